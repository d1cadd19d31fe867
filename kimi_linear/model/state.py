"""What a model remembers between calls: one typed state per layer, explicit, handed in and out.

A linear-attention layer keeps a matrix per value head and the last inputs of its short convolution: the size never
changes. A full-attention layer keeps one compressed latent per token: it grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

FIRST_CAPACITY = 64
"""Tokens that a latent buffer holds when it is first allocated; it then grows by doubling."""


@dataclass(eq=False, kw_only=True)
class KDAState:
    """Fixed-size state of one linear-attention layer: KDA, and equally GDN and Mamba-2.

    Without ``slots`` row n belongs to sequence n, and the first dim is N. With them the tensors are a pool that others
    may share, and ``slots`` says which rows are this state's.

    Attributes:
        recurrent: [N, HV, V, K], the memory, value-major, fp32 (fp64 in an fp64 model).
        conv: [N, 2*H*K + HV*V, W-1], the last inputs of the short convolution on q, k and v, oldest first; the last
            dim is empty where the layer has no convolution.
        slots: [N] int32 or int64, the row of each sequence in a pool.
    """

    recurrent: Float[Tensor, "slots HV V K"]
    conv: Float[Tensor, "slots channels window"]
    slots: Int[Tensor, "N"] | None = None

    @property
    def batch_size(self) -> int:
        """N, sequences."""
        return len(self.recurrent if self.slots is None else self.slots)

    def read(self) -> tuple[Float[Tensor, "N HV V K"], Float[Tensor, "N channels window"]]:
        """(memory, window) of each sequence in turn: the tensors themselves, or copies out of the pool."""
        if self.slots is None:
            return self.recurrent, self.conv
        rows = self.slots.long()
        return self.recurrent[rows], self.conv[rows]

    def write(self, recurrent: Tensor, conv: Tensor) -> None:
        """Take the state after the latest tokens. Without ``slots`` the tensors are replaced, not written into, so that
        autograd may still hold the old ones. A pool is written into, and so is every state by ``kda_decode``."""
        if self.slots is None:
            self.recurrent, self.conv = recurrent, conv
            return
        rows = self.slots.long()
        self.recurrent[rows], self.conv[rows] = recurrent, conv.to(self.conv.dtype)

    def nbytes(self) -> int:
        """Bytes of this state's sequences, the same at every context length."""
        return self.batch_size * (self.recurrent[:1].nbytes + self.conv[:1].nbytes)

    def clone(self) -> KDAState:
        """An independent copy, with rows of its own."""
        recurrent, conv = self.read()
        return KDAState(recurrent=recurrent.clone(), conv=conv.clone())

    def select(self, rows: Int[Tensor, "M"]) -> KDAState:
        """A copy of the state of ``rows``, in their order; a row may be taken more than once."""
        rows = rows if self.slots is None else self.slots.long()[rows]
        return KDAState(recurrent=self.recurrent[rows], conv=self.conv[rows])


@dataclass(eq=False, kw_only=True)
class MLAState:
    """Growing state of one full-attention layer: the latent of every token so far.

    Attributes:
        buffer: [N, capacity, R+Dr]; the first ``length`` tokens are in use.
        length: tokens held, the same for every sequence.
    """

    buffer: Float[Tensor, "N capacity latent"]
    length: int = 0

    @property
    def batch_size(self) -> int:
        """N, sequences."""
        return self.buffer.shape[0]

    @property
    def latent(self) -> Float[Tensor, "N S latent"]:
        """The latents in use [N, length, R+Dr], a view."""
        return self.buffer[:, : self.length]

    def append(self, latent: Float[Tensor, "N T latent"]) -> Float[Tensor, "N S latent"]:
        """Add the latents [N, T, R+Dr] of the next T tokens; returns all latents so far [N, length, R+Dr].

        The buffer doubles when it is full. A new one is made instead where the old must not be written into: autograd
        may need it unchanged for the backward, and one made in inference mode is fixed outside it.

        Raises:
            ValueError: another N or another width than the buffer has.
        """
        expected = (self.buffer.shape[0], latent.shape[1], self.buffer.shape[2])
        if tuple(latent.shape) != expected:
            raise ValueError(f"latent: expected shape {list(expected)} (N, T, R+Dr), got {list(latent.shape)}")
        end = self.length + latent.shape[1]
        recorded = torch.is_grad_enabled() and (latent.requires_grad or self.buffer.requires_grad)
        if recorded or (self.buffer.is_inference() and not torch.is_inference_mode_enabled()):
            self.buffer = torch.cat([self.latent, latent.to(self.buffer.dtype)], dim=1)
        else:
            self.reserve(end)
            self.buffer[:, self.length : end] = latent
        self.length = end
        return self.latent

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` in all, at least doubling the buffer where it is too small."""
        capacity = self.buffer.shape[1]
        if tokens <= capacity:
            return
        grown = self.buffer.new_empty(self.batch_size, max(tokens, 2 * capacity, FIRST_CAPACITY), self.buffer.shape[2])
        grown[:, : self.length] = self.latent
        self.buffer = grown

    def nbytes(self) -> int:
        """Bytes of the latents in use; spare capacity is not counted."""
        return self.latent.numel() * self.buffer.element_size()

    def clone(self) -> MLAState:
        """An independent copy, without the spare capacity."""
        return MLAState(buffer=self.latent.clone(), length=self.length)

    def select(self, rows: Int[Tensor, "M"]) -> MLAState:
        """The state of ``rows``, in their order; a row may be taken more than once."""
        return MLAState(buffer=self.latent[rows], length=self.length)


LayerState = KDAState | MLAState
"""What one layer carries from token to token."""


@dataclass(eq=False, kw_only=True)
class ModelState:
    """The state of every layer, first to last; ``KimiLinear.make_state`` makes one.

    Attributes:
        layers: one state per block.
        position: tokens that every sequence has seen.
    """

    layers: list[LayerState]
    position: int = 0

    @property
    def batch_size(self) -> int:
        """N, sequences."""
        return self.layers[0].batch_size

    def nbytes(self) -> int:
        """Bytes that the context so far takes, over all layers and sequences."""
        return sum(layer.nbytes() for layer in self.layers)

    def clone(self) -> ModelState:
        """An independent copy: continuing one does not change the other."""
        return ModelState(layers=[layer.clone() for layer in self.layers], position=self.position)

    def select(self, rows: Sequence[int] | Int[Tensor, "M"]) -> ModelState:
        """A new state of ``rows``, in their order: reorders, drops, or repeats sequences.

        Raises:
            IndexError: a row outside [0, N).
        """
        index = torch.as_tensor(rows, dtype=torch.long)
        values = index.tolist()
        if any(not 0 <= row < self.batch_size for row in values):
            raise IndexError(f"rows: expected rows in [0, {self.batch_size}), got {values}")
        layers = [layer.select(index.to(_device(layer))) for layer in self.layers]
        return ModelState(layers=layers, position=self.position)


def _device(layer: LayerState) -> torch.device:
    return layer.recurrent.device if isinstance(layer, KDAState) else layer.buffer.device

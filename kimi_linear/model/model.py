"""The whole model: tokens in, logits out, whatever mixers the configuration names."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kimi_linear.config import ModelConfig
from kimi_linear.model.block import Block
from kimi_linear.model.linear_mixer import LinearMixer
from kimi_linear.model.moe import MoE
from kimi_linear.model.parameters import Embedding, Linear, RMSNorm, init_weights
from kimi_linear.model.state import ModelState
from kimi_linear.model.trace import Trace, record
from kimi_linear.ops.contract import Impl
from kimi_linear.ops.validation import check_cu_seqlens


class Backbone(nn.Module):
    """Embedding, blocks and final norm: what the checkpoint calls ``model``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class KimiLinear(nn.Module):
    """A Kimi Linear model (arXiv 2510.26692), or any model that a ``ModelConfig`` describes.

    Parameter names are those of the released checkpoint, except that experts are stacked.

    Args:
        config: what to build.
        seed: seed of the first weights; torch's global generator where None. Under ``torch.device("meta")`` nothing
            is allocated or drawn.

    Attributes:
        config: as given.
    """

    def __init__(self, config: ModelConfig, *, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size)
        init_weights(self, config.initializer_range, seed)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights (A_log, dt_bias and the router's bias stay in fp32)."""
        return self.model.embed_tokens.weight.dtype

    @property
    def blocks(self) -> list[Block]:
        """The blocks, first to last."""
        return [block for block in self.model.layers if isinstance(block, Block)]

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        cu_seqlens: Int[Tensor, "N1"] | None = None,
        state: ModelState | None = None,
    ) -> Float[Tensor, "B T vocab"]:
        """Logits of the token after each token.

        Args:
            tokens: [B, T] int64 token ids.
            cu_seqlens: [N+1] int32 or int64 offsets of packed sequences, with B == 1; they never see each other.
            state: from ``make_state``; the tokens continue it, and it is updated. A forward that is interrupted
                leaves it half updated: go on from a ``clone``.

        Returns:
            [B, T, vocab].

        Raises:
            TypeError: tokens that are not int64. ValueError: an id outside the vocabulary, a wrong shape, a state of
            another model or batch, or ``cu_seqlens`` together with ``state``.
        """
        return self.logits_of(self.hidden_states(tokens, cu_seqlens=cu_seqlens, state=state))

    def hidden_states(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        cu_seqlens: Int[Tensor, "N1"] | None = None,
        state: ModelState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Normed hidden states [B, T, D], before the output projection. Arguments and errors as ``forward``."""
        self._check(tokens, cu_seqlens, state)
        x = self.model.embed_tokens(tokens)
        for i, block in enumerate(self.model.layers):
            x = block(x, cu_seqlens=cu_seqlens, state=None if state is None else state.layers[i])
        if state is not None:
            state.position += tokens.shape[1]
        return self.model.norm(x)

    def logits_of(self, hidden: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape vocab"]:
        """Logits [..., vocab] of hidden states [..., D]; ``forward`` in two steps, for losses over pieces."""
        if self.lm_head is None:
            return F.linear(hidden, self.model.embed_tokens.weight)
        return self.lm_head(hidden)

    def make_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """An empty state for ``batch_size`` sequences.

        Args:
            batch_size: N, at least 1.
            device: the model's where None.
            dtype: of convolution windows and latents, the model's where None; memories are fp32 or more.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        device = self.device if device is None else torch.device(device)
        dtype = self.dtype if dtype is None else dtype
        return ModelState(layers=[block.self_attn.make_state(batch_size, device, dtype) for block in self.blocks])

    def set_impl(self, impl: Impl) -> None:
        """Choose the implementation of every linear-attention layer; "auto" at first.

        Raises:
            ValueError: no implementation has that name, or a layer's operation does not have it.
        """
        mixers = [block.self_attn for block in self.blocks if isinstance(block.self_attn, LinearMixer)]
        for mixer in mixers:
            mixer.check_impl(impl)
        for mixer in mixers:
            mixer.impl = impl

    def record(self) -> AbstractContextManager[Trace]:
        """Watch the memory at work: inside ``with model.record() as trace:`` every forward is kept in ``trace``."""
        return record(self)

    def expert_load(self) -> dict[int, Int[Tensor, "E"]]:
        """Tokens per expert of the latest forward, by index of the block; empty without a mixture of experts."""
        layers = ((i, block.feed_forward) for i, block in enumerate(self.blocks))
        return {i: moe.load for i, moe in layers if isinstance(moe, MoE) and moe.load is not None}

    def _check(self, tokens: Tensor, cu_seqlens: Tensor | None, state: ModelState | None) -> None:
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
            got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"tokens: expected an int64 tensor, got {got}; use torch.tensor(ids)[None]")
        if tokens.ndim != 2:
            raise ValueError(f"tokens: expected shape [B, T], got {list(tokens.shape)}; one sequence is tokens[None]")
        if tokens.device != self.device:
            raise ValueError(
                f"tokens: expected device {self.device}, where the model is, got {tokens.device}; "
                "move them with tokens.to(model.device)"
            )
        # Reading values would make an accelerator wait; there the embedding's own assertion fires.
        if tokens.device.type == "cpu" and tokens.numel():
            vocab = self.config.vocab_size
            low, high = (int(t) for t in tokens.aminmax())
            if low < 0 or high >= vocab:
                raise ValueError(
                    f"tokens: expected ids in [0, {vocab}), got {low if low < 0 else high}; "
                    "was the text encoded with another model's tokenizer?"
                )
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, tokens.shape[0], tokens.shape[1], tokens.device)
        if state is None:
            return
        if cu_seqlens is not None:
            raise ValueError(
                "cu_seqlens: cannot be combined with state; run each sequence as a row, or the packed ones without a state"
            )
        if len(state.layers) != self.config.num_layers:
            raise ValueError(
                f"state: expected {self.config.num_layers} layers, got {len(state.layers)}; use this model's make_state"
            )
        if state.batch_size != tokens.shape[0]:
            raise ValueError(
                f"state: expected {tokens.shape[0]} sequences, one for each row of tokens, got {state.batch_size}; "
                f"use make_state({tokens.shape[0]}) or state.select(rows)"
            )

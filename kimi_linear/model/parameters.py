"""Parameters with a will of their own: those that stay in fp32 whatever the model is cast to, and their first values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kimi_linear.ops.norm import rms_norm

DT_MIN, DT_MAX, DT_FLOOR = 0.001, 0.1, 1e-4
"""Range of the first step sizes softplus(dt_bias), as in Mamba."""
RATE_MIN, RATE_MAX = 1.0, 16.0
"""Range of the first per-head rates exp(A_log)."""


class KeepsFP32(nn.Module):
    """A module whose parameters named in ``FP32`` are never held in less than fp32.

    ``.to(bfloat16)``, ``.half()`` and the like move them and leave their precision alone: an A_log in bf16 cannot take
    the small steps that training asks of it. They also carry ``_no_weight_decay = True``.
    """

    FP32: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        wide = {name: p for name in self.FP32 if (p := self._parameters.get(name)) is not None}
        before = {name: (p.data, None if p.grad is None else p.grad.data) for name, p in wide.items()}
        super()._apply(fn, recurse)
        for name, (value, grad) in before.items():
            parameter = self._parameters[name]
            assert parameter is not None
            if parameter.dtype.itemsize < 4:
                # A cast down: take the device from the result and the numbers from before.
                parameter.grad = None
                parameter.data = value.to(parameter.device)
                parameter.grad = None if grad is None else grad.to(parameter.device)
        self.flag_parameters()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copies and pickles make new parameters, which lose their flags.
        super().__setstate__(state)
        self.flag_parameters()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name in self.FP32:
            # load_state_dict(assign=True) takes the dictionary's tensors as they are.
            parameter = self._parameters.get(name)
            if parameter is not None and parameter.dtype.itemsize < 4:
                self._parameters[name] = nn.Parameter(parameter.data.float(), parameter.requires_grad)
        self.flag_parameters()

    def flag_parameters(self) -> None:
        """Mark the parameters for the optimizer; again after whatever may make new ones."""
        for name in self.FP32:
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter._no_weight_decay = True  # type: ignore[attr-defined]


def fp32_parameter(*shape: int, requires_grad: bool = True) -> nn.Parameter:
    """A zero parameter in fp32, whatever the default dtype."""
    return nn.Parameter(torch.zeros(*shape, dtype=torch.float32), requires_grad=requires_grad)


@torch.no_grad()
def init_rate(A_log: Tensor, generator: torch.Generator | None) -> None:
    """``A_log = log(uniform(1, 16))``: heads that forget at different speeds."""
    A_log.uniform_(RATE_MIN, RATE_MAX, generator=generator).log_()


@torch.no_grad()
def init_step(dt_bias: Tensor, generator: torch.Generator | None) -> None:
    """The Mamba initialisation: softplus(dt_bias) is log-uniform in [0.001, 0.1], at least 1e-4."""
    step = dt_bias.uniform_(math.log(DT_MIN), math.log(DT_MAX), generator=generator).exp_().clamp_(min=DT_FLOOR)
    # The inverse of softplus, stable for small steps.
    dt_bias.copy_(step + torch.log(-torch.expm1(-step)))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, with a weight that starts at one.

    Attributes:
        output_dtype: of what it hands out, the input's where None. With autocast's, projections find their input rounded already.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.output_dtype: torch.dtype | None = None
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, dtype=self.output_dtype)


class ConvWeight(nn.Module):
    """The taps [channels, 1, W] of a depthwise convolution, named as in the release; the layer applies them.

    Attributes:
        bound: their first values are uniform up to this; where None, normal as all weights.
    """

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.bound: float | None = None
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))


class Linear(nn.Linear):
    """A projection, without bias as nearly everywhere in the model, left unset until ``init_weights`` or a checkpoint."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        """Nothing: torch's own first values would be thrown away, and cost four seconds of imports on meta."""


class Embedding(nn.Embedding):
    """A table of vectors, left unset like ``Linear``."""

    def reset_parameters(self) -> None:
        """Nothing, for the same reason."""


def allocate(model: nn.Module, device: torch.device | str) -> None:
    """Give a model on the meta device memory on ``device``, uninitialised: fill it with ``init_weights`` or a checkpoint.

    Each parameter keeps its dtype, so that ``model.to(torch.bfloat16)`` before makes a bf16 model without an fp32 copy.
    """
    # As model.to_empty, which would import torch's decompositions for a second.
    model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))


def init_weights(model: nn.Module, std: float, seed: int | None) -> None:
    """First values of every parameter: N(0, std), norm weights one, and each layer's own rules.

    Nothing is drawn on the meta device.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        if isinstance(module, ConvWeight) and module.bound is not None:
            nn.init.uniform_(module.weight, -module.bound, module.bound, generator=generator)
        elif isinstance(module, Linear | Embedding | ConvWeight):
            nn.init.normal_(module.weight, std=std, generator=generator)
            bias = getattr(module, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif callable(getattr(module, "init_weights", None)):
            module.init_weights(std, generator)  # type: ignore[operator]

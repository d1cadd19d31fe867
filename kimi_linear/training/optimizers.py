"""Which optimizer moves which parameter: AdamW for all, or Muon for the matrices inside the blocks.

Muon makes the update of a matrix near orthogonal. It is torch's own, with the learning rate scaled by
``0.2 * sqrt(max(rows, columns))`` (``match_rms_adamw``), so that its updates have the size of AdamW's and one learning
rate and weight decay serve both (Moonlight, arXiv 2502.16982).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from kimi_linear.model import KimiLinear
from kimi_linear.model.moe import Experts
from kimi_linear.training.config import TrainConfig


class StackedMatrices:
    """The matrices in a stacked expert parameter as parameters of their own, which share its storage.

    ``gate_up`` [E, 2I, D] holds two matrices per expert, ``down`` [E, D, I] one. Muon has to see each by itself: the
    orthogonal factor of a stack is not the stack of orthogonal factors.
    """

    def __init__(self, stack: nn.Parameter, pieces: int) -> None:
        """``stack`` [E, rows, columns], whose rows are ``pieces`` matrices of equal height."""
        self.stack, self.pieces = stack, pieces
        self.views = [nn.Parameter(view) for view in self._split(stack.data)]

    def take_gradients(self) -> None:
        """Give every view its part of the stack's gradient, without a copy."""
        # A cast or move of the model would leave the views behind, and the updates would go nowhere.
        if self.views[0].data_ptr() != self.stack.data_ptr():
            raise RuntimeError(
                "model: expected its weights where the optimizer was built, got moved ones; build it last"
            )
        grads = [None] * len(self.views) if self.stack.grad is None else self._split(self.stack.grad)
        for view, grad in zip(self.views, grads, strict=True):
            view.grad = grad

    def _split(self, x: Tensor) -> list[Tensor]:
        return [matrix for expert in x for matrix in expert.chunk(self.pieces)]


class Optimizers:
    """The optimizers of a model, stepped, saved and loaded as one."""

    def __init__(self, parts: dict[str, Optimizer], stacks: list[StackedMatrices]) -> None:
        """``parts`` by name; ``stacks`` whose views are among their parameters."""
        self.parts, self.stacks = parts, stacks

    def step(self, lr: float) -> None:
        """Move every parameter that has a gradient, with learning rate ``lr``."""
        for stack in self.stacks:
            stack.take_gradients()
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for stack in self.stacks:
            stack.stack.grad = None
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """States of all parts, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state. Raises ``ValueError`` where it is of other optimizers or another model."""
        if set(state) != set(self.parts):
            raise ValueError(f"optimizer: expected the state of {sorted(self.parts)}, got that of {sorted(state)}")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def build_optimizers(model: KimiLinear, config: TrainConfig) -> Optimizers:
    """The optimizers that ``config`` asks for, over the parameters of ``model`` where they are now.

    With "muon": Muon takes the matrices inside the blocks, each expert's on its own; AdamW takes embedding, output
    projection, convolutions, norms, and everything that is no matrix. Weight decay acts on parameters of two or more
    dims that do not carry ``_no_weight_decay``.
    """
    matrices, stacks = (_hidden_matrices(model), _expert_stacks(model)) if config.optimizer == "muon" else ([], [])
    by_muon = {id(p) for p in [*matrices, *(stack.stack for stack in stacks)]}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in by_muon]
    decayed = [p for p in others if p.ndim >= 2 and not getattr(p, "_no_weight_decay", False)]
    kept = [p for p in others if p.ndim < 2 or getattr(p, "_no_weight_decay", False)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    fused = model.device.type in ("cpu", "cuda")
    parts: dict[str, Optimizer] = {"adamw": AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)}
    if by_muon:
        parts["muon"] = Muon(
            [*matrices, *(view for stack in stacks for view in stack.views)],
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
    return Optimizers(parts, stacks)


def _hidden_matrices(model: KimiLinear) -> list[nn.Parameter]:
    """Two-dimensional parameters of the blocks; embedding and output projection lie outside."""
    return [
        p
        for p in model.model.layers.parameters()
        if p.requires_grad and p.ndim == 2 and not getattr(p, "_no_weight_decay", False)
    ]


def _expert_stacks(model: KimiLinear) -> list[StackedMatrices]:
    found = [module for module in model.modules() if isinstance(module, Experts)]
    stacks = [(p, pieces) for experts in found for p, pieces in ((experts.gate_up, 2), (experts.down, 1))]
    return [StackedMatrices(p, pieces) for p, pieces in stacks if p.requires_grad]


@torch.no_grad()
def balance_experts(model: KimiLinear, rate: float) -> None:
    """Move each router's correction bias by ``rate`` towards an even load of the latest forward.

    Experts that got more than the mean become less likely to be chosen, those that got less more so; the mixture weights
    do not change (auxiliary-loss-free balancing, arXiv 2408.15664).
    """
    for index, load in model.expert_load().items():
        load = load.float()
        bias = model.blocks[index].block_sparse_moe.gate.e_score_correction_bias
        bias += rate * torch.sign(load.mean() - load)

"""The memory as a learner: each token is one step of gradient descent on a loss (arXiv 2510.26692, section 2.2, Table 7).

    forget   S~ = Diag(exp(g)) S            learn   S <- S~ - grad loss(S~)

- KDA and GDN learn to recall: loss = beta / 2 * ||S~^T k - v||^2, a step of size beta (GDN forgets by head, not by
  channel);
- linear attention and Mamba-2 only want agreement: loss = -<S~^T k, v>, whose gradient never looks at what is stored.

The step is taken by autograd, so nothing here knows the delta rule: that it comes out is the point.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def recall_loss(state: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """``beta / 2 * ||S^T k - v||^2``, summed over heads. state [..., V, K]; k [..., K]; v [..., V]; beta [...]."""
    error = (state @ k[..., None])[..., 0] - v
    return (beta / 2 * error.square().sum(-1)).sum()


def agreement_loss(state: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``-<S^T k, v>``, summed over heads. Shapes as ``recall_loss``."""
    return -((state @ k[..., None])[..., 0] * v).sum()


def learn(state: Tensor, g: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Forget, then take one gradient step of size 1 on ``loss(state)``. state [..., V, K]; g [..., K]. The new state."""
    faded = state * g.exp()[..., None, :]
    return faded - torch.func.grad(loss)(faded)

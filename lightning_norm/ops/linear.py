"""A linear layer for statistics: in the precision of its input, forward and backward, inside autocast as well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x W^T + b for x (N, C), weight (H, C) and bias (H,).

    ``normalize`` turns autocast off for the algebra; this keeps it off where the backward pass runs inside autocast,
    whose matrix products would round to half precision. A backward pass may be differentiated once more.
    """
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.addmm(bias, x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        if torch.is_autocast_enabled(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                return dy @ weight, dy.t() @ x, dy.sum(0)
        return dy @ weight, dy.t() @ x, dy.sum(0)

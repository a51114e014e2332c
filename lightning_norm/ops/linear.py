"""A linear layer for statistics: in the precision of its input, forward and backward, inside autocast as well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_norm.ops import torch_private


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x W^T + b for x (N, C), weight (H, C) and bias (H,).

    ``normalize`` turns autocast off for the algebra, but not for its backward pass, which the user may run inside of
    autocast: there the matrix products of ``torch.nn.functional.linear`` would round to half precision. This function
    turns it off in both. Its backward pass can be differentiated once more.
    """
    # Whatever looks at single operations sees through no autograd function.
    if torch_private.is_transformed():
        return torch.addmm(bias, x, weight.t())
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


class _Linear(torch.autograd.Function):
    """x W^T + b, whose backward pass runs outside of autocast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # Both as they came, so that a second derivative can be taken through them.
        ctx.save_for_backward(x, weight)
        # Autocast is off here already: the caller's forward pass runs without it.
        return torch.addmm(bias, x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        # Entered only where autocast is on: most backward passes run without it.
        if torch.is_autocast_enabled(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                return dy @ weight, dy.t() @ x, dy.sum(0)
        return dy @ weight, dy.t() @ x, dy.sum(0)

"""A tensor as it is, whose gradient is scaled down where it is too long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def clip_gradient(t: Tensor, limit: float) -> Tensor:
    """Return t; its gradient, of this use, is scaled to the Euclidean norm ``limit`` where it is longer.

    >>> w = torch.zeros(2, requires_grad=True)
    >>> torch.autograd.grad((clip_gradient(w, 1.0) * torch.tensor([3.0, 4.0])).sum(), w)
    (tensor([0.6000, 0.8000]),)
    """
    # torch.compile traces the older form of an autograd function, and torch.func asks for the newer one.
    function = _ClippedInGraph if torch.compiler.is_compiling() else _Clipped
    clipped: Tensor = function.apply(t, limit)
    return clipped


def _shortened(g: Tensor, limit: float) -> Tensor:
    # A norm of 0 has no direction, and the factor of a short gradient is 1.
    norm = torch.linalg.vector_norm(g).clamp_min(torch.finfo(g.dtype).tiny)
    shortened: Tensor = g * (norm.reciprocal() * limit).clamp_max(1)
    return shortened


class _Clipped(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, limit: float) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _shortened(grads[0], ctx.limit), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0].view_as(tangents[0])


class _ClippedInGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return t.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _shortened(grads[0], ctx.limit), None

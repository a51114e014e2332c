"""Functions of each element in plain PyTorch: gamma f(alpha x + s) + beta, and its gradients."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lightning_norm.ops.layout import Layout, at_least_float32


class Function(Protocol):
    """f and its derivative."""

    @staticmethod
    def function(u: Tensor) -> Tensor:
        """Return f."""

    @staticmethod
    def slope(u: Tensor, f: Tensor) -> Tensor:
        """Return the derivative of f at u, given f there."""


def value(
    x: Tensor,
    alpha: Tensor,
    offset: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    of: Function,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return alpha x + s, f of it, and y, in float32 at least."""
    wide = at_least_float32(x.dtype)
    u = x.to(wide) * alpha.to(wide)
    u = u if offset is None else u + offset.to(wide)
    f = of.function(u)
    y = f if weight is None else f * layout.broadcast_to_input(weight.to(wide).unsqueeze(0))
    return u, f, y if bias is None else y + layout.broadcast_to_input(bias.to(wide).unsqueeze(0))


def gradients(
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    offset: Tensor | None,
    weight: Tensor | None,
    of: Function,
    layout: Layout,
    need: tuple[bool, ...] = (True,) * 5,
) -> tuple[Tensor | None, ...]:
    """Return those of the gradients of x, alpha, s, gamma and beta that are needed, in float32 at least."""
    # Without the bias, which no gradient needs.
    u, f, _ = value(x, alpha, offset, weight, None, of, layout)
    dy = dy.to(u.dtype)
    du = dy * of.slope(u, f)
    if weight is not None:
        du = du * layout.broadcast_to_input(weight.to(u.dtype).unsqueeze(0))
    # weight and bias are per channel; alpha and s are one number each, so their gradients are sums over everything.
    axes = [d for d in range(x.dim()) if d != layout.channel_dim % x.dim()]
    return (
        du * alpha.to(u.dtype) if need[0] else None,
        (du * x.to(u.dtype)).sum().view(1) if need[1] else None,
        du.sum().view(1) if need[2] else None,
        (dy * f).sum(axes) if need[3] else None,
        dy.sum(axes) if need[4] else None,
    )

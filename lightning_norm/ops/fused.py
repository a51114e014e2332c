"""normalize(x, algebra): moments -> algebra -> apply, as one autograd graph.

Where is the backward? The algebra's own is autograd on (N, C) tensors. The two passes over x are the two autograd nodes
below, tied by a carrier: ``_Apply`` hands back dy itself, unscaled, as the gradient of ``hook`` (an alias of x), and
scale as the gradient of the carrier; ``_Moments`` then holds dy, scale, dmean and dvar at once and writes dx in one
pass. Where a depthwise convolution follows, ``_Recover`` takes the place of ``_Apply`` and makes the normalized map
afresh in the backward pass. Only x is kept for the backward pass. Under ``create_graph=True`` the same formulas are
recorded, so double backward works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_norm.ops import depthwise, eager
from lightning_norm.ops.layout import Layout, at_least_float32, layout_of, stat_dtype
from lightning_norm.ops.moments import Affine, Moments
from lightning_norm.ops.sync import Ranks


def normalize(
    x: Tensor,
    algebra: Callable[[Moments], Affine],
    *,
    layout: Layout | int = 1,
    given: Moments | None = None,
    ranks: Ranks | None = None,
    recovery: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    r"""Normalize x by what ``algebra`` makes of its moments.

    .. math:: y = s\,(x - c) + t, \qquad (c, s, t) = \mathrm{algebra}(\mu_{nc}, \sigma^2_{nc})

    Args:
        x: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W), any memory format; (N, ..., C) with ``layout=-1``.
        algebra: from :class:`Moments` to :class:`Affine`, written with differentiable PyTorch on (N, C) tensors.
        layout: the channel axis, 1 or -1 for tokens, or a :class:`lightning_norm.ops.layout.Layout` already checked.
        given: moments to use in place of those of x, which is then read once only.
        ranks: the ranks that ``Moments.over_batch`` pools with.
        recovery: kernel (C, 1, *) of odd sizes and bias (C,) of a depthwise convolution of the above, padded with
            zeros.

    Returns:
        A fresh tensor in the shape, dtype and memory format of x.

    Raises:
        TypeError, ValueError: as :func:`lightning_norm.ops.layout.layout_of`, and for an Affine of the wrong shape.

    >>> x = torch.randn(4, 3, 5, 5)
    >>> y = normalize(x, lambda m: Affine(m.mean, (m.var + 1e-5).rsqrt()))  # instance norm
    >>> torch.allclose(y, torch.nn.functional.instance_norm(x), atol=1e-5)
    True
    """
    if not isinstance(layout, Layout):
        layout = layout_of(x, x.shape[layout] if isinstance(x, Tensor) and x.dim() > 1 else 0, layout)
    if recovery is not None and layout.channel_dim != 1:
        x = x.movedim(-1, 1)
        layout = layout_of(x, layout.c)
        return normalize(x, algebra, layout=layout, given=given, ranks=ranks, recovery=recovery).movedim(1, -1)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _normalize(x, algebra, layout, given, ranks, recovery)
    return _normalize(x, algebra, layout, given, ranks, recovery)


def _normalize(
    x: Tensor,
    algebra: Callable[[Moments], Affine],
    layout: Layout,
    given: Moments | None,
    ranks: Ranks | None,
    recovery: tuple[Tensor, Tensor | None] | None,
) -> Tensor:
    flat = False
    if given is None:
        hook, mean, var, carrier = _Moments.apply(x, layout)
        flat = x.dtype == torch.float32 == mean.dtype and layout.size > 1 and x.is_cpu
        given = Moments(mean, var, layout.size, ranks)
    else:
        hook, carrier = _Alias.apply(x, layout)
    center, scale, shift = algebra(given).expand(layout.n, layout.c)
    if recovery is None:
        y: Tensor = _Apply.apply(hook, carrier, x, center, scale, shift, layout, flat)
    else:
        kernel, bias = recovery
        kernel = depthwise.fit(kernel, len(layout.reduced)).to(at_least_float32(x.dtype))
        bias = None if bias is None else bias.to(kernel.dtype)
        y = _Recover.apply(hook, carrier, x, center, scale, shift, kernel, bias, layout, flat)
    return y


class _Moments(torch.autograd.Function):
    """x -> (alias of x, mean, var, carrier)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var = eager.moments(x, layout)
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean)
        return x.view_as(x), mean, var, torch.zeros_like(mean)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        dy, dmean, dvar, scale = grads
        x, mean = ctx.saved_tensors
        if dy is None or scale is None:  # y was not used, only the moments
            dy, scale = torch.zeros_like(x), torch.zeros_like(mean)
        return eager.combine(dy, scale, x, mean, dmean, dvar, ctx.layout), None


class _Alias(torch.autograd.Function):
    """x -> (alias of x, carrier), where the moments of x are not asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        ctx.layout = layout
        return x.view_as(x), torch.zeros((layout.n, layout.c), dtype=stat_dtype(x), device=x.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dy, scale = grads
        return (dy * ctx.layout.spread(scale)).to(dy.dtype), None


class _Apply(torch.autograd.Function):
    """y = scale * (x - center) + shift. ``hook`` only routes dy; the x that is read is the input itself."""

    @staticmethod
    def forward(
        ctx: Any,
        hook: Tensor,
        carrier: Tensor,
        x: Tensor,
        center: Tensor,
        scale: Tensor,
        shift: Tensor,
        layout: Layout,
        flat: bool,
    ) -> Tensor:
        ctx.layout, ctx.flat = layout, flat
        ctx.save_for_backward(x, center, scale)
        return eager.apply(x, center, scale, shift, layout, flat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, center, scale = ctx.saved_tensors
        need = ctx.needs_input_grad
        dcenter = dscale = dshift = None
        if any(need[3:6]):
            dshift, dscale = eager.reduce(dy, x, center, ctx.layout, ctx.flat)
            dcenter = -scale * dshift
        return dy if need[0] else None, scale if need[1] else None, None, dcenter, dscale, dshift, None, None


class _Recover(torch.autograd.Function):
    """y = kernel * (scale * (x - center) + shift) + bias, * the depthwise convolution; otherwise as ``_Apply``."""

    @staticmethod
    def forward(
        ctx: Any,
        hook: Tensor,
        carrier: Tensor,
        x: Tensor,
        center: Tensor,
        scale: Tensor,
        shift: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        layout: Layout,
        flat: bool,
    ) -> Tensor:
        ctx.layout, ctx.flat = layout, flat
        ctx.save_for_backward(x, center, scale, shift, kernel)
        wide = x.to(kernel.dtype)
        return depthwise.convolve(eager.apply(wide, center, scale, shift, layout, flat), kernel, bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, center, scale, shift, kernel = ctx.saved_tensors
        need = ctx.needs_input_grad
        dcenter = dscale = dshift = dkernel = dbias = None
        x, dy = x.to(kernel.dtype), grads[0].to(kernel.dtype)
        dx = depthwise.transposed(dy, kernel)
        if any(need[6:8]):
            normalized = eager.apply(x, center, scale, shift, ctx.layout, ctx.flat)
            dkernel, dbias = depthwise.kernel_gradients(dy, normalized, kernel)
        if any(need[3:6]):
            dshift, dscale = eager.reduce(dx, x, center, ctx.layout, ctx.flat)
            dcenter = -scale * dshift
        hook, carrier = dx if need[0] else None, scale if need[1] else None
        return hook, carrier, None, dcenter, dscale, dshift, dkernel, dbias if need[7] else None, None, None

"""normalize(x, algebra): moments -> algebra -> apply, as one autograd graph.

Where is the backward? The algebra's own is autograd on (N, C) tensors. The two passes over x are the two autograd nodes
below, tied by a carrier: ``_Apply`` hands back dy itself, unscaled, as the gradient of ``hook`` (an alias of x), and
scale as the gradient of the carrier; ``_Moments`` then holds dy, scale, dmean and dvar at once and writes dx in one
pass. Only x is kept for the backward pass. Under ``create_graph=True`` the same formulas are recorded, so double
backward works.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_norm.ops import depthwise, eager
from lightning_norm.ops.backend import on_kernels
from lightning_norm.ops.fused import triton_passes
from lightning_norm.ops.fused.encoder_decoder import EncoderDecoderSpec
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.fused.per_channel import PerChannelSpec
from lightning_norm.ops.layout import Layout, at_least_float32, cast, layout_of, stat_dtype
from lightning_norm.ops.moments import Affine, Moments
from lightning_norm.ops.sync import Ranks

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
}


def normalize(
    x: Tensor,
    algebra: Callable[[Moments], Affine],
    *,
    layout: Layout | int = 1,
    given: Moments | None = None,
    ranks: Ranks | None = None,
    backend: str = "auto",
    fused_spec: Callable[[Layout], MixtureSpec | PerChannelSpec | EncoderDecoderSpec | None] | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    depthwise_conv: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    r"""Normalize x by what ``algebra`` makes of its moments.

    .. math:: y = s\,(x - c) + t, \qquad (c, s, t) = \mathrm{algebra}(\mu_{nc}, \sigma^2_{nc})

    Args:
        x: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W), any memory format; (N, ..., C) with ``layout=-1``.
        algebra: from :class:`Moments` to :class:`Affine`, written with differentiable PyTorch on (N, C) tensors.
        layout: the channel axis, 1 or -1 for tokens, or a :class:`lightning_norm.ops.layout.Layout` already checked.
        given: moments to use in place of those of x, which is then read once only.
        ranks: the ranks that ``Moments.over_batch`` pools with.
        backend: "auto" for the Triton kernels where x is on CUDA and they can take it, else plain PyTorch; "eager" for
            plain PyTorch; "triton" for the kernels or an error.
        fused_spec: the same algebra as the kernels know it, used instead where they run.
        activation: "none", "relu" or "silu", applied to the result; in the same pass where a fused description is used.
        residual: added before the activation, in the shape of x; likewise.
        depthwise_conv: kernel (C, 1, *) of odd sizes and bias (C,) of a depthwise convolution of the above, padded with
            zeros.

    Returns:
        A fresh tensor in the shape, dtype and memory format of x.

    Raises:
        TypeError, ValueError: as :func:`lightning_norm.ops.layout.layout_of`, and for a wrong Affine, activation
            or residual.
        RuntimeError: ``backend="triton"`` for an input that the kernels cannot take.

    >>> x = torch.randn(4, 3, 5, 5)
    >>> y = normalize(x, lambda m: Affine(m.mean, (m.var + 1e-5).rsqrt()))  # instance norm
    >>> torch.allclose(y, torch.nn.functional.instance_norm(x), atol=1e-5)
    True
    """
    if not isinstance(layout, Layout):
        layout = layout_of(x, x.shape[layout] if isinstance(x, Tensor) and x.dim() > 1 else 0, layout)
    if activation not in ACTIVATIONS:
        raise ValueError(f"normalize: activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}.")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"normalize: residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}: they must agree.")
    if depthwise_conv is not None and layout.channel_dim != 1:
        x, turned = x.movedim(-1, 1), None if residual is None else residual.movedim(-1, 1)
        y = normalize(
            x,
            algebra,
            layout=layout_of(x, layout.c),
            given=given,
            ranks=ranks,
            backend=backend,
            fused_spec=fused_spec,
            activation=activation,
            residual=turned,
            depthwise_conv=depthwise_conv,
        )
        return y.movedim(1, -1)
    kernels, known = on_kernels(x, layout, backend, empty=ranks is not None), None
    if kernels and fused_spec is not None:
        known = fused_spec(layout)
    if known is not None and ranks is not None:
        known = known.over(ranks)
    if not x.numel() and known is None:
        kernels = False
    with _full_precision(x):
        if known is not None and depthwise_conv is None and (residual is None or residual.dtype == x.dtype):
            return known.normalize(x, layout, activation, residual)
        taps = None if depthwise_conv is None else depthwise.fit(depthwise_conv[0], len(layout.reduced))
        fused = taps is not None and depthwise.on_kernels(taps, layout.size)
        if isinstance(known, MixtureSpec) and depthwise_conv is not None and taps is not None and fused:
            y = known.recover(x, layout, taps, depthwise_conv[1])
        else:
            y = _normalize(x, algebra, layout, given, ranks, kernels, depthwise_conv)
    return activated(y, activation, residual)


def activated(y: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
    """Return act(y + residual), in plain PyTorch."""
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[activation](y)


def _full_precision(x: Tensor) -> AbstractContextManager[object]:
    on = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()


def _normalize(
    x: Tensor,
    algebra: Callable[[Moments], Affine],
    layout: Layout,
    given: Moments | None,
    ranks: Ranks | None,
    kernels: bool,
    depthwise_conv: tuple[Tensor, Tensor | None] | None,
) -> Tensor:
    flat = False
    if given is None:
        hook, mean, var, carrier = _Moments.apply(x, layout, kernels)
        flat = x.dtype == torch.float32 == mean.dtype and layout.size > 1 and x.is_cpu
        given = Moments(mean, var, layout.size, ranks)
    else:
        hook, carrier = _Alias.apply(x, layout, kernels)
    center, scale, shift = algebra(given).fields(layout.n, layout.c)
    if depthwise_conv is None:
        y: Tensor = _Apply.apply(hook, carrier, x, center, scale, shift, layout, flat, kernels)
        return y
    kernel, bias = depthwise_conv
    kernel = depthwise.fit(kernel, len(layout.reduced)).to(at_least_float32(x.dtype))
    bias = None if bias is None else bias.to(kernel.dtype)
    recovered: Tensor = _Recover.apply(hook, carrier, x, center, scale, shift, kernel, bias, layout, flat)
    return recovered


def _passes(kernels: bool) -> Any:
    """Return the module that runs the passes; what is differentiated once more is recorded in plain PyTorch."""
    return triton_passes if kernels and (torch.compiler.is_compiling() or not torch.is_grad_enabled()) else eager


class _Moments(torch.autograd.Function):
    """x -> (alias of x, mean, var, carrier)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, kernels: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var = (triton_passes if kernels else eager).moments(x, layout)
        ctx.layout, ctx.kernels = layout, kernels
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean)
        return x.view_as(x), mean, var, torch.zeros_like(mean)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        dy, dmean, dvar, scale = grads
        x, mean = ctx.saved_tensors
        if dy is None or scale is None:  # y was not used, only the moments
            dy, scale = torch.zeros_like(x), torch.zeros_like(mean)
        return _passes(ctx.kernels).combine(dy, scale, x, mean, dmean, dvar, ctx.layout), None, None


class _Alias(torch.autograd.Function):
    """x -> (alias of x, carrier), where the moments of x are not asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, kernels: bool) -> tuple[Tensor, Tensor]:
        ctx.layout = layout
        return x.view_as(x), torch.zeros((layout.n, layout.c), dtype=stat_dtype(x), device=x.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        dy, scale = grads
        return (dy * ctx.layout.broadcast_to_input(scale)).to(dy.dtype), None, None


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
        kernels: bool,
    ) -> Tensor:
        ctx.layout, ctx.flat, ctx.kernels = layout, flat, kernels
        ctx.carrier_dtype, ctx.shift_like = carrier.dtype, (shift.shape, shift.dtype)
        ctx.save_for_backward(x, center, scale)
        y: Tensor = (triton_passes if kernels else eager).apply(x, center, scale, shift, layout, flat)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, center, scale = ctx.saved_tensors
        need, passes = ctx.needs_input_grad, _passes(ctx.kernels)
        fields = _field_gradients(ctx, passes, dy, x, center, scale) if any(need[3:6]) else (None, None, None)
        return dy if need[0] else None, _over(ctx, scale), None, *fields, None, None, None


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
        ctx.carrier_dtype, ctx.shift_like = carrier.dtype, (shift.shape, shift.dtype)
        ctx.save_for_backward(x, center, scale, shift, kernel)
        ctx.unroll = depthwise.unrolled(x, kernel)
        normalized = eager.apply(x.to(kernel.dtype), center, scale, shift, layout, flat)
        return cast(depthwise.convolve(normalized, kernel, bias, unroll=ctx.unroll), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, center, scale, shift, kernel = ctx.saved_tensors
        need = ctx.needs_input_grad
        dkernel = dbias = None
        x, dy = x.to(kernel.dtype), grads[0].to(kernel.dtype)
        dx = depthwise.transposed(dy, kernel, unroll=ctx.unroll)
        if any(need[6:8]):
            normalized = eager.apply(x, center, scale, shift, ctx.layout, ctx.flat)
            dkernel, dbias = depthwise.kernel_gradients(dy, normalized, kernel, unroll=ctx.unroll)
        fields = _field_gradients(ctx, eager, dx, x, center, scale) if any(need[3:6]) else (None, None, None)
        over = _over(ctx, scale)
        return dx if need[0] else None, over, None, *fields, dkernel, dbias if need[7] else None, None, None


def _over(ctx: Any, scale: Tensor) -> Tensor | None:
    """Return scale as the gradient of the carrier."""
    return scale.to(ctx.carrier_dtype).expand(ctx.layout.n, ctx.layout.c) if ctx.needs_input_grad[1] else None


def _field_gradients(
    ctx: Any, passes: Any, dy: Tensor, x: Tensor, center: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of center, scale and shift, given that of scale * (x - center) + shift."""
    pivot = center.to(at_least_float32(x.dtype))
    total, dot = passes.reduce(dy, x, pivot, ctx.layout, ctx.flat)
    dscale = _fit(dot, scale.shape, scale.dtype)
    if pivot.dtype != center.dtype:
        dscale = dscale + _fit_product(pivot - center, total, scale.shape, scale.dtype)
    return -_fit_product(scale, total, center.shape, center.dtype), dscale, _fit(total, *ctx.shift_like)


def _fit(t: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Sum an (N, C) tensor over the axes along which ``shape`` has one entry."""
    axes = [d for d in (0, 1) if shape[d] == 1 != t.shape[d]]
    return t.sum(axes, keepdim=True, dtype=dtype) if axes else t.to(dtype)


def _fit_product(factor: Tensor, t: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return ``_fit(factor * t, shape, dtype)``, summing first where that is the same."""
    if all(size in (1, other) for size, other in zip(factor.shape, shape, strict=True)):
        return factor * _fit(t, shape, dtype)
    return _fit(factor * t, shape, dtype)

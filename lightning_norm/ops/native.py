"""ATen's own normalizations, for the normalizers that are the same function: on the CPU nothing else is as fast.

They subtract no mean before they scale, which loses digits where a mean is large against its standard deviation. Both
come out beside y, so that this is looked at afterwards; the caller then normalizes anew by the passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_norm.ops import eager, torch_private
from lightning_norm.ops.eager import SMALL_MEAN
from lightning_norm.ops.layout import Layout, cast

LEAST_SCALE = 1e-18
"""One over the standard deviation below which the variance may not be a finite number in float32."""

PLAIN = (Tensor, torch.nn.Parameter)
WIDE = (torch.float32, torch.float64)


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Tell whether ATen computes with x and the layer's tensors what the passes do, at the same precision.

    That is so in float32 and float64, all tensors alike, where x lies dense in one of torch's two memory formats and
    nobody but autograd looks at the operations.
    """
    dtype = x.dtype
    return (
        type(x) in PLAIN
        and dtype in WIDE
        and not torch_private.is_transformed()  # first of all: a trace would note what is asked of x below
        and eager.may_read_back(x)
        # ATen reads a weight, a bias or a running value with strides as if it had none.
        and all([t is None or (t.dtype == dtype and t.is_cpu and t.is_contiguous()) for t in others])  # noqa: C419  a generator takes longer
        and (x.is_contiguous() or _is_channels_last(x))
    )


def batch_norm(
    x: Tensor,
    layout: Layout,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: tuple[Tensor, Tensor] | None = None,
    momentum: float = 0.0,
) -> Tensor | None:
    """Return x normalized by the statistics of the batch, (N, C, *) or dense tokens (N, *, C).

    Args:
        x: the input; :func:`takes` it.
        layout: of x.
        weight: (C,).
        bias: (C,).
        eps: added to the variance.
        running: mean and variance, which move towards those of the batch.
        momentum: by how much.

    Returns:
        y; ``None``, and nothing has moved, where digits would be lost or a statistic is not finite.
    """
    rows = _rows(x, layout)
    # In copies, and written only once it is known that they are finite: a backward pass needs none of the buffers.
    moved = (None, None) if running is None else (running[0].clone(), running[1].clone())
    # torch's stub takes it for an operator that gets its results' tensors.
    y, mean, scale = torch.native_batch_norm(rows, weight, bias, *moved, True, momentum, eps)  # type: ignore[call-arg,arg-type]
    if not _is_exact(mean, scale) or scale.min().item() < LEAST_SCALE:
        return None
    if running is not None:
        for old, new in zip(running, moved, strict=True):
            old.copy_(new)  # type: ignore[arg-type]  # both are there
    return y if rows is x else y.view(layout.shape)


def statistics(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor] | None:
    """Return mean and biased variance of each channel, (C,); ``None`` where the mean is too large for the float32."""
    mean, var = torch.batch_norm_update_stats(_rows(x, layout), None, None, 0.0)
    return (mean, var) if eager.is_small(mean, var) else None


def standardize(
    x: Tensor,
    layout: Layout,
    weight: Tensor | None,
    bias: Tensor | None,
    constants: tuple[Tensor, Tensor, Tensor, Tensor],
    scale_of: Callable[[Tensor], Tensor],
) -> Tensor:
    r"""Return :math:`\gamma (r\, s(\sigma^2) (x - \mu) + d) + \beta`, for a function s of the variance.

    With r s = e V^(-1/2) in value, and V = -s / 2 s', the gradient is that of batch normalization by the variance V as
    well: for the scale :math:`(v + \epsilon)^{-1/2}`, say, V is the variance and eps.

    Args:
        x: the input; :func:`takes` it.
        layout: of x.
        weight: gamma, (C,).
        bias: beta, (C,).
        constants: the mean of x, V, e and d, (C,), in float64, so that what is multiplied with x is rounded once.
        scale_of: r s, for what is differentiated once more.
    """
    rows = _rows(x, layout)
    y: Tensor = _Standardize.apply(rows, weight, bias, constants, scale_of)
    return y if rows is x else y.view(layout.shape)


class _Standardize(torch.autograd.Function):
    """Batch normalization by statistics that are those of x, computed already."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, constants: tuple[Tensor, ...], scale_of: Any
    ) -> Tensor:
        ctx.scale_of = scale_of
        ctx.save_for_backward(x, weight, bias, *constants)
        mean, spread, factor, shift = constants
        # In float64 until they are cast below, so that what multiplies x is rounded once.
        factor, shift = _weighted(weight, bias, factor, shift)
        scale = spread.rsqrt().mul_(factor)
        fields = cast(scale, x.dtype), cast(torch.addcmul(shift, scale, mean, value=-1), x.dtype)
        zeros, ones = torch.zeros_like(fields[0]), torch.ones_like(fields[0])
        return torch.batch_norm(x, *fields, zeros, ones, False, 0.0, 0.0, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), need = grads, ctx.needs_input_grad[:3]
        x, weight, bias, mean, spread, factor, shift = ctx.saved_tensors
        if eager.is_recording(dy):
            plainly = functools.partial(_plainly, shift=shift, scale_of=ctx.scale_of)
            return (*eager.recorded_gradients(plainly, (x, weight, bias), dy, need), None, None)
        weighted = factor if weight is None else factor * weight
        weighted, mean, scale = (cast(t, x.dtype) for t in (weighted, mean, spread.rsqrt()))
        dx, dfactor, dshift = torch.ops.aten.native_batch_norm_backward(
            dy, x, weighted, None, None, mean, scale, True, 0.0, [need[0], need[1], need[1] or need[2]]
        )
        dweight = cast(torch.addcmul(shift * dshift, factor, dfactor), x.dtype) if need[1] else None
        return dx, dweight, dshift if need[2] else None, None, None


def _weighted(weight: Tensor | None, bias: Tensor | None, factor: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return gamma times the factor, and gamma times the shift and beta."""
    if weight is not None:
        factor, shift = factor * weight, shift * weight
    return factor, shift if bias is None else shift + bias


def _plainly(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, shift: Tensor, scale_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return y in plain differentiable PyTorch."""
    axes = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(axes, keepdim=True)
    scale, shift = _weighted(weight, bias, scale_of((x - mean).square().mean(axes)), shift)
    scale, shift = (t.view(1, -1, *(1,) * (x.dim() - 2)) for t in (scale, shift))
    return scale.to(x.dtype) * (x - mean) + shift.to(x.dtype)


def group_norm(
    x: Tensor, layout: Layout, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """Return x, (N, C, *), normalized by the statistics of each sample's groups; ``None`` if digits would be lost."""
    # For this call alone: the layer stays without a weight.
    weight = _weight_beside(bias, weight)
    y, mean, scale = torch.native_group_norm(x, weight, bias, layout.n, layout.c, layout.size, groups, eps)
    # Autograd would keep what is computed of them, for they have gradients.
    return y if _is_exact(mean.detach(), scale.detach()) else None


def wide_group_norm(
    x: Tensor, layout: Layout, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return the same in float64, for few elements; what is kept is x."""
    y: Tensor = _WideGroupNorm.apply(x, weight, bias, (layout.n, layout.c, layout.size, groups), eps)
    return y


class _WideGroupNorm(torch.autograd.Function):
    """Group normalization in float64, whose statistics are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, sizes: tuple[int, int, int, int], eps: float
    ) -> Tensor:
        ctx.sizes, ctx.eps = sizes, eps
        ctx.save_for_backward(x, weight, bias)
        wide, gamma, beta = _doubles(x, weight, bias)
        return cast(torch.native_group_norm(wide, gamma, beta, *sizes, eps)[0], x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), need, sizes = grads, ctx.needs_input_grad[:3], ctx.sizes
        x, weight, bias = ctx.saved_tensors
        if eager.is_recording(dy):

            def plainly(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                wide, gamma, beta = _doubles(x, _weight_beside(bias, weight), bias)
                return torch.nn.functional.group_norm(wide, sizes[-1], gamma, beta, ctx.eps).to(x.dtype)

            return (*eager.recorded_gradients(plainly, (x, weight, bias), dy, need), None, None)
        dy, x, weight = _doubles(dy.contiguous(), x, _weight_beside(bias, weight))
        n, c, size, groups = sizes
        _, mean, scale = torch.native_group_norm(x, None, None, n, c, size, groups, ctx.eps)
        found = torch.ops.aten.native_group_norm_backward(dy, x, mean, scale, weight, n, c, size, groups, list(need))
        return *(cast(t, grads[0].dtype) if n else None for t, n in zip(found, need, strict=True)), None, None


def _weight_beside(bias: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """Return a weight: torch 2.11 has no gradient of a bias alone."""
    return torch.ones_like(bias) if weight is None and bias is not None else weight


def _doubles(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


def _rows(x: Tensor, layout: Layout) -> Tensor:
    """Return x as torch's BatchNorm takes it: of tokens, each is a sample."""
    return x if layout.channel_dim == 1 else x.view(-1, layout.c)


def _is_exact(mean: Tensor, scale: Tensor) -> bool:
    """Tell whether all means are small against their standard deviations; written so that NaN is not."""
    return (mean * scale).abs_().max().item() <= SMALL_MEAN


def _is_channels_last(x: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return last is not None and x.is_contiguous(memory_format=last)

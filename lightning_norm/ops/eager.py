"""The passes in plain PyTorch: the CPU path, what torch.compile traces, and the oracle of the kernels.

Precision. For float32 inputs the (N, C) means are float64, unless |mean| / std is small, because 1000 +- 1 rounded to
float32 already costs more than nn.BatchNorm2d loses in all. Products with x are rounded once: eager code goes through
fused multiply-adds (``addcmul``, ATen's evaluation-mode batch norm), a compiled CPU graph computes in float64
registers, for Inductor fuses none.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lightning_norm.ops.layout import Layout, at_least_float32, cast, stat_dtype

FLAT = 8.0
"""|mean| / std up to which scale * x + offset loses nothing against scale * (x - mean)."""


def moments(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per (sample, channel), each (N, C)."""
    dtype = stat_dtype(x)
    narrow = at_least_float32(x.dtype)
    if layout.size == 1:
        mean = x.reshape(layout.n, layout.c).to(dtype, copy=True)
        return mean, torch.zeros_like(mean, dtype=narrow)
    rough = x.mean(layout.reduced, dtype=narrow)
    u = x - layout.spread(rough)
    if dtype == narrow:
        return rough, _dot(u, u, layout) / layout.size
    if may_be_flat(x):
        var = _dot(u, u, layout) / layout.size
        if bool((rough.square() <= FLAT**2 * var).all()):  # reading a value back costs nothing on the CPU
            return rough, var  # a small mean keeps its digits, and float32 halves the work of the algebra
        u = x - layout.spread(rough)
    rest = u.mean(layout.reduced)  # what rounding the mean left over
    var = (_dot(u, u, layout) / layout.size - rest.square()).clamp_min(0)
    return rough.to(dtype) + rest, var


def apply(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor, layout: Layout, flat: bool = False) -> Tensor:
    """Return y = scale * (x - center) + shift, a fresh tensor in x's dtype and memory format.

    ``center``, ``scale`` and ``shift`` are (N, C), or 1 in place of either.
    """
    u = _wide(x)
    if u.dtype == center.dtype and not flat:
        return cast(_affine(u - layout.spread(center), scale.to(u.dtype), shift.to(u.dtype), layout), x.dtype)
    pivot, scale = center.to(at_least_float32(u.dtype)), scale.to(at_least_float32(u.dtype))
    if flat and not _recording():
        offset = torch.addcmul(shift, scale, center, value=-1).to(scale.dtype)
        return cast(_affine(u, scale, offset, layout), x.dtype)
    offset = (shift + scale * (pivot - center)).to(scale.dtype)
    return cast(_affine(u - layout.spread(pivot), scale, offset, layout), x.dtype)


def reduce(dy: Tensor, x: Tensor, pivot: Tensor, layout: Layout, flat: bool = False) -> tuple[Tensor, Tensor]:
    """Sum of dy and of dy * (x - pivot) per (sample, channel), each (N, C) in the dtype of ``pivot``."""
    if flat and _by_rows(x, pivot, layout) and dy.is_contiguous() and _sums_alone():
        # Group norm's parameter gradients, each row a group: both sums in one pass and no temporary.
        rows = layout.n * layout.c
        dy, x, one = dy.view(1, rows, -1), x.view(1, rows, -1), pivot.new_ones(1, rows)
        args = (_rows(pivot, layout).view(1, rows), one, None, 1, rows, layout.size, rows, [False, True, True])
        _, dot, total = torch.ops.aten.native_group_norm_backward(dy, x, *args)
        return total.view(layout.n, layout.c), dot.view(layout.n, layout.c)
    total = dy.sum(layout.reduced, dtype=pivot.dtype) if layout.reduced else dy.to(pivot.dtype)
    return total, _dot(x - layout.spread(pivot), dy, layout)


def combine(
    dy: Tensor, scale: Tensor, x: Tensor, mean: Tensor, dmean: Tensor | None, dvar: Tensor | None, layout: Layout
) -> Tensor:
    """Return dx = scale * dy + dmean / S + (2 * dvar / S) * (x - mean), in x's dtype."""
    dy, u = _wide(dy), _wide(x)
    dtype = at_least_float32(u.dtype)
    wide = layout.spread(scale.to(dtype))
    offset = None if dmean is None else dmean.to(dtype) / layout.size
    if dvar is None or layout.size == 1:  # the variance of one element is constant
        return (dy * wide if offset is None else torch.addcmul(layout.spread(offset), dy, wide)).to(x.dtype)
    slope = dvar.to(dtype) * (2 / layout.size)
    pivot = mean.to(dtype)
    if pivot.dtype != mean.dtype:
        drift = slope * (pivot - mean).to(dtype)
        offset = drift if offset is None else offset + drift
    offset = layout.spread(torch.zeros_like(slope) if offset is None else offset)
    u, slope = u - layout.spread(pivot), layout.spread(slope)
    if _recording():
        return torch.addcmul(u * slope + offset, dy, wide).to(x.dtype)
    u.mul_(slope).add_(offset)  # small beside dy: only the last step counts
    return u.addcmul_(dy, wide).to(x.dtype)


def _affine(u: Tensor, scale: Tensor, offset: Tensor, layout: Layout) -> Tensor:
    """Return scale * u + offset, rounded once where it is not wide."""
    if _by_rows(u, scale, layout):
        scale, offset = _rows(scale, layout), _rows(offset, layout)
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        flat = u.view(1, scale.numel(), -1)
        flat = torch.batch_norm(flat, scale, offset, zero, one, False, 0.0, 0.0, False)
        y: Tensor = torch.ops.aten._unsafe_view(flat, layout.shape)  # no autograd view: an in-place ReLU may follow
        return y
    return torch.addcmul(layout.spread(offset), u, layout.spread(scale))


@functools.cache
def _sums_alone() -> bool:
    """Whether group norm's backward can leave out dx: torch 2.11 raises."""
    one = torch.ones(1, 1, 2)
    try:
        torch.ops.aten.native_group_norm_backward(
            one, one, one[0, :, :1], one[0, :, :1], None, 1, 1, 2, 1, [False, True, True]
        )
    except RuntimeError:
        return False
    return True


def _by_rows(x: Tensor, stat: Tensor, layout: Layout) -> bool:
    """Whether ATen's CPU kernels can take x as (1, N * C, S), one channel per row."""
    plain = x.is_cpu and x.dtype == stat.dtype and not _recording()
    return plain and layout.channel_dim == 1 and x.is_contiguous() and x.numel() > 0


def _rows(t: Tensor, layout: Layout) -> Tensor:
    """Return a tensor that broadcasts to (N, C) as (N * C,)."""
    return t.expand(layout.n, layout.c).reshape(-1)


def may_be_flat(x: Tensor) -> bool:
    """Whether it is asked, by reading a value back, if |mean| / std is small everywhere."""
    return x.is_cpu and not torch.compiler.is_compiling() and x.numel() > 0


def _wide(x: Tensor) -> Tensor:
    """In a compiled CPU graph, x in float64: registers, not memory."""
    return x.double() if torch.compiler.is_compiling() and x.is_cpu and x.dtype == torch.float32 else x


def _dot(u: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Sum of u * v per (sample, channel); u is overwritten."""
    product = u * v if _recording() else u.mul_(v)
    return product.sum(layout.reduced) if layout.reduced else product


def _recording() -> bool:
    return torch.is_grad_enabled() or torch.compiler.is_compiling()

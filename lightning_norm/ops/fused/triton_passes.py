"""The passes on the Triton kernels, for algebras written in PyTorch; the same signatures as ``ops/eager.py``.

The kernels hold a mean as two float32 numbers, hi + lo, and subtract hi from x. An algebra gets their sum, in float64
where x is float32. The center that it returns goes back as the nearest float32, and what that rounding has left becomes
a correction of the offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_norm.ops.layout import Layout, stat_dtype

ops = torch.ops.lightning_norm


def moments(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per (sample, channel), each (N, C)."""
    hi, lo, var = ops.moments(x, layout.channel_dim).unbind(0)
    return (hi.double() + lo if stat_dtype(x) == torch.float64 else hi.clone()), var.clone()


def apply(
    x: Tensor, center: Tensor, scale: Tensor, shift: Tensor, layout: Layout, mean_is_small: bool = False
) -> Tensor:
    """Return y = scale * (x - center) + shift, a fresh tensor in x's dtype and memory format."""
    # What float32 cannot hold of the center goes into the shift, which is small beside it.
    pivot = center.float()
    parts = (pivot, scale.float(), (shift + scale * (pivot - center)).float())
    affine = torch.stack([t.expand(layout.n, layout.c) for t in parts])
    y: Tensor = ops.apply(x, affine, layout.channel_dim, "none", None)
    return y


def reduce(dy: Tensor, x: Tensor, pivot: Tensor, layout: Layout, mean_is_small: bool = False) -> tuple[Tensor, Tensor]:
    """Sum of dy and of dy * (x - pivot) per (sample, channel), each (N, C)."""
    wide = pivot.float().expand(1, layout.n, layout.c).contiguous()
    total, dot = ops.sums(dy, x, wide, layout.channel_dim).to(pivot.dtype).unbind(0)
    return total, dot


def combine(
    dy: Tensor, scale: Tensor, x: Tensor, mean: Tensor, dmean: Tensor | None, dvar: Tensor | None, layout: Layout
) -> Tensor:
    """Return dx = scale * dy + dmean / S + (2 * dvar / S) * (x - mean), in x's dtype."""
    pivot, dx_affine = mean.float(), None
    if dmean is not None or dvar is not None:
        # The variance of one element is 0 whatever x is, and so is its gradient.
        slope = torch.zeros_like(pivot) if dvar is None or layout.size == 1 else dvar.float() * (2 / layout.size)
        constant = slope * (pivot - mean).float()
        dx_affine = torch.stack([constant if dmean is None else constant + dmean.float() / layout.size, slope])
    wide = scale.float()
    dx: Tensor = ops.combine(dy, x, torch.stack([pivot, wide, wide]), dx_affine, layout.channel_dim)
    return dx

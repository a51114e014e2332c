"""The passes where a whole batch is one sample of all its positions, by ATen's batch normalization on the CPU.

Normalizers of batch statistics alone need no moments of single samples: their algebra then runs on (1, C) numbers, and
of (N, C) inputs nothing of the size of x is kept beside x. What autograd is to record, and what these functions would
lose digits of, the passes of :mod:`lightning_norm.ops.eager` do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_norm.ops import eager
from lightning_norm.ops.eager import combine as combine
from lightning_norm.ops.layout import Layout, stat_dtype


def moments(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (1, C), the variance in float64: a scale belongs to a whole channel."""
    mean, var = (t.view(1, -1) for t in torch.batch_norm_update_stats(_rows(x, layout), None, None, 0.0))
    if stat_dtype(x) == mean.dtype or eager.is_small(mean, var):
        return mean, var.double()
    # What rounding took from a large mean is small: its mean, and the squares around it, have all their digits.
    u = x - layout.broadcast_to_input(mean)
    rest = u.mean(layout.reduced, dtype=torch.float64).view(1, -1)
    square = u.mul_(u).mean(layout.reduced, dtype=torch.float64).view(1, -1)
    return mean.double() + rest, (square - rest.square()).clamp_min(0)


def apply(
    x: Tensor, center: Tensor, scale: Tensor, shift: Tensor, layout: Layout, mean_is_small: bool = False
) -> Tensor:
    """Return y = scale * (x - center) + shift, as :func:`lightning_norm.ops.eager.apply` does."""
    if not mean_is_small or eager.is_recording():
        return eager.apply(x, center, scale, shift, layout)
    offset = torch.addcmul(shift, scale, center, value=-1)
    scale, offset = (t.to(x.dtype).expand(1, layout.c).reshape(-1) for t in (scale, offset))
    ones = torch.ones_like(scale)
    y = torch.batch_norm(_rows(x, layout), scale, offset, torch.zeros_like(scale), ones, False, 0.0, 0.0, False)
    # No view, which autograd would refuse to change in place.
    return y if y.shape == x.shape else y.view(x.shape).data


def reduce(dy: Tensor, x: Tensor, pivot: Tensor, layout: Layout, mean_is_small: bool = False) -> tuple[Tensor, Tensor]:
    """Sum of dy and of dy * (x - pivot) per channel, (1, C), whatever the mean."""
    if eager.is_recording(dy) or dy.dtype != pivot.dtype:
        return eager.reduce(dy, x, pivot, layout, mean_is_small)
    pivot = pivot.expand(1, layout.c).reshape(-1)
    _, dot, total = torch.ops.aten.native_batch_norm_backward(
        _rows(dy, layout), _rows(x, layout), None, None, None, pivot, torch.ones_like(pivot), True, 0.0,
        [False, True, True],
    )  # fmt: skip
    return total.view(1, -1), dot.view(1, -1)


def _rows(x: Tensor, layout: Layout) -> Tensor:
    """Return x as torch's BatchNorm takes it: of tokens, each is a sample."""
    return x if layout.channel_dim == 1 else x.reshape(-1, layout.c)

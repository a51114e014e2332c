"""Statistics of each token over its channels, beside those per sample and channel that :func:`normalize` has.

A field with one entry per sample and position is no :class:`Affine`, whose fields broadcast to (N, C): what mixes both
is written on tensors of the size of x, in plain differentiable PyTorch, and autograd keeps several of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_norm.ops import eager, masked
from lightning_norm.ops.layout import Layout, at_least_float32, without_autocast
from lightning_norm.ops.moments import Moments
from lightning_norm.ops.normalize import activated, check_ending
from lightning_norm.ops.sync import Ranks


@dataclass(frozen=True)
class Tokens:
    """An input with the channels last, (N, ..., C), and its statistics.

    Args:
        moments: mean and biased variance per sample and channel, (N, C).
        x: the input, in float32 at least.
        centered: x minus the mean of its token.
        var: biased variance of each token over its channels, (N, ..., 1).
        apart: x - pivot.
        pivot: constants near the means, (N, C): what is subtracted first costs no digits.
        layout: of x.
    """

    moments: Moments
    x: Tensor
    centered: Tensor
    var: Tensor
    apart: Tensor
    pivot: Tensor
    layout: Layout

    def along(self, field: Tensor) -> Tensor:
        """Return a tensor that broadcasts to (N, C) in a shape that broadcasts to x, in the dtype of ``centered``."""
        field = field.reshape(1, -1) if field.dim() < 2 else field
        return self.layout.broadcast_to_input(field).to(self.centered.dtype)

    def minus(self, mean: Tensor, weight: Tensor) -> Tensor:
        r"""Return :math:`x - m - w\,\mu_{nl}`, with the mean of each token; ``m`` and ``w`` broadcast to (N, C)."""
        # The few numbers of (N, C) meet in the dtype of the means, where a large mean keeps its digits.
        pivot, weight = self.pivot.to(self.moments.mean.dtype), weight.to(self.moments.mean.dtype)
        center = mean + weight * pivot.mean(1, keepdim=True)
        rounded = center.detach().to(self.x.dtype)
        rest = self.along(center - rounded)
        of_token = torch.addcmul(rest, self.along(weight), self.apart.mean(-1, keepdim=True))
        return self.x - self.along(rounded) - of_token

    def scaled(self, x: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return weight * scale * x + bias, with one rounding at its end, given a weight and a bias (C,)."""
        scale = scale if weight is None else scale * self.along(weight)
        return x * scale if bias is None else torch.addcmul(self.along(bias), x, scale)


def normalize_tokens(
    x: Tensor,
    normalized: Callable[[Tokens], Tensor],
    layout: Layout,
    ranks: Ranks | None = None,
    mask: masked.Mask | None = None,
    backend: str = "auto",
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Return act(y + residual) for a y that looks at the statistics of each token; 0 for y where it is padding.

    Args:
        x: (N, ..., C), with zeros for padding.
        normalized: from :class:`Tokens` to y.
        layout: of x, whose channels are on the last axis.
        ranks: the ranks that ``Moments.over_batch`` pools with.
        mask: which positions count.
        backend: as for :func:`lightning_norm.ops.normalize.normalize`.
        activation: "none", "relu" or "silu".
        residual: added before the activation.

    Raises:
        ValueError: a wrong activation or residual.
        RuntimeError: ``backend="triton"``.
    """
    check_ending(x, activation, residual)
    if backend == "triton":
        raise RuntimeError("backend='triton' has no kernel for the statistics of each token. Type backend='auto'.")
    with without_autocast(x):
        if mask is None:
            moments = Moments(*eager.moments(x, layout, recorded=True), layout.count(x), ranks)
        else:
            moments = Moments(*masked.masked_moments(x, mask, layout, recorded=True), mask.count, ranks)
        y = normalized(_tokens(x, moments, layout, mask)).to(x.dtype)
        y = y if mask is None else mask.zeroed(y)
    return activated(y, activation, residual)


def _tokens(x: Tensor, moments: Moments, layout: Layout, mask: masked.Mask | None) -> Tokens:
    wide = at_least_float32(x.dtype)
    # No gradient goes through the pivot, for no result depends on it.
    pivot = moments.mean.detach().to(wide)
    x = x.to(wide)
    apart = x - layout.broadcast_to_input(pivot)
    # The pivots of a sample's channels differ, and their differences belong to the token's statistics.
    between = (pivot.to(moments.mean.dtype) - pivot.mean(1, keepdim=True, dtype=moments.mean.dtype)).to(wide)
    centered = apart - apart.mean(-1, keepdim=True) + layout.broadcast_to_input(between)
    var = centered.square().mean(-1, keepdim=True)
    # Padding is all zeros: a variance of 0 has no gradient with an eps of 0.
    var = var if mask is None else torch.where(mask.valid, var, var.new_ones(()))
    return Tokens(moments, x, centered, var, apart, pivot, layout)

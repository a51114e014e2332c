"""Feature condensation: how alike the samples of a batch are, as the mean cosine of all pairs, in O(N * D).

With u_n = x_n / |x_n| and M samples that are not zero, the pairs sum to |sum_n u_n|^2 - M: one weighted sum of the
samples, for which x is read once, and no Gram matrix. The norms follow from the moments, without reading x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_norm.ops import torch_private
from lightning_norm.ops.layout import at_least_float32, stat_dtype, without_autocast
from lightning_norm.ops.moments import Moments
from lightning_norm.ops.sync import Ranks

SMALL = 1e-30
"""Mean square of a sample below which a float32 variance loses digits."""

CHUNKS = 8
"""A batch in half precision is converted to float32 in so many parts, one after the other, to spare memory."""


@torch_private.without_gradients
def condensation(x: Tensor, squares: Tensor | None = None, ranks: Ranks | None = None) -> Tensor:
    r"""Return the mean pairwise cosine of the samples of x, a 0-dim tensor; no value leaves the device.

    .. math:: \frac{\lVert \sum_n x_n / \lVert x_n \rVert \rVert^2 - M}{M (M - 1)}

    Args:
        x: (N, *), any memory format; each sample counts as one vector.
        squares: (N,) squared norms, if they are known.
        ranks: the ranks whose samples count as well; all must call it, with samples of one shape.

    Returns:
        A number in [-1 / (M - 1), 1], M being the samples that are not zero; NaN where M < 2.

    >>> x = torch.randn(1, 3, 4, 4)
    >>> condensation(torch.cat([x, 2 * x, -x, 0 * x])).round(decimals=5)  # one pair of three agrees, two are opposed
    tensor(-0.3333)
    """
    # Sum and count add up over ranks, so that pairs of samples on different ranks are counted as well.
    total, count = unit_sum(x, squares)
    if ranks is not None:
        sums = ranks.sum(torch.cat([total.reshape(-1), count.reshape(1)]))
        total, count = sums[:-1], sums[-1]
    return mean_cosine(total, count)


@torch_private.without_gradients
def unit_sum(x: Tensor, squares: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the sum of the samples, each divided by its norm, and how many are not zero; both add up over batches.

    Args:
        x: (N, *).
        squares: (N,) squared norms, if they are known.
    """
    dtype = at_least_float32(x.dtype)
    if squares is None:
        axes = tuple(range(1, x.dim()))
        # By the largest element first, for its square may leave the range of the dtype.
        peak = torch.linalg.vector_norm(x, float("inf"), dim=axes, keepdim=True, dtype=dtype)
        safe = torch.where(peak > 0, peak, 1)
        lengths = torch.linalg.vector_norm(x.to(dtype) / safe, dim=axes)
        x, squares = x.to(dtype) / safe, lengths.square()
    # Not ``squares > 0``: a NaN must reach the result.
    not_zero = ~(squares <= 0)
    # A sample of zeros has no direction, and is left out of sum and count alike.
    weights = torch.where(not_zero, squares.rsqrt(), 0).to(dtype)
    with without_autocast(x):
        return _weighted_sum(x, weights), not_zero.sum().to(dtype)


@torch_private.without_gradients
def mean_cosine(total: Tensor, count: Tensor) -> Tensor:
    """Return the mean cosine of all pairs, from the sum of the unit vectors and their number; NaN below two."""
    # |sum u|^2 counts each sample with itself once, which is 1 for a unit vector.
    similarity = (total.square().sum() - count) / (count * (count - 1))
    return torch.where(count < 2, torch.nan, similarity)


def squared_norms(m: Moments) -> Tensor:
    """Return the (N,) squared norms of the samples whose (N, C) moments are given: S * sum_c (var + mean^2).

    NaN where they left the range in which float32 holds their digits: such a batch has no condensation.
    """
    wide = stat_dtype(m.var)
    squares = (m.var.to(wide) + m.mean.to(wide).square()).sum(1)
    known = squares.isfinite() & ((squares == 0) | (squares >= SMALL * m.var.shape[1]))
    count = m.count.flatten() if isinstance(m.count, torch.Tensor) else m.count  # with a mask, one for each sample
    return torch.where(known, count * squares, torch.nan)


def _weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """Return sum_n weights_n * x_n, in the shape of a sample, whatever the strides of x."""
    # In the order of memory a dense sample is one row: flatten copies nothing, channels-last or not. No order of
    # strides is asked for, which torch.compile cannot sort where sizes vary, before torch 2.14.
    last = x.movedim(1, -1).is_contiguous()
    dims = [*range(2, x.dim()), 1] if last else [*range(1, x.dim())]
    rows = x.permute(0, *dims).flatten(1)
    # One product of a matrix and a vector reads x once and makes nothing of its size.
    if rows.dtype == weights.dtype:
        total = torch.mv(rows.t(), weights)
    else:
        total = weights.new_zeros(rows.shape[1])
        # Sums over a batch in half precision would lose most digits of small cosines.
        for part, weight in zip(rows.chunk(CHUNKS), weights.chunk(CHUNKS), strict=True):
            total = torch.addmv(total, part.t().to(weight.dtype), weight)
    return total.view([x.shape[d] for d in dims]).permute([dims.index(d) for d in range(1, x.dim())])

"""Metrics for torchmetrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_norm.ops.condensation import mean_cosine, unit_sum


class FeatureCondensation(Metric):
    r"""How alike features are: the mean cosine of all pairs of the samples seen since the last reset.

    .. math:: \frac{1}{M (M - 1)} \sum_{i \ne j} \cos(x_i, x_j)

    It is what :class:`~lightning_norm.UnifiedBatchNorm` compares with its threshold, for any tensor of any network.
    ``forward`` returns the value of the batch, ``compute`` that of all samples, pairs across batches and ranks
    included. The state is one sum of the size of a sample, and no sample is stored.

    Args:
        options: of ``torchmetrics.Metric``.

    Shape:
        ``update(x)``: x (N, *), one vector per sample; * the same in every batch and on every rank, each of which must
        have had one. Output: a 0-dim tensor in [-1 / (M - 1), 1], M being the samples that are not zero; NaN where
        M < 2.

    Raises:
        TypeError: x is not a tensor of floating point numbers.
        ValueError: x has no dimension beside that of the samples, or samples of another shape than before.

    >>> condensation = FeatureCondensation()
    >>> condensation.update(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    >>> condensation.update(torch.tensor([[3.0, 0.0]]))
    >>> condensation.compute()  # one pair of three agrees, two are at right angles
    tensor(0.3333)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0
    total: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")  # broadcast against the first batch
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, x: Tensor) -> None:
        """Add the samples of a batch."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"FeatureCondensation takes a tensor of floating point numbers, got {_dtype_or_type(x)}.")
        if x.dim() < 2:
            raise ValueError(f"FeatureCondensation takes (N, *), one vector per sample, got {tuple(x.shape)}.")
        total, count = unit_sum(x.detach())
        if self.total.dim() and self.total.shape != total.shape:
            raise ValueError(
                f"FeatureCondensation: samples of shape {tuple(total.shape)} after some of {tuple(self.total.shape)}. "
                "Call reset(), or bring them to one size."
            )
        self.total = self.total + total
        self.count = self.count + count.to(self.count.dtype)

    @override
    def compute(self) -> Tensor:
        """Return the mean cosine of all pairs."""
        return mean_cosine(self.total, self.count)


def _dtype_or_type(x: object) -> str:
    return f"{x.dtype}" if isinstance(x, Tensor) else type(x).__name__

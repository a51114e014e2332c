"""The moments of many batches as one: merged by counts in float64, and over ranks at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_norm.ops.moments import Moments
from lightning_norm.ops.sync import Ranks


class Pool:
    """Mean and biased variance of everything seen, by the pairwise merge of Chan, Golub and LeVeque.

    Args:
        shape: of the statistics, (K, C).
        between: the spread of the batches' means is part of the variance.
    """

    def __init__(self, shape: tuple[int, int], between: bool = True) -> None:
        self.between = between
        self.count = torch.zeros(shape[0], 1, dtype=torch.float64)
        self.mean = torch.zeros(shape, dtype=torch.float64)
        self.var = torch.zeros(shape, dtype=torch.float64)
        self.batches = self.skipped = 0

    @torch.no_grad()
    def add(self, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
        """Merge (K, C) moments of ``count`` elements; those with a NaN or an infinity are counted and left out."""
        m, v = (t.detach().cpu().double().reshape(self.mean.shape) for t in (mean, var))
        n = torch.as_tensor(count).detach().cpu().double().expand_as(self.count)
        if not bool(torch.isfinite(m + v).all()):
            self.skipped += 1
            return
        self.batches += 1
        total = self.count + n
        share = n / total.clamp_min(1)
        apart = m - self.mean
        self.mean = self.mean + share * apart
        self.var = self.var + share * (v - self.var)
        if self.between:
            self.var = self.var + share * (1 - share) * apart.square()
        self.count = total

    def over(self, ranks: Ranks | None) -> Moments:
        """Return the moments of all ranks; every rank must call it."""
        if ranks is None:
            return Moments(self.mean, self.var, self.count)
        batches = torch.full_like(self.count, self.batches)
        skipped = torch.full_like(self.count, self.skipped)
        spread = self.var if self.between else torch.zeros_like(self.var)
        count, mean, var = ranks.pool(self.count, self.mean, spread)
        if not self.between:
            var = ranks.pool(self.count, self.var, spread)[1]
        one = torch.ones_like(self.count)
        world = ranks.pool(one, one, one * 0)[0]
        totals = [ranks.pool(one, t, one * 0)[1] * world for t in (batches, skipped)]
        self.batches, self.skipped = (round(float(t[0, 0])) for t in totals)
        return Moments(mean, var, count)

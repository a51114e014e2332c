"""The moments of many batches as one, merged by their counts in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_norm.ops import torch_private
from lightning_norm.ops.moments import Moments
from lightning_norm.ops.sync import Ranks


def merge(
    old: tuple[Tensor, Tensor, Tensor], new: tuple[Tensor, Tensor, Tensor], between: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge two sets of count (K, 1), mean and biased variance (K, C), after Chan, Golub and LeVeque.

    Args:
        old: the first.
        new: the second.
        between: the variance between the two means is part of the merged one.
    """
    (count, mean, var), (new_count, new_mean, new_var) = old, new
    total = count + new_count
    # A set without elements has the fraction 0, and 0 / 0 would be NaN.
    fraction = new_count / total.clamp_min(1)
    difference = new_mean - mean
    merged = var + fraction * (new_var - var)
    if between:
        # Chan's term: two sets about different means vary more together than each by itself.
        merged = merged + fraction * (1 - fraction) * difference.square()
    return total, mean + fraction * difference, merged


class AccumulationWindow:
    """Mean and biased variance of the batches since the last optimizer step, kept where the layer is.

    Args:
        shape: of the statistics, (K, C).
        between: the variance between the batches' means is part of the variance.
        device: where they are.
    """

    def __init__(self, shape: tuple[int, int], between: bool, device: torch.device) -> None:
        self.between = between
        # Many small batches, each with its rounding, and MPS has no float64.
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.count = torch.zeros(shape[0], 1, dtype=wide, device=device)
        self.mean, self.var = (torch.zeros(shape, dtype=wide, device=device) for _ in range(2))
        self.shift: Tensor | None = None
        """What means are sent to other ranks relative to, (K, C): see ``lightning_norm.layers.pooling``."""
        self.agreed_in = ""
        """The process group whose ranks have compared their layers, and will move the running statistics together."""

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and variance themselves."""
        return self.count, self.mean, self.var

    @torch_private.without_gradients
    def add(self, mean: Tensor, var: Tensor, count: int | Tensor, usable: Tensor) -> None:
        """Merge (K, C) moments of ``count`` elements if a 0-dim ``usable`` is true."""
        # The window is a sum over batches, and must not keep the graphs of all of them alive.
        m, v = (t.detach().to(self.mean.dtype).reshape(self.mean.shape) for t in (mean, var))
        n = torch.as_tensor(count, device=m.device).detach().to(m.dtype).expand_as(self.count)
        for old, new in zip(self.tensors(), merge(self.tensors(), (n, m, v), self.between), strict=True):
            # In place, so that a compiled graph finds the same tensors, and without reading a value back from a GPU.
            old.copy_(torch.where(usable, new, old))

    def moments(self) -> Moments:
        """Return what was gathered."""
        return Moments(self.mean, self.var, self.count)

    def clear(self) -> None:
        """Forget everything."""
        for t in self.tensors():
            t.zero_()


class StatisticsAccumulator:
    """Mean and biased variance of everything seen, without what is not finite, and over ranks at the end.

    Args:
        shape: of the statistics, (K, C).
        between: the variance between the batches' means is part of the variance.
        dtype: of the running statistics, in which all must be finite.
    """

    def __init__(self, shape: tuple[int, int], between: bool = True, dtype: torch.dtype = torch.float32) -> None:
        self.between, self.dtype = between, dtype
        # On the CPU, so that the result does not depend on the device, and so that MPS has float64, too.
        self.count = torch.zeros(shape[0], 1, dtype=torch.float64)
        self.mean = torch.zeros(shape, dtype=torch.float64)
        self.var = torch.zeros(shape, dtype=torch.float64)
        self.batches = self.skipped = 0

    @torch_private.without_gradients
    def add(self, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
        """Merge (K, C) moments of ``count`` elements; those with a NaN or an infinity are counted and left out."""
        m, v = (t.detach().cpu().double().reshape(self.mean.shape) for t in (mean, var))
        n = torch.as_tensor(count).detach().cpu().double().expand_as(self.count)
        # One bad batch would spoil the average of all others for good.
        if not bool(torch.isfinite(torch.stack([m, v]).to(self.dtype)).all()):
            self.skipped += 1
            return
        self.batches += 1
        self.count, self.mean, self.var = merge((self.count, self.mean, self.var), (n, m, v), self.between)

    def over(self, ranks: Ranks | None) -> Moments:
        """Return the moments of all ranks; every rank must call it."""
        if ranks is None:
            return Moments(self.mean, self.var, self.count)
        # Counters travel as means over ranks, for pooling is the only collective that this file uses.
        batches = torch.full_like(self.count, self.batches)
        skipped = torch.full_like(self.count, self.skipped)
        zero = torch.zeros_like(self.var)
        count, mean, var = ranks.pool(self.count, self.mean, self.var if self.between else zero)
        if not self.between:
            # Pooling adds the variance between means, so variances are averaged as means of no variance.
            var = ranks.pool(self.count, self.var, zero)[1]
        one = torch.ones_like(self.count)
        world = ranks.pool(one, one, one * 0)[0]
        totals = [ranks.pool(one, t, one * 0)[1] * world for t in (batches, skipped)]
        self.batches, self.skipped = (round(float(t[0, 0])) for t in totals)
        return Moments(mean, var, count)

"""Statistics per context: in a batch, over batches, and what they say about a sample whose context is unknown."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_norm.layers.accumulators import AccumulationWindow
from lightning_norm.layers.variance import unbiased
from lightning_norm.normalizers.context.parameters import ContextRows, pool
from lightning_norm.ops.moments import Moments


class PerContext(ContextRows):
    """Abstract: a row of statistics per context, pooled by the share of each sample in each context."""

    min_count: int
    missing: str

    def statistics(self, m: Moments, g: Tensor) -> tuple[Moments, Tensor]:
        """Return the moments of the contexts in this batch, (K, C), and the mean of all, (1, C), as a constant.

        In training the running statistics follow them. A context with fewer than ``min_count`` elements is mixed with
        all samples, exactly as the law of total variance says: with none at all it has the statistics of all.

        Args:
            m: moments of each sample.
            g: share of each sample in each context, (N, K).
        """
        m = Moments(m.mean.to(g.dtype), m.var.to(g.dtype), m.count, m.ranks)
        own = m.over_batch(g)
        assert isinstance(own.count, Tensor)
        rows, share, common = self._drawn(own)
        if self.training and self.track_running_stats:
            if self.missing == "posterior":
                self._follow(Moments(m.mean, torch.zeros_like(m.var), 1, m.ranks).over_batch(g), share)
            if not isinstance(self.accumulator, AccumulationWindow):
                self.fold(rows, share, own.count.sum())
            else:
                self.accumulator.add(own.mean, own.var, own.count, self._usable(own.mean, own.var, own.count.sum()))
        return rows, common.mean.detach()

    def _drawn(self, own: Moments) -> tuple[Moments, Tensor, Moments]:
        """Return the contexts' moments, small ones drawn to those of all, their shares, and the moments of all."""
        assert isinstance(own.count, Tensor)
        total = own.count.sum()
        share = own.count / total.clamp_min(1)
        common = pool(own.mean, own.var, share)
        part = (1 - own.count / self.min_count).clamp_min(0)  # of the common statistics in those of a small context
        apart = common.mean - own.mean
        var = own.var + part * (common.var - own.var + (1 - part) * apart.square())
        return Moments(own.mean + part * apart, var, own.count + part * (total - own.count)), share, common

    def _move_by_window(self, m: Moments) -> None:
        assert isinstance(m.count, Tensor)
        rows, share, _ = self._drawn(m)
        self.fold(rows, share, m.count.sum(), m.count.any())

    @torch.no_grad()
    def _follow(self, means: Moments, share: Tensor) -> None:
        held = self._buffers["running_spread"]
        assert held is not None
        step = (self.momentum or 0.1) * (self.num_contexts * share).clamp_max(1)
        step = torch.where(self.unseen(), (share > 0).to(step.dtype), step)
        fine = torch.isfinite(means.var).all() & (share > 0)
        held.copy_(torch.where(fine, torch.lerp(held.to(step.dtype), means.var, step), held).to(held.dtype))

    @torch.no_grad()
    def posterior(self, m: Moments) -> Tensor:
        """Return the probability of each context given the means of a sample's channels, (N, K); flattened by C."""
        rows, share, _ = self.rows()
        spread = self._buffers["running_spread"]
        assert spread is not None
        var = spread.to(rows.mean.dtype) + self.eps
        apart = (m.mean.unsqueeze(1) - rows.mean).square() / var  # (N, K, C)
        return torch.softmax(share[:, 0].log() - 0.5 * (apart + var.log()).mean(2), 1)

    @torch.no_grad()
    def fold(self, m: Moments, share: Tensor, total: Tensor, wanted: Tensor | None = None) -> None:
        """Move the running statistics towards those of this batch, each context in proportion to its share.

        The first samples of a context are taken as they are; a context without samples does not move. An update with
        a NaN or an infinity in it is skipped and counted.

        Args:
            m: statistics of the contexts, (K, C).
            share: of each context in this batch, (K, 1).
            total: elements behind all of them.
            wanted: false, 0-dim, where there is nothing to fold in.
        """
        mean, var = m.mean, m.var * unbiased(m.count)
        finite = torch.isfinite(mean + var).all() & torch.isfinite(share).all() & (total > 1)
        assert self.prior is not None
        assert self.num_batches_tracked is not None
        assert self.skipped_updates is not None
        self.num_batches_tracked.add_(finite)
        self.skipped_updates.add_(~finite if wanted is None else wanted & ~finite)
        momentum = self._buffers["_momentum"]
        seen = self.num_batches_tracked.clamp_min(1).to(share.dtype)
        rate = 1 / seen if momentum is None else momentum.to(share.dtype)
        prior = torch.lerp(self.prior.to(share.dtype), share[:, 0], rate)
        if momentum is None:  # the average of all samples: share of this batch in all that the context has seen
            step = share / (seen * prior.unsqueeze(1)).clamp_min(torch.finfo(share.dtype).tiny)
        else:
            step = rate * (self.num_contexts * share).clamp_max(1)
        step = torch.where(self.unseen(), (share > 0).to(step.dtype), step)
        for name, new in zip(self.running_names, (mean, var), strict=True):
            old = self._buffers[name]
            assert old is not None
            moved = (1 - step) * old + step * new
            old.copy_(torch.where(finite & (share > 0), moved.to(old.dtype), old))
        self.prior.copy_(torch.where(finite, prior.to(self.prior.dtype), self.prior))

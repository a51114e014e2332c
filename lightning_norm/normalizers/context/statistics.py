"""Statistics per context: in a batch, over batches, and what they say about a sample whose context is unknown."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_norm.layers.accumulators import AccumulationWindow
from lightning_norm.layers.running_stats import count_batch, count_skipped, fits, is_usable, moves_running_stats
from lightning_norm.normalizers.context.parameters import ContextParameters, pool_moments
from lightning_norm.ops import torch_private
from lightning_norm.ops.moments import Moments


class ContextStatistics(ContextParameters):
    """Abstract: statistics of each context, in which a sample counts by its responsibility.

    The responsibilities (N, K) say how much each sample belongs to each context, as in a mixture model; rows sum to 1.
    """

    min_count: int
    missing: str
    running_spread: Tensor
    """Running variance of the samples' means in each context, (K, C); only with ``missing="posterior"``."""

    def statistics(self, m: Moments, responsibilities: Tensor) -> tuple[Moments, Tensor]:
        """Return the moments of the contexts in this batch, (K, C), and the mean of the batch, (1, C), as a constant.

        In training the running statistics follow them. A context with fewer than ``min_count`` elements is mixed with
        the whole batch, exactly as the law of total variance says: with none at all it has the batch's statistics.

        Args:
            m: moments of each sample.
            responsibilities: of the contexts for each sample, (N, K).
        """
        # In the responsibilities' dtype, float64 for float32 inputs: means are subtracted from each other below.
        m = Moments(m.mean.to(responsibilities.dtype), m.var.to(responsibilities.dtype), m.count, m.ranks)
        batch = m.over_batch(responsibilities)
        assert isinstance(batch.count, Tensor)
        contexts, frequency, pooled = self._shrink_small_contexts(batch)
        if moves_running_stats(self):
            if self.missing == "posterior":
                between = Moments(m.mean, torch.zeros_like(m.var), m.each(), m.ranks).over_batch(responsibilities)
                self._update_running_spread(between.var, frequency)
            total = batch.count.sum()
            if not isinstance(self._accumulator, AccumulationWindow):
                self.update_running_stats(contexts, frequency, total)
            else:
                usable = is_usable(self, batch.mean, batch.var, total)
                self._accumulator.add(batch.mean, batch.var, batch.count, usable)
        return contexts, pooled.mean.detach()

    def _shrink_small_contexts(self, batch: Moments) -> tuple[Moments, Tensor, Moments]:
        """Return the moments of the contexts, their frequencies (K, 1), and the moments of the batch (1, C).

        A context with n < min_count elements gets a mixture: n / min_count of its own distribution, and the rest of the
        whole batch's. The variance of few elements cannot be trusted, and one element has none.
        """
        assert isinstance(batch.count, Tensor)
        total = batch.count.sum()
        frequency = batch.count / total.clamp_min(1)
        pooled = pool_moments(batch.mean, batch.var, frequency)
        # This is the whole batch's part in the mixture.
        borrowed = (1 - batch.count / self.min_count).clamp_min(0)
        distance = pooled.mean - batch.mean
        mean = batch.mean + borrowed * distance
        # The last term is the variance between the two parts, by the law of total variance.
        var = batch.var + borrowed * (pooled.var - batch.var + (1 - borrowed) * distance.square())
        return Moments(mean, var, batch.count + borrowed * (total - batch.count)), frequency, pooled

    def _move_by_window(self, m: Moments) -> None:
        assert isinstance(m.count, Tensor)
        contexts, frequency, _ = self._shrink_small_contexts(m)
        self.update_running_stats(contexts, frequency, m.count.sum(), m.count.any())

    def _step_size(self, frequency: Tensor, momentum: float | Tensor) -> Tensor:
        """Return the weight of this batch in each context's running statistics, (K, 1).

        A context as frequent as 1 / K, or more, has ``momentum``. A rarer one has in proportion less, for its few
        samples say less. The first samples of a context replace the starting values, which stand for nothing.
        """
        # With K contexts alike each has the frequency 1 / K, and then the step is the momentum.
        step = momentum * (self.num_contexts * frequency).clamp_max(1)
        return torch.where(self.unseen(), (frequency > 0).to(step.dtype), step)

    @torch_private.without_gradients
    def _update_running_spread(self, between_var: Tensor, frequency: Tensor) -> None:
        """Move the running variance of the samples' means, (K, C), which the posterior measures distances in."""
        buffer: Tensor = self.running_spread
        step = self._step_size(frequency, 0.1 if self.momentum is None else self.momentum)
        # A context that the batch does not have keeps its spread.
        usable = torch.isfinite(between_var.to(buffer.dtype)).all() & (frequency > 0)
        moved = torch.lerp(buffer.to(step.dtype), between_var, step)
        buffer.copy_(torch.where(usable, moved, buffer).to(buffer.dtype))

    @torch_private.without_gradients
    def posterior(self, m: Moments) -> Tensor:
        r"""Return the probability of each context given the means of a sample's channels, (N, K).

        .. math::
            p_{nk} \propto \pi_k \exp\left(-\frac{1}{2C} \sum_c \left[\frac{(\mu_{nc} - \mu_{kc})^2}{v_{kc} + \epsilon}
            + \log(v_{kc} + \epsilon)\right]\right)

        with v the running variance of the samples' means. The sum is divided by C: channels are far from independent,
        and without it the posterior would be 0 or 1 in any wide layer.
        """
        contexts, prior, _ = self.running_per_context()
        var = self.running_spread.to(contexts.mean.dtype) + self.eps
        squared_distance = (m.mean.unsqueeze(1) - contexts.mean).square() / var  # (N, K, C)
        # A context with the prior 0 has the logit -inf, and so the probability 0.
        return torch.softmax(prior[:, 0].log() - 0.5 * (squared_distance + var.log()).mean(2), 1)

    @torch_private.without_gradients
    def update_running_stats(self, m: Moments, frequency: Tensor, total: Tensor, wanted: Tensor | None = None) -> None:
        """Move the running statistics towards those of this batch, each context in proportion to its frequency.

        The first samples of a context are taken as they are; a context without samples does not move. An update with
        a NaN or an infinity in it is skipped and counted.

        Args:
            m: statistics of the contexts, (K, C).
            frequency: of each context in this batch, (K, 1), sum 1.
            total: elements per channel in the batch.
            wanted: 0-dim; where it is false, there was no batch, and nothing counts as skipped.
        """
        mean, var = m.mean, m.unbiased().var
        finite = fits(self, mean, var) & torch.isfinite(frequency).all() & (total > 1)
        assert self.prior is not None
        batches = count_batch(self, finite).to(frequency.dtype)
        count_skipped(self, ~finite if wanted is None else wanted & ~finite)
        momentum = self._buffers["_momentum"]
        weight = 1 / batches if momentum is None else momentum.to(frequency.dtype)
        prior = torch.lerp(self.prior.to(frequency.dtype), frequency[:, 0], weight)
        if momentum is None:
            # The average of all samples: of those that the context has ever had, this batch's part.
            step = frequency / (batches * prior.unsqueeze(1)).clamp_min(torch.finfo(frequency.dtype).tiny)
            step = torch.where(self.unseen(), (frequency > 0).to(step.dtype), step)
        else:
            step = self._step_size(frequency, weight)
        for name, new in zip(self.running_names, (mean, var), strict=True):
            old: Tensor = getattr(self, name)
            # In the dtype of the batch's statistics, rounded once; torch.lerp takes one dtype only.
            moved = (1 - step) * old + step * new
            old.copy_(torch.where(finite & (frequency > 0), moved.to(old.dtype), old))
        if self.priors is None:
            self.prior.copy_(torch.where(finite, prior.to(self.prior.dtype), self.prior))

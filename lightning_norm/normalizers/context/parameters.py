"""The tensors of a BatchNorm, once per context: how they are made, loaded, handed over, and pooled into one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_norm.errors import counted
from lightning_norm.layers.arguments import check_count
from lightning_norm.layers.base import MomentNorm
from lightning_norm.layers.declared import ExtraBuffers
from lightning_norm.layers.published_files import PublishedNames
from lightning_norm.layers.running_stats import reads_copies
from lightning_norm.ops.layout import at_least_float32, stat_dtype
from lightning_norm.ops.moments import Moments


class ContextParameters(MomentNorm):
    """Abstract: weight, bias and running statistics are (K, C), a row per context.

    ``prior`` (K,) is the running frequency of the contexts: the mean of all responsibilities, weighted by ``momentum``.

    Args:
        num_features: channels.
        num_contexts: K.
        options: see :class:`MomentNorm`.

    Raises:
        ValueError: ``num_contexts`` is not a positive int.
    """

    translated_tensors: ClassVar[tuple[str, ...]] = ("weight", "bias", "running_mean", "running_var")
    extra_buffers: ClassVar[ExtraBuffers] = ExtraBuffers(float32=("prior",))
    _has_rows: ClassVar[bool] = True
    published_names: ClassVar[PublishedNames] = PublishedNames(("context_norm_layers.", "means", "variances"))
    priors: tuple[float, ...] | None
    prior: Tensor | None

    def __init__(self, num_features: int, *, num_contexts: int = 3, **options: Any) -> None:
        num_contexts = check_count(f"{type(self).__name__}: num_contexts", num_contexts)
        self.num_contexts = num_contexts
        super().__init__(num_features, **options)
        for name in ("weight", "bias"):
            parameter = getattr(self, name)
            if parameter is not None:
                # All contexts start alike, so that a swapped network computes what it did.
                setattr(self, name, nn.Parameter(parameter.detach().repeat(num_contexts, 1)))

    def _make_running_stats(self, num_features: int, track: bool, device: Any, dtype: torch.dtype | None) -> None:
        super()._make_running_stats(num_features, track, device, dtype)
        k = self.num_contexts
        # The base class makes (C,) buffers; each context starts from a row of its own.
        for name in self.running_names if track else ():
            setattr(self, name, getattr(self, name).repeat(k, 1))
        prior = torch.tensor(self.priors or (1 / k,) * k, device=device, dtype=at_least_float32(dtype))
        self.register_buffer("prior", prior if track else None)

    def reset_running_stats(self) -> None:
        """Set means to 0, variances to 1, the counters to 0 and the prior of each context to 1 / K, if it can move."""
        super().reset_running_stats()
        if self.prior is not None and self.priors is None:
            self.prior.fill_(1 / self.num_contexts)

    def prior_or_uniform(self) -> Tensor:
        """Return ``prior``, (K,); 1 / K each in a layer without running statistics."""
        if self.prior is not None:
            return self.prior
        parameter = next(self.parameters(), None)
        device = None if parameter is None else parameter.device
        return torch.tensor(self.priors or (1 / self.num_contexts,) * self.num_contexts, device=device)

    def unseen(self) -> Tensor:
        """Tell which contexts still have the statistics of a new layer, (K, 1)."""
        mean, var = (getattr(self, name) for name in self.running_names)
        unseen: Tensor = ((mean == 0) & (var == 1)).all(1, keepdim=True)
        return unseen

    def running_per_context(self) -> tuple[Moments, Tensor, Moments]:
        """Return the running statistics of each context (K, C), their priors (K, 1), and the pooled statistics (1, C).

        A context that training has not seen has prior 0 and the pooled statistics, so that it is answered by the
        others. Before training, when none was seen, all keep the values that they start with.
        """
        mean, var = (getattr(self, name) for name in self.running_names)
        mean, var = (t.to(stat_dtype(t), copy=reads_copies()) for t in (mean, var))
        # torch.where in place of a branch: no value is read back from the device, and a compiled graph serves both.
        # As published, a context with a constant prior is answered by its own statistics, whatever they are.
        unseen = self.unseen() if self.priors is None else torch.zeros_like(self.unseen())
        prior = self.prior_or_uniform().to(mean.dtype).unsqueeze(1)
        prior = torch.where(unseen & ~unseen.all(), 0, prior)
        prior = prior / prior.sum().clamp_min(torch.finfo(prior.dtype).tiny)
        pooled = pool_moments(mean, var, prior)
        per_context = Moments(torch.where(unseen, pooled.mean, mean), torch.where(unseen, pooled.var, var), 1)
        return per_context, prior, pooled

    def seen_prior(self) -> Tensor:
        """Return the prior of each context, (K, 1), sum 1; it is 0 for a context that training has not seen."""
        return self.running_per_context()[1] if self.has_running_stats else self.prior_or_uniform().unsqueeze(1)

    def running(self) -> Moments:
        """Return the running statistics of all contexts pooled, (1, C)."""
        return self.running_per_context()[2]

    def _as_batch_norm(self) -> dict[str, Tensor]:
        """Return one BatchNorm's tensors, (C,) each: moments pooled, weight and bias averaged by the prior."""
        tensors: dict[str, Tensor] = {}
        if self.has_running_stats:
            pooled = self.running()
            tensors = {"running_mean": pooled.mean[0], "running_var": pooled.var[0]}
        prior = self.seen_prior()
        for name in ("weight", "bias"):
            parameter = getattr(self, name)
            if parameter is not None:
                tensors[name] = (prior * parameter.detach()).sum(0)
        return tensors

    @torch.no_grad()
    def _follow(self, name: str, before: Tensor, now: Tensor) -> None:
        """Move the rows of all contexts as their average was moved, variances by its factor."""
        rows: Tensor = getattr(self, name)
        if rows.is_meta or now.is_meta or torch.equal(before, now):
            return
        before, now = before.to(rows), now.to(rows)
        if name == "running_var":
            rows.mul_(now / before.clamp_min(torch.finfo(before.dtype).tiny))
        else:
            rows.add_(now - before)

    def take_from(self, source: nn.Module) -> None:
        """Start every context from the source's weight, bias and running statistics.

        Raises:
            ValueError: the source has another number of contexts.
        """
        super().take_from(source)
        # From another layer with contexts each row goes to its own context, and the priors with them.
        per_context = isinstance(source, ContextParameters)
        if isinstance(source, ContextParameters) and source.num_contexts != self.num_contexts:
            raise ValueError(
                f"cannot turn {counted(source.num_contexts, 'context')} into {self.num_contexts}: type "
                f"num_contexts={source.num_contexts}, or undo the first swap."
            )
        for name in (*self.translated_tensors, "prior") if per_context else self.translated_tensors:
            old, new = getattr(source, name, None), getattr(self, name)
            if old is None or new is None:
                continue
            with torch.no_grad():
                # (C,) broadcasts to a row per context.
                new.copy_(old)
            if isinstance(new, nn.Parameter):
                new.requires_grad_(old.requires_grad)

    def return_to(self, source: nn.Module) -> None:
        """Give the source what is not translated, and of a tensor whose rows changed their average over contexts."""
        super().return_to(source)
        averages: dict[str, Tensor] = {}
        per_context = isinstance(source, ContextParameters)
        for name in (*self.translated_tensors, "prior") if per_context else self.translated_tensors:
            ours, theirs = getattr(self, name), getattr(source, name, None)
            # What did not change is left alone: an average of equal rows would still round.
            if ours is None or theirs is None or ours.is_meta or torch.equal(ours, theirs.to(ours).expand_as(ours)):
                continue
            averages = averages or ({} if per_context else self._as_batch_norm())
            with torch.no_grad():
                theirs.copy_(ours if per_context else averages[name])

    def _translate(self, state_dict: dict[str, Any], prefix: str, strict: bool = True) -> None:
        of_batch_norm = False
        for name in self.translated_tensors:
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor) or getattr(self, name) is None:
                continue
            if value.numel() == self.num_features:
                # A BatchNorm's tensor becomes the row of every context.
                of_batch_norm = True
                state_dict[prefix + name] = value.reshape(1, -1).repeat(self.num_contexts, 1)
            elif value.dim() == 2 and value.shape[0] != self.num_contexts:
                raise RuntimeError(
                    f"{prefix[:-1] or 'this layer'}: the checkpoint has {counted(value.shape[0], 'context')}, this "
                    f"{type(self).__name__} {self.num_contexts}. Type num_contexts={value.shape[0]}."
                )
        # A BatchNorm's checkpoint has none of the buffers that only contexts need: they keep their starting values.
        for name in self.extra_buffers.float32 if of_batch_norm and strict else ():
            buffer = getattr(self, name, None)
            if buffer is not None:
                state_dict.setdefault(prefix + name, buffer.detach().clone())


def pool_moments(mean: Tensor, var: Tensor, weights: Tensor) -> Moments:
    r"""Pool the moments (K, C) of several sets by the law of total variance, into (1, C).

    .. math:: \mu = \sum_k w_k \mu_k, \qquad \sigma^2 = \sum_k w_k \left[\sigma_k^2 + (\mu_k - \mu)^2\right]

    Args:
        mean: of each set.
        var: biased variance of each set.
        weights: (K, 1), with the sum 1.
    """
    center = (weights * mean).sum(0, keepdim=True)
    return Moments(center, (weights * (var + (mean - center).square())).sum(0, keepdim=True), 1)

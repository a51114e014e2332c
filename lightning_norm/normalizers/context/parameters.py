"""One row of a BatchNorm's tensors per context: where they come from, how they move, what they are worth together."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_norm.layers.base import MomentNorm
from lightning_norm.ops.layout import at_least_float32, stat_dtype
from lightning_norm.ops.moments import Moments


class ContextRows(MomentNorm):
    """Abstract: weight, bias and running statistics are (K, C), a row per context, and ``prior`` (K,) is their share.

    Args:
        num_features: channels.
        num_contexts: K.
        options: see :class:`MomentNorm`.

    Raises:
        ValueError: ``num_contexts`` is not a positive int.
    """

    translated_tensors: ClassVar[tuple[str, ...]] = ("weight", "bias", "running_mean", "running_var")
    float32_buffers: ClassVar[tuple[str, ...]] = ("prior",)
    has_rows: ClassVar[bool] = True
    prior: Tensor | None

    def __init__(self, num_features: int, *, num_contexts: int = 3, **options: Any) -> None:
        if not isinstance(num_contexts, int) or isinstance(num_contexts, bool) or num_contexts < 1:
            raise ValueError(f"{type(self).__name__}: num_contexts must be a positive int, got {num_contexts!r}.")
        self.num_contexts = num_contexts
        super().__init__(num_features, **options)
        for name in ("weight", "bias"):
            one = self._parameters[name]
            if one is not None:
                setattr(self, name, nn.Parameter(one.detach().repeat(num_contexts, 1)))

    def _make_running_stats(self, num_features: int, track: bool, device: Any, dtype: torch.dtype | None) -> None:
        super()._make_running_stats(num_features, track, device, dtype)
        k = self.num_contexts
        for name in self.running_names if track else ():
            one = self._buffers[name]
            assert one is not None
            self._buffers[name] = one.repeat(k, 1)
        prior = torch.full((k,), 1 / k, device=device, dtype=at_least_float32(dtype))
        self.register_buffer("prior", prior if track else None)

    def reset_running_stats(self) -> None:
        """Set means to 0, variances to 1, the counters to 0 and all shares to 1 / K."""
        super().reset_running_stats()
        if self.prior is not None:
            self.prior.fill_(1 / self.num_contexts)

    def prior_or_uniform(self) -> Tensor:
        """Return the running share of each context, (K,); 1 / K where none is kept."""
        if self.prior is not None:
            return self.prior
        held = next(self.parameters(), None)
        return torch.full((self.num_contexts,), 1 / self.num_contexts, device=None if held is None else held.device)

    def unseen(self) -> Tensor:
        """Tell which contexts still have the statistics of a new layer, (K, 1)."""
        mean, var = (self._buffers[name] for name in self.running_names)
        assert mean is not None
        assert var is not None
        return ((mean == 0) & (var == 1)).all(1, keepdim=True)

    def rows(self) -> tuple[Moments, Tensor, Moments]:
        """Return running statistics (K, C), shares (K, 1), and both pooled, (1, C); unseen contexts hold the pooled."""
        mean, var = (self._buffers[name] for name in self.running_names)
        assert mean is not None
        assert var is not None
        mean, var = mean.to(stat_dtype(mean)), var.to(stat_dtype(var))
        new = self.unseen()
        share = self.prior_or_uniform().to(mean.dtype).unsqueeze(1)
        share = torch.where(new & ~new.all(), 0, share)
        share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
        pooled = pool(mean, var, share)
        return Moments(torch.where(new, pooled.mean, mean), torch.where(new, pooled.var, var), 1), share, pooled

    def shares(self) -> Tensor:
        """Return the share of each context, (K, 1); a context not seen in training has none."""
        return self.rows()[1] if self.track_running_stats else self.prior_or_uniform().unsqueeze(1)

    def running(self) -> Moments:
        """Return the running statistics of all contexts together, (1, C)."""
        return self.rows()[2]

    def as_batch_norm(self) -> dict[str, Tensor]:
        """Return what the rows are worth together, (C,) each: moments pooled, weight and bias averaged by share."""
        found: dict[str, Tensor] = {}
        share = self.shares()
        if self.track_running_stats:
            pooled = self.running()
            found = {"running_mean": pooled.mean[0], "running_var": pooled.var[0]}
        for name in ("weight", "bias"):
            held = self._parameters[name]
            if held is not None:
                found[name] = (share * held.detach()).sum(0)
        return found

    def take_from(self, source: nn.Module) -> None:
        """Start every context from the layer's own weight, bias and running statistics.

        Raises:
            ValueError: the layer has another number of contexts.
        """
        super().take_from(source)
        alike = isinstance(source, ContextRows)
        if isinstance(source, ContextRows) and source.num_contexts != self.num_contexts:
            raise ValueError(
                f"cannot turn {source.num_contexts} contexts into {self.num_contexts}: type "
                f"num_contexts={source.num_contexts}, or undo the first swap."
            )
        for name in (*self.translated_tensors, "prior") if alike else self.translated_tensors:
            held, own = getattr(source, name, None), getattr(self, name)
            if held is None or own is None:
                continue
            with torch.no_grad():
                own.copy_(held)
            if isinstance(own, nn.Parameter):
                own.requires_grad_(held.requires_grad)

    def return_to(self, source: nn.Module) -> None:
        """Give the layer what is not converted, and the rows' common value where a row changed."""
        super().return_to(source)
        now: dict[str, Tensor] = {}
        for name in self.translated_tensors:
            own, back = getattr(self, name), getattr(source, name, None)
            if own is None or back is None or own.is_meta or torch.equal(own, back.to(own).expand_as(own)):
                continue
            now = now or self.as_batch_norm()
            with torch.no_grad():
                back.copy_(own if isinstance(source, ContextRows) else now[name])

    def _translate(self, state_dict: dict[str, Any], prefix: str) -> None:
        plain = False
        for name in self.translated_tensors:
            held, own = state_dict.get(prefix + name), getattr(self, name)
            if not isinstance(held, Tensor) or own is None:
                continue
            if held.numel() == self.num_features:
                plain = True
                state_dict[prefix + name] = held.reshape(1, -1).repeat(self.num_contexts, 1)
            elif held.dim() == 2 and held.shape[0] != self.num_contexts:
                raise RuntimeError(
                    f"{prefix[:-1] or 'this layer'}: the checkpoint has {held.shape[0]} contexts, this "
                    f"{type(self).__name__} {self.num_contexts}. Type num_contexts={held.shape[0]}."
                )
        for name in (
            self.float32_buffers if plain else ()
        ):  # absent from a BatchNorm's checkpoint: keep the starting value
            value = self._buffers.get(name)
            if value is not None:
                state_dict.setdefault(prefix + name, value.detach().clone())


def pool(mean: Tensor, var: Tensor, share: Tensor) -> Moments:
    """Pool (K, C) moments by shares (K, 1) with sum 1, by the law of total variance."""
    center = (share * mean).sum(0, keepdim=True)
    return Moments(center, (share * (var + (mean - center).square())).sum(0, keepdim=True), 1)

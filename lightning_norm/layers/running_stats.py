"""Running statistics: buffers, update, evaluation. Kept in float32 at least, whatever the model is cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_norm.layers.accumulators import AccumulationWindow, StatisticsAccumulator
from lightning_norm.layers.variance import unbiased
from lightning_norm.ops.layout import at_least_float32
from lightning_norm.ops.moments import Moments


class RunningStats(nn.Module):
    """Mixin: ``running_mean``, ``running_var`` (C,) and ``num_batches_tracked`` with torch's names and meaning."""

    running_names: ClassVar[tuple[str, str]] = ("running_mean", "running_var")
    counters: ClassVar[tuple[str, ...]] = ()
    """Further integers that a resumed run needs; a BatchNorm's checkpoint has none of them, and they start at 0."""

    float32_buffers: ClassVar[tuple[str, ...]] = ()
    """Further buffers that stay in float32 at least."""
    no_recalibration: ClassVar[str] = ""
    """Why the running statistics cannot be re-estimated from some batches; empty where they can."""
    no_window: ClassVar[str] = ""
    """Why the running statistics cannot wait for the end of a window of batches; empty where they can."""
    pools_means: ClassVar[bool] = True
    """The running variance is that of all samples together: it holds the spread of their means."""

    pool: StatisticsAccumulator | None = None
    """Takes the statistics of each training step in place of the running ones, while those are re-estimated."""
    window: AccumulationWindow | None = None
    """Gathers the statistics of several batches, which then move the running ones once: :meth:`close_window`."""
    num_batches_tracked: Tensor | None
    skipped_updates: Tensor | None

    def _make_running_stats(
        self, num_features: int, track: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        self.track_running_stats = track
        for name, fill in zip(self.running_names, (0.0, 1.0), strict=True):
            stat = torch.full((num_features,), fill, device=device, dtype=at_least_float32(dtype))
            self.register_buffer(name, stat if track else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device) if track else None)
        self.register_buffer("skipped_updates", torch.tensor(0, device=device) if track else None, persistent=False)
        for name in self.counters:
            self.register_buffer(name, torch.tensor(0, device=device) if track else None)

    def track(self, m: Moments) -> Moments:
        """In training, fold m into the running statistics and return m; in evaluation, return the running ones.

        Call it exactly once per algebra, with the result of ``over_batch()``. An update with a NaN or an infinity in it
        is skipped and counted in ``skipped_updates``.
        """
        if not self.track_running_stats:
            return m
        if not self.training:
            return self.running()
        if self.pool is not None:
            self.pool.add(*self._gathered(m, *self.running_target(m)))
            return m
        self._update(m)
        return m

    def _gathered(self, m: Moments, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
        """Return mean, variance and count as they are pooled over batches, given what was observed."""
        if self.pools_means:
            return m.mean, m.var, m.count
        return mean, var, Moments(m.mean, m.var * 0, m.count, m.ranks).over_batch().count

    def _settled(self, m: Moments) -> tuple[Tensor, Tensor]:
        """Return the mean and variance for the running statistics, given what was pooled."""
        return self.running_target(m) if self.pools_means else (m.mean, m.var)

    def open_window(self) -> None:
        """From now on, gather the statistics of each batch until :meth:`close_window`.

        Raises:
            ValueError: there are no running statistics, or they cannot wait.
        """
        stat = self._buffers[self.running_names[0]] if self.track_running_stats else None
        if stat is None or self.no_window:
            raise ValueError(f"{type(self).__name__}: {self.no_window or 'it keeps no running statistics'}.")
        features = stat.shape[-1]
        self.window = AccumulationWindow((stat.numel() // features, features), self.pools_means, stat.device)

    @torch.no_grad()
    def close_window(self) -> None:
        """Move the running statistics by what the window gathered, as if it had been one batch, and empty it."""
        if self.window is not None:
            self._close(self.window.moments())
            self.window.clear()

    def _close(self, m: Moments) -> None:
        self._shift(*self._settled(m), (torch.as_tensor(m.count) > 1).all())

    @torch.no_grad()
    def write_running(self, m: Moments) -> None:
        """Set the running statistics to those of pooled moments."""
        mean, var = self._settled(m)
        for name, value in zip(self.running_names, (mean, var), strict=True):
            stat = self._buffers[name]
            assert stat is not None
            seen = torch.as_tensor(m.count, device=value.device) > 0
            stat.copy_(torch.where(seen, value, stat.to(value).reshape(value.shape)).reshape(stat.shape))

    def running(self) -> Moments:
        """Return the running statistics as (1, C) moments."""
        mean, var = (self._buffers[name] for name in self.running_names)
        assert mean is not None
        assert var is not None
        return Moments(mean.unsqueeze(0), var.unsqueeze(0), 1)

    def running_target(self, m: Moments) -> tuple[Tensor, Tensor]:
        """Return the mean and the unbiased variance that the running statistics move towards."""
        return m.mean, m.var * unbiased(m.count)

    @torch.no_grad()
    def _usable(self, mean: Tensor, var: Tensor, count: int | Tensor) -> Tensor:
        """Tell whether statistics may move the running ones, as a 0-dim tensor; count those that may not."""
        finite = torch.isfinite(mean + var).all()
        if isinstance(count, Tensor):  # pooled over ranks, which may all be empty
            finite = finite & (count > 1).all()
        assert self.skipped_updates is not None
        self.skipped_updates.add_(~finite)
        return finite

    @torch.no_grad()
    def _update(self, m: Moments, wanted: Tensor | None = None) -> None:
        """Move the running statistics towards m, or gather it, unless a 0-dim ``wanted`` is false."""
        mean, var = self.running_target(m)
        usable = self._usable(mean, var, m.count)
        usable = usable if wanted is None else usable & wanted
        if self.window is None:
            self._shift(mean, var, usable)
        else:
            self.window.add(*self._gathered(m, mean, var), usable)

    @torch.no_grad()
    def _shift(self, mean: Tensor, var: Tensor, usable: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(usable)
        momentum = self._buffers["_momentum"]
        weight = 1.0 / self.num_batches_tracked.clamp_min(1).to(mean.dtype) if momentum is None else momentum
        for name, new in zip(self.running_names, (mean, var), strict=True):
            old = self._buffers[name]
            assert old is not None
            moved = torch.lerp(old, new.detach().reshape(-1).to(old.dtype), weight.to(old.dtype))
            old.copy_(torch.where(usable, moved, old))

    def keep_wide(self) -> None:
        """Widen again what FSDP's mixed precision has narrowed: it spares the buffers of torch's BatchNorm alone."""
        stat = self._buffers.get(self.running_names[0])
        if stat is None or stat.dtype == at_least_float32(stat.dtype):
            return
        for name in (*self.running_names, *self.float32_buffers):
            held = self._buffers.get(name)
            if held is not None:
                held.data = held.data.to(at_least_float32(held.dtype))

    def without_effect(self) -> dict[str, str]:
        """Return the scheduled arguments that do nothing in this layer as it is: name -> the argument that says so."""
        return {} if vars(self).get("track_running_stats", True) else {"momentum": "track_running_stats=False"}

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the counters to 0."""
        if self.track_running_stats:
            for name in (*self.running_names, "num_batches_tracked", "skipped_updates", *self.counters):
                buffer = self._buffers[name]
                assert buffer is not None
                buffer.fill_(name == self.running_names[1])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        names = [name for name in self.counters if self._buffers.get(name) is not None]
        if not any(prefix + name in state_dict for name in names):
            state_dict.update({prefix + name: torch.tensor(0) for name in names})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers.get(name) for name in (*self.running_names, *self.float32_buffers)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new.dtype != at_least_float32(new.dtype):
                self._buffers[name] = old.to(new.device, at_least_float32(old.dtype))
        return self

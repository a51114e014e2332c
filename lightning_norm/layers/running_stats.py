"""Running statistics: buffers, update, evaluation. Kept in float32 at least, whatever the model is cast to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_norm.layers.accumulators import AccumulationWindow, StatisticsAccumulator
from lightning_norm.layers.declared import ExtraBuffers, Unsupported
from lightning_norm.layers.pausing import is_paused
from lightning_norm.ops import eager, torch_private
from lightning_norm.ops.layout import at_least_float32, cast
from lightning_norm.ops.moments import Moments, to_var

_NOTHING = Unsupported()


class RunningStats(nn.Module):
    r"""Mixin: ``running_mean``, ``running_var`` (C,) and ``num_batches_tracked`` with torch's names and meaning.

    In training, with m the :attr:`momentum`, or 1 / ``num_batches_tracked`` where that is ``None``,

    .. math:: \hat\mu \leftarrow (1 - m)\,\hat\mu + m\,\mu, \qquad
        \hat\sigma^2 \leftarrow (1 - m)\,\hat\sigma^2 + m\,\frac{n}{n - 1}\,\sigma^2

    for the mean and the biased variance of n elements. A batch in which either is not finite moves nothing and is
    counted in ``skipped_updates``, a buffer that no checkpoint holds. Buffers stay in float32 at least under
    ``model.half()``.

    >>> from lightning_norm import BatchNorm
    >>> layer = BatchNorm(2, momentum=None)
    >>> _ = layer(torch.full((4, 2), float("inf"))), layer(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    >>> layer.running_mean, int(layer.skipped_updates), layer.half().running_mean.dtype
    (tensor([2., 2.]), 1, torch.float32)
    """

    extra_buffers: ClassVar[ExtraBuffers] = ExtraBuffers()
    """Buffers beyond a BatchNorm's that need more than to be registered."""
    _includes_between_var: ClassVar[bool] = True
    """The running variance is that of all samples together: it includes the variance between their means."""

    _accumulator: StatisticsAccumulator | AccumulationWindow | None = None
    """Takes the statistics of each training step in place of the running ones: a :class:`StatisticsAccumulator` while
    those are re-estimated, an :class:`AccumulationWindow` where they move once per optimizer step."""

    _statistics_paused: bool = False
    """A thread is in a block of :func:`lightning_norm.paused_statistics`; :func:`is_paused` tells whether this one."""

    eps: float
    num_batches_tracked: Tensor | None
    skipped_updates: Tensor | None

    @property
    def running_names(self) -> tuple[str, str]:
        """Names of the buffers of the running mean and the running variance, or standard deviation ``running_std``."""
        return "running_mean", "running_var"

    @property
    def unsupported(self) -> Unsupported:
        """What the layer cannot do, and why; a class that cannot do it with any arguments writes it as an attribute."""
        return _NOTHING

    @property
    def train_uses_running_stats(self) -> bool:
        """Whether in training the output depends on the running statistics, or on another buffer that it moves."""
        return False

    @property
    def has_running_stats(self) -> bool:
        """Whether there are running statistics to evaluate on: as in torch by the buffers, and not by the flag."""
        mean, var = self.running_names  # not by all(), for every forward pass asks it a few times
        return self._buffers.get(mean) is not None and self._buffers.get(var) is not None

    def _make_running_stats(
        self, num_features: int, track: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Register the buffers, or ``None`` under their names as torch does."""
        # On the layer itself, where torch.compile sees it change.
        self.track_running_stats, self._statistics_paused = track, False
        # torch's starting values, with which a fresh layer evaluates to its own input.
        for name, fill in zip(self.running_names, (0.0, 1.0), strict=True):
            stat = torch.full((num_features,), fill, device=device, dtype=at_least_float32(dtype))
            self.register_buffer(name, stat if track else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device) if track else None)
        # Not saved: a checkpoint must have the keys of torch's BatchNorm and no others.
        self.register_buffer("skipped_updates", torch.tensor(0, device=device) if track else None, persistent=False)
        for name in self.extra_buffers.counters:
            self.register_buffer(name, torch.tensor(0, device=device) if track else None)

    def track(self, m: Moments) -> Moments:
        """In training, move the running statistics towards m and return m; in evaluation, return the running ones.

        Call it exactly once per algebra, with the result of ``over_batch()``; both are then (1, C). A class that
        overrides ``running_target`` to say what is kept, such as InstanceNorm, may hand over the moments of each
        sample, (N, C), and gets them back in training.
        """
        if not self.training:
            return self.running() if self.has_running_stats else m
        if moves_running_stats(self):
            update_running(self, m)
        return m

    def running(self) -> Moments:
        """Return the running statistics as (1, C) moments; a running standard deviation as a variance."""
        mean, var = running_buffers(self)
        return Moments(mean, to_var(var, self.eps) if self.running_names[1] == "running_std" else var, 1)

    def running_target(self, m: Moments) -> tuple[Tensor, Tensor]:
        """Return the mean and unbiased variance that the running statistics move towards; a class may override it."""
        return m.mean, m.unbiased().var

    def _move_by_window(self, m: Moments) -> None:
        """Move the running statistics by the moments of a whole window of batches."""
        mean, var = _from_accumulator(self, m)
        enough, finite = (torch.as_tensor(m.count) > 1).all(), fits(self, mean, var)
        count_skipped(self, enough & ~finite)
        _move_running(self, mean, var, enough & finite)

    def without_effect(self) -> dict[str, str]:
        """Return the scheduled arguments that do nothing in this layer as it is: name -> the argument that says so."""
        return {} if vars(self).get("track_running_stats", True) else {"momentum": "track_running_stats=False"}

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the counters to 0.

        >>> from lightning_norm import BatchNorm
        >>> layer = BatchNorm(2)
        >>> _ = layer(torch.randn(4, 2) + 9)
        >>> layer.reset_running_stats()
        >>> layer.running_mean, layer.num_batches_tracked
        (tensor([0., 0.]), tensor(0))
        """
        if self.track_running_stats:
            for name in (*self.running_names, "num_batches_tracked", "skipped_updates", *self.extra_buffers.counters):
                buffer = self._buffers.get(name)
                if buffer is not None:
                    buffer.fill_(name == self.running_names[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers with the layer, and keep the statistics in float32 at least."""
        before = {name: getattr(self, name, None) for name in (*self.running_names, *self.extra_buffers.float32)}
        unsaved = self._non_persistent_buffers_set
        unmade = [name for name, t in self.named_buffers(recurse=False) if t.is_meta and name in unsaved]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # What no checkpoint brings must not stay as to_empty() leaves it.
        for name in unmade:
            if not self.get_buffer(name).is_meta:
                self.get_buffer(name).zero_()
        # From the value before the cast, whose digits the narrow one has lost.
        for name, old in before.items():
            new = getattr(self, name, None)
            if old is not None and new is not None and new.dtype != at_least_float32(new.dtype):
                setattr(self, name, old.to(new.device, at_least_float32(old.dtype)))
        return self


def trains_with_running_stats(layer: RunningStats) -> bool:
    """Tell whether the layer is in training and has running statistics that belong to it."""
    return layer.training and layer.track_running_stats and layer.has_running_stats


def moves_running_stats(layer: RunningStats) -> bool:
    """Tell whether the next forward pass moves the running statistics: not while they are paused."""
    return trains_with_running_stats(layer) and not (layer._statistics_paused and is_paused(layer))


def reads_copies() -> bool:
    """Tell whether a forward pass must read copies of the running statistics.

    It must where a backward pass may need them after the next batch has moved the buffers; and always in a graph of
    ``torch.jit.trace``, which is checked without gradients and must come out the same.
    """
    return torch.is_grad_enabled() or torch_private.tracing_state() is not None


def running_buffers(layer: RunningStats, names: tuple[str, str] | None = None) -> tuple[Tensor, Tensor]:
    """Return the running mean, and the running variance or standard deviation, as (1, C); or two others by name."""
    mean, var = (layer.get_buffer(name).unsqueeze(0) for name in names or layer.running_names)
    return (mean.clone(), var.clone()) if reads_copies() else (mean, var)


@torch_private.without_gradients
def update_running(layer: RunningStats, m: Moments, wanted: Tensor | None = None) -> None:
    """Move the running statistics towards m, or accumulate it, unless a 0-dim ``wanted`` is false."""
    mean, var = layer.running_target(m)
    if layer._accumulator is not None:
        _accumulate(layer, m, mean, var, wanted)
        return
    if wanted is None and not isinstance(m.count, Tensor) and _moved_at_once(layer, mean, var):
        return
    usable = is_usable(layer, mean, var, m.count)
    # Counted as skipped is only what was not finite, and not what a method chose to leave out.
    _move_running(layer, mean, var, usable if wanted is None else usable & wanted)


def _moved_at_once(layer: RunningStats, mean: Tensor, var: Tensor) -> bool:
    """Move the running statistics in few operations, where values may be read back and all of them are finite."""
    if not eager.may_read_back(mean) or torch_private.is_transformed():
        return False
    old: list[Any] = [layer._buffers[name] for name in layer.running_names]
    new = [cast(value.view(-1), buffer.dtype) for buffer, value in zip(old, (mean, var), strict=True)]
    # No product with a NaN or an infinity is finite. A sum that is not may be one of finite numbers: that is for the
    # caller to find out.
    if not math.isfinite((new[0] * new[1]).sum().item()):
        return False
    batches, momentum = layer.num_batches_tracked, layer._buffers.get("_momentum")
    if batches is not None:
        batches.add_(1)
    weight = momentum.item() if momentum is not None else 1.0 if batches is None else 1.0 / batches.item()
    for buffer, value in zip(old, new, strict=True):
        buffer.lerp_(value, weight)
    return True


def _accumulate(layer: RunningStats, m: Moments, mean: Tensor, var: Tensor, wanted: Tensor | None) -> None:
    """Hand moments to the layer's accumulator, given what the running statistics would move towards."""
    values = _for_accumulator(layer, m, mean, var)
    if isinstance(layer._accumulator, StatisticsAccumulator):
        # It leaves out, and counts, what is not finite by itself.
        layer._accumulator.add(*values)
    elif layer._accumulator is not None:
        usable = is_usable(layer, mean, var, m.count)
        layer._accumulator.add(*values, usable if wanted is None else usable & wanted)


@torch_private.without_gradients
def is_usable(layer: RunningStats, mean: Tensor, var: Tensor, count: int | Tensor) -> Tensor:
    """Tell whether statistics may move the running ones, as a 0-dim tensor; count those that may not."""
    usable = fits(layer, mean, var)
    if isinstance(count, Tensor):
        # The ranks that were pooled may all have been empty, and all positions padding.
        usable = usable & (count.sum() > 1)
    count_skipped(layer, ~usable)
    return usable


def fits(layer: RunningStats, mean: Tensor, var: Tensor) -> Tensor:
    """Tell whether statistics are finite in the dtype of the running ones, as a 0-dim tensor."""
    dtype = layer.get_buffer(layer.running_names[0]).dtype
    return torch.isfinite(mean.to(dtype)).all() & torch.isfinite(var.to(dtype)).all()


def count_skipped(layer: RunningStats, skipped: Tensor) -> None:
    """Count an update that was skipped, if a 0-dim tensor is true."""
    # No state_dict holds the counter, so that it may not be passed to a function that is transformed.
    if layer.skipped_updates is not None and not torch_private.is_captured(layer.skipped_updates):
        layer.skipped_updates.add_(skipped)


def count_batch(layer: RunningStats, usable: Tensor) -> Tensor:
    """Count a batch if a 0-dim ``usable`` is true, and return how many there were, at least 1."""
    # torch allows that the user sets the counter to None.
    if layer.num_batches_tracked is None:
        return torch.ones_like(usable, dtype=torch.long)
    return layer.num_batches_tracked.add_(usable).clamp_min(1)


def _move_running(layer: RunningStats, mean: Tensor, var: Tensor, usable: Tensor) -> None:
    """Move the running statistics a step of size ``momentum`` towards these, if a 0-dim ``usable`` is true."""
    batches = count_batch(layer, usable)
    momentum = layer._buffers.get("_momentum")
    weight = 1.0 / batches.to(mean.dtype) if momentum is None else momentum
    for name, new in zip(layer.running_names, (mean, var), strict=True):
        old: Tensor = getattr(layer, name)
        write(old, torch.lerp(old, new.detach().reshape(-1).to(old.dtype), weight.to(old.dtype)), usable)


def write(buffer: Tensor, new: Tensor, usable: Tensor) -> None:
    """Write new values, in the shape and dtype of the buffer, where ``usable`` is true; call it under ``no_grad``."""
    # By torch.where and not under an if, which would read a value back from the device.
    buffer.copy_(torch.where(usable, new.reshape(buffer.shape).to(buffer.dtype), buffer))


def open_window(layer: RunningStats) -> None:
    """From now on, gather the statistics of each batch until :func:`close_window`.

    Args:
        layer: with running statistics, which do not move meanwhile.

    Raises:
        ValueError: there are no running statistics, or they cannot wait.
    """
    if not layer.track_running_stats or not layer.has_running_stats or layer.unsupported.window:
        raise ValueError(f"{type(layer).__name__}: {layer.unsupported.window or 'it keeps no running statistics'}.")
    stat = layer.get_buffer(layer.running_names[0])
    # One row of all channels, or with contexts one row for each.
    features = stat.shape[-1]
    shape = (stat.numel() // features, features)
    layer._accumulator = AccumulationWindow(shape, layer._includes_between_var, stat.device)


def window_of(layer: RunningStats) -> AccumulationWindow | None:
    """Return the window that gathers a layer's statistics, ``None`` where none is open."""
    return layer._accumulator if isinstance(layer._accumulator, AccumulationWindow) else None


def drop_window(layer: RunningStats) -> None:
    """Take the window off; what it has gathered moves nothing."""
    layer._accumulator = None


@torch.no_grad()
def close_window(layer: RunningStats) -> None:
    """Move the running statistics by what the window gathered, as if it had been one batch, and empty it."""
    window = window_of(layer)
    if window is not None:
        layer._move_by_window(window.moments())
        # The window stays open and starts anew with the next batch.
        window.clear()


@torch.no_grad()
def write_running(layer: RunningStats, m: Moments) -> None:
    """Set the running statistics to those of accumulated moments.

    Args:
        layer: with running statistics.
        m: moments and counts, (K, C) and (K, 1), K being 1 but for contexts.
    """
    # A context that no batch had keeps its statistics.
    for name, value in zip(layer.running_names, _from_accumulator(layer, m), strict=True):
        stat = layer.get_buffer(name)
        seen = torch.as_tensor(m.count, device=value.device) > 0
        stat.copy_(torch.where(seen, value, stat.to(value).reshape(value.shape)).reshape(stat.shape))


def keep_float32(layer: Any) -> None:
    """Widen again what FSDP's mixed precision has narrowed: it spares the buffers of torch's BatchNorm alone."""
    stat = layer._buffers.get(layer.running_names[0])
    if stat is None or stat.dtype == at_least_float32(stat.dtype):
        return
    for name in (*layer.running_names, *layer.extra_buffers.float32):
        buffer = getattr(layer, name, None)
        if buffer is not None:
            # By ``data``, because FSDP and compiled graphs hold the buffer itself.
            buffer.data = buffer.data.to(at_least_float32(buffer.dtype))


def _for_accumulator(layer: RunningStats, m: Moments, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
    """Return mean, variance and count as they are merged over batches, given what the running ones move towards."""
    if layer._includes_between_var:
        return m.mean, m.var, m.count
    # How many elements all ranks had together, for the merge weighs batches by it.
    return mean, var, Moments(m.mean, m.var * 0, m.count, m.ranks).over_batch().count


def _from_accumulator(layer: RunningStats, m: Moments) -> tuple[Tensor, Tensor]:
    """Return the mean and variance for the running statistics, given what was merged."""
    return layer.running_target(m) if layer._includes_between_var else (m.mean, m.var)

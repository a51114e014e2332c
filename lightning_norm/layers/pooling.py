"""``sync="running"``: the running statistics of all layers, pooled over the ranks in one all-reduce per optimizer step.

Between two steps each rank normalizes by statistics of its own and gathers those of its batches in a window per layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_norm.errors import SyncWarning
from lightning_norm.layers.accumulators import AccumulationWindow
from lightning_norm.layers.running_stats import close_window, moves_running_stats, open_window
from lightning_norm.ops.sync import Ranks, active_ranks


def ready_window(layer: Any) -> None:
    """Before a forward pass: open the window that a layer with ``sync="running"`` gathers in, if ranks are active.

    In evaluation, warn of statistics that were gathered and that nobody moves the running ones by.

    Raises:
        RuntimeError: in a graph, where no window can be opened.
    """
    if torch.compiler.is_compiling():
        refuse_without_window(layer)
        return
    window = layer._accumulator
    if layer.training:
        # At the first batch and not before, for only then is it certain which ranks there are.
        if window is None and moves_running_stats(layer) and ranks_of_window(layer) is not None:
            open_window(layer)
    elif isinstance(window, AccumulationWindow) and not window.agreed_in:
        warnings.warn(
            "layers with sync='running' have gathered statistics, and their running ones have never moved. Call "
            "lightning_norm.pool_statistics(model) on every rank after each optimizer step, or train with NormSwap, "
            "which does it.",
            SyncWarning,
            stacklevel=2,
        )


def refuse_without_window(layer: Any) -> None:
    """Refuse to put a layer into a graph that would move its running statistics on each rank by itself.

    Raises:
        RuntimeError: no window is open, and in a graph none can be opened.
    """
    if layer._accumulator is None and moves_running_stats(layer) and ranks_of_window(layer) is not None:
        raise RuntimeError(
            "a network with sync='running' is compiled as a whole before its windows are open. Call "
            "lightning_norm.pool_statistics(model) once before the first step, and after each optimizer step."
        )


def ranks_of_window(layer: Any) -> Ranks | None:
    """Return the ranks with which a layer pools once per optimizer step, ``None`` for none."""
    return active_ranks(layer.sync == "running" and not layer._sync_paused, True, layer.sync_group)


def pause_sync(layers: Iterable[Any], paused: bool) -> bool:
    """Let layers use the statistics of their own rank for a while, or end it; tell whether that changes any of them."""
    changed = [layer for layer in layers if layer._sync_paused != paused]
    for layer in changed:
        layer._sync_paused = paused
    return bool(changed)


def attend(layers: Iterable[Any]) -> None:
    """Open the windows of those layers that pool once per step, and compare the layers with those of the other ranks.

    Args:
        layers: normalizers, of which those without ``sync="running"`` or running statistics are left alone.

    Raises:
        SyncError: ranks have different layers.
    """
    for ranks, pooled in _by_ranks(layers).items():
        for layer in pooled:
            if layer._accumulator is None:
                open_window(layer)
        # Once per process group: a rank with another layer would wait in the all-reduce for numbers that never come.
        if any(layer._accumulator.agreed_in != ranks.group for layer in pooled):
            # One text for all of them: it is hashed, and shown only where ranks differ.
            said = (f"{layer._place} {type(layer).__name__}{tuple(layer._accumulator.mean.shape)}" for layer in pooled)
            ranks.agree("; ".join(said), pooled[0]._accumulator.mean.device)
            for layer in pooled:
                layer._accumulator.agreed_in = ranks.group


@torch.no_grad()
def move_by_windows(layers: Sequence[Any]) -> None:
    """Move the running statistics of layers by what their windows gathered, and empty these.

    Layers with ``sync="running"`` first pool what all ranks gathered, those of one process group in one all-reduce.
    """
    attend(layers)
    for ranks, pooled in _by_ranks(layers).items():
        # A rank that skipped a batch has counted fewer than the others.
        counters = [
            layer.get_buffer(name) for layer in pooled for name in layer.extra_buffers.counters if hasattr(layer, name)
        ]
        pool_windows([layer._accumulator for layer in pooled], ranks, counters)
    for layer in layers:
        close_window(layer)


@torch.no_grad()
def pool_windows(windows: Sequence[AccumulationWindow], ranks: Ranks, counters: Sequence[Tensor] = ()) -> None:
    r"""Give the windows what all ranks gathered, weighted by counts, by the law of total variance, in one all-reduce.

    .. math::
        d_r = \mu_r - s, \quad \mu = s + \frac{\sum_r n_r d_r}{\sum_r n_r}, \quad
        \sigma^2 = \frac{\sum_r n_r (\sigma_r^2 + d_r^2)}{\sum_r n_r} - (\mu - s)^2

    The shift s is the pooled mean of the step before, which all ranks have to the last bit, so that the difference
    keeps its digits whatever the mean is. In the first step one more all-reduce finds it. What travels does not grow
    with the number of ranks.

    Args:
        windows: of the layers, in one order on all ranks.
        ranks: the ranks.
        counters: integers of each rank; all get the greatest.
    """
    if any(window.shift is None for window in windows):
        first = _split(ranks.sum(_joined([t for w in windows for t in (w.count, w.count * w.mean)])), windows, 2)
        for window, (n, total) in zip(windows, first, strict=True):
            window.shift = total / n.clamp_min(1)
    # Sums, for sums are what an all-reduce adds up; they are divided by the counts afterwards.
    packed: list[Tensor] = []
    for window in windows:
        assert window.shift is not None
        apart = window.mean - window.shift
        square = window.var + apart.square() if window.between else window.var
        packed += [window.count, window.count * apart, window.count * square]
    # The greatest of some integers by a sum: each rank writes its own into a row of zeros.
    places = _at_rank(counters, ranks, packed[0])
    total = ranks.sum(_joined([*packed, places]))
    for window, (n, moved, square) in zip(windows, _split(total, windows, 3), strict=True):
        assert window.shift is not None
        moved, var = moved / n.clamp_min(1), square / n.clamp_min(1)
        if window.between:
            # Two nearly equal numbers, whose difference may round to less than 0.
            var = (var - moved.square()).clamp_min(0)
        mean = window.shift + moved
        for old, new in zip(window.tensors(), (n, mean, var), strict=True):
            old.copy_(new)
        # A layer that no rank ran keeps the shift that it has.
        window.shift = torch.where(n > 0, mean, window.shift)
    greatest = total[total.numel() - places.numel() :].view(ranks.size, len(counters))
    for counter, value in zip(counters, greatest.amax(0).unbind() if counters else (), strict=True):
        counter.copy_(value)


def _by_ranks(layers: Iterable[Any]) -> dict[Ranks, list[Any]]:
    together: dict[Ranks, list[Any]] = {}
    for layer in layers:
        ranks = ranks_of_window(layer) if layer.track_running_stats and layer.has_running_stats else None
        if ranks is not None:
            together.setdefault(ranks, []).append(layer)
    return together


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _split(total: Tensor, windows: Sequence[AccumulationWindow], parts: int) -> list[list[Tensor]]:
    """Return what was joined, window by window: the counts (K, 1), and ``parts - 1`` tensors (K, C)."""
    shapes = [[w.count.shape, *[w.mean.shape] * (parts - 1)] for w in windows]
    sizes = [s.numel() for each in shapes for s in each]
    pieces = iter(torch.split(total, [*sizes, total.numel() - sum(sizes)]))
    return [[next(pieces).view(s) for s in each] for each in shapes]


def _at_rank(counters: Sequence[Tensor], ranks: Ranks, like: Tensor) -> Tensor:
    """Return the counters of this rank among zeros, so that a sum tells each rank those of all."""
    places = like.new_zeros(ranks.size, len(counters))
    if counters:
        places[ranks.rank] = torch.stack([c.to(like.dtype) for c in counters])
    return places

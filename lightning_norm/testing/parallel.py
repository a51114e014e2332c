"""Check: several ranks equal one process on the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_norm.layers.base import MomentNorm, Normalizer
from lightning_norm.layers.pooling import move_by_windows
from lightning_norm.layers.running_stats import close_window, open_window
from lightning_norm.testing.kit import (
    C,
    Make,
    Step,
    built,
    check,
    features,
    noise,
    same,
    same_step,
    statistics,
    step,
)
from lightning_norm.testing.masks import masked_step, takes_masks
from lightning_norm.testing.ranks import run_ranks

SPLITS = ((3, 2), (5, 0), (1, 4))
"""Samples of each rank: uneven, one rank empty, one rank with a single sample."""


def _steps(
    rank: int, layers: list[Normalizer], later: Normalizer, x: Tensor, dy: Tensor
) -> tuple[list[tuple[Step, dict[str, Tensor]]], dict[str, Tensor]]:
    results: list[tuple[Step, dict[str, Tensor]]] = []
    for layer, split in zip(layers, [*SPLITS, *SPLITS[:2]], strict=True):
        parts = [torch.split(t, list(split))[rank] for t in (x, dy)]
        # The last two: with a mask, and in ghost batches.
        run: Any = masked_step if len(results) == len(SPLITS) and takes_masks(layer) else step
        results.append((run(layer, *parts), statistics(layer)))
    if waits(later):
        later.sync = "running"
        for split in SPLITS:
            later(torch.split(x, list(split))[rank])
        move_by_windows([later])
    return results, statistics(later)


def waits(layer: Normalizer) -> bool:
    """Tell whether the running statistics can wait for the optimizer step; a swap refuses those that cannot."""
    return layer.track_running_stats and not layer.unsupported.window


@check
def ranks_equal_one_process(make: Make) -> None:
    """Two uneven gloo ranks, one of them empty at times, equal one process: values, gradients, running statistics.

    With ``sync="running"``, which pools once for all batches of a step, the running statistics equal those of one
    process that gathers the same batches.
    """
    x, dy = features(5, C, 3, 2, dtype=torch.float64), noise(5, C, 3, 2, seed=7, dtype=torch.float64)
    whole = built(make, torch.float64)
    if not (whole.train_uses_batch_stats or whole.track_running_stats):
        # A sample's statistics alone have nothing to exchange.
        return
    expected, running = step(whole, x, dy), statistics(whole)
    layers = [built(make, torch.float64) for _ in range(len(SPLITS) + 1)]
    ghost = whole.train_uses_batch_stats and isinstance(whole, MomentNorm)
    layers.append(built(make, torch.float64, **({"virtual_batch_size": 2} if ghost else {})))
    (first, later_a), (second, later_b) = run_ranks(_steps, 2, layers, built(make, torch.float64), x, dy)
    if ghost:
        # Of 5 and 0 samples: the ranks meet for each of two ghost batches, to which the second brings nothing.
        alone = built(make, torch.float64, virtual_batch_size=2)
        by_groups, running_by_groups = step(alone, x, dy), statistics(alone)
        (a, running_a), (b, _) = first[-1], second[-1]
        same(torch.cat([a.y, b.y]), by_groups.y, 1e-10, "ghost batches over ranks")
        for name, value in running_by_groups.items():
            same(running_a[name], value, 1e-10, f"ghost batches over ranks, {name}")
    first, second = first[:-1], second[:-1]
    for split, (a, running_a), (b, running_b) in zip([*SPLITS, SPLITS[0]], first, second, strict=True):
        # DDP adds the parameters' gradients, and each rank has the outputs of its samples.
        joined = Step(torch.cat([a.y, b.y]), torch.cat([a.dx, b.dx]), {k: a.grads[k] + b.grads[k] for k in a.grads})
        same_step(joined, expected, 1e-10, f"batch split {split}")
        for name, value in running.items():
            same(running_a[name], value, 1e-10, f"batch split {split}, {name} on rank 0")
            same(running_b[name], running_a[name], 0.0, f"batch split {split}, {name} of rank 1 against rank 0")
    gathering = built(make, torch.float64)
    if waits(gathering):
        open_window(gathering)
        for _ in SPLITS:
            gathering(x)
        close_window(gathering)
        for name, value in statistics(gathering).items():
            same(later_a[name], value, 1e-10, f"sync='running', {name} on rank 0")
            same(later_b[name], later_a[name], 0.0, f"sync='running', {name} of rank 1 against rank 0")

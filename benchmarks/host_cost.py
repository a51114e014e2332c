"""Measure what the host does for a layer, forward and backward, in microseconds beside nn.BatchNorm2d; without a GPU.

    python -m benchmarks.host_cost
    python -m benchmarks.host_cost sn bn --rounds 5 --save docs/benchmarks/host_cost.md

The kernels are compiled and launched for real, on a driver that does nothing (``benchmarks/stub``). The time is that of
this thread on the processor, so that other processes disturb it little; all layers take their turn in each round, and
the medians over the rounds are compared. Allocations are those of torch, counted by its profiler.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import counters, stub
from lightning_norm import create, normalizers

SHAPE = (2, 16, 14, 14)
BARS = dict.fromkeys(("sn", "bn", "in", "bcn"), 1.5)
"""Times nn.BatchNorm2d."""

BAR = 2.0
"""For the others."""

COLUMNS = ("layer", "forward", "forward + backward", "ratio", "bar", "launches", "allocations")


@dataclass
class Row:
    """One layer: the counts of one training step, and times in microseconds."""

    name: str
    forward: Callable[[], Any]
    both: Callable[[], Any]
    launches: str
    allocations: int
    times: tuple[list[float], list[float]]

    @property
    def medians(self) -> tuple[float, float]:
        """Return those of forward alone, and of forward and backward."""
        return statistics.median(self.times[0]), statistics.median(self.times[1])


def layer_of(key: str) -> nn.Module:
    """Return the normalizer in training, on the kernels; contexts come from the gate, which needs no callback."""
    options: dict[str, dict[str, Any]] = {"cn": {"context": "gate"}, "gn": {"num_groups": 4}}
    layer: Any = create(key, SHAPE[1], **options.get(key, {}))
    layer.backend = "triton"
    return layer  # type: ignore[no-any-return]


def row_of(name: str, layer: nn.Module, x: Tensor, dy: Tensor) -> Row:
    """Compile the layer's kernels, and count one step."""
    inputs = [x, *layer.parameters()]

    def forward() -> Tensor:
        return layer(x)  # type: ignore[no-any-return]

    def both() -> None:
        torch.autograd.grad(layer(x), inputs, dy, allow_unused=True)

    for _ in range(3):
        both()
    if x.is_cuda:
        forwards, all_launches = (counters.launches(run, "cuda") or 0 for run in (forward, both))
    else:
        before = stub.launches()
        forward()
        between = stub.launches()
        both()
        forwards, all_launches = between - before, stub.launches() - between
    return Row(name, forward, both, f"{forwards} + {all_launches - forwards}", allocations(both), ([], []))


def allocations(call: Callable[[], Any]) -> int:
    """Return how many times a call takes memory from torch's allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    results: Any = profile.profiler
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in results.kineto_results.events())


def microseconds(call: Callable[[], Any], calls: int) -> float:
    """Return the time of this thread for one call; what a GPU has in its queue before must not hold the launches."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.thread_time_ns()
    for _ in range(calls):
        call()
    return (time.thread_time_ns() - start) / calls / 1e3


def measure(keys: list[str], rounds: int, calls: int, device: str = "cpu") -> list[Row]:
    """Return a row for nn.BatchNorm2d and one for each normalizer; on "cpu" the stub must be installed."""
    x, dy = torch.randn(SHAPE, device=device, requires_grad=True), torch.randn(SHAPE, device=device)
    layers = {"nn.BatchNorm2d": nn.BatchNorm2d(SHAPE[1]).to(device), **{k: layer_of(k).to(device) for k in keys}}
    rows = [row_of(name, layer, x, dy) for name, layer in layers.items()]
    for _ in range(rounds):
        for row in rows:
            for call, times in zip((row.forward, row.both), row.times, strict=True):
                times.append(microseconds(call, calls))
    return rows


def table(rows: list[Row]) -> list[str]:
    """Return the lines of a Markdown table, worst ratio first."""
    base = rows[0].medians[1]
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    for row in [rows[0], *sorted(rows[1:], key=lambda row: -row.medians[1])]:
        forward, both = row.medians
        bar = f"{BARS.get(row.name, BAR):.1f}" if row is not rows[0] else ""
        cells = (row.name, f"{forward:.0f}", f"{both:.0f}", f"{both / base:.2f}", bar, row.launches, row.allocations)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def over_the_bar(rows: list[Row]) -> list[str]:
    """Return the normalizers that take longer than they may."""
    return [row.name for row in rows[1:] if row.medians[1] > BARS.get(row.name, BAR) * rows[0].medians[1]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("keys", nargs="*", help="normalizers; all of them without")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=30, help="in each round")
    parser.add_argument("--save", type=Path, help="a Markdown file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stub.install()
    rows = measure(arguments.keys or sorted(normalizers()), arguments.rounds, arguments.calls)
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}"
    lines = [
        f"Microseconds of the host for one layer on {SHAPE}, float32, training; medians of {arguments.rounds} rounds",
        f"of {arguments.calls} calls. {versions}, {platform.machine()}, one thread:",
        f"`python -m benchmarks.host_cost{''.join(f' {key}' for key in arguments.keys)}`",
        "",
        *table(rows),
    ]
    print("\n".join(lines))
    late = over_the_bar(rows)
    print(f"\nover the bar: {', '.join(late) or 'none'}")
    if arguments.save is not None:
        arguments.save.write_text("\n".join(lines) + "\n")
    sys.exit(bool(late))


if __name__ == "__main__":
    main()

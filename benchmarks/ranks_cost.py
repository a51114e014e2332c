"""Measure what synchronized statistics cost between the processes of this machine, and model what they cost beyond it.

    python -m benchmarks.ranks_cost [--steps 20] [--save docs/benchmarks/distributed.md]

Every rank trains the same network (DDP, gloo, one thread), its steps in turn without synchronization, with
``sync="running"`` and with ``sync=True``, so that whatever else the machine does falls on all kinds of step.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_norm import create, normalizers, pool_statistics, swap
from lightning_norm.surgery.walk import normalizers_of
from lightning_norm.testing.ranks import run_ranks

WORLDS = (1, 2, 4)
CHANNELS = 64
KEYS = ("bn", "sn", "dbn")
KINDS = (False, "running", True)
WIDTHS = (64, 256, 1024)
LINKS = (("one node, NVLink", 2e-6, 200e9), ("nodes, InfiniBand", 5e-6, 25e9), ("nodes, Ethernet", 25e-6, 3e9))
"""Assumed: seconds from one rank to the next, and bytes per second."""


def message(width: int, ranks: int) -> int:
    """Return the numbers in a layer's message: the total count, and count, means and variances of every rank."""
    return 1 + ranks * (2 * width + 1)


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own has no types
    """Note the bytes of every all-reduce."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operator."""
        # ``c10d::allreduce_`` takes a list, and ``_c10d_functional::all_reduce`` a tensor.
        if "allreduce" in str(func).replace("_", ""):
            self.bytes.append(sum(t.numel() * t.element_size() for t in tree_leaves(args[0])))
        return func(*args, **(kwargs or {}))


def count(rank: int) -> list[tuple[str, list[int], list[int]]]:
    """Return the collectives of each normalizer's forward and backward pass."""
    rows = []
    for key, cls in normalizers().items():
        options = {**cls.test_arguments, **({"num_groups": 4} if key == "gn" else {})}
        cases = {key: options} | ({f"{key}, threshold=0.5": {**options, "threshold": 0.5}} if key == "ubn" else {})
        for name, arguments in cases.items():
            layer, x = create(key, CHANNELS, **arguments), torch.randn(4, CHANNELS, 8, 8, requires_grad=True)
            layer(x)  # the first time ranks compare their layers
            with Collectives() as forward:
                y = layer(x)
            with Collectives() as backward:
                torch.autograd.backward(y.square().sum())
            rows.append((name, forward.bytes, backward.bytes))
    return rows


def latency(rank: int, repeats: int = 200) -> list[float]:
    """Return the median milliseconds of one all-reduce of a layer's statistics, per width."""
    if dist.get_world_size() == 1:
        return [0.0 for _ in WIDTHS]
    medians = []
    for c in WIDTHS:
        t, seconds = torch.ones(message(c, dist.get_world_size()), dtype=torch.float64), []
        for _ in range(repeats):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(t)
            seconds.append(time.perf_counter() - begin)
            t.fill_(1)
        medians.append(statistics.median(seconds) * 1e3)
    return medians


def steps(rank: int, key: str, repeats: int) -> dict[Any, float]:
    """Return the median milliseconds of a step with each kind of synchronization."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10)
    swap(net, key, norm_args=normalizers()[key].test_arguments)
    layers = normalizers_of(net)
    run: nn.Module = DistributedDataParallel(net) if dist.get_world_size() > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    x, target = torch.randn(8, 3, 64, 64), torch.arange(8)
    seconds: dict[Any, list[float]] = {kind: [] for kind in KINDS}
    windows: list[Any] = [None for _ in layers]
    for number in range(len(KINDS) * (2 + repeats)):
        kind = KINDS[number % len(KINDS)]
        for layer, window in zip(layers, windows, strict=True):
            layer.sync, layer._accumulator = kind, window if kind == "running" else None
        begin = time.perf_counter()
        torch.autograd.backward(nn.functional.cross_entropy(run(x), target))
        optimizer.step()
        optimizer.zero_grad()
        pool_statistics(net)
        if number >= 2 * len(KINDS):  # the first ones warm up
            seconds[kind].append(time.perf_counter() - begin)
        if kind == "running":
            windows = [layer._accumulator for layer in layers]
    return {kind: statistics.median(times) * 1e3 for kind, times in seconds.items()}


def measure(rank: int, repeats: int) -> dict[str, Any]:
    """Measure everything on one rank."""
    return {"latency": latency(rank), "steps": {key: steps(rank, key, repeats) for key in KEYS}}


def model(ranks: int, layers: int, width: int, hop: float, bandwidth: float, running: bool) -> tuple[float, float]:
    """Return the milliseconds that a step waits for statistics, all-reduced in a ring and in a tree.

    Args:
        ranks: p.
        layers: each with one all-reduce forward and one backward, in which each rank has a place of its own.
        width: channels of a layer.
        hop: seconds from one rank to the next.
        bandwidth: bytes per second of one link.
        running: one all-reduce for all layers, of sums, in place of these.
    """
    collectives = 1 if running else 2 * layers
    size = 8 * layers * (2 * width + 1) if running else 8 * message(width, ranks)
    ring = 2 * (ranks - 1) * hop + 2 * (ranks - 1) / ranks * size / bandwidth
    depth = (ranks - 1).bit_length()
    tree = 2 * depth * hop + 2 * size / bandwidth
    return collectives * ring * 1e3, collectives * tree * 1e3


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def sizes(collectives: Sequence[int]) -> str:
    """Return the number of collectives and their bytes."""
    return f"{len(collectives)} ({' + '.join(map(str, collectives))} B)" if collectives else "0"


def modelled() -> str:
    """Return the table of the model: a ResNet-50, 53 layers of 512 channels on average."""
    rows = []
    for where, hop, bandwidth in LINKS:
        for p in (8, 64, 1024):
            if p == 8 or where != "one node, NVLink":
                times = [t for running in (False, True) for t in model(p, 53, 512, hop, bandwidth, running)]
                told = (f"{t:.1f}" if t >= 0.1 else f"{t:.2f}" for t in times)
                rows.append((where, str(p), f"{8 * message(512, p) / 1e3:.0f}", *told))
    head = ("between", "ranks", "n, kB", "ring, ms", "tree, ms", "running: ring, ms", "running: tree, ms")
    return table(head, rows)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of each kind")
    parser.add_argument("--save", type=Path, help="Markdown file")
    options = parser.parse_args()
    counts = run_ranks(count, 2)[0]
    results = {world: run_ranks(measure, world, options.steps, timeout=900)[0] for world in WORLDS}
    base = {key: results[1]["steps"][key][False] for key in KEYS}
    rows, waits = [], []
    for world, measured in results.items():
        for key in KEYS:
            times = measured["steps"][key]
            off, later, on = (times[kind] for kind in KINDS)
            ratios = [f"{t / off:.2f} x" for t in (later, on)]
            rate = [f"{world * base[key] / t:.2f} x" for t in (off, later, on)]
            rows.append((str(world), key, *ratios, *rate))
        if world > 1:
            shortest = results[2]["latency"][0]
            waits.append((str(world), *(f"{ms / shortest:.1f} x" for ms in measured["latency"])))
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    machine = f"{cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end"
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    head = (
        *("ranks", "norm", "running / without", "with / without"),
        *("throughput without", "throughput running", "throughput with"),
    )
    text = f"""# Cost of synchronized statistics

`python -m benchmarks.ranks_cost --steps {options.steps} --save docs/benchmarks/distributed.md`

{machine}; {versions}, gloo over the loopback device, one thread per rank. More ranks than
cores share them: their steps are longer whatever is synchronized.

## Collectives of one layer

{CHANNELS} channels; counted as operators are dispatched, on one of two ranks. On a CPU a message has 8 bytes more,
which say whether a rank is in the forward or the backward pass.

{table(("normalizer", "forward", "backward"), [(name, sizes(f), sizes(b)) for name, f, b in counts])}

## One all-reduce

Median time for a layer's statistics, 8 (1 + p (2C + 1)) bytes on p ranks, relative to the first of this table.

{table(("ranks", *(f"C = {c}" for c in WIDTHS)), waits)}

## A training step

ResNet-18, 20 layers, 8 images of 64 x 64 per rank, DDP; medians of interleaved steps. Throughput is relative to one
rank without synchronization; linear scaling would be the number of ranks. "Running" is `sync="running"`: one all-reduce
per step for all layers, in place of two per layer. With one rank there is nothing to synchronize: how far its ratios
are from 1 is the noise of this table, for other programs ran as well (see the load).

{table(head, rows)}

## Model

See [Many ranks](../distributed.md) for the assumptions.

{modelled()}
"""
    print(text)
    if options.save:
        options.save.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

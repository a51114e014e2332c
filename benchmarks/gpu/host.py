"""Part (d): what the host does for a layer, and whole training steps of a ResNet-50 at batch 8, 32 and 64."""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace

import torch

from benchmarks import host_cost, network, stub
from benchmarks.budget import Budget
from benchmarks.gpu.rows import Part, part_of
from lightning_norm.bench.contenders import ARGUMENTS
from lightning_norm.normalizers import normalizers

BATCHES = (64, 8, 32)
MODES = ("AMP channels_last", "eager", "channels_last", "compiled AMP channels_last")
KEYS = ("sn", "bn", "in", "bcn")
"""Normalizers of the training steps; all of them stand in the table of the host."""


def layers(part: Part, device: str) -> None:
    """Write the host's microseconds for each layer."""
    keys, rounds, calls = (["in", "bn"], 2, 2) if part.dry else (sorted(normalizers()), 7, 20)
    rows = host_cost.measure(keys, rounds, calls, device)
    base = statistics.median(rows[0].times[1])
    for row in rows:
        forward, both = row.medians
        bar = host_cost.BARS.get(row.name, host_cost.BAR) if row is not rows[0] else None
        part.write(
            "host", name=row.name, forward_us=forward, both_us=both, ratio=both / base, bar=bar, launches=row.launches
        )


def steps(part: Part, device: str) -> None:
    """Write the time of a training step for each mode, batch and normalizer."""
    time_left = Budget(min(part.seconds_left, 1e6) / 60)
    nets = [replace(network.LARGE, batch=batch) for batch in BATCHES]
    modes: tuple[str, ...] = MODES
    keys: tuple[str, ...] = KEYS
    repeats = 10
    if part.dry:
        nets, modes, keys, repeats = [network.Network("resnet18", 2, 32)], MODES[:1], KEYS[:1], 2
    for mode in modes:
        for net in nets:
            for row in network.steps(net, keys, device, repeats, False, time_left, ARGUMENTS, (mode,)):
                part.write("step", batch=net.batch, **row)
    for line in time_left.left_out:
        part.leave_out(line, "see there")
    for line in time_left.failed:
        part.write("failed", what=line, why="see there")


def main() -> int:
    """Measure; without a GPU the layers run over the stubbed driver, and the steps on the CPU."""
    part, device = part_of("host", __doc__), "cuda"
    torch.set_num_threads(1)
    if part.dry:
        device = "cpu"
        steps(part, device)  # before the stub sends the layers to the kernels
        stub.install()
    layers(part, device)
    if not part.dry:
        steps(part, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())

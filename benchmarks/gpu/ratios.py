"""Part (c): time against nn.BatchNorm2d and against the memory, by replayed graphs; what the bars need comes first.

The shapes of a ResNet-50 in bfloat16 and float32 and both memory formats, inputs without positions, small maps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import budget
from benchmarks.counters import copy_speed
from benchmarks.gpu.rows import Part, part_of
from benchmarks.roofline_rows import roofline
from lightning_norm.bench.clock import machine
from lightning_norm.normalizers import normalizers

FLAT = ((65536, 256), (8192, 1024), (256, 64))
"""Tokens, the head of a large network and of a small one: one element to each sample and channel."""

SMALL = ((32, 64, 7, 7), (2, 32, 8, 8))


def cases(dry: bool) -> list[budget.Case]:
    """Return the cases in the order in which they are worth their time."""
    if dry:
        return [budget.Case((4, 6, 5, 5), "bf16", True), budget.Case((8, 6), "fp32", False)]
    # Half precision first, as networks are trained.
    resnet = budget.cases(budget.SHAPES, ["bf16", "fp32"], False)
    others = budget.cases((*FLAT, *SMALL), ["bf16", "fp32"], False)
    return [*(c for c in resnet if c.needed), *others, *(c for c in resnet if not c.needed)]


def run(part: Part, device: str, keys: Sequence[str]) -> None:
    """Measure case after case, and write down each at once."""
    time_left = budget.Budget(min(part.seconds_left, 1e6) / 60)
    part.write("machine", **machine(1))
    speed = {d: copy_speed(device, 1000 if device == "cuda" else 4, 5, budget.DTYPES[d]) for d in ("bf16", "fp32")}
    part.write("copy", gb_s=speed)
    for rows, passes in roofline(cases(part.dry), keys, device, 3 if part.dry else 12, time_left, speed):
        for row in rows:
            part.write("layer", **row)
        for row in passes:
            part.write("pass", **row)
    for line in time_left.left_out:
        part.leave_out(line, "see there")
    for line in time_left.failed:
        part.write("failed", what=line, why="see there")


def main() -> int:
    """Measure."""
    part = part_of("ratios", __doc__)
    run(part, "cpu" if part.dry else "cuda", ("bn", "in") if part.dry else tuple(normalizers()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

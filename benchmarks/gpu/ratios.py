"""Part (c): time against nn.BatchNorm2d and against the memory, by replayed graphs; what the bars need comes first.

The shapes of a ResNet-50 in bfloat16 and float32 and both memory formats, beside torch's layer and naive formulas under
torch.compile where maps are small, inputs without positions, small maps.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from benchmarks import budget
from benchmarks.counters import copy_speed
from benchmarks.gpu.rows import Part, part_of
from benchmarks.roofline_rows import roofline
from lightning_norm.bench.clock import machine
from lightning_norm.normalizers import normalizers

FLAT = ((65536, 256), (8192, 1024), (256, 64))
"""Tokens, the head of a large network and of a small one: one element to each sample and channel."""

SMALL = ((32, 64, 7, 7), (2, 32, 8, 8))


COMPILED = ((64, 2048, 7, 7), (64, 1024, 14, 14))
"""Maps at which the formulas written naively are timed under torch.compile, too."""


class Stage(NamedTuple):
    """Cases that are measured alike.

    Args:
        cases: in the order in which they are worth their time.
        keys: normalizers.
        peer: torch's layer under torch.compile beside them, where maps are small.
        seconds: at most, as compilation takes long.
    """

    cases: list[budget.Case]
    keys: tuple[str, ...]
    peer: bool = False
    seconds: float = 1e6


def stages(dry: bool) -> list[Stage]:
    """Return what is measured, in the order in which it is worth its time."""
    if dry:
        shape = (4, 6, 5, 5)
        return [
            Stage([budget.Case(shape, "bf16", True)], ("bn", "in"), peer=True),
            Stage(budget.cases([shape], ["fp32"], True), ("bn",)),
            Stage([budget.Case((8, 6), "fp32", False)], ("bn", "in")),
        ]
    # Half precision first, as networks are trained.
    resnet = budget.cases(budget.SHAPES, ["bf16", "fp32"], False)
    others = budget.cases((*FLAT, *SMALL), ["bf16", "fp32"], False)
    every = tuple(normalizers())
    return [
        Stage([c for c in resnet if c.needed], every, peer=True),
        Stage(budget.cases(COMPILED, ["bf16"], True), ("bn", "sn"), seconds=40),
        Stage([*others, *(c for c in resnet if not c.needed)], every),
    ]


def run(part: Part, device: str) -> None:
    """Measure case after case, and write down each at once."""
    part.write("machine", **machine(1))
    speed = {d: copy_speed(device, 1000 if device == "cuda" else 4, 5, budget.DTYPES[d]) for d in ("bf16", "fp32")}
    part.write("copy", gb_s=speed)
    for cases, keys, peer, seconds in stages(part.dry):
        time_left = budget.Budget(min(part.seconds_left, seconds) / 60)
        for rows, passes in roofline(cases, keys, device, 3 if part.dry else 12, time_left, speed, peer):
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
    run(part, "cpu" if part.dry else "cuda")
    return 0


if __name__ == "__main__":
    sys.exit(main())

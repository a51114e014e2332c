"""Count the instructions that the moments take per byte of x, by disassembly, beside what a memory could deliver.

    python -m benchmarks.issue_slots
    python -m benchmarks.issue_slots --dtype bf16 --bandwidth 4.3

A multiprocessor issues four instructions in a cycle, one for each of its schedulers. So a program cannot be faster than
its instructions allow, whatever the memory does: *slots* are those on the path that one program takes, times its warps,
over four, and *bound* is the part of a copy's bandwidth that they leave, on 132 multiprocessors of 1.7 GHz. Real
kernels are below it.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.aot_cases import Variant
from benchmarks.aot_report import compiled, disassembled
from lightning_norm.kernels.grid import Grid, cdiv, grid_like
from lightning_norm.kernels.passes.forward import moments_columns, moments_rows
from lightning_norm.kernels.passes.launch import averages, moment_warps
from lightning_norm.surgery.text_tables import markdown

MULTIPROCESSORS, CLOCK, SCHEDULERS = 132, 1.7e9, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAPS = ((256, 56), (512, 28), (1024, 14), (2048, 7))
"""Channels and width, at a batch of 64."""


class Case(NamedTuple):
    """A kernel at one shape: how it is compiled, the bytes that one program reads, and the turns of its loop."""

    name: str
    variant: Variant
    size: int
    turns: int


def cases(dtype: str) -> Iterator[Case]:
    """Yield the moments at ResNet-50's maps in both layouts."""
    itemsize = 4 if dtype == "fp32" else 2
    for columns in (False, True):
        for channels, width in MAPS:
            grid = grid_like(64, channels, width * width, columns, 16 // itemsize)
            blocks = {"ALIGN": grid.align, "ROWS": grid.rows, "BLOCK": grid.block}
            kernel = moments_columns if columns else moments_rows
            blocks |= {"AVERAGE": averages(grid, DTYPES[dtype])}
            variant = Variant(kernel, f"{width} x {width}", dtype, blocks, moment_warps(grid))
            yield Case(f"{kernel.fn.__name__} {dtype} {width} x {width}", variant, *work(grid, itemsize))


def work(grid: Grid, itemsize: int) -> tuple[int, int]:
    """Return the bytes that a program reads, and how often its loop turns behind the first tile."""
    if grid.columns:
        return min(grid.piece, grid.length) * min(grid.block, grid.c) * itemsize, cdiv(
            min(grid.piece, grid.length), grid.rows
        ) - 1
    turns = cdiv(grid.piece + grid.align - 1, grid.block) - 1
    return grid.rows * grid.piece * itemsize, turns


def instructions(code: str, turns: int) -> int:
    """Return how many instructions one warp issues, given a kernel's disassembly and the turns of its loop.

    Slow paths, which call a function for numbers that are not normal, are not taken; a loop may be unrolled by ptxas.
    """
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(found[1])
    count = at = 0
    while at < len(lines):
        count += 1
        text = lines[at]
        at += 1
        if text.startswith("EXIT"):
            break
        jump = re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", text)
        if jump is None:
            continue
        to = labels[jump[1]]
        between = lines[at:to]
        if to < at:  # the end of a loop
            count += (turns - 1) * (at - to)
        elif (
            not text.startswith("@")
            or any("CALL" in t for t in between)
            or (turns == 0 and _loops(between, labels, at))
        ):
            at = to
    return count


def _loops(lines: list[str], labels: dict[str, int], start: int) -> bool:
    jumps = ((i, re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", text)) for i, text in enumerate(lines, start))
    return any(jump is not None and labels[jump[1]] <= i for i, jump in jumps)


def slots(variant: Variant, turns: int, arch: int = 90) -> float:
    """Return the cycles in which one program keeps its multiprocessor's schedulers busy."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled(variant, arch).asm["cubin"])
        file.flush()
        return instructions(disassembled(file.name), turns) * variant.warps / SCHEDULERS


def bound(size: int, taken: float, bandwidth: float) -> float:
    """Return the part of a bandwidth, in TB/s, at which instructions alone let a program read its bytes."""
    return size / (bandwidth * 1e12 / MULTIPROCESSORS) * CLOCK / taken


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--bandwidth", type=float, default=3.0, help="of a copy, in TB/s: 3.0 is an H100's")
    options = parser.parse_args()
    rows = [["kernel", "tile", "bytes", "slots", f"bound at {options.bandwidth} TB/s"]]
    for dtype in options.dtype:
        for name, variant, size, turns in cases(dtype):
            taken = slots(variant, turns)
            tile = f"{variant.constants['ROWS']} x {variant.constants['BLOCK']}, {turns + 1}"
            rows.append([name, tile, str(size), f"{taken:.0f}", f"{bound(size, taken, options.bandwidth):.2f}"])
            print(*rows[-1], sep="  ", flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()

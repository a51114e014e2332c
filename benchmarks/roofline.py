"""Measure every normalizer forward and backward as fractions of what the memory allows, and check the bars.

    python -m benchmarks.roofline --device cuda --save docs/benchmarks                 8 minutes: what the bars need
    python -m benchmarks.roofline --device cuda --minutes 40 --dtypes fp32,bf16,fp16   everything
    python -m benchmarks.roofline --device cpu --norms bn,sn,bnet                      the same code without a GPU

It prints the speed of a copy, a table per case (shape, dtype, memory format), the training steps, what it left out for
lack of time, and the bars. It exits with an error, after everything else was measured, if a normalizer fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import bars, budget, network
from benchmarks.counters import copy_speed
from benchmarks.roofline_report import BARS, bars_table, save_roofline
from benchmarks.roofline_rows import Row, roofline
from lightning_norm.bench.clock import machine
from lightning_norm.bench.contenders import ARGUMENTS
from lightning_norm.cli.bench import parse_shape
from lightning_norm.normalizers import create, normalizers


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device, unless it is typed.

    Args:
        shapes: of x.
        keys: of the normalizers.
        repeats: rounds.
        copied: MB of the tensor whose copy is timed.
        net: the network of the training steps.
    """

    shapes: tuple[tuple[int, ...], ...]
    keys: tuple[str, ...]
    repeats: int
    copied: int
    net: network.Network


def sizes(device: str) -> Sizes:
    """Return the sizes for a kind of device."""
    if device == "cuda":
        return Sizes(budget.SHAPES, tuple(normalizers()), 20, 1000, network.LARGE)
    return Sizes(((32, 64, 32, 32), (32, 256, 14, 14), (32, 512, 7, 7)), ("bn", "sn", "bcn"), 50, 50, network.SMALL)


def run(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, print, save, and return the row of each contender and case.

    Raises:
        RuntimeError: ``--device cuda`` without one.
        ValueError: an unknown norm or dtype, or a shape that cannot be read.
        ArithmeticError: a normalizer of ours failed, or computes something else than its formula in float64.
    """
    options = _parser().parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device found. Type --device cpu.")
    torch.set_num_threads(options.threads)
    default, dtypes = sizes(options.device), options.dtypes.split(",")
    unknown = set(dtypes) - set(budget.DTYPES)
    if unknown:
        raise ValueError(f"--dtypes: {sorted(unknown)} unknown. Type one or more of {','.join(budget.DTYPES)}.")
    keys = options.norms.split(",") if options.norms else list(default.keys)
    for key in keys:
        create(key, 32)  # so that an unknown key is told before anything runs
    shapes = [parse_shape(text) for text in options.shapes.split(",")] if options.shapes else list(default.shapes)
    return measure_all(options, shapes, dtypes, keys)


def measure_all(
    options: argparse.Namespace, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], keys: Sequence[str]
) -> list[Row]:
    """Run stage after stage until the minutes are over; whatever happens, what was measured is printed and saved."""
    cuda, default = options.device == "cuda", sizes(options.device)
    repeats, time_left = options.repeats or default.repeats, budget.Budget(options.minutes)
    rounds = max(5, repeats // 5)
    speed = {d: copy_speed(options.device, default.copied, rounds, budget.DTYPES[d]) for d in dtypes}
    print("copy: " + ", ".join(f"{d} {s:.0f}" for d, s in speed.items()) + " GB/s read and written", flush=True)
    command = " ".join(["python -m benchmarks.roofline", *sys.argv[1:]])
    result: dict[str, Any] = {"machine": machine(options.threads), "command": command, "copy_gb_s": speed}
    result |= {"roofline": [], "passes": [], "steps": [], "left_out": time_left.left_out}
    try:
        for stage in budget.stages(shapes, dtypes, keys, options.compile, cuda or options.network):
            tables = roofline(stage.cases, keys, options.device, repeats, time_left, speed, options.compile)
            for rows, passes in tables:
                result["roofline"] += rows
                result["passes"] += passes
            if stage.keys:
                times = max(3, repeats // (2 if cuda else 5))
                result["steps"] += network.steps(
                    default.net, stage.keys, options.device, times, stage.compiled, time_left, ARGUMENTS
                )
    finally:
        result["bars"] = bars.verdicts(result["roofline"], result["passes"], result["steps"])
        for line in time_left.left_out:
            print(f"left out: {line}", flush=True)
        print(f"\n{BARS}\n{bars_table(result['bars'])}", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(result, indent=1))
        if options.save:
            save_roofline(result, Path(options.save))
    if time_left.failed:
        raise ArithmeticError("the benchmark is done, but not all of it ran:\n" + "\n".join(time_left.failed))
    return list(result["roofline"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    keys = ",".join(normalizers())
    parser.add_argument("--norms", help=f"out of {keys}, by commas; all on CUDA, bn,sn,bcn on the CPU")
    parser.add_argument("--shapes", help="of the input, by commas: 64x256x56x56,64x2048x7x7")
    parser.add_argument("--dtypes", default="fp32,bf16", help=f"out of {','.join(budget.DTYPES)}, by commas")
    parser.add_argument(
        "--repeats", type=int, help="rounds, in each of which every contender runs; 20 on CUDA, else 50"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--minutes", type=float, default=8, help="what does not fit is left out (default: %(default)s)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    parser.add_argument("--network", action="store_true", help="on the CPU, too: training steps of resnet18")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--save", metavar="DIR", help="write roofline.json, roofline.md and roofline.png there")
    return parser


if __name__ == "__main__":
    run()

"""``lightning-norm bench``: the time of each layer on this machine.

Example:
  lightning-norm bench --device cpu --norms bn,sn,bcn --json bench.json --save docs/benchmarks
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_norm.bench.clock import machine
from lightning_norm.bench.shapes import bench_shape
from lightning_norm.bench.tables import save, table
from lightning_norm.cli.parsing import CommandParser, path_of
from lightning_norm.normalizers import create, normalizers
from lightning_norm.surgery.extras import require
from lightning_norm.surgery.whole_files import write_whole

SHAPES = "32x64x32x32,32x256x14x14,32x512x7x7,128x64"
DECODERS = "1x128x256x256,1x512x64x64,1x128x20x256x256"
"""Of the decoders of VAEs and U-Nets for images and video, which normalize by GroupNorm and SiLU."""


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Time every contender at every shape, print a table per shape and return the rows.

    Args:
        argv: the arguments behind ``bench``.

    Returns:
        A row for each contender, shape and direction, as the JSON file holds it.

    Raises:
        RuntimeError: ``--device cuda`` without one.
        ValueError: an unknown norm, a shape that cannot be read, or too few threads or repeats.
        ArithmeticError: a layer does not compute what its formula does in float64.
        SystemExit: wrong arguments.
    """
    options = parser().parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device found. Type --device cpu.")
    if options.save:
        require("the picture of --save", "examples", "matplotlib", otherwise=", or --json FILE in place of --save")
    if options.repeats < 2:
        raise ValueError(f"--repeats must be 2 or more, for quartiles, got {options.repeats}.")
    if options.threads < 1:
        raise ValueError(f"--threads must be 1 or more, got {options.threads}.")
    # Fixed and written down, for the times of a CPU depend on it more than on the layer.
    torch.set_num_threads(options.threads)
    texts = DECODERS if options.shapes == "decoders" else options.shapes
    shapes, keys = [parse_shape(text) for text in texts.split(",")], options.norms.split(",")
    for key in keys:
        create(key, 32)  # so that an unknown key is told before anything runs
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for channels_last in (False, True) if len(shape) > 3 else (False,):
            rows_of_shape = bench_shape(
                shape, keys, channels_last, options.device, options.repeats, options.compile, options.activation
            )
            rows += rows_of_shape
            print(f"\n{rows_of_shape[0]['shape']}\n{table(rows_of_shape)}", flush=True)
    # Whoever finds the file can repeat the measurement.
    command = " ".join(["lightning-norm bench", *argv])
    result = {"machine": machine(options.threads), "command": command, "rows": rows}
    if options.json:
        write_whole(options.json, json.dumps(result, indent=1))
    if options.save:
        save(result, Path(options.save))
    return rows


def parse_shape(text: str) -> tuple[int, ...]:
    """Read a shape as it is typed.

    Raises:
        ValueError: it is not two to five positive sizes joined by x.

    >>> parse_shape("32x64x7x7")
    (32, 64, 7, 7)
    """
    # Anything that is no number becomes 0, which the check below refuses together with 0 itself.
    shape = tuple(int(size) if size.isdigit() else 0 for size in text.split("x"))
    if not 2 <= len(shape) <= 5 or min(shape) < 1:
        raise ValueError(f"--shapes: {text!r} is no shape. Expected sizes joined by x, for example 32x64x32x32,128x64.")
    return shape


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    made = CommandParser(
        "bench",
        "Time every normalizer beside nn.BatchNorm and its own formula written naively, after checking it.",
        __doc__,
    )
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    keys = ", ".join(normalizers())
    made.add_argument("--norms", default="bn,sn,bcn", help=f"some of {keys} (default: %(default)s)")
    made.add_argument(
        "--shapes",
        default=SHAPES,
        help=f"of the input, by commas (default: %(default)s); 'decoders' for those of VAEs and U-Nets: {DECODERS}",
    )
    made.add_argument(
        "--activation", choices=("none", "relu", "silu"), default="none", help="behind each layer (default: none)"
    )
    made.add_argument("--repeats", type=int, default=50, help="rounds, in each of which every contender runs")
    made.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    made.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    made.add_argument("--json", type=path_of("--json bench.json"), metavar="FILE", help="write all figures there")
    made.add_argument(
        "--save", type=path_of("--save bench"), metavar="DIR", help="write bench.json, bench.md and bench.png there"
    )
    return made

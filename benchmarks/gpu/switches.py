"""Part (e): what awaits a GPU to be decided, each beside what is on now.

A switch is looked up where it would be: one that nobody has built yet is told as such.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import stub
from benchmarks.gpu.rows import Part, part_of
from lightning_norm.bench.clock import Timed, interleaved
from lightning_norm.kernels import grid, launcher
from lightning_norm.normalizers import create
from lightning_norm.ops import backend

SHAPES = ((64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7))
HELD = ((64, 2048, 7, 7), (32, 2048, 7, 7), (16, 1024, 14, 14), (8, 512, 28, 28))
"""Maps of at most 24 MB, which a cooperative launch takes; the first is one in half precision alone."""

KEYS = ("sn", "bn")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@contextlib.contextmanager
def tile(elements: int) -> Iterator[None]:
    """Let programs that reduce hold so many elements of x at once; the flat passes stay as they are."""
    with mock.patch.object(grid, "TILE", elements):
        yield


@contextlib.contextmanager
def warps(number: int) -> Iterator[None]:
    """Run the launches of four warps with so many."""
    usual = launcher._write_down

    def with_warps(launches: Any, kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        if options.get("num_warps") == 4:
            options["num_warps"] = number
        usual(launches, kernel, grid, *args, **options)

    with mock.patch.object(launcher, "_write_down", with_warps):
        yield


def attribute(name: str) -> Callable[[], AbstractContextManager[Any] | None]:
    """Return a switch that is a Boolean of ``kernels/grid.py``; ``None`` from it where there is no such thing."""
    return lambda: mock.patch.object(grid, name, True) if hasattr(grid, name) else None


def graph(way: str) -> AbstractContextManager[Any]:
    """Let layers in a graph of torch.compile run in this way."""
    return mock.patch.object(backend, "IN_GRAPHS", way)


SWITCHES: dict[str, Callable[[], AbstractContextManager[Any] | None]] = {
    "tile of 1024 elements": lambda: tile(1024),
    "tile of 4096 elements": lambda: tile(4096),
    "8 warps": lambda: warps(8),
    "2 warps": lambda: warps(2),
    "owner kernel": attribute("OWNER"),
    "cooperative launch": attribute("COOPERATIVE"),
    **{f"compiled: {way}": functools.partial(graph, way) for way in ("operators", "transparent", "plain")},
}


def timed(
    switch: AbstractContextManager[Any], key: str, x: torch.Tensor, dy: torch.Tensor, device: str, name: str = ""
) -> Timed:
    """Return forward and backward of a layer, whose launches are recorded, or which is compiled, under a switch."""
    layer: Any = create(key, x.shape[1], device=x.device)
    layer.backend = "auto" if name == "compiled: plain" else "triton"
    if name.startswith("compiled"):
        layer.compile()
    plans: dict[Any, Any] = {}

    def both() -> Any:
        launcher._plans = plans  # each its own: once recorded, launches stay as the switch made them
        return torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

    usual = launcher._plans
    try:
        with switch:
            for made in (grid._rows, grid._columns):
                made.cache_clear()  # grids were made under another switch
            return Timed(both, device)
    finally:
        launcher._plans = usual
        for made in (grid._rows, grid._columns):
            made.cache_clear()


class Turn(NamedTuple):
    """Switches that are timed side by side, and where."""

    switches: dict[str, Callable[[], Any]]
    shapes: Sequence[tuple[int, ...]]
    keys: Sequence[str]


def turns(built: dict[str, Callable[[], Any]], dry: bool) -> list[Turn]:
    """Return what is timed, in the order in which it is worth its time."""
    # Programs that wait for each other might wait forever, so theirs is the last turn.
    last = {name: built[name] for name in built.keys() & {"cooperative launch"}}
    owner = {name: built[name] for name in built.keys() & {"owner kernel"}}
    first = {name: switch for name, switch in built.items() if name not in last}
    every = [
        Turn(first, SHAPES, KEYS),
        Turn(owner, SHAPES[2:], ("rbn", "dbn")),  # larger maps are none that a program can own
        Turn(last, HELD, KEYS),
        Turn(last, HELD, ("gn", "bcn")),
    ]
    every = [turn for turn in every if turn.switches]
    return [turn._replace(shapes=[(2, 16, 14, 14)], keys=turn.keys[-1:]) for turn in every] if dry else every


def run(part: Part, device: str) -> None:
    """Time every switch beside what is on now."""
    built = {name: switch for name, switch in SWITCHES.items() if switch() is not None}
    for name in SWITCHES:
        part.write("switch", name=name, state="built" if name in built else "not built")
    dtypes = {"bf16": torch.bfloat16} if part.dry else {"bf16": torch.bfloat16, "fp32": torch.float32}
    for switches, shapes, keys in turns(built, part.dry):
        for dtype, shape, (form, order), key in itertools.product(dtypes, shapes, FORMATS.items(), keys):
            what = f"{key} {'x'.join(map(str, shape))} {dtype} {form}"
            if part.seconds_left < 0:
                part.leave_out(what)
                continue
            try:
                compare(part, what, switches, key, shape, dtypes[dtype], order, device)
            except Exception as error:
                part.fail(what, error)


def compare(
    part: Part,
    what: str,
    built: dict[str, Callable[[], Any]],
    key: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    order: torch.memory_format,
    device: str,
) -> None:
    """Write one row for a case: milliseconds as it is now, and under each switch."""
    x, dy = (torch.randn(shape, device=device).to(dtype).contiguous(memory_format=order) for _ in range(2))
    x.requires_grad_()
    runs = {"now": timed(contextlib.nullcontext(), key, x, dy, device)}
    for name, switch in built.items():
        runs[name] = timed(switch(), key, x, dy, device, name)
    times = interleaved(runs, 5 if part.dry else 12)
    medians = {name: statistics.median(t) for name, t in times.items()}
    for name, ms in medians.items():
        ratio = ms / medians["now"]
        part.write("A/B", case=what, name=name, ms=ms, ratio=ratio, clock=runs[name].how)


def main() -> int:
    """Measure; without a GPU over the stubbed driver."""
    part = part_of("switches", __doc__)
    if part.dry:
        stub.install()
    run(part, "cpu" if part.dry else "cuda")
    return 0


if __name__ == "__main__":
    sys.exit(main())

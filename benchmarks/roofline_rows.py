"""The rows of ``python -m benchmarks.roofline``: forward and backward apart, beside the memory's own speed.

Each pass must read and write x so many times at least (three forward, five backward), and a machine copies so many
bytes in a second: the floor. What a contender takes is told as a fraction of it, beside the ratio to torch's BatchNorm
of the same run. The same code runs on a CPU, where it counts no kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.budget import DTYPES, Budget, Case
from benchmarks.counters import launches, peak_memory
from benchmarks.peers import others
from benchmarks.roofline_report import roofline_table
from lightning_norm.bench.clock import Timed, interleaved
from lightning_norm.bench.contenders import PEER_FACTOR, PEERS, check, contenders, shared_code
from lightning_norm.ops import eager
from lightning_norm.ops.layout import layout_of

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 3e-3}
"""Of the norm of a result, against float64."""

FLOOR = {"forward": 3, "backward": 5}
"""Times that x is read or written, at least, by batch normalization and its kind."""

Row = dict[str, Any]


def roofline(
    chosen: Iterable[Case],
    keys: Sequence[str],
    device: str,
    repeats: int,
    budget: Budget,
    speed: Mapping[str, float],
    compiled: bool = False,
) -> Iterator[tuple[list[Row], list[Row]]]:
    """Yield a row per contender and a row per pass of each case.

    Args:
        chosen: the cases.
        keys: normalizers.
        device: "cpu" or "cuda".
        repeats: rounds.
        budget: of time; what cannot run is noted there.
        speed: the copy's in GB/s, by dtype.
        compiled: torch's layer also under torch.compile, where maps are small.
    """
    for case in chosen:
        if not budget.allows(str(case), "case"):
            continue
        start = time.monotonic()
        mine, passes = measure(case, keys, device, repeats, speed[case.dtype], budget, compiled), list[Row]()
        if not case.compiled:
            try:
                passes = measure_passes(case, device, repeats, speed[case.dtype])
            except Exception as error:
                budget.record_failure(f"{case}: passes", error, True)
            budget.record_time(start, "case")
        print(f"\n{case}\n{roofline_table(mine)}", flush=True)
        yield mine, passes


def inputs(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Return x and dy."""
    torch.manual_seed(0)
    form = torch.channels_last if case.channels_last else torch.contiguous_format
    x, dy = (torch.randn(case.shape, device=device).to(DTYPES[case.dtype], memory_format=form) for _ in range(2))
    return x.requires_grad_(), dy


@dataclass(frozen=True)
class Contender:
    """A layer, checked and ready to be timed.

    Args:
        forward: its forward pass.
        both: forward and backward.
        eager: the same without a graph, with the work of the host.
        facts: kernels, memory, errors.
    """

    forward: Timed
    both: Timed
    eager: Timed
    facts: Row


def enter(name: str, layer: nn.Module, x: Tensor, dy: Tensor, case: Case, device: str, tolerance: float) -> Contender:
    """Check a layer, count what it launches and needs, and capture it."""

    def forward() -> Tensor:
        y: Tensor = layer(x)
        return y

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

    errors = check(name, layer, x, dy, tolerance)
    runs = Timed(forward, device), Timed(both, device), Timed(both, device, graph=False)
    of_forward, of_both, peak = launches(forward, device), launches(both, device), peak_memory(both, device)
    facts = {
        "kernels_forward": of_forward,
        "kernels_backward": None if of_forward is None or of_both is None else of_both - of_forward,
        "peak": None if peak is None else peak / case.bytes,
        "clock": runs[1].how,
        **dict(zip(("error_y", "error_dx"), errors or (None, None), strict=True)),
    }
    return Contender(*runs, facts)


def measure(
    case: Case, keys: Sequence[str], device: str, repeats: int, speed: float, budget: Budget, compiled: bool = False
) -> list[Row]:
    """Check every contender of a case, then time all in turn; what cannot run is noted in the budget."""
    with shared_code():
        return _measure(case, keys, device, repeats, speed, budget, compiled)


def _measure(
    case: Case, keys: Sequence[str], device: str, repeats: int, speed: float, budget: Budget, compiled: bool
) -> list[Row]:
    x, dy = inputs(case, device)
    entered: dict[str, Contender] = {}
    dims, both = len(case.shape), case.compiled or (compiled and case.small)
    layers = chain(
        contenders(case.shape, keys, device, case.compiled, case.naive), others(case.shape[1], dims, device, both)
    )
    for name, layer in _until_error(layers, lambda error: budget.record_failure(f"{case}: the next one", error, True)):
        ours, start = name.split()[0] in keys and "naive" not in name, time.monotonic()
        kind = "compiled" if "compiled" in name else "naive" if "naive" in name else ""
        if kind and not budget.allows(f"{case}: {name}", kind):
            continue
        if name.startswith("bnet naive") or any(isinstance(m, nn.Conv2d) for m in layer.modules()):
            layer.to(x.dtype)  # a convolution does not mix dtypes
        tolerance = TOLERANCE[case.dtype] * (1 if ours or name == "torch" else PEER_FACTOR)
        try:
            entered[name] = enter(name, layer, x, dy, case, device, tolerance)
        except Exception as error:
            budget.record_failure(f"{case}: {name}", error, ours or name == "torch")
        if kind:
            budget.record_time(start, kind)
    parts = ("forward", "both", "eager")
    times = interleaved({f"{n}\0{p}": getattr(c, p) for n, c in entered.items() for p in parts}, repeats)
    medians = {name: statistics.median(t) for name, t in times.items()}
    return [_row(case, name, c, medians, speed) for name, c in entered.items()] if "torch" in entered else []


def _until_error(items: Iterator[Any], on_error: Callable[[Exception], None]) -> Iterator[Any]:
    """Yield what an iterator gives until it raises, which is told and not passed on."""
    try:
        yield from items
    except Exception as error:
        on_error(error)


def _row(case: Case, name: str, contender: Contender, medians: Mapping[str, float], speed: float) -> Row:
    forward_ms, both_ms, eager_ms = (medians[f"{name}\0{part}"] for part in ("forward", "both", "eager"))
    row: Row = {**case.facts, "name": name, "eager_ms": eager_ms}
    # None: lost in the noise
    times = {"forward": forward_ms, "backward": both_ms - forward_ms if both_ms > forward_ms else None}
    for part, ms in times.items():
        rate = None if ms is None else FLOOR[part] * case.bytes / (ms * 1e6)
        row |= {f"{part}_ms": ms, f"{part}_gb_s": rate, f"{part}_of_floor": None if rate is None else rate / speed}
    peer = medians.get(f"{PEERS.get(name)}\0both")
    row |= {"ratio_forward": forward_ms / medians["torch\0forward"], "ratio": both_ms / medians["torch\0both"]}
    return {**row, "vs_peer": None if peer is None else both_ms / peer, **contender.facts}


def measure_passes(case: Case, device: str, repeats: int, speed: float) -> list[Row]:
    """Time each pass over x on its own, the kernels on CUDA and plain PyTorch elsewhere; fractions of the copy.

    Beside them a copy of x itself, which may be served by the cache.
    """
    x, dy = (t.detach() for t in inputs(case, device))
    layout = layout_of(x, case.shape[1])
    affine = torch.rand(3, layout.n, layout.c, device=device)
    dx_affine = torch.rand(2, layout.n, layout.c, device=device)
    k, a, b = affine.unbind(0)
    if device == "cuda":
        from lightning_norm.ops.fused import operators  # noqa: F401  defines the operators

        ops = torch.ops.lightning_norm
        runs = {
            "moments": lambda: ops.moments(x, 1),
            "apply": lambda: ops.apply(x, affine, 1, "none", None),
            "sums": lambda: ops.sums(dy, x, affine, 1),
            "combine": lambda: ops.combine(dy, x, affine, dx_affine, 1),
        }
    else:
        wide = x.float()
        runs = {
            "moments": lambda: eager.moments(wide, layout),
            "apply": lambda: eager.apply(wide, k, a, b, layout),
            "sums": lambda: eager.reduce(dy.float(), wide, k, layout),
            "combine": lambda: eager.combine(dy.float(), a, wide, k, dx_affine[0], dx_affine[1], layout),
        }
    target = torch.empty_like(x)
    runs["copy"] = lambda: target.copy_(x)
    touched = {"moments": 1, "apply": 2, "sums": 2, "combine": 3, "copy": 2}
    with torch.no_grad():
        times = interleaved({name: Timed(run, device) for name, run in runs.items()}, repeats)
    rows: list[Row] = []
    for name, ts in times.items():
        ms = statistics.median(ts)
        rate = touched[name] * case.bytes / (ms * 1e6)
        rows.append({**case.facts, "name": name, "ms": ms, "gb_s": rate, "of_copy": rate / speed})
    return rows

"""``lightning-norm bench --roofline``: forward and backward apart, beside the memory's own speed.

Each pass must read and write x so many times at least (three forward, five backward), and a machine copies so many
bytes in a second: the floor. What a contender takes is told as a fraction of it, beside the ratio to torch's BatchNorm
of the same run. The same code runs on a CPU, where it counts no kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.cli.bench import check, contenders
from lightning_norm.cli.bench_clock import Timed, interleaved, launches, peak_memory
from lightning_norm.cli.bench_peers import others
from lightning_norm.cli.bench_report import roofline_table
from lightning_norm.ops import eager
from lightning_norm.ops.layout import layout_of

SHAPES = ((64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 3e-3}
"""Of the norm of a result, against float64."""

FLOOR = {"forward": 3, "backward": 5}
"""Times that x is read or written, at least, by batch normalization and its kind."""


@dataclass(frozen=True)
class Case:
    """One table of the report.

    Args:
        shape: of x.
        dtype: "fp32", "bf16" or "fp16".
        channels_last: memory format.
        compiled: also under torch.compile.
    """

    shape: tuple[int, ...]
    dtype: str
    channels_last: bool
    compiled: bool = False

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), self.dtype, "channels_last" if self.channels_last else "contiguous"]
        return " ".join([*words, *["compiled"] * self.compiled])

    @property
    def bytes(self) -> int:
        """Return the size of x."""
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize


GUESS = {"case": 20.0, "compiled": 30.0, "step": 10.0, "compiled step": 90.0}
"""Seconds that each kind of work takes, until one of it was seen to take more."""


class Budget:
    """The time that is left.

    Args:
        minutes: in all.
    """

    def __init__(self, minutes: float) -> None:
        self.end, self.left_out, self.longest = time.monotonic() + 60 * minutes, list[str](), dict(GUESS)

    def allows(self, what: str, kind: str) -> bool:
        """Tell whether as much as the longest of its kind still fits; if not, note what is left out."""
        fits = time.monotonic() + self.longest[kind] < self.end
        if not fits:
            self.left_out.append(what)
        return fits

    def took(self, since: float, kind: str) -> None:
        """Note what something took, since a reading of the monotonic clock."""
        self.longest[kind] = max(time.monotonic() - since, self.longest[kind])


def cases(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], compiled: bool) -> Iterator[Case]:
    """Yield every case; under torch.compile, which takes long, only one dtype and format."""
    for dtype in dtypes[-1:] if compiled else dtypes:
        for shape in shapes:
            for last in (False, True) if len(shape) == 4 and not compiled else (False,):
                yield Case(shape, dtype, last, compiled)


def roofline(
    chosen: Iterable[Case], keys: Sequence[str], device: str, repeats: int, budget: Budget, speed: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a row per contender of each case, and a row per pass; ``speed`` is the copy's in GB/s.

    Raises:
        ArithmeticError: a normalizer's output or input gradient is not what float64 says.
    """
    rows: list[dict[str, Any]] = []
    passes: list[dict[str, Any]] = []
    for case in chosen:
        if not budget.allows(str(case), "case"):
            continue
        start = time.monotonic()
        mine = measure(case, keys, device, repeats, speed, budget)
        rows += mine
        if not case.compiled:
            passes += measure_passes(case, device, repeats, speed)
            budget.took(start, "case")
        print(f"\n{case}\n{roofline_table(mine)}", flush=True)
    return rows, passes


def inputs(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Return x and dy."""
    torch.manual_seed(0)
    form = torch.channels_last if case.channels_last else torch.contiguous_format
    x, dy = (torch.randn(case.shape, device=device).to(DTYPES[case.dtype], memory_format=form) for _ in range(2))
    return x.requires_grad_(), dy


def measure(
    case: Case, keys: Sequence[str], device: str, repeats: int, speed: float, budget: Budget
) -> list[dict[str, Any]]:
    """Check every contender of a case, then time all in turn; what cannot run is noted in the budget."""
    x, dy = inputs(case, device)
    torch._dynamo.reset()
    runs: dict[str, tuple[Timed, Timed, Timed]] = {}
    facts: dict[str, dict[str, Any]] = {}
    found = [*contenders(case.shape, keys, device, case.compiled), *others(case.shape[1], device, case.compiled)]
    for name, layer in found:
        ours, slow, start = name.split()[0] in keys and "naive" not in name, "compiled" in name, time.monotonic()
        if slow and not budget.allows(f"{case}: {name}", "compiled"):
            continue
        if name == "bnet naive" or any(isinstance(m, nn.Conv2d) for m in layer.modules()):
            layer.to(x.dtype)  # a convolution does not mix dtypes

        def forward(layer: nn.Module = layer) -> Tensor:
            y: Tensor = layer(x)
            return y

        def both(layer: nn.Module = layer) -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

        try:
            check(name, layer, x, dy, TOLERANCE[case.dtype])
            runs[name] = Timed(forward, device), Timed(both, device), Timed(both, device, graph=False)
        except Exception as error:
            if ours or name == "torch":
                raise
            budget.left_out.append(f"{case}: {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            continue
        if slow:
            budget.took(start, "compiled")
        of_forward, of_both, peak = launches(forward, device), launches(both, device), peak_memory(both, device)
        backward = None if of_forward is None or of_both is None else of_both - of_forward
        facts[name] = {
            "kernels_forward": of_forward,
            "kernels_backward": backward,
            "peak": None if peak is None else peak / case.bytes,
            "clock": runs[name][1].how,
        }
    flat = {f"{name}\0{i}": run for name, three in runs.items() for i, run in enumerate(three)}
    times = interleaved(flat, repeats)
    medians = {name: statistics.median(t) for name, t in times.items()}
    rows = []
    for name in runs:
        forward_ms, both_ms, eager_ms = (medians[f"{name}\0{i}"] for i in range(3))
        own = {"forward": forward_ms, "backward": both_ms - forward_ms if both_ms > forward_ms else None}
        row: dict[str, Any] = {"case": str(case), "name": name, "mb": case.bytes / 1e6, "eager_ms": eager_ms}
        for part, ms in own.items():
            row[f"{part}_ms"] = ms
            rate = None if ms is None else FLOOR[part] * case.bytes / (ms * 1e6)  # None: lost in the noise
            row[f"{part}_gb_s"], row[f"{part}_of_floor"] = rate, None if rate is None else rate / speed
        row["ratio_forward"] = forward_ms / medians["torch\x000"]
        row["ratio"] = both_ms / medians["torch\x001"]
        rows.append({**row, **facts[name]})
    return rows


def measure_passes(case: Case, device: str, repeats: int, speed: float) -> list[dict[str, Any]]:
    """Time each pass over x on its own, the kernels on CUDA and plain PyTorch elsewhere; fractions of the copy."""
    x, dy = (t.detach() for t in inputs(case, device))
    layout = layout_of(x, case.shape[1])
    coef, line = torch.rand(3, layout.n, layout.c, device=device), torch.rand(2, layout.n, layout.c, device=device)
    k, a, b = coef.unbind(0)
    if device == "cuda":
        from lightning_norm.ops import primitives  # noqa: F401  defines the operators

        ops = torch.ops.lightning_norm
        runs = {
            "moments": lambda: ops.moments(x, 1),
            "apply": lambda: ops.apply(x, coef, 1, "none", None),
            "sums": lambda: ops.sums(dy, x, coef, 1),
            "combine": lambda: ops.combine(dy, x, coef, line, 1),
        }
    else:
        wide = x.float()
        runs = {
            "moments": lambda: eager.moments(wide, layout),
            "apply": lambda: eager.apply(wide, k, a, b, layout),
            "sums": lambda: eager.reduce(dy.float(), wide, k, layout),
            "combine": lambda: eager.combine(dy.float(), a, wide, k, line[0], line[1], layout),
        }
    touched = {"moments": 1, "apply": 2, "sums": 2, "combine": 3}
    with torch.no_grad():
        times = interleaved({name: Timed(run, device) for name, run in runs.items()}, repeats)
    rows = []
    for name, ts in times.items():
        ms = statistics.median(ts)
        rate = touched[name] * case.bytes / (ms * 1e6)
        rows.append({"case": str(case), "name": name, "ms": ms, "gb_s": rate, "of_copy": rate / speed})
    return rows

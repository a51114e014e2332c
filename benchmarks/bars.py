"""The bars that the kernels are held to on an H200, and what a run says about each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.budget import LARGE
from benchmarks.network import MODES

Row = dict[str, Any]
Measured = list[tuple[float, str, Any]]
"""Figure, where, and the combination of dtype and format (or the mode) that it stands for."""

NORMS = ("bn", "sn", "bcn", "rbn", "dbn", "in", "gn", "cn")
"""Normalizers that may cost no more than torch's BatchNorm."""

EVERYWHERE = {(dtype, form) for dtype in ("fp32", "bf16") for form in ("contiguous", "channels_last")}
CHANCE = 1.05
"""Two results of equal precision are rounded differently: errors this close are the same."""

ROUNDING = 1.2e-7
"""Of float32: errors below it are the same."""


def verdicts(rows: Iterable[Row], passes: Iterable[Row], steps: Iterable[Row]) -> list[dict[str, Any]]:
    """Return for each bar its worst figure, where that was, and "met", "not met" or "not measured".

    A bar is met if every dtype and memory format (or mode of training) was measured and all of them meet it.

    Args:
        rows: a row per contender and case.
        passes: a row per pass and case.
        steps: a row per training step.
    """
    rows = [r for r in rows if not r["case"].endswith("compiled")]
    large = [r for r in rows if r["mb"] >= LARGE]
    big = [p for p in passes if p["mb"] >= LARGE]
    results = [
        _bar(f"{name}: at least 85 % of the copy", 0.85, _of(big, (name,), lambda p: p["of_copy"]), least=True)
        for name in ("apply", "combine")
    ]
    for part, floor in (("forward", 3), ("backward", 5)):
        measured = _of(large, NORMS, lambda r, part=part: r[f"{part}_of_floor"])  # type: ignore[misc]
        results.append(_bar(f"{part}: at least 80 % of the floor of {floor} passes", 0.8, measured, least=True))
    results += [
        _bar(f"{name}: at most 1.00 x nn.BatchNorm2d", 1.0, _of(large, (name,), lambda r: r["ratio"])) for name in NORMS
    ]
    small = [r for r in rows if r["small"]]
    results.append(_bar("7 x 7, CUDA graphs: at most torch.compile's BatchNorm", 1.0, list(_small(small))))
    results.append(
        _bar(
            "bnet: at most 0.65 x BatchNorm and depthwise convolution",
            0.65,
            _of(large, ("bnet",), lambda r: r["vs_peer"]),
        )
    )
    modes = [(s["ratio"], f"{s['case']}, {s['name']}", _mode(s)) for s in steps if s["name"] == "sn"]
    resnet = [m for m in modes if m[1].startswith("resnet50")]
    results.append(_bar("resnet50 step with sn: at most 1.05 x BatchNorm's", 1.05, resnet, set(MODES)))
    results.append(_bar("error against float64: at most nn.BatchNorm2d's", CHANCE, list(_errors(rows))))
    for part, most in (("forward", 4), ("backward", 5)):
        measured = _of(rows, (*NORMS, "bnet"), lambda r, part=part: r[f"kernels_{part}"])  # type: ignore[misc]
        results.append(_bar(f"{part}: at most {most} kernels", most, measured))
    return results


def _of(rows: Iterable[Row], names: tuple[str, ...], figure: Callable[[Row], float | None]) -> Measured:
    return [
        (value, f"{r['case']}, {r['name']}", (r["dtype"], r["format"]))
        for r in rows
        if r["name"] in names and (value := figure(r)) is not None
    ]


def _small(rows: list[Row]) -> Iterator[tuple[float, str, Any]]:
    """Yield the time of forward and backward in graphs as a multiple of the compiled BatchNorm's of the same case."""
    peers = {r["case"]: r for r in rows if r["name"] == "torch compiled"}
    for r in rows:
        peer = peers.get(r["case"])
        if r["name"] in NORMS and peer is not None and r["clock"] == peer["clock"] == "graph replay":
            yield r["ratio"] / peer["ratio"], f"{r['case']}, {r['name']}", (r["dtype"], r["format"])


def _errors(rows: list[Row]) -> Iterator[tuple[float, str, Any]]:
    """Yield the errors of output and input gradient as multiples of torch's in the same case."""
    torchs = {r["case"]: r for r in rows if r["name"] == "torch"}
    for r in rows:
        base = torchs.get(r["case"])
        for what, name in (("error_y", "y"), ("error_dx", "dx")):
            if r["name"] in NORMS and base is not None and r[what] is not None and base[what] is not None:
                times = r[what] / max(base[what], ROUNDING)
                yield times, f"{r['case']}, {r['name']}, {name}", (r["dtype"], r["format"])


def _mode(step: Row) -> str:
    return str(step["case"]).partition(" ")[2]


def _bar(
    bar: str, limit: float, measured: Measured, needed: set[Any] = EVERYWHERE, least: bool = False
) -> dict[str, Any]:
    if not measured:
        return {"bar": bar, "limit": limit, "figure": None, "where": None, "verdict": "not measured"}
    figure, where, _ = (min if least else max)(measured, key=lambda m: m[0])
    met = figure >= limit if least else figure <= limit
    missing = needed - {combination for _, _, combination in measured}
    verdict = "not met" if not met else "not measured" if missing else "met"
    if missing:
        names = sorted(" ".join(m) if isinstance(m, tuple) else m for m in missing)
        where = f"{where}; not measured: {', '.join(names)}"
    return {"bar": bar, "limit": limit, "figure": figure, "where": where, "verdict": verdict}

"""Tables and the picture of ``python -m benchmarks.roofline``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_norm.surgery.text_tables import aligned

ROOFLINE_LEGEND = (
    "Forward and backward on the device, medians of interleaved runs, by the clock that each row names. `of floor`: "
    "the time that a copy of 3 (forward) or 5 (backward) times the size of x takes on this machine, as a share of the "
    "time taken. `eager` is forward and backward with the work of the host. `kernels` were counted by the profiler; "
    "`peak` is memory beyond the inputs, as a multiple of x; `error` that of output and input gradient "
    "against float64, relative to their norms."
)


def roofline_table(rows: list[dict[str, Any]]) -> str:
    """Return aligned rows of text for the contenders of one case."""
    head = " |forward ms|of floor|backward ms|of floor|vs torch|eager ms|kernels|peak|error|clock"
    cells = [tuple(head.split("|"))]
    for r in rows:
        kernels = "-" if r["kernels_forward"] is None else f"{r['kernels_forward']} + {r['kernels_backward']}"
        peak = "-" if r["peak"] is None else f"{r['peak']:.2f} x"
        error = "-" if r["error_y"] is None else f"{r['error_y']:.1e} {r['error_dx']:.1e}"
        parts = [(_or_dash(r[f"{p}_ms"], ".4f"), _or_dash(r[f"{p}_of_floor"], ".0%")) for p in ("forward", "backward")]
        shown = (*parts[0], *parts[1], f"{r['ratio']:.2f} x", f"{r['eager_ms']:.4f}", kernels, peak, error, r["clock"])
        cells.append((r["name"], *shown))
    return aligned(cells)


BARS = "Bars on an H200"


def bars_table(bars: list[dict[str, Any]]) -> str:
    """Return aligned rows of text: each bar, the worst figure, where it was measured, the verdict."""
    cells = [("bar", "figure", "verdict", "worst at")]
    cells += [(b["bar"], _or_dash(b["figure"], ".3g"), b["verdict"], b["where"] or "-") for b in bars]
    return aligned(cells)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def save_roofline(result: dict[str, Any], folder: Path) -> None:
    """Write ``roofline.json``, ``roofline.md`` and ``roofline.png`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "roofline.json").write_text(json.dumps(result, indent=1))
    where = ", ".join(f"{k} {v}" for k, v in result["machine"].items() if v)
    copies = ", ".join(f"copy {d} {s:.0f} GB/s" for d, s in result["copy_gb_s"].items())
    text = [f"# Roofline\n\n`{result['command']}`\n\n{where}, {copies}\n\n{ROOFLINE_LEGEND}"]
    for case in dict.fromkeys(r["case"] for r in result["roofline"]):
        text.append(
            f"### {case}\n\n```text\n{roofline_table([r for r in result['roofline'] if r['case'] == case])}\n```"
        )
    passes = [("", "pass", "ms", "GB/s", "of copy")]
    passes += [
        (r["case"], r["name"], f"{r['ms']:.4f}", f"{r['gb_s']:.0f}", f"{r['of_copy']:.0%}") for r in result["passes"]
    ]
    text.append(f"## Passes\n\n```text\n{aligned(passes)}\n```")
    steps = [("", "", "ms", "vs torch", "peak GB")]
    for r in result["steps"]:
        peak = _or_dash(None if r["peak"] is None else r["peak"] / 1e9, ".2f")
        steps.append((r["case"], r["name"], f"{r['ms']:.1f}", f"{r['ratio']:.2f} x", peak))
    text.append(f"## Training steps\n\n```text\n{aligned(steps)}\n```")
    if result["left_out"]:
        text.append("## Left out\n\n" + "\n".join(f"- {line}" for line in result["left_out"]))
    text.append(f"## {BARS}\n\n```text\n{bars_table(result['bars'])}\n```")
    (folder / "roofline.md").write_text("\n\n".join(text) + "\n")
    plot_roofline(result["roofline"], max(result["copy_gb_s"].values()), folder / "roofline.png")


def plot_roofline(rows: list[dict[str, Any]], speed: float, path: Path) -> None:
    """Draw the GB/s that each contender reaches over the size of x, below the copy's; channels-last hollow."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    shown = [r for r in rows if "naive" not in r["name"] and not r["case"].endswith("compiled")]
    names = list(dict.fromkeys(r["name"] for r in shown))
    torchs = [name for name in names if name.startswith("torch")]
    ours = [name for name in names if name not in torchs]
    styles = {name: ("black", "x+*1^"[i % 5]) for i, name in enumerate(torchs)}
    styles |= {name: (colormaps["tab20"](i % 20), "o") for i, name in enumerate(ours)}
    for axes, part in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True):
        for name, (color, marker) in styles.items():
            for form, fill in (("contiguous", "full"), ("channels_last", "none")):
                mine = [r for r in shown if r["name"] == name and r["format"] == form and r[f"{part}_gb_s"]]
                axes.plot(
                    [r["mb"] for r in mine],
                    [r[f"{part}_gb_s"] for r in mine],
                    linestyle="none",
                    label=name if form == "contiguous" else None,
                    markersize=5,
                    alpha=0.8,
                    color=color,
                    marker=marker,
                    fillstyle=fill,
                )
        axes.axhline(speed, color="black", linewidth=1)
        axes.axhline(0.8 * speed, color="black", linewidth=1, linestyle="dotted")
        axes.set_xscale("log")
        axes.set_xlabel("size of x in MB")
        axes.set_title(part, fontsize=11)
    figure.axes[0].set_ylabel("GB/s, at 3 (5) times the size of x; lines: a copy, and 80 % of it")
    if names:
        figure.axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)

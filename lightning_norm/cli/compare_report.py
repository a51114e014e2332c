"""The table and the picture of ``lightning-norm compare``."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_norm.surgery.text import aligned

Row = dict[str, str]
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which colour-blind readers tell apart."""
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX"


def summarize(rows: Sequence[Row], norms: Sequence[str], baseline: str) -> str:
    """Return the table: accuracy, paired interval against the baseline, step time and parameters."""
    by_norm = {norm: {int(r["seed"]): r for r in rows if r["norm"] == norm} for norm in norms}
    base = by_norm[baseline]
    lines = [("norm", "test acc (mean +- sd)", f"vs {baseline}, 95 % interval", "step time", "params")]
    for norm in norms:
        runs = by_norm[norm]
        accuracies = [float(r["test_acc"]) for r in runs.values()]
        pairs = [float(runs[s]["test_acc"]) - float(base[s]["test_acc"]) for s in runs if s in base]
        ratio = _median(runs, "step_ms") / _median(base, "step_ms")
        more = int(_median(runs, "params") - _median(base, "params"))
        params = f"{_median(runs, 'params') / 1e6:.2f} M" if norm == baseline else f"{more:+d}"
        deviation = f" +- {statistics.stdev(accuracies):.4f}" if len(accuracies) > 1 else ""
        against = "-" if norm == baseline else interval(pairs)
        lines.append((norm, f"{statistics.mean(accuracies):.4f}{deviation}", against, f"{ratio:.2f} x", params))
    seeds = len(base)
    notes = [
        aligned(lines),
        "An interval that contains 0 is no evidence of a difference.",
        f"{seeds} seed{'s' if seeds > 1 else ''}, paired; Student's t over seeds, which says nothing about other data.",
        "Step times are medians of whole training runs; `lightning-norm bench` measures side by side.",
    ]
    if "bn" in norms:
        notes.append("bn is the network's own torch BatchNorm, unswapped.")
    return "\n".join(notes)


def interval(differences: Sequence[float]) -> str:
    """Return mean and 95 % t-interval of paired differences.

    >>> interval([0.01, 0.02, 0.03])
    '+0.0200 [-0.0048, +0.0448]'
    """
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.4f} (no interval of one seed)"
    from scipy.stats import t

    half = t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


def draw(rows: Sequence[Row], norms: Sequence[str], path: Path, title: str) -> None:
    """Draw validation accuracy and training loss by epoch: mean over seeds, and a band of one standard deviation.

    Args:
        rows: of runs.csv.
        norms: in the order of the legend.
        path: of the PNG.
        title: what was trained.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure_class, canvas = matplotlib()
    figure = figure_class(figsize=(10, 4.2), layout="constrained", dpi=150)
    canvas(figure)
    for axes, column, label in zip(
        figure.subplots(1, 2),
        ("val_acc", "train_loss"),
        ("validation accuracy (higher is better)", "training loss (lower is better)"),
        strict=True,
    ):
        least = [
            _curve(axes, [json.loads(r[column]) for r in rows if r["norm"] == norm], norm, i)
            for i, norm in enumerate(norms)
        ]
        if column == "train_loss":
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.5 * min(least))
            axes.yaxis.get_major_locator().set_params(subs=(1.0, 2.0, 5.0))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.set_ylim(top=min(axes.get_ylim()[1], 1.005))  # no accuracy is above 1, whatever its deviation
        axes.set_title(label, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(title="norm", frameon=False, loc="lower right" if column == "val_acc" else "upper right")
    seeds = len({r["seed"] for r in rows})
    band = ", band: +- one standard deviation" if seeds > 1 else ""
    figure.suptitle(f"{title}: mean of {seeds} seed{'s' if seeds > 1 else ''}{band}")
    figure.savefig(path)


def matplotlib() -> tuple[Any, Any]:
    """Return matplotlib's Figure and its canvas that needs no display.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"pictures need matplotlib ({error}): pip install 'lightning-norm[examples]'."
        ) from error
    return Figure, FigureCanvasAgg


def _curve(axes: Any, runs: list[list[float]], norm: str, i: int) -> float:
    """Draw one norm and return the least value of its mean curve."""
    by_epoch = list(zip(*runs, strict=True))
    epochs = range(1, len(by_epoch) + 1)
    mean: list[float] = [statistics.mean(values) for values in by_epoch]
    look = {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i % len(STYLES)], "marker": MARKERS[i % len(MARKERS)]}
    axes.plot(epochs, mean, label=f"{norm}  {mean[-1]:.3f} at the end", linewidth=2, markersize=5, **look)
    if len(runs) > 1:
        sd = [statistics.stdev(values) for values in by_epoch]
        low = [max(m - s, 1e-12) for m, s in zip(mean, sd, strict=True)]  # a logarithmic axis has no zero
        high = [m + s for m, s in zip(mean, sd, strict=True)]
        axes.fill_between(epochs, low, high, color=look["color"], alpha=0.15, linewidth=0)
    return float(min(mean))


def _median(rows: dict[int, Row], column: str) -> float:
    return statistics.median(float(row[column]) for row in rows.values())

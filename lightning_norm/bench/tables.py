"""Tables and pictures of the benchmark."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from lightning_norm.bench.contenders import PEERS
from lightning_norm.surgery.text_tables import aligned
from lightning_norm.surgery.whole_files import write_whole, writing_whole


def save(result: dict[str, Any], folder: Path) -> None:
    """Write ``bench.json``, ``bench.md`` and ``bench.png`` into a folder.

    Args:
        result: ``command`` as typed, ``machine`` as :func:`lightning_norm.bench.clock.machine` describes it, and
            ``rows``.
        folder: which exists; files of an earlier benchmark are replaced, each as a whole.
    """
    write_whole(folder / "bench.json", json.dumps(result, indent=1))
    where = ", ".join(f"{k} {v}" for k, v in result["machine"].items() if v)
    shapes = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    tables = "\n\n".join(
        f"### {s}\n\n```text\n{table([r for r in result['rows'] if r['shape'] == s])}\n```" for s in shapes
    )
    write_whole(folder / "bench.md", f"# Benchmark\n\n`{result['command']}`\n\n{where}\n\n{LEGEND}\n\n{tables}\n")
    plot(result["rows"], folder / "bench.png")


LEGEND = (
    "Medians of interleaved runs, forward and backward; quartiles in brackets. The ratios hold on this machine; "
    "absolute times do not travel. `saved` is what is kept for the backward pass, as a multiple of x."
)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratios to torch's BatchNorm, a panel per shape.

    Args:
        rows: of all shapes, as :func:`rows_of` returns them.
        path: of a picture; its ending says in which format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    # Only a report with pictures needs matplotlib, and not every installation has it.
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    columns = min(4, len(shapes))
    lines = math.ceil(len(shapes) / columns)
    figure = Figure(figsize=(3.6 * columns, 0.6 + 2.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, shape in zip(panels, shapes, strict=False):
        mine = [r for r in rows if r["shape"] == shape and "naive" not in r["name"] and r["name"] != "torch"]
        colors = ["#0072B2" if "compiled" in r["name"] else "#E69F00" for r in mine]
        axes.barh([r["name"] for r in mine], [r["ratio"] for r in mine], color=colors)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_title(shape, fontsize=10)
        # Bars are drawn from below; the table is read from above.
        axes.invert_yaxis()
        for i, r in enumerate(mine):
            axes.text(r["ratio"], i, f" {r['ratio']:.2f}", va="center", fontsize=8)
        axes.margins(x=0.18)
    # What the loop above has left of the iterator: panels without a shape.
    for axes in list(panels):
        axes.axis("off")
    figure.suptitle(
        "time of forward + backward, nn.BatchNorm = 1 (eager orange, compiled blue; shorter is faster)", fontsize=11
    )
    with writing_whole(path) as there:
        figure.savefig(there, dpi=110)


def table(rows: list[dict[str, Any]]) -> str:
    """Return aligned rows of text."""
    head = ("", "median ms", "vs torch", "vs peer", "vs naive", "saved")
    cells = [head]
    for r in rows:
        peer, naive, saved = (f"{r[k]:.2f} x" if r[k] else "-" for k in ("vs_peer", "vs_naive", "saved"))
        cells.append(
            (r["name"], f"{r['ms']:.2f} [{r['low']:.2f}, {r['high']:.2f}]", f"{r['ratio']:.2f} x", peer, naive, saved)
        )
    return aligned(cells)


def rows_of(label: str, times: dict[str, list[float]], saved: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row per contender of one shape: median and quartiles in milliseconds, ratios, memory.

    Args:
        label: of the shape.
        times: contender -> milliseconds, one per round; "torch" is what the others are held against.
        saved: contender -> what is kept for the backward pass, as a multiple of x.

    >>> rows = rows_of("2x8", {"torch": [1.0, 1.0, 1.0], "sn": [2.0, 2.0, 2.0]}, {"sn": 1.5})
    >>> [(row["name"], row["ratio"], row["saved"]) for row in rows]
    [('torch', 1.0, None), ('sn', 2.0, 1.5)]
    """
    medians = {name: statistics.median(ts) for name, ts in times.items()}
    rows = []
    for name, ts in times.items():
        low, _, high = statistics.quantiles(ts, n=4)
        naive = f"{name.split()[0]} naive{' compiled' if name.endswith(' compiled') else ''}"
        # A compiled layer is compared with the compiled formula, an eager one with the eager formula.
        peer = PEERS.get(name.split()[0], "")
        against = medians[name] / medians[naive] if naive in medians and "naive" not in name else None
        rows.append(
            {
                "shape": label,
                "name": name,
                "ms": medians[name],
                "low": low,
                "high": high,
                "ratio": medians[name] / medians["torch"],
                "vs_peer": medians[name] / medians[peer] if peer in medians else None,
                "vs_naive": against,
                "saved": saved.get(name),
            }
        )
    return rows

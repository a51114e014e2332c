"""What came out of a comparison: table, CSV, JSON, pictures, TensorBoard's HParams and one page of HTML.

Everything is made from the records of the runs, which :mod:`lightning_norm.cli.compare.training` describes, so that a
report can be drawn again without training.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_norm.cli.compare.intervals import LEAST_SEEDS, Difference, compare_paired, half_width_ratio
from lightning_norm.cli.compare.store import Record
from lightning_norm.errors import counted
from lightning_norm.surgery.extras import require
from lightning_norm.surgery.text_tables import aligned
from lightning_norm.surgery.whole_files import write_whole, writing_whole

COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which colour-blind readers tell apart."""
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX"

LEAST_MB = 50.0
"""A peak of less is mostly the allocator's own: no ratio is told."""

Point = tuple[tuple[str, str], ...]

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
body{color:#1a1a1a;background:#fff}
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:left}
th{border-bottom:2px solid #888}img{max-width:100%;height:auto}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}img{background:#fff}th,td{border-color:#444}}"""


MOST_IN_A_PICTURE = 6
"""Lines whose legend still finds room among them; that of more stands beside the picture."""

LEGEND_WIDTH = 2.0
"""Inches of such a legend."""


class Report:
    """The results of finished runs under one metric.

    A normalizer is compared with the baseline seed by seed, for the same seed means the same data and the same starting
    weights. Intervals hold for all comparisons at once: with many, the chance that one of them is wrong stays 5 %.

    Args:
        records: finished runs.
        metric: its name.
        higher: more of it is better.
        best: take the best epoch in place of the last one; a tested metric has one value only.
        baseline: label that the others are held against.

    Attributes:
        labels: of the normalizers, the baseline first.
        points: of the sweep, each a tuple of (entry, value).
        comparisons: differences that are looked at, one for each normalizer beside the baseline and each point.

    >>> run = {"sweep": {}, "history": {}, "steps": 10, "seconds": 1.0}
    >>> bn = [{**run, "label": "bn", "seed": seed, "test": {"acc": 0.90 + seed / 100}} for seed in range(3)]
    >>> sn = [{**run, "label": "sn", "seed": seed, "test": {"acc": 0.95 + seed / 100}} for seed in range(3)]
    >>> row = Report([*sn, *bn], "acc", higher=True, best=False, baseline="bn").rows()[1]
    >>> row["norm"], row["seeds"], round(row["difference"], 2), row["verdict"]
    ('sn', 3, 0.05, 'higher')
    """

    def __init__(self, records: Sequence[Record], metric: str, higher: bool, best: bool, baseline: str) -> None:
        self.records, self.metric, self.higher, self.best, self.baseline = list(records), metric, higher, best, baseline
        self.labels = list(dict.fromkeys(r["label"] for r in self.records))
        if baseline in self.labels:  # the baseline comes first, in the table and in the legend
            self.labels.remove(baseline)
            self.labels.insert(0, baseline)
        # Runs come as their files lie, which is 128 before 32.
        self.points: list[Point] = sorted(dict.fromkeys(_point(r) for r in self.records), key=_in_order)
        others = [label for label in self.labels if label != baseline]
        # Each normalizer at each point is one chance of a false finding.
        self.comparisons = max(1, len(others) * len(self.points))

    def value(self, record: Record) -> float:
        """Return the metric of one run: of its test, or else of the last epoch or the best one.

        Raises:
            KeyError: the run has no such metric; ``command.check_metric`` says so in words before.
        """
        if self.metric in record["test"]:
            return float(record["test"][self.metric])
        # A diverged epoch is never the best one; the last value below may still be NaN, and is shown so.
        history = [v for v in record["history"][self.metric] if math.isfinite(v)]
        if self.best and history:
            return float(max(history) if self.higher else min(history))
        return float(record["history"][self.metric][-1])

    def of(self, label: str, point: Point) -> dict[int, Record]:
        """Return the runs of one normalizer at one point of the sweep, by seed."""
        return {r["seed"]: r for r in self.records if r["label"] == label and _point(r) == point}

    def difference(self, label: str, point: Point) -> Difference:
        """Return the paired difference to the baseline at one point of the sweep.

        Args:
            label: of the normalizer.
            point: of the sweep.

        Returns:
            Mean and interval, over the seeds that both have; the interval is NaN where there are too few.
        """
        runs, base = self.of(label, point), self.of(self.baseline, point)
        # By seed, for the same seed means the same data and the same starting weights.
        seeds = [seed for seed in runs if seed in base]
        return compare_paired(
            [self.value(runs[s]) for s in seeds], [self.value(base[s]) for s in seeds], self.comparisons
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return the table, one row per normalizer and point of the sweep, as numbers.

        A row has ``norm``, the swept entries, ``seeds`` and how many of them ``diverged``; ``mean`` and ``sd`` of the
        metric over those that did not; beside the baseline ``difference``, ``low``, ``high`` and ``verdict``; and
        medians over seeds: ``step_ms``, ``peak_mb``, ``parameters``, ``steps``, ``seconds``, with ratios to the
        baseline.
        """
        rows: list[dict[str, Any]] = []
        for point in self.points:
            base = self.of(self.baseline, point)
            for label in self.labels:
                runs = self.of(label, point)
                if not runs:
                    continue
                # A mean over diverged runs would be NaN, so they are counted apart.
                values = [self.value(r) for r in runs.values()]
                finite = [v for v in values if math.isfinite(v)]
                row: dict[str, Any] = {"norm": label, **dict(point), "seeds": len(values)}
                row["diverged"] = len(values) - len(finite)
                row["mean"] = statistics.fmean(finite) if finite else math.nan
                row["sd"] = statistics.stdev(finite) if len(finite) > 1 else None
                if label != self.baseline and base:
                    d = self.difference(label, point)
                    row |= {"difference": d.mean, "low": d.low, "high": d.high, "verdict": d.verdict}
                row["step_ms"], row["peak_mb"] = _median(runs, "step_ms"), _median(runs, "peak_mb")
                row["step_ratio"] = _ratio(runs, base, "step_ms")
                row["memory_ratio"] = _ratio(runs, base, "peak_mb", LEAST_MB)
                row["parameters"], row["steps"] = _median(runs, "parameters"), _median(runs, "steps")
                row["seconds"] = _median(runs, "seconds")
                rows.append(row)
        return rows

    def table(self) -> list[tuple[str, ...]]:
        """Return the table as text, the heading first."""
        level = "simultaneous 95 % interval" if self.comparisons > 1 else "95 % interval"
        swept = [key.rpartition(".")[2] for key, _ in self.points[0]] if self.points else []
        lines = [
            (
                "norm",
                *swept,
                f"{self.metric} (mean +- sd)",
                f"vs {self.baseline}, {level}",
                "step time",
                "memory",
                "params",
            )
        ]
        base_parameters = {
            tuple(dict(p).values()): _median(self.of(self.baseline, p), "parameters") for p in self.points
        }
        for row in self.rows():
            # The columns behind the norm: the swept entries in their order.
            point = tuple(row[key] for key, _ in self.points[0])
            sd = "" if row["sd"] is None else f" +- {row['sd']:.4f}"
            mean = f"{row['mean']:.4f}{sd}" if math.isfinite(row["mean"]) else "-"
            if row["diverged"]:
                mean += f" ({row['diverged']} of {row['seeds']} diverged)"
            base = base_parameters[point]
            added = (
                ""
                if base is None or row["parameters"] is None
                else f"{row['parameters'] - base:+,.0f}".replace(",", " ")
            )
            # The number for the baseline, for all others the difference, which is what one looks for.
            params = _count(row["parameters"]) if row["norm"] == self.baseline else added
            lines.append(
                (
                    row["norm"],
                    *point,
                    mean,
                    _against(row),
                    _times(row["step_ratio"]),
                    _times(row["memory_ratio"]),
                    params,
                )
            )
        return lines

    def notes(self) -> list[str]:
        """Return what a reader must know to read the table, one sentence each."""
        better = "higher" if self.higher else "lower"
        rows = self.rows()
        # Of what has run: in a sweep that goes on, some normalizers have not come to some points.
        seeds = min((row["seeds"] for row in rows), default=0)
        remaining = len(self.labels) * len(self.points) - len(rows)
        which = "best" if self.best else "last"
        where = "test" if all(self.metric in r["test"] for r in self.records) else f"{which} epoch"
        notes = [f"{self.metric} of the {where}; {better} is better. Equal budgets: {self._budget(rows)}."]
        if remaining:
            notes.append(f"{remaining} of {len(rows) + remaining} rows without a run so far; the same command goes on.")
        if seeds < LEAST_SEEDS:
            notes.append(f"{counted(seeds, 'seed')}: too few for a verdict, --seeds {LEAST_SEEDS} gives one.")
        elif len(self.labels) > 1:
            notes.append(
                "An interval that contains 0 is no evidence of a difference. Differences are paired by seed; Student's "
                f"t, Bonferroni over {counted(self.comparisons, 'comparison')}; they say "
                "nothing about other data."
            )
            # The price beside the gain: whether more seeds are worth it is for the user to say.
            seconds = sum(row["seconds"] or 0.0 for row in rows)
            ratio = half_width_ratio(seeds, seeds, self.comparisons)
            notes.append(
                f"One more seed costs about {_duration(seconds)} of training; {seeds} more would narrow the intervals "
                f"to about {100 * ratio:.0f} % of their width ({_duration(seconds * seeds)})."
            )
        decided = [r for r in rows if r.get("verdict") in ("higher", "lower")]
        for row in decided:
            good = (row["verdict"] == "higher") == self.higher
            at = "".join(f", {key.rpartition('.')[2]}={row[key]}" for key, _ in self.points[0])
            notes.append(
                f"{row['norm']}{at}: {'better' if good else 'worse'} than {self.baseline}; its interval excludes 0."
            )
        if any(r["step_ms"] for r in rows):
            notes.append(
                f"Step times and memory are medians of whole runs, memory from {LEAST_MB:.0f} MB on; "
                "`lightning-norm bench` measures side by side."
            )
        if self.baseline == "bn":
            notes.append("bn is the network as it is, unswapped.")
        return notes

    def _budget(self, rows: Sequence[dict[str, Any]]) -> str:
        """Return how many optimizer steps the runs had, for each point of the sweep."""
        told = []
        for point in self.points:
            at = [row for row in rows if all(row[key] == value for key, value in point)]
            counts = sorted({int(row["steps"]) for row in at if row["steps"] is not None})
            where = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in point)
            # Runs of one point can differ in steps if one was stopped early; then the range is told.
            told.append(
                " to ".join(map(str, dict.fromkeys(counts[:1] + counts[-1:]))) + (f" at {where}" if where else "")
            )
        return f"optimizer steps of each run {'; '.join(told)}"

    def text(self) -> str:
        """Return the table and its notes for the terminal."""
        return "\n".join([aligned(self.table()), *self.notes()])

    def save(self, folder: Path) -> list[str]:
        """Write everything into a folder; return one line per file of interest.

        ``results.csv`` and ``results.json`` hold a row per normalizer and point of the sweep, ``index.html`` the table
        and all pictures in one file that can be sent, ``tensorboard`` the curves and the columns under "HParams".

        Args:
            folder: of the comparison; what an earlier report wrote is replaced.
        """
        rows = self.rows()
        # The baseline has no difference, so no single row has all columns.
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(folder / "results.csv", text.getvalue())
        summary = {
            "metric": self.metric,
            "higher_is_better": self.higher,
            "baseline": self.baseline,
            "rows": _finite(rows),
        }
        write_whole(folder / "results.json", json.dumps(summary, indent=1))
        pictures = self._pictures(folder)
        # The pictures are inside the page, so that one file can be sent.
        write_whole(folder / "index.html", self._page(pictures))
        self._hparams(folder / "tensorboard")
        return [
            f"Pictures, table and data: {folder / 'index.html'}     CSV: {folder / 'results.csv'}",
            f"TensorBoard: tensorboard --logdir {folder / 'tensorboard'}",
        ]

    def _pictures(self, folder: Path) -> list[tuple[str, Path]]:
        """Draw the pictures, and return the title and the path of each."""
        pictures = []
        # The last word of the dotted name makes a file name that every system takes.
        swept = [key for key, _ in self.points[0]]
        for key in swept:
            path = folder / f"sweep_{key.rpartition('.')[2]}.png"
            self._draw_sweep(key, path)
            pictures.append((f"{self.metric} by {key}", path))
        shown = [self.metric] if any(self.metric in r["history"] for r in self.records) else []
        names = {name for r in self.records for name in r["history"]}
        # Without a history of its own, a tested metric is shown by those of its kind that training logged.
        kind = self.metric.replace("/", "_").rpartition("_")[2]
        shown += sorted(n for n in names if n.replace("/", "_").endswith(kind) and n not in shown)[:2]
        for i, name in enumerate(dict.fromkeys(shown)):
            path = folder / ("curves.png" if i == 0 else f"curves_{name.replace('/', '_')}.png")
            self._draw_curves(name, path)
            pictures.append((f"{name} by epoch", path))
        return pictures

    def _draw_curves(self, name: str, path: Path) -> None:
        """Draw a logged quantity over the epochs, a panel for each point of the sweep."""
        # Without pyplot, which would ask for a display and keep every figure.
        figure, canvas = matplotlib()
        columns = min(3, len(self.points))
        lines = math.ceil(len(self.points) / columns)
        beside = LEGEND_WIDTH * columns * (len(self.labels) > MOST_IN_A_PICTURE)
        made = figure(figsize=(max(6.4, 4.6 * columns) + beside, 4.2 * lines), layout="constrained", dpi=130)
        canvas(made)
        grid = made.subplots(lines, columns, squeeze=False, sharey=True).flat
        for point, axes in zip(self.points, grid, strict=False):
            for i, label in enumerate(self.labels):
                series = [r["history"][name] for r in self.of(label, point).values() if name in r["history"]]
                _curve(axes, series, label, i)
            title = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in point)
            axes.set_title(title, loc="left")
            _dress(axes, "epoch")
        # Panels that no point has taken.
        for axes in list(grid):
            axes.set_visible(False)
        seeds = max(len(self.of(label, p)) for label in self.labels for p in self.points)
        what = f"mean over {seeds} seeds, band: one standard deviation" if seeds > 1 else "one seed"
        made.suptitle(f"{name}: {what}")
        with writing_whole(path) as there:
            made.savefig(there)

    def _draw_sweep(self, key: str, path: Path) -> None:
        """Draw the metric over the values of one swept entry."""
        figure, canvas = matplotlib()
        beside = LEGEND_WIDTH * (len(self.labels) > MOST_IN_A_PICTURE)
        made = figure(figsize=(7.2 + beside, 4.6), layout="constrained", dpi=130)
        canvas(made)
        axes = made.subplots()
        values = list(dict.fromkeys(dict(point)[key] for point in self.points))
        for i, label in enumerate(self.labels):
            means, deviations = [], []
            for value in values:
                runs = [r for p in self.points if dict(p)[key] == value for r in self.of(label, p).values()]
                # A diverged run has no place on the axis; the table counts it.
                finite = [v for v in map(self.value, runs) if math.isfinite(v)]
                means.append(statistics.fmean(finite) if finite else math.nan)
                deviations.append(statistics.stdev(finite) if len(finite) > 1 else 0.0)
            # Points beside each other, so that the bars of two normalizers do not hide one another.
            at = [x + 0.03 * (i - (len(self.labels) - 1) / 2) for x in range(len(values))]
            axes.errorbar(at, means, deviations, label=label, capsize=3, linewidth=2, markersize=5, **_look(i))
        axes.set_xticks(range(len(values)), values)
        axes.set_title(f"{self.metric} (mean, bar: one standard deviation)", loc="left")
        _dress(axes, key)
        with writing_whole(path) as there:
            made.savefig(there)

    def _page(self, pictures: Sequence[tuple[str, Path]]) -> str:
        """Return the page: table, notes, pictures, and all settings of the job."""
        # Written by hand, without a template engine: one table, a list and some pictures.
        heading, *lines = self.table()
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heading)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
        images = "".join(
            f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,'
            f'{base64.b64encode(path.read_bytes()).decode()}">'
            for title, path in pictures
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes())
        settings = "".join(
            f"<tr><td><code>{html.escape(k)}</code></td><td>{html.escape(v)}</td></tr>"
            for k, v in sorted(self.records[0]["settings"].items())
        )
        versions = ", ".join(f"{k} {v}" for k, v in self.records[0]["versions"].items())
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(self.metric)} of "
            f"{counted(len(self.labels), 'normalizer')}</title><style>{STYLE}</style>"
            f"<h1>{html.escape(self.metric)} of {counted(len(self.labels), 'normalizer')}</h1>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><ul>{notes}</ul>{images}"
            f"<h2>The job</h2><p>{html.escape(versions)}, on {html.escape(self.records[0]['device'])}</p>"
            f"<details><summary>All settings</summary><table>{settings}</table></details></html>\n"
        )

    def _hparams(self, folder: Path) -> None:
        """Write TensorBoard's HParams: one row per run, all with the same columns, as TensorBoard wants them."""
        from torch.utils.tensorboard.summary import hparams, scalar

        described = [
            {"norm": r["label"], "seed": r["seed"], **r["sweep"], **_arguments(r["swap"])} for r in self.records
        ]
        columns = list(dict.fromkeys(name for d in described for name in d))
        for record, d in zip(self.records, described, strict=True):
            row = {name: d.get(name, "") for name in columns}
            # An entry that is a number in one run and missing in another is text in both: a column has one type.
            row = {n: str(v) if any(n not in other for other in described) else v for n, v in row.items()}
            # Beside the run's curves; drawn again, they replace what an earlier report wrote.
            target = folder / record["name"] / "hparams"
            now = time.time()
            # The three summaries that TensorBoard wants; add_hparams would write them into a folder of its own.
            summaries = [(summary, 0) for summary in hparams(row, {self.metric: 0.0})]  # type: ignore[no-untyped-call]
            # At the end of the run's curve, in whose chart it is drawn as well.
            last = scalar(self.metric, self.value(record))  # type: ignore[no-untyped-call]
            summaries.append((last, record["steps"]))
            # A new name each time: a TensorBoard that is open reads on in a file that it knows.
            written = target / f"events.out.tfevents.{now:.6f}"
            write_whole(written, _events(summaries, now))
            for earlier in {*target.iterdir()} - {written}:
                earlier.unlink(missing_ok=True)


def _events(summaries: Sequence[tuple[Any, int]], now: float) -> bytes:
    """Return what is in an event file of TensorBoard.

    In memory, for SummaryWriter writes a file piece by piece, and on a full disk has lost the earlier one by then.

    Args:
        summaries: each with its step.
        now: seconds since 1970.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    writer = RecordWriter(content)
    writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    for summary, step in summaries:
        writer.write(Event(wall_time=now, step=step, summary=summary).SerializeToString())
    return content.getvalue()


def check_pictures() -> None:
    """Raise now, before anything is trained, what would be missing for the report.

    Raises:
        ModuleNotFoundError: matplotlib or scipy is not installed.
    """
    require("pictures and intervals", "examples", "matplotlib", "scipy")


def matplotlib() -> tuple[Any, Any]:
    """Return matplotlib's Figure and its canvas that needs no display.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    require("pictures", "examples", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return Figure, FigureCanvasAgg


def _point(record: Record) -> Point:
    """Return the swept values of a run."""
    return tuple(record["sweep"].items())


def _in_order(point: Point) -> list[tuple[float, str]]:
    """Return what swept values are sorted by: numbers by their size, then words.

    >>> sorted([(("batch", "32"),), (("batch", "null"),), (("batch", "4"),)], key=_in_order)
    [(('batch', '4'),), (('batch', '32'),), (('batch', 'null'),)]
    """
    keys = []
    for _, value in point:
        try:
            keys.append((float(value), value))
        except ValueError:
            keys.append((math.inf, value))
    return keys


def _arguments(swap: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a contender's normalizer, flat."""
    norm = swap.get("norm")
    arguments = dict(norm.get("init_args") or {}) if isinstance(norm, dict) else {}
    arguments |= swap.get("norm_args") or {}
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in arguments.items()}


def _finite(value: Any) -> Any:
    """Return a value for strict JSON, which has no NaN.

    >>> _finite({"mean": math.nan, "sd": [0.5, math.inf]})
    {'mean': None, 'sd': [0.5, None]}
    """
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _median(runs: dict[int, Record], column: str) -> float | None:
    """Return the median of a column over the seeds that have it."""
    values = [r[column] for r in runs.values() if r.get(column) is not None]
    return statistics.median(values) if values else None


def _ratio(runs: dict[int, Record], base: dict[int, Record], column: str, least: float = 0.0) -> float | None:
    """Return the median of a column over that of the baseline; ``None`` where one is missing or that is too small."""
    one, other = _median(runs, column), _median(base, column)
    return one / other if one is not None and other and other >= least else None


def _count(parameters: float | None) -> str:
    """Return a number of parameters in short.

    >>> _count(4800.0), _count(11_689_512.0), _count(None)
    ('4800', '11.69 M', '-')
    """
    if parameters is None:
        return "-"
    return f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else f"{parameters:.0f}"


def _times(ratio: float | None) -> str:
    """Return a ratio as text."""
    return "-" if ratio is None else f"{ratio:.2f} x"


def _against(row: dict[str, Any]) -> str:
    """Return the difference to the baseline with its interval, or why there is none.

    >>> _against({"difference": 0.05, "low": 0.01, "high": 0.09, "verdict": "higher"})
    '+0.0500 [+0.0100, +0.0900]'
    """
    if "difference" not in row:
        return "-"
    if not math.isfinite(row["difference"]):
        return str(row["verdict"])
    if not math.isfinite(row["low"]):
        return f"{row['difference']:+.4f} ({row['verdict']})"
    return f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"


def _duration(seconds: float) -> str:
    """Return seconds as a person would say them.

    >>> _duration(30), _duration(600), _duration(7200)
    ('30 s', '10 minutes', '2.0 hours')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def _look(i: int) -> dict[str, str]:
    """Return colour, line and marker of the i-th normalizer, which tell it apart in print as well."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i % len(STYLES)], "marker": MARKERS[i % len(MARKERS)]}


def _curve(axes: Any, series: list[list[float]], label: str, i: int) -> None:
    """Draw the mean over seeds, and a band of one standard deviation."""
    if not series:
        return
    # Up to the shortest run: an early stop ends the band there.
    by_epoch = list(zip(*series, strict=False))
    epochs = range(1, len(by_epoch) + 1)
    mean = [statistics.fmean(values) for values in by_epoch]
    axes.plot(epochs, mean, label=f"{label}  {mean[-1]:.3f}", linewidth=2, markersize=4, **_look(i))
    if len(series) > 1:
        sd = [statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan for values in by_epoch]
        low, high = ([m + sign * s for m, s in zip(mean, sd, strict=True)] for sign in (-1, 1))
        axes.fill_between(epochs, low, high, color=_look(i)["color"], alpha=0.15, linewidth=0)


def _dress(axes: Any, below: str) -> None:
    """Give the axes of a picture their grid, label and legend."""
    axes.set_xlabel(below)
    if below == "epoch":
        # One epoch alone has one tick, and not nine between 0.96 and 1.04.
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    # Values such as 0.9812 are read as they are, not as an offset and a rest. A logarithmic axis has no offset.
    axes.ticklabel_format(axis="y", useOffset=False) if hasattr(
        axes.yaxis.get_major_formatter(), "set_useOffset"
    ) else None
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    many = len(axes.get_legend_handles_labels()[1]) > MOST_IN_A_PICTURE
    axes.legend(frameon=False, fontsize="small", **({"loc": "upper left", "bbox_to_anchor": (1, 1)} if many else {}))

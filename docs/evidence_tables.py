"""Write the tables of docs/evidence from the results that are committed there.

``docs/evidence/results/STUDY.csv`` is the results.csv of ``lightning-norm compare``; ``generate.py`` beside this file
calls these functions and puts the lines into the pages. ``python docs/evidence_tables.py`` draws the pictures that
compare does not draw, and ``python docs/evidence_tables.py FOLDER...`` takes what results.csv does not hold out of the
runs of studies, whose names the folders have: SN's mean switch weights, epochs to a given accuracy, and the like.
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_norm.surgery.text_tables import markdown

PAGES = Path(__file__).resolve().parent / "evidence"
NOT_ENDED = ["No results yet: the study has not ended on our machines."]

ALPHAS = {
    "1": 2.70, "0.75": 1.91, "0.5": 1.84, "0.25": 1.91, "0.1": 1.90, "0.01": 1.94, "0.001": 1.95,
    "1/m": 2.10, "1/m2": 2.00, "0": 24.27,
}  # fmt: skip
"""Rows of table 1 of the paper on diminishing batch normalization: alpha, and the test error on MNIST in %."""
HEAD = {
    "batch": "batch",
    "running": "mixed, gradient batch",
    "running none": "mixed, none",
    "running renorm": "mixed, renorm",
    "running copied": "mixed, first copied",
}
"""Readings of the paper: what the study's contenders are called, and the pages."""
READINGS = tuple(HEAD)


BATCH = "data.init_args.batch_size"


PARTS = {
    "corruptions": ("clean", "severity_1", "severity_3", "severity_5"),
    "domains": ("mnist", "mnist_m", "usps", "digits"),
}
"""Study -> parts of its test, as the metrics test/acc_PART are called."""


@dataclass(frozen=True)
class Found:
    """A row of a study that says what a normalizer gained.

    Args:
        key: of the normalizer.
        study: whose results hold the row.
        label: of the contender.
        at: values of the sweep.
        what: how tables and pictures call it.
    """

    key: str
    study: str
    label: str
    at: Mapping[str, str]
    what: str

    def row(self) -> dict[str, str] | None:
        """Return the row, or ``None`` where the study has not come so far."""
        for row in read_results(self.study):
            if row["norm"] == self.label and all(row[name] == value for name, value in self.at.items()):
                return row if row["difference"] and math.isfinite(float(row["low"] or "nan")) else None
        return None


GAINS = (
    *(
        Found(key, "sn", key, {BATCH: size}, f"batches of {size}")
        for size in ("2", "128")
        for key in ("sn", "gn", "ln", "in", "bcn", "brn")
    ),
    Found("bnet", "bnet", "bnet 3", {}, "CIFAR-10"),
    Found("ubn", "ubn", "no threshold", {}, "CIFAR-10"),
    Found("ubn", "ubn_batches", "no threshold", {BATCH: "512"}, "batches of 512"),
    Found("dbn", "dbn_cifar", "renorm 0.25", {}, "CIFAR-10"),
    *(
        Found(key, study, key, {}, what)
        for study, what in (("corruptions", "corrupted images"), ("domains", "other digits"))
        for key in ("afn", "asr", "sn", "gn")
    ),
    Found("cn", "contexts", "cn domain", {"data.init_args.mixture": "real", "trainer.max_epochs": "12"}, "domains"),
)
"""What each normalizer gained, study by study, with its default arguments where the study has them."""


def read_results(study: str) -> list[dict[str, str]]:
    """Return the rows of a study's committed results; none where it has not ended."""
    path = PAGES / "results" / f"{study}.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def swept(row: Mapping[str, str]) -> list[str]:
    """Return the swept entries of a row: the dotted names among its columns."""
    return [name for name in row if "." in name]


def results(study: str, norms: Collection[str] = ()) -> list[str]:
    """Return a table of one row for each normalizer and value of the sweep, in percent and points of accuracy.

    Args:
        study: whose results are read.
        norms: labels of the rows, all by default.
    """
    rows = [row for row in read_results(study) if not norms or row["norm"] in norms]
    if not rows:
        return NOT_ENDED
    entries = swept(rows[0])
    head = ["normalizer", *(name.rpartition(".")[2].replace("_", " ") for name in entries)]
    head += ["seeds", "test accuracy, %", "difference to bn, points"]
    lines = []
    for row in rows:
        lines.append([row["norm"], *(row[name] for name in entries), row["seeds"], mean(row), difference(row)])
    return table(head, lines)


def mean(row: Mapping[str, str], error: bool = False) -> str:
    """Return mean and standard deviation in percent, of the accuracy or of what is missing from 1."""
    if not row["mean"] or math.isnan(float(row["mean"])):
        return "diverged"
    value = 100 * float(row["mean"])
    text = f"{100 - value if error else value:.2f}"
    text += f" ± {100 * float(row['sd']):.2f}" if row["sd"] else ""
    return text + (f" ({row['diverged']} of {row['seeds']} diverged)" if int(row["diverged"]) else "")


def difference(row: Mapping[str, str]) -> str:
    """Return the difference to the baseline with its interval, bold where that excludes 0."""
    if not row["difference"] or math.isnan(float(row["difference"])):
        return "-"
    d, low, high = (100 * float(row[name]) for name in ("difference", "low", "high"))
    text = f"{d:+.2f} [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else f"{d:+.2f} ({row['verdict']})"
    return f"**{text}**" if row["verdict"] in ("higher", "lower") else text


def dbn_readings() -> list[str]:
    """Return table 1 of the paper beside the error of every reading, and of torch's BatchNorm."""
    rows = {row["norm"]: row for row in read_results("dbn")}
    if not rows:
        return NOT_ENDED
    head = ["alpha", "paper", *HEAD.values()]
    lines = [
        [alpha, f"{error:.2f}", *(mean(rows[f"{r} {alpha}"], error=True) for r in READINGS)]
        for alpha, error in ALPHAS.items()
    ]
    lines.append(["torch's BatchNorm", "-", mean(rows["bn"], error=True), "", "", "", ""])
    return table(head, lines)


def draw_dbn(path: Path) -> None:
    """Draw the test error over alpha, a line for each reading and the paper's table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {row["norm"]: row for row in read_results("dbn")}
    figure = Figure(figsize=(7.2, 4.4), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines = {"paper": list(ALPHAS.values())}
    lines |= {HEAD[r]: [100 - 100 * float(rows[f"{r} {alpha}"]["mean"]) for alpha in ALPHAS] for r in READINGS}
    for (label, errors), marker in zip(lines.items(), "*osD^v", strict=True):
        axes.plot(list(ALPHAS), errors, marker=marker, label=label, linestyle=":" if label == "paper" else "-")
    axes.axhline(100 - 100 * float(rows["bn"]["mean"]), color="black", linewidth=1, label="torch's BatchNorm")
    axes.set(yscale="log", xlabel="alpha", ylabel="test error, %", title="MNIST, 784-300-300-10")
    axes.set_yticks([2, 3, 5, 10, 20], ["2", "3", "5", "10", "20"])
    axes.minorticks_off()
    axes.grid(color="0.9")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def switch_weights() -> list[str]:
    """Return the mean switch weights of sn over batch sizes, at the end of training."""
    rows = read_results("sn_weights")
    if not rows:
        return NOT_ENDED
    names = [name for name in rows[0] if name.startswith("norm/")]
    head = ["normalizer", "batch size", "seeds", *(name.removeprefix("norm/").replace("_", " of ") for name in names)]
    return table(head, [[row["norm"], row["batch size"], row["seeds"], *(row[name] for name in names)] for row in rows])


def save_switch_weights(records: Sequence[Mapping[str, Any]]) -> None:
    """Write results/sn_weights.csv from the runs of SN's study: means over layers and seeds after the last epoch."""
    cells: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    for record in records:
        # Other normalizers log other quantities under the same prefix.
        last = {n: values[-1] for n, values in record["history"].items() if n.startswith(("norm/mean_", "norm/var_"))}
        if last:
            cells[record["label"], int(record["sweep"][BATCH])].append(last)
    rows: list[dict[str, Any]] = []
    for (label, size), runs in sorted(cells.items()):
        means = {name: f"{statistics.fmean(run[name] for run in runs):.3f}" for name in runs[0]}
        rows.append({"norm": label, "batch size": size, "seeds": len(runs), **means})
    write_results("sn_weights", rows)


def save_epochs(study: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write results/STUDY_epochs.csv: epochs until a run reaches what every run of BatchNorm reaches at the end.

    That is the lowest of its last validation accuracies over the seeds.
    """
    target = min(record["history"]["val/acc"][-1] for record in records if record["label"] == "bn")
    reached: dict[str, list[int | None]] = defaultdict(list)
    for record in records:
        good = (i for i, value in enumerate(record["history"]["val/acc"], start=1) if value >= target)
        reached[record["label"]].append(next(good, None))
    rows = []
    for label, epochs in reached.items():
        known = [e for e in epochs if e is not None]
        row = {"norm": label, "target": f"{target:.4f}", "seeds": len(epochs), "reached": len(known)}
        rows.append({**row, "epochs": f"{statistics.fmean(known):.1f}" if known else ""})
    write_results(f"{study}_epochs", rows)


def epochs_to_target(study: str) -> list[str]:
    """Return the table of epochs to BatchNorm's accuracy."""
    rows = read_results(f"{study}_epochs")
    if not rows:
        return NOT_ENDED
    head = ["normalizer", "runs that reach it", f"epochs to {100 * float(rows[0]['target']):.1f} % in validation, mean"]
    return table(head, [[r["norm"], f"{r['reached']} of {r['seeds']}", r["epochs"] or "-"] for r in rows])


def save_condensations(records: Sequence[Mapping[str, Any]]) -> None:
    """Write results/condensation_layers.csv: what the study's callback logged, over seeds, at both ends of training."""
    prefix = "condensed/"
    names = [name for name in records[0]["history"] if name.startswith(prefix)]
    rows = []
    # What the convolutions write first, then what the ReLUs make of it.
    for name in sorted(names):
        row: dict[str, Any] = {"features": name.removeprefix(prefix)}
        for label in dict.fromkeys(record["label"] for record in records):
            series = [record["history"][name] for record in records if record["label"] == label]
            for when, i in (("first", 0), ("last", -1)):
                values = [s[i] for s in series]
                row[f"{label}, {when} epoch"] = f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
        rows.append(row)
    write_results("condensation_layers", rows)


def condensations() -> list[str]:
    """Return the table of condensations by layer, with BatchNorm and without."""
    rows = read_results("condensation_layers")
    return table(list(rows[0]), [list(row.values()) for row in rows]) if rows else NOT_ENDED


def save_parts(study: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write results/STUDY_parts.csv: the mean accuracy over seeds on each part of the test, in percent."""
    rows = []
    for label in dict.fromkeys(record["label"] for record in records):
        runs = [record["test"] for record in records if record["label"] == label]
        parts = {
            part: f"{100 * statistics.fmean(run[f'test/acc_{part}'] for run in runs):.1f}" for part in PARTS[study]
        }
        rows.append({"norm": label, "seeds": len(runs), **parts})
    write_results(f"{study}_parts", rows)


def parts(study: str) -> list[str]:
    """Return the table of accuracies on the parts of the test."""
    rows = read_results(f"{study}_parts")
    if not rows:
        return NOT_ENDED
    head = ["normalizer", "seeds", *(name.replace("_", " ") for name in PARTS[study])]
    return table(head, [[row["norm"], row["seeds"], *(row[name] for name in PARTS[study])] for row in rows])


def write_results(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a file of the folder of results."""
    with (PAGES / "results" / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def save_from_runs(folder: Path) -> None:
    """Write the files that come from the runs of a study, whose name the folder has."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "runs").glob("*.json"))]
    if folder.name == "sn":
        save_switch_weights(records)
    elif folder.name in PARTS:
        save_parts(folder.name, records)
    elif folder.name == "condensation":
        save_condensations(records)
    elif not any(record["sweep"] for record in records):
        save_epochs(folder.name, records)


def costs() -> list[str]:
    """Return what each normalizer costs a ResNet-18, beside what it gained in the studies."""
    gains: dict[str, list[str]] = defaultdict(list)
    for found in GAINS:
        if row := found.row():
            gains[found.key].append(f"[{found.what}]({found.study.partition('_')[0]}.md): {difference(row)}")
    head = ["normalizer", "step", "channels-last", "kept for backward", "parameters added to 128", "gained, points"]
    return table(
        head,
        [
            [
                f"[{row['norm']}](../cards/{row['norm']}.md)",
                *(f"{float(row[name]):.2f} x" for name in ("step_ratio", "channels_last_ratio", "kept_ratio")),
                row["added_to_64"] or "-",
                "; ".join(gains[row["norm"]]) or "not studied",
            ]
            for row in read_results("cost")
        ],
    )


def draw_costs(path: Path) -> None:
    """Draw what was gained over the time of a step, a point with its interval for each normalizer and study."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ratios = {row["norm"]: float(row["step_ratio"]) for row in read_results("cost")}
    figure = Figure(figsize=(8.4, 5.0), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tops: dict[str, float] = {}
    for what, marker in zip(dict.fromkeys(found.what for found in GAINS), "osD^v*P", strict=False):
        points = [
            (found.key, row) for found in GAINS if found.what == what and found.key in ratios and (row := found.row())
        ]
        if not points:
            continue
        at = [ratios[key] for key, _ in points]
        d, low, high = ([100 * float(row[name]) for _, row in points] for name in ("difference", "low", "high"))
        below, above = ([abs(a - b) for a, b in zip(d, ends, strict=True)] for ends in (low, high))
        axes.errorbar(at, d, [below, above], fmt=marker, capsize=3, label=what)
        for (key, _), y, up in zip(points, d, above, strict=True):
            tops[key] = max(tops.get(key, y + up), y + up)
    # One name above all points of a normalizer: beside each of them, names would lie on one another.
    for key, y in tops.items():
        axes.annotate(key, (ratios[key], y), xytext=(0, 4), textcoords="offset points", ha="center", fontsize="small")
    axes.axhline(0, color="black", linewidth=1)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xlabel="time of a step of ResNet-18, x BatchNorm's", ylabel="accuracy to BatchNorm, points")
    axes.grid(color="0.9")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def overview() -> list[str]:
    """Return the table of all studies: claim, verdict and effect, as their pages say them.

    Raises:
        ValueError: a page without one of these paragraphs.
    """
    lines = []
    for page in sorted(PAGES.glob("*.md")):
        if page.stem == "index":
            continue
        text = page.read_text(encoding="utf-8")
        marks = {"Claim": r"\*\*Claim\.\*\*", "Verdict": r"\*\*Verdict:", "Effect": r"\*\*Effect\.\*\*"}
        told = {word: re.search(rf"^{mark}(.*?)\n\n", text, re.M | re.S) for word, mark in marks.items()}
        missing = [word for word, paragraph in told.items() if paragraph is None]
        if missing:
            raise ValueError(
                f"{page} needs the paragraphs '**Claim.** ...', '**Verdict: word.** ...', '**Effect.** ...'."
            )
        claim, verdict, effect = (" ".join(paragraph[1].split()) for paragraph in told.values() if paragraph)
        lines.append([f"[{page.stem}]({page.name})", claim, verdict.partition(".**")[0], effect])
    return table(("study", "claim", "verdict", "effect"), lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return markdown([head, *rows]).splitlines()


if __name__ == "__main__":
    for study_folder in sys.argv[1:]:
        save_from_runs(Path(study_folder))
    draw_dbn(PAGES / "results" / "dbn.png")
    draw_costs(PAGES / "results" / "cost.png")

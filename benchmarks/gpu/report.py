"""The report of ``benchmarks/gpu.sh``: after each part its tables, at the end the bars and what was left out.

python -m benchmarks.gpu.report --ended ratios --status 0 --seconds 168
python -m benchmarks.gpu.report --final
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu.rows import Row, append, read
from lightning_norm.surgery.text_tables import markdown

PARTS = {
    "values": "(a) Values against float64, determinism, graphs, launches",
    "odd_shapes": "(b) Memory checked at odd shapes",
    "ratios": "(c) Time beside nn.BatchNorm2d and the memory's own speed",
    "host": "(d) The host's time, and training steps",
    "switches": "(e) What awaits a GPU, beside what is on now",
}
SHOWN: dict[str, tuple[str, ...]] = {
    "machine": ("cpu", "gpu", "torch", "triton", "python"),
    "copy": ("gb_s",),
    "layer": (
        "case",
        "name",
        "forward_ms",
        "forward_of_floor",
        "backward_ms",
        "backward_of_floor",
        "ratio",
        "eager_ms",
        "kernels_forward",
        "kernels_backward",
        "peak",
        "error_y",
        "error_dx",
        "clock",
    ),
    "pass": ("case", "name", "ms", "gb_s", "of_copy"),
    "host": ("name", "forward_us", "both_us", "ratio", "bar", "launches"),
    "step": ("case", "batch", "name", "ms", "ratio", "peak"),
    "switch": ("name", "state"),
    "A/B": ("case", "name", "ms", "ratio", "clock"),
    "memcheck": ("summary",),
    "failed": ("what", "why"),
    "left out": ("what", "why"),
    "ended": ("status", "seconds"),
}
"""Kind of a row -> what of it stands in the report; all kinds are in ``rows.jsonl`` with all that they hold."""

REPORT = "report.md"
KILLED = (124, 137)
"""Exit statuses of ``timeout``."""


def section(name: str, rows: list[Row]) -> list[str]:
    """Return the lines on one part."""
    mine = [r for r in rows if r["part"] == name]
    if not mine:
        return [f"## {PARTS[name]}", "", "Did not run.", ""]
    lines = [f"## {PARTS[name]}", ""]
    if name == "values":
        lines += [f"{count} tests {outcome}" for outcome, count in outcomes(mine).items()] + [""]
        mine += [{**r, "kind": "failed", "what": r["id"]} for r in mine if r.get("outcome") == "failed"]
    if name == "odd_shapes":
        checked = [r for r in mine if r["kind"] == "odd shape"]
        lines += [f"{len(checked)} cases ran, {sum(r['finite'] for r in checked)} of them with finite results", ""]
    for kind, columns in SHOWN.items():
        chosen = [r for r in mine if r["kind"] == kind]
        if chosen:
            lines += [f"### {kind}", "", *table([columns, *([shown(r.get(c)) for c in columns] for r in chosen)]), ""]
    return lines


def outcomes(rows: Iterable[Row]) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped."""
    counts: dict[str, int] = {}
    for row in rows:
        if row["kind"] == "test":
            counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    return counts


def table(rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first row is its head."""
    return markdown([cell.replace("|", "/") for cell in row] for row in rows).splitlines()


def shown(value: object) -> str:
    """Return a value as a cell.

    >>> shown(0.123456), shown(None), shown("a")
    ('0.123', '', 'a')
    """
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def verdicts(rows: list[Row]) -> list[Row]:
    """Return a row for each bar: figure, limit, and "met", "not met" or "not measured"."""
    from benchmarks import bars, network  # torch, which no other part of this file needs

    def of(kind: str) -> list[Row]:
        return [r for r in rows if r["kind"] == kind]

    if any(r["dry"] for r in of("run")):
        rows = []  # what a run without a GPU measures says nothing of these
    steps = [r for r in of("step") if r["batch"] == network.LARGE.batch]
    return [*_correctness(rows), *bars.verdicts(of("layer"), of("pass"), steps), *_host(of("host"))]


def _correctness(rows: list[Row]) -> list[Row]:
    """Return the verdicts on values and on memory, which come before any time."""
    tests, ended = outcomes(rows), {r["part"]: r["status"] for r in rows if r["kind"] == "ended"}
    failed, complete = tests.get("failed", 0), _complete("values", rows, ended)
    result = [_verdict("tests that fail on the GPU", failed, complete and bool(tests.get("passed")))]
    summaries = [r["errors"] for r in rows if r["kind"] == "memcheck" and r["errors"] is not None]
    wrong = [r for r in rows if r["part"] == "odd_shapes" and not (r.get("finite", True) and r["kind"] != "failed")]
    complete = _complete("odd_shapes", rows, ended) and bool(summaries)
    return [*result, _verdict("errors of compute-sanitizer, and results not finite", sum(summaries) + len(wrong), complete)]  # noqa: E501  # fmt: skip


def _verdict(bar: str, wrong: int, complete: bool) -> Row:
    verdict = "not met" if wrong else "met" if complete else "not measured"
    return {"bar": bar, "figure": wrong, "limit": 0, "verdict": verdict, "where": "" if complete else "not all ran"}


def _complete(part: str, rows: list[Row], ended: dict[str, int]) -> bool:
    left = any(r["part"] == part and r["kind"] == "left out" for r in rows)
    return part in ended and ended[part] not in KILLED and not left


def _host(rows: list[Row]) -> list[Row]:
    """Return the verdicts on the host's time."""
    result: list[Row] = []
    for bar in sorted({r["bar"] for r in rows if r["bar"] is not None}):
        worst = max((r for r in rows if r["bar"] == bar), key=lambda r: float(r["ratio"]))
        verdict = "met" if worst["ratio"] <= bar else "not met"
        name = f"host: at most {bar} x nn.BatchNorm2d"
        result.append({"bar": name, "figure": worst["ratio"], "limit": bar, "verdict": verdict, "where": worst["name"]})
    if not result:
        result.append({"bar": "host", "figure": None, "limit": None, "verdict": "not measured", "where": ""})
    return result


def final(rows: list[Row]) -> list[str]:
    """Return the last section: the bars, what failed, what was left out."""
    columns = ("bar", "figure", "limit", "verdict", "where")
    lines = ["## Bars", "", *table([columns, *([shown(r[c]) for c in columns] for r in verdicts(rows))]), ""]
    for kind, title in (("failed", "Failed"), ("left out", "Left out")):
        chosen = [f"- {r['part']}: {r['what']} ({r['why']})" for r in rows if r["kind"] == kind]
        chosen += [f"- values: {r['id']} ({r['why']})" for r in rows if kind == "failed" and r.get("outcome") == kind]
        ended = {r["part"] for r in rows if r["kind"] == "ended"}
        if kind == "left out":
            chosen += [f"- {r['part']}: killed after {r['seconds']} s" for r in rows if r.get("status") in KILLED]
            chosen += [f"- {name}: did not run" for name in PARTS if name not in ended]
        lines += [f"## {title}", "", *(chosen or ["Nothing."]), ""]
    return lines


def memcheck(text: str) -> Row:
    """Return what compute-sanitizer counted, from what it printed.

    >>> memcheck("========= ERROR SUMMARY: 0 errors")["errors"]
    0
    """
    if not text:
        return {"part": "odd_shapes", "kind": "left out", "what": "compute-sanitizer", "why": "it did not run"}
    totals = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing was printed")
    summary = f"{totals[-1]} errors" if totals else f"no summary; the last line: {last[:200]}"
    return {"part": "odd_shapes", "kind": "memcheck", "errors": int(totals[-1]) if totals else None, "summary": summary}


def main() -> None:
    """Write the report anew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"))
    parser.add_argument("--begin", choices=("dry", "gpu"), help="a run, with a GPU or without")
    parser.add_argument("--ended", choices=tuple(PARTS), help="a part that is over")
    parser.add_argument("--status", type=int, help="of its process")
    parser.add_argument("--seconds", type=int, help="that it took")
    parser.add_argument("--sanitizer", type=Path, help="what compute-sanitizer printed")
    parser.add_argument("--final", action="store_true", help="print and write the bars, too")
    options = parser.parse_args()
    if options.begin is not None:
        append(options.out, {"part": "run", "kind": "run", "dry": options.begin == "dry"})
    if options.sanitizer is not None:
        append(options.out, memcheck(options.sanitizer.read_text() if options.sanitizer.exists() else ""))
    if options.ended is not None:
        append(options.out, {"part": options.ended, "kind": "ended", "status": options.status, "seconds": options.seconds})  # noqa: E501  # fmt: skip
    rows = read(options.out)
    dry = ["A run without a GPU: it shows that the parts run, and no figure of a GPU.", ""]
    lines = [
        "# Ten minutes of a GPU",
        "",
        *(dry if any(r.get("dry") for r in rows) else []),
        *(line for name in PARTS for line in section(name, rows)),
    ]
    if options.final:
        last = final(rows)
        print("\n".join(last))
        lines[2:2] = last
    (options.out / REPORT).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

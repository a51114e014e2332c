"""The file that every part of ``benchmarks/gpu.sh`` writes to, a row at a time: what was measured survives a kill."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = "rows.jsonl"
Row = dict[str, Any]


class Part:
    """One part of the run: it knows when to stop, and writes each row at once.

    Args:
        name: of the part.
        options: of the command line: ``out``, ``until``, ``dry``, ``slice``.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.folder, self.dry = name, options.out, options.dry
        self.end, self.slice = options.until or float("inf"), getattr(options, "slice", None)

    @property
    def seconds_left(self) -> float:
        """Return the seconds until this part should end by itself."""
        return self.end - time.time()

    def write(self, kind: str, **row: Any) -> None:
        """Add a row."""
        append(self.folder, {"part": self.name, "kind": kind, **row})

    def leave_out(self, what: str, why: str = "no time left") -> None:
        """Say what was not measured, and why."""
        self.write("left out", what=what, why=why)

    def fail(self, what: str, error: Exception) -> None:
        """Say what went wrong."""
        self.write("failed", what=what, why=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def append(folder: Path, row: Row) -> None:
    """Add a row to the file; each is one write, so processes side by side do not mix theirs."""
    with (folder / FILE).open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(folder: Path) -> list[Row]:
    """Return all rows so far; a last line that a kill cut off is dropped."""
    file, rows = folder / FILE, []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def part_of(name: str, description: str | None, argv: Sequence[str] | None = None) -> Part:
    """Read the command line of a part."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder of the results; $OUT without")
    parser.add_argument("--until", type=float, help="seconds since 1970 at which to end")
    parser.add_argument("--dry", action="store_true", help="the same code without a GPU, on little")
    parser.add_argument("--slice", help='"1/4": the second of four processes that only warm up for this part')
    options = parser.parse_args(argv)
    if options.out is None:
        parser.error("no folder for the results. Type --out DIR, or set OUT.")
    options.out.mkdir(parents=True, exist_ok=True)
    return Part(name, options)

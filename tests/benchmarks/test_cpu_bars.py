"""The bars of the CPU are printed, in the shortest form: the numbers themselves are those of a quiet machine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cpu_bars import ALL, CASES, STARTUP, Row, bar, startup, verdict
from lightning_norm import normalizers

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("name", "key", "limit"),
    [
        ("128x64", "bn", 1.2),
        ("128x64", "sn", 3.0),
        ("2x32x8x8", "gn", 2.0),
        ("32x64x7x7", "afn", None),
        ("32x3x64x64", "sn", 1.1),
    ],
)
def test_bars_of_the_issue(name, key, limit):
    assert bar(next(case for case in CASES if case.name == name), key) == limit


def test_every_normalizer_takes_part():
    assert set(ALL.split(",")) == set(normalizers())


def test_verdict_names_what_is_missed():
    flat = CASES[0]
    rows = [Row(flat, "bn", [1.5], 60.0, [1.04], 1.2), Row(flat, "sn", [2.5], 100.0, [1.5], 3.0)]
    said = verdict(rows)
    assert "1 of 2 bars met. Missed: bn at 128x64: 1.50 for 1.2" in said
    assert "1 of 2 met. Missed: sn at 128x64: 1.50" in said


def test_command_beside_another_tree(tmp_path):
    saved = tmp_path / "cpu.md"
    command = [sys.executable, "-m", "benchmarks.cpu_bars", "--parts", "small", "--norms", "bn", "--rounds", "2"]
    process = subprocess.run(
        [*command, "--before", str(ROOT), "--save", str(saved)], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    rows = re.findall(r"^\| (\S+) \| bn \| \d+ \| [\d.]+ \| [\d.]+ \|", saved.read_text(), re.M)
    assert rows == [case.name for case in CASES if case.part == "small"]


def test_startup_is_read_from_processes():
    said = startup(1)
    assert [row.split("|")[1].strip() for row in said.splitlines()[2:]] == ["import torch", *STARTUP]
    assert all(float(row.split("|")[3]) > 0 for row in said.splitlines()[2:])

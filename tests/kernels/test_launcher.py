"""Recorded launches on Triton's compiler and launcher, over a stubbed driver; interpreted/ compares values."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent
SLOW = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
@pytest.mark.parametrize(
    ("keys", "launches"),
    [
        (["sn"], {"sn": 8}),
        (["dyt", "derf"], {"dyt": 3, "derf": 3}),
        pytest.param(["--OWNER", "bn", "rbn"], {"bn": 2, "rbn": 2}, marks=SLOW),
        pytest.param(["--COOPERATIVE", "sn", "gn"], {"sn": 2, "gn": 2}, marks=SLOW),
    ],
)
def test_recorded_launches(keys, launches):
    """Run by .ci/run on the newest Triton, by .ci/oldest on the oldest: their launchers differ."""
    command = [sys.executable, "-m", "tests.kernels.on_the_stub", *keys]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    seen = json.loads(process.stdout.splitlines()[-1])
    assert seen.pop("launcher") in ("tuple", "flat", "")
    assert seen == {
        "loaded by a second step": 0,  # so a graph may capture it
        "launches": launches,
        "asked for the same": [True] * (2 if keys == ["sn"] else 16),  # forward and backward, of each input
        "loaded by Triton": 0,
        "hooks called": True,
    }


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_kernels_compiled_before_the_first_step():
    """All at once and without a launch; then a step records, compiles and loads nothing, so a graph may capture it."""
    command = [sys.executable, "-m", "tests.kernels.warmed_on_the_stub"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    seen = json.loads(process.stdout.splitlines()[-1])
    assert seen.pop("compiled") == seen.pop("loaded ahead") > 8
    assert seen == {"launched": 0, "again": 0, "unchanged": True, "loaded by a step": 0, "recorded by a step": 0}
    assert "Kernels" in process.stderr  # the bar

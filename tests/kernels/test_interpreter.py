"""The kernels on the CPU, interpreted: each file of interpreted/ in a pytest process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))
ROOT = Path(__file__).parents[2]
HALF_A_MINUTE = (
    "test_layers",
    "test_recorded",
    "test_ranks",
    "test_encoder_decoder",
    "test_depthwise",
    "test_elementwise",
)
"""Files that take as much or more on a quiet machine: CI runs them with the slow tests."""


def interpret(file, *options):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--color=no", *options]
    run = subprocess.run([*command, str(file)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout.splitlines()[-1]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=[pytest.mark.slow] * (f.stem in HALF_A_MINUTE), id=f.stem) for f in FILES],
)
def test_interpreted(file):
    interpret(file)


@pytest.mark.slow
@pytest.mark.timeout(14400)
@pytest.mark.parametrize(
    "name",
    ["layers", "per_channel", "encoder_decoder", "condensation", "contexts", "cooperative", "depthwise", "passes"],
)
def test_interpreted_at_length(name):
    interpret(ROOT / f"tests/kernels/interpreted/test_{name}.py", "-m", "slow", "--timeout", "7200")

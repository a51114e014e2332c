"""Machines on which kernels cannot run: "auto" ends a step in plain PyTorch, with right values and the reason told.

Triton's compiler, ptxas and launcher over a stubbed driver, each in a process of its own; see cannot_run.py. The one
thing that a stub cannot show is what a kernel computes, so the trial is let pass where a later kernel is to fail.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent
SLOW = pytest.mark.slow
TRIAL = "a kernel launched for trial failed "


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("no C compiler", TRIAL + "(FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/cc')"),
        ("capability 150", "cannot compile for compute capability 15.0"),  # where LLVM ends the process
        pytest.param("capability 30", "cannot compile for compute capability 3.0", marks=SLOW),
        ("ROCm", "the kernels are written for CUDA, and this is ROCm"),
        pytest.param("driver too old", TRIAL + "(RuntimeError: Triton Error [CUDA]", marks=SLOW),
        ("capture", "a CUDA graph is being captured, and no kernel ran before the capture"),
    ],
)
def test_no_kernel_runs(tmp_path, monkeypatch, case, reason):
    seen = _seen(tmp_path, monkeypatch, case)
    assert all(report.startswith("eager: ") and reason in report for report in seen["reports"])
    assert len(seen["warnings"]) == 1
    assert reason in seen["warnings"][0]


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("later shared memory", "OutOfResources"),
        ("later passes", "Triton Error [CUDA]"),
        pytest.param("later backward", "Triton Error [CUDA]", marks=SLOW),
    ],
)
def test_a_kernel_of_another_shape_does_not_load(tmp_path, monkeypatch, case, reason):
    seen = _seen(tmp_path, monkeypatch, case)
    assert all(report.startswith("triton: ") for report in seen["reports"])
    # Once for each kernel, and not for each layer.
    assert all("does not compile or load" in text and reason in text for text in seen["warnings"])
    kernels = 4 if case == "later passes" else len(seen["reports"])
    assert 0 < len(seen["warnings"]) == len(set(seen["warnings"])) <= kernels


def _seen(tmp_path, monkeypatch, case):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    command = [sys.executable, "-m", "tests.kernels.cannot_run", case]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    seen = json.loads(process.stdout.splitlines()[-1])
    assert len(seen["reports"]) == (1 if case == "later passes" else 5)
    assert seen["wrong"] == seen["others"] == []
    assert seen["launches"] == 0
    return seen

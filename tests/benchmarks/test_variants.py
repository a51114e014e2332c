"""The kernels that the first step of a ResNet-50 compiles, each of which costs it seconds."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("torchvision")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
@pytest.mark.parametrize(("order", "most"), [([], 14), (["--contiguous"], 16)], ids=["channels last", "contiguous"])
def test_variants_of_a_first_step(order, most):
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "benchmarks.variants", *order]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    *counts, total = process.stdout.splitlines()
    assert "kernels for 12 shapes" in total
    assert sum(int(line.split()[0]) for line in counts) == int(total.split()[0]) <= most

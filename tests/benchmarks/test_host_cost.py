"""The measure of the host's cost runs, in its shortest form: the numbers themselves are those of a quiet machine."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_short_form():
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "benchmarks.host_cost", "in", "--rounds", "1", "--calls", "2"]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert process.returncode in (0, 1), process.stderr  # 1 says that a bar was missed
    rows = re.findall(r"^\| (\S+) \|.* (\d+) \+ (\d+) \| (\d+) \|$", process.stdout, re.M)
    assert [row[:3] for row in rows] == [("nn.BatchNorm2d", "0", "0"), ("in", "3", "4")]
    assert int(rows[1][3]) < int(rows[0][3]) < 20  # the counts of allocations do not depend on the machine

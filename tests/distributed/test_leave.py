"""A rank that is done ends with status 0, and does not wait for one that failed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(how, meet):
    commands = [[sys.executable, "-m", "tests.distributed.leave", how, str(meet), str(rank)] for rank in (0, 1)]
    pipe = subprocess.PIPE
    return [subprocess.Popen(c, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for c in commands]


def test_ranks_end_with_status_zero(tmp_path):
    # Without its own end, gloo aborts two of three such pairs.
    for attempt in range(4):
        ranks = start("at_once", tmp_path / str(attempt))
        errors = [process.communicate()[1] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], errors


def test_a_rank_does_not_wait_at_its_end_for_one_that_skips_a_collective(tmp_path):
    zero, one = start("pending", tmp_path / "meet")
    zero.communicate()  # a hang is what pytest's timeout finds
    assert one.poll() is None
    one.communicate("")

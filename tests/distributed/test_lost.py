"""Never a hang: whatever happens to one rank, the other ends with an error, and does not wait where it can know.

Seconds are not compared: a busy machine has its own. A hang is what pytest's timeout finds; whether a rank waited for
the group's timeout or was told of the loss stands in the error that the network gave.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.lost import SCENARIOS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    here = tmp_path_factory.mktemp("lost")
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.lost", str(here)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {s.__name__: json.loads((here / f"{s.__name__}_0.json").read_text()) for s in SCENARIOS}


def test_the_rank_that_is_left_ends_with_an_error(ended):
    survivors = {name: got for name, got in ended.items() if name != "alone"}
    for name, got in survivors.items():
        assert got["error"] == "SyncError", (name, got)
        assert "the ranks did not meet to pool the statistics" in got["text"]
    for waits in ("exhausted", "silent"):  # nothing tells it earlier
        assert "Timed out" in survivors[waits]["text"], (waits, survivors[waits])
    for told in ("killed", "finished", "unplugged"):
        assert "Timed out" not in survivors[told]["text"], (told, survivors[told])


def test_evaluation_on_one_rank_waits_for_nobody(ended):
    assert ended["alone"]["error"] == "NoneType"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kill", "stop", "short"])
def test_a_trainer_ends(what):
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.lost_trainer", what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    error = done.stdout.split()[-1]
    assert error in ("SyncError", "RuntimeError"), done.stderr[-3000:]  # the latter from DDP, where that waits first

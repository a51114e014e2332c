"""Never a hang: whatever happens to one rank, the other ends with an error within the process group's timeout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.lost import SCENARIOS, TIMEOUT

ROOT = Path(__file__).parents[2]
MARGIN = 8.0
"""Seconds: fourteen processes share the cores."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    here = tmp_path_factory.mktemp("lost")
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.lost", str(here)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {s.__name__: json.loads((here / f"{s.__name__}_0.json").read_text()) for s in SCENARIOS}


def test_the_rank_that_is_left_ends_with_an_error_in_time(ended):
    survivors = {name: found for name, found in ended.items() if name != "alone"}
    for name, found in survivors.items():
        assert found["error"] == "SyncError", (name, found)
        assert "the ranks did not meet to pool the statistics" in found["text"]
        assert found["seconds"] < TIMEOUT + MARGIN, (name, found)
    for waits in ("exhausted", "silent", "skipped"):  # nothing tells it earlier
        assert survivors[waits]["seconds"] > TIMEOUT / 2, (waits, survivors[waits])
    for told in ("killed", "finished", "unplugged"):
        assert survivors[told]["seconds"] < TIMEOUT, (told, survivors[told])


def test_evaluation_on_one_rank_waits_for_nobody(ended):
    assert ended["alone"]["error"] == "NoneType"
    assert ended["alone"]["seconds"] < TIMEOUT / 2


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kill", "stop", "short"])
def test_a_trainer_ends_in_time(what):
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.lost_trainer", what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    error, seconds = done.stdout.split()[-2:]
    assert error in ("SyncError", "RuntimeError"), done.stderr[-3000:]  # the latter from DDP, where that waits first
    assert float(seconds) < 20 + MARGIN  # lost_trainer.TIMEOUT

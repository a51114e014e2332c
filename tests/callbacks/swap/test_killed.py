"""A run that was killed and resumed in the middle of an epoch is the uninterrupted one, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.callbacks.swap.killed import BATCHES, EPOCHS, EVERY, WAIT_AT, train

ROOT = Path(__file__).parents[3]


def flat(state, prefix=""):
    """Return path -> leaf of nested dicts and lists."""
    if isinstance(state, (dict, list)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in items for k, v in flat(value, f"{prefix}.{key}").items()}
    return {prefix: state}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You're resuming from a checkpoint")
def test_killed_and_resumed_is_uninterrupted(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.callbacks.swap.killed", str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.strip() == "waiting":
                break
        assert said[-1].strip() == "waiting", "".join(said)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.stdout.close()

    left = sorted((tmp_path / "killed").glob("*.ckpt"))
    assert [file.name for file in left] == ["step=4.ckpt", "step=8.ckpt"]
    at = WAIT_AT // EVERY * EVERY
    assert at % BATCHES, "the checkpoint is to lie within an epoch"
    weights, optimizer, values = train(tmp_path / "whole")
    again = train(tmp_path / "resumed", resume_from=str(left[-1]))

    steps = EPOCHS * BATCHES
    assert list(values) == list(range(1, steps + 1))
    assert len({tuple(v) for v in values.values()}) == steps
    assert again[2] == {step: values[step] for step in range(at + 1, steps + 1)}
    assert again[0].keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(value, again[0][name]), name
    one, two = flat(optimizer), flat(again[1])
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(two[name])) if value is not None else True, name

"""Tests for a machine with a GPU: ``pytest -n 0 -m gpu``.

Those that need no feature of CUDA run on a CPU as well, interpreted: ``TRITON_INTERPRET=1 pytest -n 0 tests/gpu``.
"""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def pytest_collection_modifyitems(config, items):
    """Without a GPU these are skipped, and not even that where nobody asked for them."""
    mine = [item for item in items if HERE in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        item.add_marker(pytest.mark.filterwarnings("default"))  # torch's hints about this or that GPU
        item.add_marker(pytest.mark.timeout(3600))
        if ON == "cpu" and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, or TRITON_INTERPRET=1"))
    asked = INTERPRETED or ON == "cuda" or "gpu" in config.option.markexpr
    if not asked:
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if item not in mine]


@pytest.fixture
def device():
    """Where the kernels run: "cuda", or interpreted on "cpu"."""
    return ON


@pytest.fixture
def cuda():
    """For what only CUDA has."""
    if ON != "cuda":
        pytest.skip("needs a CUDA device")
    return "cuda"


@pytest.fixture
def plain_memory(monkeypatch):
    """No filling of fresh memory, whose kernels would be counted and recorded."""
    monkeypatch.undo()

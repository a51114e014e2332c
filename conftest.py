import os
from unittest import mock

import pytest
import torch

NAMES = ("empty", "empty_like", "empty_strided")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_environment():
    """What a test leaves in the environment, Lightning's MASTER_PORT for one, is gone after it."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory(monkeypatch):
    """Whoever reads memory before writing it reads NaN. Only calls from Python can be reached."""

    def filling(make):
        def call(*args, **kwargs):
            t = make(*args, **kwargs)
            if not torch.compiler.is_compiling() and t.is_floating_point() and not t.is_meta:
                with torch.no_grad():
                    t.fill_(float("nan"))
            return t

        return call

    for name in NAMES:
        monkeypatch.setattr(torch, name, filling(getattr(torch, name)))


@pytest.fixture(autouse=True)
def _names_in_docstrings(doctest_namespace):
    doctest_namespace["torch"] = torch


def pytest_configure():
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # one worker per core

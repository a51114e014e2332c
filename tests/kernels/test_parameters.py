"""How many parameters the device functions have, compile-time ones included: more than 20 cannot be read."""

import importlib
import pkgutil

import pytest

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

import lightning_norm.kernels

MOST = 20


def parameters():
    package = lightning_norm.kernels
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        for name, function in vars(importlib.import_module(module.name)).items():
            if isinstance(function, JITFunction) and function.fn.__module__ == module.name:
                yield f"{module.name.removeprefix(package.__name__ + '.')}.{name}", len(function.params)


def test_no_more_parameters():
    counts = dict(parameters())
    assert len(counts) > 60
    assert {name: n for name, n in counts.items() if n > MOST} == {}

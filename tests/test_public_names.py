"""The public names: lazy, the same for the interpreter and for type checkers, and ``normalizers`` in any order."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_norm

STUB = Path(lightning_norm.__file__).with_suffix(".pyi")


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


HEAVY = "import sys; print(*{'torch', 'lightning', 'triton', 'torchvision', 'torchmetrics', 'tensorboard', 'yaml'}"


def test_the_package_alone_imports_nothing():
    assert run(f"import lightning_norm; {HEAVY}.intersection(sys.modules))") == []


def test_a_swap_in_plain_pytorch_needs_torch_alone():
    code = "import lightning_norm, torch; lightning_norm.swap(torch.nn.Sequential(torch.nn.BatchNorm2d(4)), 'sn')"
    assert run(f"{code}; {HEAVY}.intersection(sys.modules))") == ["torch"]


def test_the_stub_says_what_the_table_says():
    imports = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ImportFrom)]
    stub = {alias.asname: (node.module, alias.name) for node in imports for alias in node.names}
    assert stub == {name: (module, name) for name, module in lightning_norm._MODULE_OF.items()}


@pytest.mark.parametrize("name", lightning_norm.__all__)
def test_every_name_is_found(name):
    value = getattr(lightning_norm, name)
    assert name in dir(lightning_norm)
    if name != "normalizers":
        assert value is getattr(importlib.import_module(lightning_norm._MODULE_OF[name]), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lightning_norm' has no attribute 'NormSwop'"):
        lightning_norm.NormSwop  # noqa: B018
    with pytest.raises(ImportError, match="NormSwop"):
        from lightning_norm import NormSwop  # noqa: F401


ORDERS = [
    "import lightning_norm",
    "from lightning_norm import normalizers",
    "from lightning_norm import SwitchableNorm, create, swap",
    "import lightning_norm.normalizers",
    "from lightning_norm.normalizers import normalizers",
    "import lightning_norm.normalizers.context.assignment",
    "import lightning_norm.layers.registry, lightning_norm.normalizers.bnet",
    "import lightning_norm.callbacks",
    "import lightning_norm.testing",
    "from lightning_norm import *",
]
AFTER = """
import copy, doctest, importlib, inspect, pickle, types
import lightning_norm
assert list(lightning_norm.normalizers())[0] == "bn"
from lightning_norm import normalizers
from lightning_norm.normalizers import SwitchableNorm, normalizers as function
assert normalizers()["sn"] is function()["sn"] is lightning_norm.SwitchableNorm is SwitchableNorm
assert normalizers is lightning_norm.normalizers is importlib.import_module("lightning_norm.normalizers")
assert isinstance(normalizers, types.ModuleType) and inspect.ismodule(normalizers) and callable(normalizers)
assert not inspect.signature(normalizers).parameters
assert pickle.loads(pickle.dumps(normalizers)) is normalizers is copy.deepcopy(normalizers)
assert doctest.testmod(normalizers).failed == 0
import lightning_norm.normalizers.bnet as bnet
assert normalizers()["bnet"] is bnet.BNET is lightning_norm.normalizers.bnet.BNET
"""


FORKS = """
import os, sys, traceback, torch
for order in {orders!r}:
    child = os.fork()
    if not child:
        try:
            exec(order + {after!r}, {{"__name__": "order"}})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(order, file=sys.stderr)
        sys.exit(1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that torch is imported once for all orders")
def test_normalizers_is_a_function_and_a_folder_in_any_order():
    run(FORKS.format(orders=ORDERS, after=AFTER))

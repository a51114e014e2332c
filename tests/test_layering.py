"""Who may import whom (the rooms), and how long a file may be."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_norm"
ROOMS = (
    "kernels",
    "ops",
    "layers",
    "normalizers",
    "surgery",
    "schedules",
    "metrics",
    "callbacks",
    "plugins",
    "bench",
    "demo",
    "cli",
)
BESIDE = ("testing",)  # may import any room, and no room imports it
WITH_LIGHTNING = {"callbacks", "plugins", "demo", "cli"}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
DISTRIBUTED = {"ops/sync.py", "ops/torch_private.py", "testing/ranks.py"}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file):
    return file.relative_to(PACKAGE).as_posix()


def room_of(name):
    return name.split("/")[0].removesuffix(".py")


def imports(file):
    """Every module that a file names in an import, at any depth of its code, with ``from a import b`` as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def faults(name, imported):
    """What a file of that name may not import."""
    room, found = room_of(name), []
    for module in sorted(imported):
        top, *rest = module.split(".")
        if top in LIGHTNING and room not in WITH_LIGHTNING:
            found.append(f"{module}: Lightning belongs to {sorted(WITH_LIGHTNING)}")
        if top == "triton" and room != "kernels":
            found.append(f"{module}: Triton belongs to kernels/")
        if module.startswith("torch.distributed") and name not in DISTRIBUTED:
            found.append(f"{module}: torch.distributed belongs to ops/sync.py")
        if top == "lightning_norm":
            target = rest[0] if rest else ""
            if name == "errors.py":
                found.append(f"{module}: errors.py is a leaf")
            elif target == "errors" or name in ("__init__.py", "__main__.py") or room in BESIDE or target == room:
                continue
            elif target not in ROOMS or ROOMS.index(target) > ROOMS.index(room):
                found.append(f"{module}: {room} may import {ROOMS[: ROOMS.index(room) + 1]} and errors")
    return found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports(file):
    assert faults(name_of(file), imports(file)) == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_length(file):
    lines = len(file.read_text().splitlines())
    budget = 200 if room_of(name_of(file)) == "normalizers" else 300
    assert lines <= budget, f"{lines} lines, {budget} allowed: split it"


def test_every_folder_is_a_known_room():
    folders = {room_of(name_of(f)) for f in FILES if f.parent != PACKAGE}
    assert folders <= {*ROOMS, *BESIDE}


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("ops/normalize.py", "lightning_norm.layers.base"),
        ("ops/normalize.py", "lightning_norm.testing.kit"),
        ("layers/base.py", "lightning_norm"),
        ("layers/base.py", "lightning.pytorch"),
        ("testing/kit.py", "lightning"),
        ("layers/base.py", "torch.distributed"),
        ("layers/base.py", "torch.distributed.ReduceOp"),
        ("ops/eager.py", "triton"),
        ("ops/eager.py", "triton.language"),
        ("errors.py", "lightning_norm.ops.layout"),
        ("schedules.py", "lightning_norm.callbacks.swap"),
        ("surgery/swap.py", "lightning_norm.cli.main"),
    ],
)
def test_the_rules_can_fail(name, module):
    assert faults(name, {module})


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("ops/sync.py", "torch.distributed"),
        ("callbacks/swap.py", "lightning.pytorch"),
        ("layers/base.py", "lightning_norm.ops.normalize"),
        ("ops/normalize.py", "lightning_norm.ops.eager"),
        ("ops/compiled.py", "lightning_norm.errors"),
        ("kernels/apply.py", "triton.language"),
        ("testing/kit.py", "lightning_norm.layers.base"),
    ],
)
def test_the_rules_can_pass(name, module):
    assert not faults(name, {module})

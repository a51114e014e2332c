"""Who may import whom (the rooms), that no circle of imports closes, and that a file's name says which file it is."""

import ast
from collections import defaultdict
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
REGISTERED = (["create"], ["normalizers"], ["resolve"])
FILES = sorted(PACKAGE.rglob("*.py"))

SAME_NAMES = {"__init__", "base", "torch_private", "forward", "backward", "launch", "flags"}
"""Names that say their role in a folder; the folder says of what."""
NAMED_AFTER_ANOTHER = ("kernels/", "ops/fused/", "testing/", "cli/")
"""Folders whose files may have the name of the file that they are the kernels, the description, the checks or the
command of."""


def name_of(file):
    return file.relative_to(PACKAGE).as_posix()


def room_of(name):
    return name.split("/")[0].removesuffix(".py")


def imports(code):
    """Every module that code names in an import, at any depth and under TYPE_CHECKING alike.

    ``from a import b`` counts as a and as a.b.
    """
    modules = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def faults(name, imported):
    """What a file of that name may not import."""
    room, messages = room_of(name), []
    for module in sorted(imported):
        top, *rest = module.split(".")
        if top in LIGHTNING and room not in WITH_LIGHTNING:
            messages.append(f"{module}: Lightning belongs to {sorted(WITH_LIGHTNING)}")
        if top == "triton" and room != "kernels":
            messages.append(f"{module}: Triton belongs to kernels/")
        if module.startswith("torch.distributed") and name not in DISTRIBUTED:
            messages.append(f"{module}: torch.distributed belongs to {sorted(DISTRIBUTED)}")
        if top == "lightning_norm":
            messages += faults_within(name, room, module, rest)
    return messages


def faults_within(name, room, module, rest):
    target = rest[0] if rest else ""
    if name == "errors.py":
        return [f"{module}: errors.py is a leaf"]
    if rest[:2] == ["layers", "registry"] and rest[2:] in REGISTERED and room not in ("layers", "normalizers"):
        return [f"{module}: import it from lightning_norm.normalizers, where the methods are registered"]
    if target in ("errors", room) or name in ("__init__.py", "__main__.py") or room in BESIDE:
        return []
    if target not in ROOMS or room not in ROOMS or ROOMS.index(target) > ROOMS.index(room):
        return [f"{module}: {room} may import itself, errors and the rooms before it in {ROOMS}"]
    return []


def graph_of(sources):
    """Return module -> the modules of the package that it imports.

    Args:
        sources: path inside the package -> code.

    Whoever imports a module of another folder runs that folder's ``__init__`` first, so it counts as imported, too. A
    file's own folders are being imported already when it is: only a name that it takes from their ``__init__`` counts.
    """
    modules = {dotted(name): name for name in sources}
    graph = {}
    for module, name in modules.items():
        targets = set()
        for imported in imports(sources[name]):
            parts = imported.split(".")
            for i in range(1, len(parts) + 1):
                target = ".".join(parts[:i])
                # a.b.c names the module a.b if it is a name in it, and a as the folder it is in
                is_last = target in modules and ".".join(parts[: i + 1]) not in modules
                taken_from = is_last and i < len(parts)
                around = module == target or module.startswith(f"{target}.")
                if target in modules and module != target and (not around or taken_from):
                    targets.add(target)
        graph[module] = targets
    return graph


def dotted(name):
    return ".".join(["lightning_norm", *name.removesuffix(".py").split("/")]).removesuffix(".__init__")


def circles(graph):
    """Return the strongly connected components of more than one module, each sorted."""

    def reached(start):
        seen, todo = set(), [start]
        while todo:
            for target in graph[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        return seen

    after = {module: reached(module) for module in graph}
    return sorted({tuple(sorted(m for m in after[n] if n in after[m])) for n in graph if n in after[n]})


def same_names(names):
    """Return the files that share a name without a reason, by that name."""
    by_name = defaultdict(list)
    for name in names:
        stem = Path(name).stem
        if stem not in SAME_NAMES:
            mirror = next((folder for folder in NAMED_AFTER_ANOTHER if name.startswith(folder)), "")
            by_name[mirror, stem].append(name)
    return {stem: files for (_, stem), files in by_name.items() if len(files) > 1}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports(file):
    assert faults(name_of(file), imports(file.read_text())) == []


def test_no_circle_of_imports():
    graph = graph_of({name_of(file): file.read_text() for file in FILES})
    assert sum(map(len, graph.values())) > 300  # there is something to look at
    assert circles(graph) == []


def test_no_two_files_share_a_name():
    assert same_names(map(name_of, FILES)) == {}


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
        ("surgery/swap.py", "lightning_norm.layers.registry.create"),
        ("testing/kit.py", "lightning_norm.layers.registry.normalizers"),
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
        ("surgery/swap.py", "lightning_norm.layers.registry.NormSpec"),
        ("surgery/swap.py", "lightning_norm.normalizers.create"),
    ],
)
def test_the_rules_can_pass(name, module):
    assert not faults(name, {module})


LATE = "def f():\n    from lightning_norm.ops.a import g"
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lightning_norm.ops.a import A"


@pytest.mark.parametrize("back", ["import lightning_norm.ops.a", "from lightning_norm.ops import a", LATE, TYPES])
def test_a_circle_of_files_is_seen(back):
    sources = {
        "__init__.py": "",
        "ops/__init__.py": "",
        "ops/a.py": "from lightning_norm.ops.b import B",
        "ops/b.py": "from lightning_norm.ops.c import C",
        "ops/c.py": back,
    }
    assert circles(graph_of(sources)) == [("lightning_norm.ops.a", "lightning_norm.ops.b", "lightning_norm.ops.c")]
    assert circles(graph_of({**sources, "ops/c.py": ""})) == []


def test_a_circle_through_a_folder_is_seen_and_a_list_of_names_is_none():
    names = "from lightning_norm.ops.a import A"
    sources = {"ops/__init__.py": names, "ops/a.py": "from lightning_norm.ops.b import B", "ops/b.py": ""}
    assert circles(graph_of(sources)) == []
    assert circles(graph_of({**sources, "ops/b.py": "from lightning_norm.ops import A"})) != []
    outside = {"kernels/k.py": "from lightning_norm.ops.b import B", "ops/b.py": "import lightning_norm.kernels.k"}
    assert circles(graph_of({**sources, **outside})) != []


def test_a_shared_name_is_seen():
    assert same_names(["surgery/report.py", "bench/report.py"]) == {"report": ["surgery/report.py", "bench/report.py"]}
    assert same_names(["kernels/a/flags.py", "kernels/b/flags.py", "ops/moments.py", "kernels/moments.py"]) == {}

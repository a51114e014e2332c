"""What is imported is declared in pyproject.toml, and what is declared is imported."""

import ast
import functools
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNDECLARED = {"triton": "comes with torch, in the version that torch pins", "apex": "a competitor, measured if found"}
LOCAL = {"lightning_norm", "benchmarks", "examples"}


def declared(*extras):
    """The distributions that ``pip install lightning-norm[extras]`` names."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    requirements = [Requirement(line) for line in lines]
    names = {canonicalize_name(r.name) for r in requirements}
    inner = [extra for r in requirements if r.name == PROJECT["name"] for extra in r.extras]
    return names | (declared(*inner) if inner else set())


def imported(tree):
    """Pairs of a third-party package and whether the import runs as soon as the file is imported."""
    at_once = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
        else:
            continue
        for top in {module.split(".")[0] for module in modules}:
            if top not in sys.stdlib_module_names and top not in LOCAL:
                yield top, node in at_once


@functools.cache
def distributions_of():
    return packages_distributions()  # reads what every installed distribution says of itself: seconds


def distributions(package):
    # Of what is not installed here, that of the same name.
    return {canonicalize_name(name) for name in distributions_of().get(package, (package,))}


def undeclared(file, source, at_once, later):
    """What a file imports without a declaration, given what may be imported at once and within a function."""
    for package, now in imported(ast.parse(source)):
        allowed = at_once if now else at_once | later
        if package not in UNDECLARED and not distributions(package) & allowed:
            yield f"{file}: {package}"


@pytest.mark.parametrize(
    ("folder", "at_once", "later"),
    [
        ("lightning_norm", declared(), declared("examples", "export")),
        ("examples", declared("examples"), set()),
        ("benchmarks", declared("test"), declared("export")),
    ],
)
def test_what_is_imported_is_declared(folder, at_once, later):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [fault for f in files for fault in undeclared(f, f.read_text(), at_once, later)] == []


def test_what_is_declared_is_imported():
    files = (ROOT / "lightning_norm").rglob("*.py")
    used = {d for f in files for package, _ in imported(ast.parse(f.read_text())) for d in distributions(package)}
    assert declared() - used == set()


@pytest.mark.parametrize(
    ("source", "faulty"),
    [
        ("import torch", False),
        ("import scipy.stats", True),
        ("def f():\n    from scipy import stats", False),
        ("def f():\n    import onnx_that_nobody_has", True),
        ("def f():\n    import pytest", True),
    ],
)
def test_the_rule_can_fail(source, faulty):
    assert bool(list(undeclared("file.py", source, declared(), declared("examples")))) == faulty

"""The ``norm:`` section of a configuration: NormSwap's arguments, without a list of callbacks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from lightning_norm.callbacks import NormSwap
from lightning_norm.callbacks.swap.saved_plan import read_plan
from lightning_norm.normalizers import normalizers, resolve

SECTION = "norm"
"""Its name; the swap comes first among the callbacks, where it belongs."""

SELECTS = ("norm", "norm_args", "include", "exclude", "source", "rules")
"""Arguments that say which layers become what, which a plan says as well."""


def add_section(parser: LightningArgumentParser) -> None:
    """Let a parser know the section and its options, ``--norm.norm sn`` for one."""
    parser.add_class_arguments(NormSwap, SECTION, instantiate=False, fail_untyped=False)


def chosen(section: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a section says beyond the defaults.

    >>> chosen({"norm": "sn", "compile": False, "exclude": ["bn1"]})
    {'norm': 'sn', 'exclude': ['bn1']}
    """
    defaults = {name: p.default for name, p in inspect.signature(NormSwap).parameters.items()}
    return {name: value for name, value in (section or {}).items() if value != defaults.get(name, value)}


def swap_of(section: Mapping[str, Any] | None) -> NormSwap | None:
    """Return the callback of a section; ``None`` if it says nothing.

    Raises:
        ValueError, TypeError: what :class:`NormSwap` raises.
    """
    arguments = chosen(section)
    return NormSwap(**arguments) if arguments else None


def expand_norm(args: list[str]) -> list[str]:
    """Write ``--norm sn`` as ``--norm.norm sn``.

    >>> expand_norm(["fit", "--norm", "sn", "--norm=bcn", "--norm", "section.yaml"])
    ['fit', '--norm.norm', 'sn', '--norm.norm=bcn', '--norm', 'section.yaml']
    """
    option = f"--{SECTION}"
    full = [
        arg.replace("=", ".norm=", 1) if arg.startswith(option + "=") and arg[7:].isidentifier() else arg
        for arg in args
    ]
    for i, (arg, value) in enumerate(pairwise(args)):
        if arg == option and value.isidentifier():
            full[i] = f"{option}.norm"
    return full


def write_out_keys(text: str) -> str:
    """Write what a configuration says by a normalizer's key as jsonargparse takes it.

    >>> print(write_out_keys("norm: sn"))
    norm:
      norm: sn
    <BLANKLINE>
    """
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # which the parser tells
    full = _full_paths(config)
    if isinstance(full, dict) and isinstance(full.get(SECTION), str) and full[SECTION].isidentifier():
        full[SECTION] = {"norm": full[SECTION]}  # anything else is the path of a file that holds the section
    return text if full == config else yaml.safe_dump(full, sort_keys=False)


def _full_paths(config: Any) -> Any:
    """Return a configuration in which every ``norm: {class_path: sn, ...}`` has a dotted path."""
    if isinstance(config, list):
        return [_full_paths(entry) for entry in config]
    if not isinstance(config, dict):
        return config
    found = {name: _full_paths(value) for name, value in config.items()}
    spec = found.get("norm")
    if isinstance(spec, dict) and spec.get("class_path") in {
        n for k, c in normalizers().items() for n in (k, c.__name__)
    }:
        cls = resolve(spec["class_path"])[0]
        found["norm"] = {**spec, "class_path": f"{cls.__module__}.{cls.__qualname__}"}
    return found


def write_out_plan(section: Any) -> None:
    """Put what a plan file says in the section itself, so that the saved configuration does without the file.

    Raises:
        ValueError: the file cannot be read, or is no plan.
    """
    said = chosen(section)
    if "plan" not in said or any(name in said for name in SELECTS):
        return
    rules, section.source = read_plan(said["plan"])
    section.rules = {name: _plain(norm) for name, norm in rules.items()}
    section.plan = None


def _plain(norm: Any) -> Any:
    if not isinstance(norm, Mapping) or not isinstance(norm["class_path"], type):
        return norm
    cls: Any = norm["class_path"]
    return {**norm, "class_path": cls.key or f"{cls.__module__}.{cls.__qualname__}"}

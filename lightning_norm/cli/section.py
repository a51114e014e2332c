"""The ``norm:`` section of a configuration: NormSwap's arguments, without a list of callbacks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lightning_norm.callbacks import NormSwap
from lightning_norm.callbacks.plan import read_plan

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
    return {name: value for name, value in (section or {}).items() if value != defaults[name]}


def swap_of(section: Mapping[str, Any] | None) -> NormSwap | None:
    """Return the callback of a section; ``None`` if it says nothing.

    Raises:
        ValueError, TypeError: what :class:`NormSwap` raises.
    """
    arguments = chosen(section)
    return NormSwap(**arguments) if arguments else None


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

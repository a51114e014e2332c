"""The rows of a manifest or a plan: every one is checked before anything of a file is used."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from lightning_norm.errors import OtherFileWarning
from lightning_norm.ops.backend import BACKENDS
from lightning_norm.ops.sync import check_group


class BadRowError(ValueError):
    """What is wrong with a row, for a message that begins with the file and the row."""


def checked_rows(rows: Any, where: str, error: type[Exception], *, may_stay: bool = False) -> list[dict[str, Any]]:
    """Return the rows of a file with every norm as ``{"class_path": ..., "init_args": {...}}``.

    Args:
        rows: what the file has under ``layers``.
        where: the file, for messages.
        error: what to raise.
        may_stay: a row may have no norm, which leaves its layer alone.

    Raises:
        error: the file, the row and the entry that is wrong.

    >>> checked_rows([{"name": "bn1", "source": "BatchNorm2d", "norm": "sn"}], "plan.yaml", ValueError)[0]["norm"]
    {'class_path': 'sn', 'init_args': {}}
    >>> checked_rows([{"name": "bn1", "norm": "sn"}], "plan.yaml", ValueError)
    Traceback (most recent call last):
    ValueError: plan.yaml, row 0 ('bn1'): a row without name, source, norm: {'name': 'bn1', 'norm': 'sn'}.
    """
    if not isinstance(rows, list):
        raise error(f"{where}: layers must be a list of rows, got {reprlib.repr(rows)}.")
    # Row by row, so that the message can name the one that is wrong.
    checked: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, row in enumerate(rows):
        try:
            checked.append(_checked_row(row, seen, may_stay))
        except ValueError as bad:
            name = f" ({row['name']!r:.80})" if isinstance(row, Mapping) and isinstance(row.get("name"), str) else ""
            raise error(f"{where}, row {number}{name}: {bad}") from bad
    # In a plan it is a mistake of whoever typed it; what a checkpoint's reader does not know is of a later version.
    if unknown := sorted({str(entry) for row in checked for entry in _unknown(row)}):
        warnings.warn(
            f"{where}: its rows have entries that this version of lightning_norm does not know: "
            f"{', '.join(unknown):.200}. They are left out, and the layers may compute something else than those that "
            "were saved. Update lightning_norm.",
            OtherFileWarning,
            stacklevel=4,
        )
    return checked


def _unknown(row: Mapping[str, Any]) -> list[Any]:
    return [entry for entry in row if entry not in _KINDS and entry not in _FOR_READERS]


def _checked_row(row: Any, seen: set[str], may_stay: bool) -> dict[str, Any]:
    """Return a row with its norms written out.

    Raises:
        BadRowError: the entry, what it must be and what it is.
    """
    # A plan may be typed by hand; the rows of a checkpoint say what the network was before, so that it can be rebuilt.
    needed = ("name", "norm") if may_stay else ("name", "source", "norm")
    if not isinstance(row, Mapping) or any(entry not in row for entry in needed):
        raise BadRowError(f"a row without {', '.join(needed)}: {reprlib.repr(row)}.")
    for entry in _unknown(row) if may_stay else ():
        raise BadRowError(
            f"an entry {entry!r}, which no row has. Arguments of a normalizer go in its norm: "
            "{class_path: sn, init_args: {...}}."
        )
    for entry, (kind, what) in _KINDS.items():
        if entry in row and not kind(row[entry]):
            raise BadRowError(f"{entry} must be {what}, got {reprlib.repr(row[entry])}.")
    # A shared module has several names, and each may stand in one row alone.
    names = [row["name"], *row.get("also", ())]
    for name in names:
        if name in seen:
            raise BadRowError(f"a second row for {name!r}. Take one of the two out.")
    seen |= {*names}
    norm = None if may_stay and row["norm"] is None else _checked_norm(row["norm"], "norm")
    before = [_checked_norm(each, "before") for each in row.get("before") or ()]
    if (group := (row.get("options") or {}).get("sync_group")) is not None:
        check_group(group)
    return {**row, "norm": norm, "before": before}


def _checked_norm(norm: Any, entry: str) -> dict[str, Any]:
    """Return a norm as ``{"class_path": ..., "init_args": {...}}``."""
    # A key by itself, as a user types it into a plan by hand.
    spec = {"class_path": norm} if isinstance(norm, str) else norm
    arguments = spec.get("init_args") if isinstance(spec, Mapping) else None
    named = isinstance(spec, Mapping) and isinstance(spec.get("class_path"), str) and bool(spec["class_path"])
    if not named or not isinstance(arguments, (Mapping, type(None))) or not all(_is_text(k) for k in arguments or ()):
        raise BadRowError(f"{entry} must be {{class_path: sn, init_args: {{...}}}}, got {reprlib.repr(norm)}.")
    return {"class_path": spec["class_path"], "init_args": dict(arguments or {})}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_sync(value: Any) -> bool:
    return isinstance(value, bool) or value == "running"


def _are_options(value: Any) -> bool:
    """Tell whether a value is what a swap may set on a layer."""
    if not isinstance(value, Mapping):
        return False
    flags = (value[name] for name in ("compile", "frozen") if name in value)
    known = _is_sync(value.get("sync", True)) and value.get("backend", "auto") in BACKENDS
    return known and all(map(_is_bool, flags)) and _are_numbers(value.get("scheduled", {}))


def _are_numbers(values: Any) -> bool:
    """Tell whether these are scheduled values by their names; whether each is in its range, its class knows."""
    return isinstance(values, Mapping) and all(
        _is_text(name) and (v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)))
        for name, v in values.items()
    )


_FOR_READERS = ("norm", "target", "reason", "preserves_eval", "moved", "converted", "dropped", "added", "removed")
"""Entries of a row that are checked elsewhere, or tell a reader of the file what the swap did."""

_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_text, "the dotted name of a layer"),
    "also": (lambda v: isinstance(v, (list, tuple)) and all(map(_is_text, v)), "a list of names"),
    "source": (_is_text, "the name of a class"),
    "before": (lambda v: isinstance(v, (list, tuple)), "a list of norms"),
    "num_features": (lambda v: v is None or (type(v) is int and v > 0), "a positive int"),
    "options": (
        _are_options,
        f"a mapping of sync (true, false, running), compile and frozen (true or false), sync_group, backend (one of "
        f"{BACKENDS}), scheduled (numbers by name)",
    ),
    "activation": (lambda v: isinstance(v, str), "the dotted name of an activation, or empty"),
    "sync": (_is_sync, "true, false or running"),
    "compiled": (_is_bool, "true or false"),
    "backend": (lambda v: isinstance(v, str) and v.partition(":")[0] in BACKENDS, f"one of {BACKENDS}"),
}

"""Which value of which layer follows which schedule, and whether every value of the run is legal."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_norm.layers.base import Normalizer
from lightning_norm.schedules.base import Schedule
from lightning_norm.surgery.walk import names_by_module


@dataclass
class Target:
    """One scheduled value of one layer.

    Args:
        layer: the layer.
        name: its dotted name.
        value: name of the argument.
        key: what the user wrote.
        schedule: what it follows.
    """

    layer: Normalizer
    name: str
    value: str
    key: str
    schedule: Schedule


def split_key(key: str) -> tuple[str | None, str]:
    """Return the pattern and the name of ``name`` or ``pattern:name``.

    Raises:
        ValueError: no name, or the pattern is no regular expression.

    >>> split_key("alpha"), split_key("net.(?:a|b):alpha")
    ((None, 'alpha'), ('net.(?:a|b)', 'alpha'))
    """
    pattern, colon, name = key.rpartition(":")
    if not name.isidentifier() or (colon and not pattern):
        raise ValueError(f"schedules[{key!r}]: expected 'alpha' or 'layer1.*:alpha', the value's name coming last.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"schedules[{key!r}]: {pattern!r} is not a regular expression: {error}.") from error
    return (pattern if colon else None), name


def find_targets(model: nn.Module, schedules: Mapping[str, Schedule]) -> list[Target]:
    """Give every value that a key names its schedule; of several keys for one value the first wins.

    Raises:
        ValueError: a key that names no value of any layer, or none that is left.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(
            "NormScheduler: the model has no layer of this package, so nothing to schedule. Swap first: "
            "Trainer(callbacks=[NormSwap('sn'), NormScheduler(...)])."
        )
    taken: dict[tuple[int, str], str] = {}
    found: list[Target] = []
    for key, schedule in schedules.items():
        pattern, value = split_key(key)
        matched = [(n, layer) for n, layer in layers if pattern is None or _matches(pattern, n)]
        able = [(n, layer) for n, layer in matched if value in _values(layer)]
        if not able:
            raise ValueError(_explain(key, pattern, value, matched, layers))
        free = [(n, layer) for n, layer in able if (id(layer), value) not in taken]
        if not free:
            first = taken[id(able[0][1]), value]
            raise ValueError(f"schedules[{key!r}] is never used: schedules[{first!r}] comes first. Exchange the two.")
        taken |= {(id(layer), value): key for _, layer in free}
        found += [Target(layer, n[0], value, key, schedule) for n, layer in free]
    return found


def check_run(targets: Sequence[Target], last: float, epoch: float, unit: str) -> None:
    """Check every value from time 0 to ``last``, which may be infinite, against the range of each layer.

    Raises:
        ValueError: a value leaves the range of a layer.
    """
    extremes: dict[int, list[tuple[float, float]]] = {}
    for target in targets:
        schedule = target.schedule
        if id(schedule) not in extremes:
            extremes[id(schedule)] = [(t, schedule(t, epoch)) for t in sorted(schedule.turns(last, epoch))]
        for time, value in extremes[id(schedule)]:
            check_value(target, time, value, unit)


def check_value(target: Target, time: float, value: float, unit: str) -> None:
    """Check one value.

    Raises:
        ValueError: it is outside the layer's range.
    """
    span = target.layer.ranges[target.value]
    if not span.low <= value <= span.high:
        when = f"{unit} {time:.0f}" if math.isfinite(time) else "the long run (this training has no end)"
        raise ValueError(
            f"schedules[{target.key!r}] = {target.schedule} gives {value:.6g} in {when}, but "
            f"{type(target.layer).__name__} {target.name} takes {target.value} from {span.low} to {span.high}."
        )


def _layers(model: nn.Module) -> list[tuple[list[str], Normalizer]]:
    return [(names, module) for module, names in names_by_module(model).items() if isinstance(module, Normalizer)]


def _values(layer: Normalizer) -> set[str]:
    return set(layer.ranges) - set(layer.without_effect())


def _matches(pattern: str, names: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, name) for name in names)


def _explain(
    key: str,
    pattern: str | None,
    value: str,
    matched: Sequence[tuple[list[str], Normalizer]],
    layers: Sequence[tuple[list[str], Normalizer]],
) -> str:
    if not matched:
        names = [n for ns, _ in layers for n in ns]
        plain = re.sub(r"[\\^$*+?()|\[\]]", "", pattern or "")
        near = difflib.get_close_matches(plain, names, n=1, cutoff=0.0)[0]
        return (
            f"schedules[{key!r}]: {pattern!r} matched none of the {len(layers)} layers. The nearest name is {near!r}: "
            "the regular expression must match the whole name."
        )
    for names, layer in matched:
        why = layer.without_effect().get(value)
        if why:
            return f"schedules[{key!r}]: {value} has no effect in {type(layer).__name__} {names[0]} with {why}."
    counts = Counter(v for _, layer in matched for v in sorted(_values(layer)))
    where = "no layer" if pattern is None else f"none of the {len(matched)} layers that {pattern!r} matches"
    close = difflib.get_close_matches(value, counts, n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    have = ", ".join(f"{v} ({n} layers)" for v, n in counts.items()) or "nothing"
    return f"schedules[{key!r}]: {where} has a value {value!r} to schedule.{guess} They have: {have}."

"""Which argument of which layer follows which schedule, and whether every value of the run is legal."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from lightning_norm.errors import counted, did_you_mean
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.scheduled import Scheduled, set_scheduled, was_scheduled
from lightning_norm.schedules.base import Schedule
from lightning_norm.surgery.torch_private import TorchRunningNormBase
from lightning_norm.surgery.walk import names_by_module

Layer: TypeAlias = Normalizer | TorchRunningNormBase
"""What has values to schedule: of torch's own layers, those that may have running statistics."""

SWAP = "Swap first: Trainer(callbacks=[NormSwap('sn'), NormScheduler(...)])."


@dataclass
class ScheduledParameter:
    """One argument of one layer, and the schedule that it follows.

    Args:
        layer: the layer.
        layer_name: its dotted name.
        argument: name of the argument, such as "momentum".
        key: what the user wrote.
        schedule: what it follows.
    """

    layer: Layer
    layer_name: str
    argument: str
    key: str
    schedule: Schedule

    @property
    def range(self) -> Scheduled:
        """Which values the layer takes."""
        return _ranges(self.layer)[self.argument]

    @property
    def was_set(self) -> bool:
        """Whether a schedule has set the value; evaluation does not read that of torch's layers."""
        return not isinstance(self.layer, Normalizer) or was_scheduled(self.layer, self.argument)

    def set(self, value: float) -> None:
        """Give the layer a value."""
        if isinstance(self.layer, Normalizer):
            set_scheduled(self.layer, self.argument, value)
        else:
            setattr(self.layer, self.argument, value)


def split_key(key: str) -> tuple[str | None, str]:
    """Return the pattern and the name of ``name`` or ``pattern:name``.

    Raises:
        ValueError: no name, or the pattern is no regular expression.

    >>> split_key("alpha"), split_key("net.(?:a|b):alpha")
    ((None, 'alpha'), ('net.(?:a|b)', 'alpha'))
    """
    # From the right, since a regular expression may have colons itself.
    pattern, colon, name = str(key).rpartition(":")
    if not name.isidentifier() or (colon and not pattern):
        raise ValueError(f"schedules[{key!r}]: expected 'alpha' or 'layer1.*:alpha', the value's name coming last.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"schedules[{key!r}]: {pattern!r} is not a regular expression: {error}.") from error
    return (pattern if colon else None), name


def find_scheduled_parameters(
    pl_module: nn.Module, schedules: Mapping[str, Schedule], trains: bool = True
) -> list[ScheduledParameter]:
    """Give every argument that a key names its schedule; of several keys for one argument the first wins.

    Args:
        pl_module: the model.
        schedules: by their keys.
        trains: ``False`` where the model is evaluated, which may have been folded or hardened since its training: a key
            may then name nothing.

    Raises:
        ValueError: a key that names no argument of any layer, or none that is left.
    """
    layers = _normalizers_with_all_names(pl_module)
    if not layers and trains:
        raise ValueError(
            f"NormScheduler: the model has no layer of this package and no BatchNorm, so nothing to schedule. {SWAP}"
        )
    # Which key has an argument already, for the message to a later key that finds none left.
    taken: dict[tuple[int, str], str] = {}
    parameters: list[ScheduledParameter] = []
    for key, schedule in schedules.items():
        pattern, argument = split_key(key)
        matched = [(names, layer) for names, layer in layers if pattern is None or _matches(pattern, names)]
        able = [(names, layer) for names, layer in matched if argument in _arguments(layer)]
        # Each key must act somewhere, since a schedule that does nothing would go unnoticed for the whole run.
        if not able and not trains:
            continue
        if not able:
            raise ValueError(_explain(key, pattern, argument, matched, layers))
        free = [(names, layer) for names, layer in able if (id(layer), argument) not in taken]
        if not free:
            first = taken[id(able[0][1]), argument]
            raise ValueError(f"schedules[{key!r}] is never used: schedules[{first!r}] comes first. Exchange the two.")
        taken |= {(id(layer), argument): key for _, layer in free}
        parameters += [ScheduledParameter(layer, names[0], argument, key, schedule) for names, layer in free]
    return parameters


def check_run(parameters: Sequence[ScheduledParameter], last: float, epoch: float, unit: str) -> None:
    """Check every value of a run against the range of each layer.

    Args:
        parameters: what is scheduled.
        last: time of the run's last step, which may be infinite.
        epoch: length of an epoch in the unit of time.
        unit: of time, "epoch" or "step".

    Raises:
        ValueError: a value leaves the range of a layer.
    """
    extremes: dict[int, list[tuple[float, float]]] = {}
    for parameter in parameters:
        schedule = parameter.schedule
        if id(schedule) not in extremes:
            # A schedule that many layers follow is evaluated once, and only where it can be at its greatest or least.
            extremes[id(schedule)] = [(t, value_at(parameter, t, epoch)) for t in sorted(schedule.turns(last, epoch))]
        for time, value in extremes[id(schedule)]:
            check_value(parameter, time, value, unit)


def value_at(parameter: ScheduledParameter, time: float, epoch: float) -> float:
    """Return what the schedule gives.

    Raises:
        ValueError: the schedule's own code raises an ArithmeticError, or gives no number.
    """
    try:
        value = parameter.schedule(time, epoch)
        return float(value)
    except (ArithmeticError, TypeError) as error:
        raise ValueError(
            f"schedules[{parameter.key!r}] = {parameter.schedule} gives no number at {time}: {type(error).__name__}: "
            f"{error}."
        ) from error


def check_value(parameter: ScheduledParameter, time: float, value: float, unit: str) -> None:
    """Check one value.

    Raises:
        ValueError: it is outside the layer's range.
    """
    span = parameter.range
    if not span.low <= value <= span.high:
        when = f"{unit} {time:.0f}" if math.isfinite(time) else "the long run (this training has no end)"
        raise ValueError(
            f"schedules[{parameter.key!r}] = {parameter.schedule} gives {value:.6g} in {when}, but "
            f"{type(parameter.layer).__name__} {parameter.layer_name} takes {parameter.argument} from {span.low} to "
            f"{span.high}."
        )


def _normalizers_with_all_names(pl_module: nn.Module) -> list[tuple[list[str], Layer]]:
    # A layer that stands twice in the model may be called by either of its names.
    kinds = (Normalizer, TorchRunningNormBase)
    return [(names, module) for module, names in names_by_module(pl_module).items() if isinstance(module, kinds)]


def _ranges(layer: Layer) -> Mapping[str, Scheduled]:
    # torch's layers declare no ranges; their momentum means what ours means.
    return layer.ranges if isinstance(layer, Normalizer) else {"momentum": Scheduled(0, 1, training_only=True)}


def _without_effect(layer: Layer) -> Mapping[str, str]:
    if isinstance(layer, Normalizer):
        return layer.without_effect()
    return {} if layer.running_mean is not None else {"momentum": "track_running_stats=False"}


def _arguments(layer: Layer) -> set[str]:
    return set(_ranges(layer)) - set(_without_effect(layer))


def _matches(pattern: str, names: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, name) for name in names)


def _explain(
    key: str,
    pattern: str | None,
    argument: str,
    matched: Sequence[tuple[list[str], Layer]],
    layers: Sequence[tuple[list[str], Layer]],
) -> str:
    """Return why a key schedules nothing, with the nearest name.

    Args:
        key: as it was typed.
        pattern: its regular expression, if it has one.
        argument: its name.
        matched: the layers that the pattern matches, with all their names.
        layers: all layers.
    """
    if not matched:
        names = [name for all_names, _ in layers for name in all_names]
        # Without its special characters a pattern resembles the name that it was meant to match.
        plain = re.sub(r"[\\^$*+?()|\[\]]", "", pattern or "")
        near = difflib.get_close_matches(plain, names, n=1, cutoff=0.0)[0]
        return (
            f"schedules[{key!r}]: {pattern!r} matched none of the {counted(len(layers), 'layer')}. The nearest name "
            f"is {near!r}: the regular expression must match the whole name."
        )
    # The argument may exist and have no effect in this layer: then the reason is the better answer.
    for names, layer in matched:
        why = _without_effect(layer).get(argument)
        if why:
            return f"schedules[{key!r}]: {argument} has no effect in {type(layer).__name__} {names[0]} with {why}."
    counts = Counter(name for _, layer in matched for name in sorted(_arguments(layer)))
    where = "no layer" if pattern is None else f"none of the {counted(len(matched), 'layer')} that {pattern!r} matches"
    guess = did_you_mean(argument, counts)
    have = ", ".join(f"{name} ({counted(n, 'layer')})" for name, n in counts.items()) or "nothing"
    have_it = [key for key, cls in Normalizer.registry.items() if argument in cls.ranges]
    hint = f" {argument} is a value of {', '.join(have_it)}." if have_it else ""
    hint += "" if any(isinstance(layer, Normalizer) for _, layer in layers) else f" {SWAP}"
    return f"schedules[{key!r}]: {where} has a value {argument!r} to schedule.{guess} They have: {have}.{hint}"

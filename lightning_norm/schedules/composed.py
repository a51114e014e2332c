"""Schedules made of schedules: one after the other, and a warm-up before one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_norm.schedules.base import Schedule, is_number
from lightning_norm.schedules.curves import Constant, Linear


@dataclass(frozen=True)
class Chain(Schedule):
    """Schedules one after the other: each for its own duration, its time counted from its own start, the last on.

    Args:
        schedules: all but the last with ``epochs`` or ``steps``.

    >>> from lightning_norm import Exponential
    >>> chain = Chain([Linear(0, 1, epochs=2), Constant(1, epochs=3), Exponential(1, 0.5)])
    >>> [chain(t) for t in (0, 1, 2, 5, 6)]
    [0.0, 0.5, 1, 1.0, 0.5]
    """

    schedules: Sequence[Schedule]

    def __post_init__(self) -> None:
        if not self.schedules:
            raise ValueError("Chain needs schedules: Chain([Linear(0, 1, epochs=5), Constant(1)]).")
        for part in self.schedules:
            if not isinstance(part, Schedule):
                raise TypeError(f"Chain: expected schedules, got {part!r}. Type Constant({part!r}, epochs=5).")
        for part in self.schedules[:-1]:
            if math.isinf(part.length()):
                raise ValueError(f"Chain: {part} never ends, but others follow. Give it epochs=... or steps=...")

    def __call__(self, time: float, epoch: float = 1.0) -> float:
        """Return the value of the schedule whose turn it is."""
        *parts, last = self.schedules
        for part in parts:
            length = part.length(epoch)
            if time < length:
                return part(time, epoch)
            time -= length
        return last(time, epoch)

    def length(self, epoch: float = 1.0) -> float:
        """Return the sum of the lengths."""
        return sum(part.length(epoch) for part in self.schedules)

    def turns(self, last: float, epoch: float = 1.0) -> Iterable[float]:
        """Return the turns of all, and the whole numbers around each: an end may lie between two steps."""
        start, found = 0.0, {0.0}
        for part in self.schedules:
            if start > last:
                break
            length = part.length(epoch)
            found |= {start, *(start + t for t in part.turns(min(last - start, length), epoch))}
            start += length
        near = {n for t in found for n in ((t,) if math.isinf(t) else (math.ceil(t) - 1, math.floor(t), math.ceil(t)))}
        return [t for t in near if 0 <= t <= last]

    def units(self) -> set[str]:
        """Return the units of all."""
        return {unit for part in self.schedules for unit in part.units()}


@dataclass(frozen=True, kw_only=True)
class Warmup(Schedule):
    """A straight line from ``start`` to the first value of a schedule, and then that schedule from its beginning.

    Args:
        schedule: what follows; a number for a constant.
        start: value at time 0.
        epochs: length of the line, in epochs.
        steps: or in steps.

    >>> from lightning_norm import Cosine
    >>> warm = Warmup(schedule=Cosine(1.0, 0.0, epochs=4), epochs=2)
    >>> [round(warm(t), 6) for t in (0, 1, 2, 4, 6)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    schedule: Schedule | float
    start: float = 0.0
    epochs: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.epochs is None and self.steps is None:
            raise ValueError("Warmup needs its duration: Warmup(schedule=..., epochs=5), or steps=500.")
        self.chain()

    def chain(self) -> Chain:
        """Return the same as a Chain."""
        then = as_schedule("Warmup: schedule", self.schedule)
        return Chain([Linear(self.start, then(0), epochs=self.epochs, steps=self.steps), then])

    def __call__(self, time: float, epoch: float = 1.0) -> float:
        """Return the value on the line, or of the schedule."""
        return self.chain()(time, epoch)

    def length(self, epoch: float = 1.0) -> float:
        """Return the length of both."""
        return self.chain().length(epoch)

    def turns(self, last: float, epoch: float = 1.0) -> Iterable[float]:
        """Return the turns of both."""
        return self.chain().turns(last, epoch)

    def units(self) -> set[str]:
        """Return the units of both."""
        return self.chain().units()


def as_schedule(what: str, value: Schedule | float) -> Schedule:
    """Return a schedule as it is, and a number as a constant.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, Schedule):
        return value
    if is_number(value):
        return Constant(float(value))
    raise TypeError(f"{what} must be a number or a schedule such as Linear(0.5, 0.9, epochs=10), got {value!r}.")

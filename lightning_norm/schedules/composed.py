"""Schedules that are made of other schedules: one after the other, and a warm-up before one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning_norm.schedules.base import Schedule, is_number
from lightning_norm.schedules.curves import Constant, Linear, Steps


@dataclass(frozen=True)
class Chain(Schedule):
    r"""Schedules one after the other, each from its own beginning.

    .. math:: v(t) = v_i(t - t_i), \quad t_i \le t < t_{i+1}, \qquad t_i = T_1 + \dots + T_{i-1}

    Args:
        schedules: all but the last with a duration T, in ``epochs`` or ``steps``; the last one goes on.

    Raises:
        ValueError: no schedules, or one without an end before another.
        TypeError: one of them is not a schedule.

    >>> from lightning_norm import Exponential
    >>> chain = Chain([Linear(0, 1, epochs=2), Constant(1, epochs=3), Exponential(1, 0.5)])
    >>> [chain(t) for t in (0, 1, 2, 5, 6)]
    [0.0, 0.5, 1, 1.0, 0.5]
    """

    schedules: Sequence[Schedule]

    def __post_init__(self) -> None:
        if not self.schedules:
            raise ValueError("Chain needs schedules: Chain([Linear(0, 1, epochs=5), Constant(1)]).")
        if not isinstance(self.schedules, Sequence) or isinstance(self.schedules, str):
            raise TypeError(f"Chain: expected a list of schedules, got {self.schedules!r}.")
        for part in self.schedules:
            if not isinstance(part, Schedule):
                raise TypeError(f"Chain: expected schedules, got {part!r}. Type Constant({part!r}, epochs=5).")
        for part in self.schedules[:-1]:
            # Found at construction, because it would show in training only as a schedule that never changes.
            if math.isinf(part.length()):
                raise ValueError(f"Chain: {part} never ends, but others follow. Give it epochs=... or steps=...")

    def __call__(self, time: float, epoch: float = 1.0) -> float:
        """Return the value of the schedule whose turn it is."""
        # Time is counted from the start of each part, so what the earlier ones took is subtracted.
        *parts, last = self.schedules
        for part in parts:
            length = part.length(epoch)
            # A part ends before its length is reached: at that very time the next one begins.
            if time < length:
                return part(time, epoch)
            time -= length
        return last(time, epoch)

    def length(self, epoch: float = 1.0) -> float:
        """Return the sum of the lengths."""
        return sum(part.length(epoch) for part in self.schedules)

    def pieces(self, last: float, epoch: float = 1.0) -> Iterable[float]:
        """Return the pieces of all, one after the other."""
        # The first value counts even where a part says nothing of its own start.
        start, times = 0.0, {0.0}
        for part in self.schedules:
            if start > last:
                break
            length = part.length(epoch)
            times |= {start, *(start + t for t in part.pieces(min(last - start, length), epoch))}
            start += length
        return times

    def turns(self, last: float, epoch: float = 1.0) -> Iterable[float]:
        """Return the whole numbers around the ends of all pieces: a piece may end between two steps."""
        # Rounded here, once, and not in the parts, whose whole numbers are no whole numbers of the chain. One more to
        # each side, for the lengths are added here and subtracted from the time of a call, which rounds differently.
        times = self.pieces(last, epoch)
        whole = {math.floor(t) + i for t in times if math.isfinite(t) for i in (-1, 0, 1, 2)}
        return [t for t in whole if 0 <= t <= last] + [t for t in (last,) if math.isinf(t)]

    def units(self) -> set[str]:
        """Return the units of all."""
        return {unit for part in self.schedules for unit in part.units()}


@dataclass(frozen=True, kw_only=True)
class Warmup(Schedule):
    r"""A straight line from ``start`` to the first value of a schedule, and then that schedule from its beginning.

    .. math:: v(t) = start + (s(0) - start)\,t/T \;\text{ for } t < T, \qquad v(t) = s(t - T) \;\text{ after}

    Args:
        schedule: what follows, s; a number for a constant, ``{0: 0.9, 10: 0.1}`` for :class:`Steps`.
        start: value at time 0.
        epochs: length of the line T, in epochs.
        steps: or T in steps.

    Raises:
        ValueError: no duration.
        TypeError: ``schedule`` is neither a schedule nor a number.

    >>> from lightning_norm import Cosine
    >>> warm = Warmup(schedule=Cosine(1.0, 0.0, epochs=4), epochs=2)
    >>> [round(warm(t), 6) for t in (0, 1, 2, 4, 6)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    schedule: Schedule | float | dict[int, float]
    start: float = 0.0
    epochs: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        # Without this, the message would be that of the line, which the user never typed.
        if self.epochs is None and self.steps is None:
            raise ValueError("Warmup needs its duration: Warmup(schedule=..., epochs=5), or steps=500.")
        self.chain()

    def chain(self) -> Chain:
        """Return the same as a Chain."""
        schedule = as_schedule("Warmup: schedule", self.schedule)
        # A chain of a line and the schedule, so that there is one arithmetic of what comes after what.
        return Chain([Linear(self.start, schedule(0), epochs=self.epochs, steps=self.steps), schedule])

    def __call__(self, time: float, epoch: float = 1.0) -> float:
        """Return the value on the line, or of the schedule."""
        return self.chain()(time, epoch)

    def length(self, epoch: float = 1.0) -> float:
        """Return the length of both."""
        return self.chain().length(epoch)

    def pieces(self, last: float, epoch: float = 1.0) -> Iterable[float]:
        """Return the pieces of both."""
        return self.chain().pieces(last, epoch)

    def turns(self, last: float, epoch: float = 1.0) -> Iterable[float]:
        """Return the turns of both."""
        return self.chain().turns(last, epoch)

    def units(self) -> set[str]:
        """Return the units of both."""
        return self.chain().units()


def as_schedule(what: str, value: Schedule | float | Mapping[int, float]) -> Schedule:
    """Return a schedule as it is, a number as a constant, and ``{0: 0.9, 10: 0.1}`` as :class:`Steps`.

    Args:
        what: the name of the value, for the message.
        value: a schedule, a number, or a mapping from times to the values from then on.

    Raises:
        TypeError: it is none of these.
        ValueError: a mapping that is no staircase, such as one without the key 0.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, Mapping):
        try:
            return Steps({_as_time(key): v for key, v in value.items()})
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
    if is_number(value):
        # A plain number is what most users type where a value shall not change.
        return Constant(float(value))
    raise TypeError(
        f"{what} must be a number or a schedule such as Linear(0.5, 0.9, epochs=10) or {{0: 0.9, 10: 0.1}}, "
        f"got {value!r}."
    )


def _as_time(key: int | str) -> int:
    # JSON and the command line have text alone for keys.
    return int(key) if isinstance(key, str) and key.isdecimal() else key  # type: ignore[return-value]  # Steps tells

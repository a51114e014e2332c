"""The elementary schedules: one class with one formula each.

A new one is a class here, an export in ``lightning_norm/__init__.py`` and a case in ``tests/schedules``, where a test
says what is missing, the row in the table of ``docs/schedules.md`` included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_norm.schedules.base import Timed, is_number, is_time


@dataclass(frozen=True)
class Constant(Timed):
    """The same value all the time; wherever a schedule is expected, a plain number means the same.

    Args:
        value: the value.
        epochs: only in a :class:`Chain`: how long.
        steps: likewise.

    >>> Constant(0.3)(7)
    0.3
    """

    value: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._numbers("value")

    def at(self, time: float, length: float) -> float:
        """Return ``value``."""
        return self.value


@dataclass(frozen=True)
class Linear(Timed):
    r"""A straight line, :math:`start + (end - start)\,t/T`, then ``end``.

    Args:
        start: value at time 0.
        end: value at and after the end.
        epochs: T, in epochs.
        steps: or T in steps.

    >>> Linear(0.5, 0.9, epochs=10)(5)
    0.7
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._numbers("start", "end")
        self._needs_end()

    def at(self, time: float, length: float) -> float:
        """Return the value on the line."""
        return _between(self.start, self.end, _part(time, length))


@dataclass(frozen=True)
class Cosine(Timed):
    r"""Half a cosine, :math:`end + (start - end)\,(1 + \cos(\pi t/T))/2`, then ``end``.

    Args:
        start: value at time 0.
        end: value at and after the end.
        epochs: T, in epochs.
        steps: or T in steps.

    >>> round(Cosine(1.0, 0.0, epochs=10)(5), 6)
    0.5
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._numbers("start", "end")
        self._needs_end()

    def at(self, time: float, length: float) -> float:
        """Return the value on the cosine."""
        return _between(self.start, self.end, (1 - math.cos(math.pi * _part(time, length))) / 2)


@dataclass(frozen=True)
class Exponential(Timed):
    r"""A constant factor per epoch (or step), :math:`start \cdot \gamma^t`.

    Args:
        start: value at time 0.
        gamma: factor per unit of the interval.
        epochs: how long the value changes; for ever by default.
        steps: likewise.

    >>> Exponential(1.0, 0.5)(2)
    0.25
    """

    start: float
    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._numbers("start", "gamma")
        if self.gamma <= 0:
            raise ValueError(f"Exponential: gamma must be > 0, got {self.gamma!r}.")

    def at(self, time: float, length: float) -> float:
        """Return the power."""
        try:
            # A schedule that starts at 0 stays there, however large the power becomes.
            return self.start * float(self.gamma**time) if self.start else 0.0
        except OverflowError:
            # An infinity is refused by the range of every hyper-parameter, with a message that names the step.
            return math.copysign(math.inf, self.start)


@dataclass(frozen=True)
class InversePower(Timed):
    r"""The diminishing weight :math:`scale / m^h`, with m = t + 1 counted from 1.

    Args:
        power: h.
        scale: value in the first epoch (or step).
        epochs: how long the value changes; for ever by default.
        steps: likewise.

    >>> InversePower(power=0.5)(3)
    0.5
    """

    power: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._numbers("power", "scale")
        if self.power < 0:
            raise ValueError(f"InversePower: power must be >= 0, got {self.power!r}.")

    def at(self, time: float, length: float) -> float:
        """Return the power of m."""
        # Time counts from 0 and the paper's m from 1.
        return self.scale * float((time + 1.0) ** -self.power)


@dataclass(frozen=True)
class Steps(Timed):
    r"""A staircase, ``{0: 0.5, 10: 0.1}``, as in Lightning's GradientAccumulationScheduler.

    .. math:: v(t) = values[\max \{k : k \le t\}]

    Args:
        values: time -> value from then on; in epochs or steps, as the interval says. The key 0 is required.
        epochs: only in a :class:`Chain`: how long.
        steps: likewise.

    >>> Steps({0: 0.5, 10: 0.1})(9), Steps({0: 0.5, 10: 0.1})(10)
    (0.5, 0.1)
    """

    values: Mapping[int, float]

    def __post_init__(self) -> None:
        super().__post_init__()
        # YAML makes text of a key in quotes, and text would be compared with a number only in training.
        if not isinstance(self.values, Mapping):
            raise TypeError(f"Steps: expected a mapping such as {{0: 0.5, 10: 0.1}}, got {self.values!r}.")
        bad = [k for k in self.values if not is_time(k, 0)]
        if bad:
            raise ValueError(f"Steps: each key is an epoch (or step), an int >= 0, got {bad[0]!r}.")
        if 0 not in self.values:
            typed = ", ".join(["0: ...", *(f"{k}: {v}" for k, v in self.values.items())])
            raise ValueError(f"Steps needs the value at the start: Steps({{{typed}}}).")
        for key, value in self.values.items():
            if not is_number(value):
                raise ValueError(f"Steps: the value from {key} on must be a number, got {value!r}.")

    def at(self, time: float, length: float) -> float:
        """Return the value of the last key that was reached."""
        # Keys may stand in any order, as in Lightning's GradientAccumulationScheduler.
        return self.values[max(key for key in self.values if key <= time)]

    def turns(self, last: float, epoch: float = 1.0) -> Iterable[float]:
        """Return the keys."""
        # Between two keys nothing changes, so these are the only times to look at.
        return [key for key in self.values if key <= last]


@dataclass(frozen=True)
class Staircase(Timed):
    r"""A factor every so many epochs (or steps), down to a floor.

    .. math:: v(t) = \max(floor, start \cdot \gamma^{\lfloor t/every \rfloor})

    BatchNorm's momentum in networks of point clouds follows one: ``Staircase(0.5, 0.5, every=20, floor=0.01)``.

    Args:
        start: value at time 0.
        gamma: factor at each stair.
        every: units of the interval from one stair to the next.
        floor: the least value; ``None`` for none.
        epochs: how long the value changes; for ever by default.
        steps: likewise.

    >>> [Staircase(0.5, 0.5, every=20, floor=0.1)(t) for t in (0, 19, 20, 40, 60)]
    [0.5, 0.5, 0.25, 0.125, 0.1]
    """

    start: float
    gamma: float
    every: int
    floor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._numbers("start", "gamma")
        if self.gamma <= 0:
            raise ValueError(f"Staircase: gamma must be > 0, got {self.gamma!r}.")
        if not is_time(self.every, 1):
            raise ValueError(
                f"Staircase: every must be a number of epochs (or steps), an int >= 1, got {self.every!r}."
            )
        if self.floor is not None:
            self._numbers("floor")
            if self.floor > self.start:
                raise ValueError(f"Staircase: floor={self.floor} is above start={self.start}: nothing would change.")

    def at(self, time: float, length: float) -> float:
        """Return the power, or the floor."""
        stairs = time // self.every if math.isfinite(time) else time
        value = Exponential(self.start, self.gamma).at(stairs, length)
        return value if self.floor is None else max(self.floor, value)


def _part(time: float, length: float) -> float:
    return 1.0 if time >= length else time / length  # both may be infinite


def _between(start: float, end: float, fraction: float) -> float:
    value = start * (1 - fraction) + end * fraction
    # Rounding must not leave the range of a hyper-parameter.
    return min(max(value, min(start, end)), max(start, end))

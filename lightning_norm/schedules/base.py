"""What every schedule is: a hyper-parameter's value as a pure function of the epoch or the step.

Nothing here imports torch or keeps state, so that a resumed run has the values of the uninterrupted one.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

MANY_TIMES = 10_000
"""Times at which a schedule that tells nothing of its shape is evaluated before a run, however long that is."""


class Schedule(ABC):
    """Abstract: a value over time. ``time`` counts epochs or steps from 0, whichever the scheduler's interval says.

    A schedule of your own is a subclass with ``__call__``; it must follow from its arguments alone, so that a resumed
    run is the uninterrupted one.
    """

    @abstractmethod
    def __call__(self, time: float, epoch: float = 1.0) -> float:
        """Return the value at a time.

        Args:
            time: epochs or steps since the start of training.
            epoch: how long an epoch lasts in units of ``time``: 1, or the number of its steps.
        """

    def length(self, epoch: float = 1.0) -> float:
        """Return how long it lasts, in units of ``time``; afterwards it keeps its last value."""
        return math.inf

    def turns(self, last: float, epoch: float = 1.0) -> Iterable[float]:
        """Return times from 0 to ``last``, among them those of the smallest and the largest value.

        The scheduler looks there whether a schedule stays within the range of a hyper-parameter. Without knowledge of
        the schedule they are all the whole numbers, and in a run of more than 10 000 as many of them, evenly spread.
        """
        # Training without an end has no last time; its schedules are checked when they are asked for.
        if math.isinf(last):
            return (0,)
        end = int(last)
        return range(end + 1) if end < MANY_TIMES else {end * i // (MANY_TIMES - 1) for i in range(MANY_TIMES)}

    def pieces(self, last: float, epoch: float = 1.0) -> Iterable[float]:
        """Return the ends of the pieces on which it is monotone, up to ``last``; they may lie between whole numbers."""
        return self.turns(last, epoch)

    def units(self) -> set[str]:
        """Return in which units its durations were written: "epochs", "steps", both or none."""
        return set()


@dataclass(frozen=True, kw_only=True)
class Timed(Schedule):
    """Abstract: a monotone schedule with a duration T, in ``epochs`` or in ``steps``; a subclass writes :meth:`at`.

    Args:
        epochs: how long it lasts; a fraction is legal.
        steps: the same in optimizer steps, for ``interval="step"``.

    Raises:
        ValueError: a duration that is not a number above 0, or both.
    """

    epochs: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        for unit in ("epochs", "steps"):
            duration = getattr(self, unit)
            # NaN and infinity are floats as well, and would divide a formula to nothing.
            if duration is not None and not (is_number(duration) and duration > 0):
                raise ValueError(f"{name}: {unit} must be a number > 0, got {duration!r}.")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"{name}: give epochs={self.epochs} or steps={self.steps}, not both.")

    @abstractmethod
    def at(self, time: float, length: float) -> float:
        """Return the value at ``time``, which lies in [0, length]; ``length`` is infinite without a duration."""

    def __call__(self, time: float, epoch: float = 1.0) -> float:
        """Return the value at ``time``: the first value before 0, and the last one after the end."""
        length = self.length(epoch)
        # Clamped here, so that a formula need not say what happens before and after.
        return self.at(min(max(as_float(time), 0.0), length), length)

    def length(self, epoch: float = 1.0) -> float:
        """Return the duration in units of time."""
        # Steps are the unit already; epochs have to be told how many of them they hold.
        if self.steps is not None:
            return self.steps
        return math.inf if self.epochs is None else self.epochs * as_float(epoch)

    def turns(self, last: float, epoch: float = 1.0) -> Iterable[float]:
        """Return both ends: it is monotone."""
        return (0, last)

    def units(self) -> set[str]:
        """Return "epochs" or "steps", whichever was given."""
        return {unit for unit in ("epochs", "steps") if getattr(self, unit) is not None}

    def _numbers(self, *names: str) -> None:
        for name in names:
            if not is_number(getattr(self, name)):
                raise ValueError(f"{type(self).__name__}: {name} must be a number, got {getattr(self, name)!r}.")

    def _needs_end(self) -> None:
        # Of the base class, for a subclass may add units and still has no duration.
        if not Timed.units(self):
            name = type(self).__name__
            raise ValueError(f"{name} needs its duration: {name}(..., epochs=10), or steps=1000 with interval='step'.")


def is_number(value: object) -> bool:
    """Tell whether it is a finite number within the range of a float, and not a bool."""
    # ``True`` is an int in Python and a slip of the pen in a schedule.
    # NumPy's scalars are of these kinds as well, and its bool is of none.
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(as_float(value))


def is_time(value: object, least: int) -> TypeGuard[int]:
    """Tell whether it is a whole number of that size at least, of any library, and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def as_float(number: Any) -> float:
    """Return a number as a float, infinite beyond the range of those.

    >>> as_float(10**400)
    inf
    """
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf

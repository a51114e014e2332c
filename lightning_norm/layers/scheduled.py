"""Hyper-parameters that may change during training, held in 0-dim tensors so that no change recompiles anything."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_norm.ops.compiled import GRAPH_KEY


@dataclass(frozen=True)
class Scheduled:
    """Say in a signature that a value may be scheduled, and within which closed range.

    Args:
        low: smallest legal value.
        high: largest legal value.

    >>> from typing import Annotated
    >>> Alpha = Annotated[float, Scheduled(0.0, 1.0)]
    """

    low: float
    high: float

    def check(self, who: str, name: str, value: float | None) -> float:
        """Return ``value`` as a float.

        Raises:
            ValueError: the value is outside the range or not a number.
        """
        try:
            number = float(value)  # type: ignore[arg-type]  # None is refused below
        except (TypeError, ValueError):
            number = math.nan
        if not self.low <= number <= self.high:
            raise ValueError(f"{who}: {name} must lie in [{self.low}, {self.high}], got {value!r}.")
        return number


class ScheduledValues(nn.Module):
    """Turn each ``Annotated[float, Scheduled(low, high)]`` argument of ``__init__`` into a range-checked property.

    ``layer.alpha`` reads and sets a float; ``layer.scheduled("alpha")`` is the 0-dim float64 tensor for the algebra
    (float64 so that 0.1 means 0.1 for float64 inputs; a 0-dim tensor never raises the dtype of the others).
    """

    ranges: ClassVar[dict[str, Scheduled]] = {}
    may_be_none: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        found, optional = _declared(cls)
        cls.ranges = {**cls.ranges, **found}
        cls.may_be_none = (cls.may_be_none - found.keys()) | optional
        for name in found:
            setattr(cls, name, property(_getter(name), _setter(name)))

    def scheduled(self, name: str) -> Tensor | None:
        """Return the 0-dim tensor behind a scheduled argument, ``None`` if it was set to ``None``."""
        value: Tensor | None = self._buffers[f"_{name}"]
        return value

    def set_scheduled(self, name: str, value: float) -> None:
        """Set a value that follows a schedule; :meth:`was_scheduled` tells it from one that was given."""
        setattr(self, name, value)
        self._followed.add(name)

    def keep_exact(self) -> None:
        """Give back its digits to a value that something, such as FSDP's mixed precision, has rounded to half."""
        for name in self.ranges:
            held = self._buffers.get(f"_{name}")
            if held is not None and held.dtype not in (torch.float64, torch.float32):
                held.data = _scalar(self._values[name], held.device)

    def was_scheduled(self, name: str) -> bool:
        """Tell whether a schedule has set this value."""
        return name in self._followed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        held = {
            f"_{name}": self._buffers.pop(f"_{name}") for name in self.ranges
        }  # float64 must not reach .half() or MPS
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in held.items():
            if old is None:
                self._buffers[name] = None
                continue
            device = fn(torch.zeros((), device=old.device)).device
            self._buffers[name] = old if device == old.device else _scalar(self._values[name[1:]], device)
        return self

    @property
    def _values(self) -> dict[str, float | None]:
        values: dict[str, float | None] = self.__dict__.setdefault("_scheduled_values", {})
        return values

    @property
    def _followed(self) -> set[str]:
        names: set[str] = self.__dict__.setdefault("_scheduled_names", set())
        return names


def _declared(cls: type) -> tuple[dict[str, Scheduled], set[str]]:
    """Return the scheduled arguments of a class's own ``__init__``, and those of them that may be ``None``."""
    init = cls.__dict__.get("__init__")
    found: dict[str, Scheduled] = {}
    optional: set[str] = set()
    if init is None:
        return found, optional
    for name, parameter in inspect.signature(init).parameters.items():
        annotation = parameter.annotation
        if isinstance(annotation, str) and "Scheduled" in annotation:
            annotation = eval(annotation, vars(sys.modules[cls.__module__]))  # a class's own annotation
        for extra in getattr(annotation, "__metadata__", ()):
            if isinstance(extra, Scheduled):
                found[name] = extra
                optional |= {name} if type(None) in get_args(get_args(annotation)[0]) else set()
    return found, optional


def _getter(name: str) -> Callable[[ScheduledValues], float | None]:
    return lambda self: self._values[name]


def _setter(name: str) -> Callable[[ScheduledValues, float | None], None]:
    def set_value(self: ScheduledValues, value: float | None) -> None:
        if value is not None or name not in self.may_be_none:
            value = self.ranges[name].check(type(self).__name__, name, value)
        self._values[name] = value
        held = self._buffers.get(f"_{name}")
        if held is None or value is None:
            device = next(
                (t.device for t in (*self._parameters.values(), *self._buffers.values()) if t is not None), None
            )
            self.__dict__.pop(GRAPH_KEY, None)
            self.register_buffer(f"_{name}", None if value is None else _scalar(value, device), persistent=False)
        else:
            with torch.no_grad():
                held.fill_(value)

    return set_value


def _scalar(value: float | None, device: torch.device | None) -> Tensor:
    dtype = torch.float32 if device is not None and device.type == "mps" else torch.float64
    return torch.tensor(value, dtype=dtype, device=device)

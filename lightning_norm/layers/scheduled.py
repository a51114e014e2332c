"""Hyper-parameters that may change during training, stored in 0-dim tensors so that no change recompiles anything."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_norm.layers.arguments import plain_value
from lightning_norm.ops.compiled import GRAPH_KEY


@dataclass(frozen=True)
class Scheduled:
    """Say in a signature that a value may be scheduled, and within which closed range.

    Such an argument becomes a property: it is checked whenever it is set, a compiled graph reads the new value without
    being made anew, and :class:`lightning_norm.NormScheduler` finds it.

    Args:
        low: smallest legal value.
        high: largest legal value.
        optional: the value may be ``None``; a signature says so by ``float | None``.
        training_only: evaluation does not read it, so that no checkpoint has to hold it.

    >>> from typing import Annotated
    >>> Alpha = Annotated[float, Scheduled(0.0, 1.0)]
    """

    low: float
    high: float
    optional: bool = False
    training_only: bool = False

    def check(self, who: str, name: str, value: float | None) -> float | None:
        """Return ``value`` as a float, or ``None`` where that is legal.

        Args:
            who: the class, for messages.
            name: the argument, for messages.
            value: a number, or what ``float`` makes one of.

        Raises:
            ValueError: the value is outside the range or not a number.

        >>> Scheduled(0, 1).check("SwitchableNorm", "radius", "0.5")
        0.5
        """
        if value is None and self.optional:
            return None
        try:
            # Text from YAML and 0-dim tensors are numbers as well.
            number = float(value)  # type: ignore[arg-type]  # None is refused below
            # YAML's yes and on are True, and no momentum.
            number = math.nan if type(value) is not float and isinstance(plain_value(value), bool) else number
        except (TypeError, ValueError):
            number = math.nan
        # Written so that NaN, for which every comparison is false, is refused.
        if not self.low <= number <= self.high:
            raise ValueError(f"{who}: {name} must lie in [{self.low}, {self.high}], got {value!r}.")
        return number


class ScheduledValues(nn.Module):
    """Turn each ``Annotated[float, Scheduled(low, high)]`` argument of ``__init__`` into a range-checked property.

    ``layer.alpha`` reads and sets a float; ``layer.scheduled("alpha")`` is the 0-dim float64 tensor for the algebra
    (float64 so that 0.1 means 0.1 for float64 inputs; a 0-dim tensor never raises the dtype of the others).

    >>> from lightning_norm import BatchNorm
    >>> layer = BatchNorm(3)
    >>> layer.momentum = 0.25
    >>> layer.momentum = 2
    Traceback (most recent call last):
    ValueError: BatchNorm: momentum must lie in [0, 1], got 2.
    >>> layer.momentum
    0.25
    """

    ranges: ClassVar[dict[str, Scheduled]] = {}
    """Each argument that may be scheduled, and its legal range."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Only the class's own arguments: those of its bases have their properties already.
        declared = _declared(cls)
        cls.ranges = {**cls.ranges, **declared}
        for name in declared:
            setattr(cls, name, property(_getter(name), _setter(name)))

    def scheduled(self, name: str) -> Tensor | None:
        """Return the 0-dim tensor behind a scheduled argument, ``None`` if it was set to ``None``.

        An algebra reads its value here and not from the property: a graph then holds the tensor and not the number.

        >>> from lightning_norm import BatchNorm
        >>> BatchNorm(3, momentum=0.25).scheduled("momentum")
        tensor(0.2500, dtype=torch.float64)
        """
        value: Tensor | None = getattr(self, f"_{name}")
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the tensors of scheduled values with the layer, in float64 whatever the layer is cast to."""
        # Taken out of the buffers for a moment, for float64 must not reach .half(), nor MPS, which has none. Their
        # places stay: an average of models pairs the buffers of both by these.
        before = {f"_{name}": self._buffers.get(f"_{name}") for name in self.ranges}
        self._buffers.update(dict.fromkeys(before))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            if old is None:
                continue
            # Where the move leads is known to ``fn`` alone, so it is tried on a tensor that may be cast.
            probe = fn(torch.zeros((), device=old.device))
            moved = old if probe.device == old.device else _scalar(getattr(self, name[1:]), probe.device)
            if _is_shared(probe):
                moved.share_memory_()  # type: ignore[no-untyped-call]
            self._buffers[name] = moved
            _remember(self, name[1:])
        return self

    def _choose_saved_values(self) -> None:
        """Let ``state_dict`` hold the values that evaluation reads, and no others."""
        saved, unsaved = saved_values(self), self._non_persistent_buffers_set
        for name in self.ranges:
            (unsaved.discard if name in saved else unsaved.add)(f"_{name}")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._choose_saved_values()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_scheduled(self, state_dict: dict[str, Any], prefix: str, strict: bool) -> str:
        """Take over the values in a checkpoint, and return what is wrong with them; older ones hold none."""
        self._choose_saved_values()
        for name in saved_values(self):
            key = f"{prefix}_{name}"
            device = next((t.device for t in state_dict.values() if isinstance(t, Tensor)), None)
            loaded = state_dict.get(key)
            if isinstance(loaded, Tensor) and not loaded.is_meta and loaded.numel() == 1:
                try:
                    # As if a schedule had set it: what evaluates the loaded layer leaves it alone.
                    set_scheduled(self, name, float(loaded))
                except ValueError as error:
                    return str(error)
            value = getattr(self, name)
            if value is not None and (isinstance(loaded, Tensor) or strict):
                state_dict[key] = _scalar(value, device)  # in its precision, also with assign=True
        return ""


def saved_values(layer: ScheduledValues) -> dict[str, float | None]:
    """Return the scheduled values that evaluation reads, which ``state_dict`` therefore holds, as ``_name``."""
    idle: dict[str, str] = getattr(layer, "without_effect", dict)()
    return {n: getattr(layer, n) for n, r in layer.ranges.items() if not r.training_only and n not in idle}


def _values(layer: ScheduledValues) -> dict[str, float | None]:
    """Return the values as they were set, of which a tensor on a device without float64 may hold fewer digits."""
    # torch 2.11 cannot trace setdefault of an object's attributes.
    if "_scheduled_values" not in vars(layer):
        vars(layer)["_scheduled_values"] = {}
    values: dict[str, float | None] = vars(layer)["_scheduled_values"]
    return values


def set_scheduled(layer: ScheduledValues, name: str, value: float) -> None:
    """Set a value that follows a schedule; :func:`was_scheduled` tells it from one that a user set."""
    setattr(layer, name, value)
    vars(layer).setdefault("_scheduled_names", set()).add(name)


def was_scheduled(layer: ScheduledValues, name: str) -> bool:
    """Tell whether a schedule has set this value."""
    return name in vars(layer).get("_scheduled_names", ())


def scheduled_value(layer: ScheduledValues, name: str) -> float | None:
    """Return the value of a scheduled argument, ``None`` for any other name."""
    return _values(layer).get(name)


def keep_exact(layer: ScheduledValues) -> None:
    """Give back its digits to a value that something, such as FSDP's mixed precision, has rounded to half."""
    for name in layer.ranges:
        tensor = layer._buffers.get(f"_{name}")
        if tensor is not None and tensor.dtype not in (torch.float64, torch.float32):
            tensor.data = _scalar(_values(layer)[name], tensor.device)


def _declared(cls: type) -> dict[str, Scheduled]:
    """Return the scheduled arguments of a class's own ``__init__``."""
    init = cls.__dict__.get("__init__")
    declared: dict[str, Scheduled] = {}
    for name, parameter in inspect.signature(init).parameters.items() if init is not None else ():
        annotation = parameter.annotation
        if isinstance(annotation, str) and "Scheduled" in annotation:
            # The text is a class's own annotation and comes from no user.
            annotation = eval(annotation, vars(sys.modules[cls.__module__]))
        for extra in getattr(annotation, "__metadata__", ()):
            if isinstance(extra, Scheduled):
                declared[name] = replace(extra, optional=type(None) in get_args(get_args(annotation)[0]))
    return declared


def _getter(name: str) -> Callable[[ScheduledValues], float | None]:
    """Return the getter of the property of that name."""

    def get_value(self: ScheduledValues) -> float | None:
        value, tensor = _values(self)[name], self._buffers.get(f"_{name}")
        if torch.compiler.is_compiling() or value is None or tensor is None or tensor.is_meta:
            return value
        # Something else may have written to the tensor: an average of models, another process, load_state_dict.
        known = vars(self).get("_scheduled_versions", {}).get(name)
        if known != _version(tensor) or _is_shared(tensor):
            with contextlib.suppress(RuntimeError):  # a stand-in without a value, while something is traced
                written = float(tensor)
                _remember(self, name)
                if written != float(torch.tensor(value, dtype=tensor.dtype)):
                    _values(self)[name] = value = written
        return value

    return get_value


def _setter(name: str) -> Callable[[ScheduledValues, float | None], None]:
    """Return the setter of the property of that name, which checks the range."""

    def set_value(self: ScheduledValues, value: float | None) -> None:
        value = self.ranges[name].check(type(self).__name__, name, value)
        _values(self)[name] = value
        tensor = getattr(self, f"_{name}", None)
        if tensor is None or value is None:
            # A value that was None has no tensor yet: it goes where the layer's other tensors are, or were to be.
            where = (t.device for t in (*self.parameters(False), *self.buffers(False)))
            device = next(where, vars(self).get("_made_on"))
            self.__dict__.pop(GRAPH_KEY, None)
            self.register_buffer(f"_{name}", None if value is None else _scalar(value, device), persistent=False)
            if self.ranges[name].optional:
                # One of both is there in any case, so that an average of models, which pairs the buffers by their
                # places, still does after a schedule has set a value that was None.
                stand_in = torch.zeros((), device=device) if value is None else None
                self.register_buffer(f"_no_{name}", stand_in, persistent=False)
        else:
            with torch.no_grad():
                # In place, because compiled graphs hold this tensor.
                tensor.fill_(value)
        _remember(self, name)

    return set_value


def _is_shared(tensor: Tensor) -> bool:
    """Tell whether other processes may write to a tensor, or it is a stand-in of a transform, which has no storage."""
    try:
        return tensor.is_cpu and bool(tensor.untyped_storage().is_shared())
    except NotImplementedError:
        return True


def _version(tensor: Tensor) -> tuple[int, int]:
    """Return what changes if something writes to the tensor, or another one takes its place."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version


def _remember(layer: ScheduledValues, name: str) -> None:
    """Remember that the tensor of a value says what was set."""
    tensor = layer._buffers.get(f"_{name}")
    if tensor is not None and not torch.compiler.is_compiling():
        vars(layer).setdefault("_scheduled_versions", {})[name] = _version(tensor)


def _scalar(value: float | None, device: torch.device | str | None) -> Tensor:
    """Return a value as a 0-dim tensor."""
    device = torch.device(device) if isinstance(device, str) else device
    # Apple's GPUs have no float64.
    dtype = torch.float32 if device is not None and device.type == "mps" else torch.float64
    return torch.tensor(value, dtype=dtype, device=device)

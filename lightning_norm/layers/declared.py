"""Declarations of a class: those that some of its arguments change, and those of several fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Unsupported:
    """What a layer cannot do: each field is the reason, for messages, and empty where it can.

    Args:
        mask: be called with a mask.
        recalibration: have its running statistics estimated anew from some batches.
        window: move its running statistics at the end of a window of batches, in place of after each.
    """

    mask: str = ""
    recalibration: str = ""
    window: str = ""


@dataclass(frozen=True)
class SwapAdvice:
    """What a swap tells the user of a method.

    Args:
        required_callback: the callback that its layers do not work without.
        not_for: families of torch's layers that it does not replace well -> why.
        growth: what to do about its parameters, where a swap adds many.
    """

    required_callback: str = ""
    not_for: Mapping[str, str] = field(default_factory=dict)
    growth: str = ""


@dataclass(frozen=True)
class ExtraBuffers:
    """Names of buffers beyond those of a BatchNorm.

    Args:
        counters: integers that a resumed run needs; a BatchNorm's checkpoint has none of them, and they start at 0.
        float32: those that stay in float32 at least.
    """

    counters: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()


class _Declared:
    """On the class what holds by default, on a layer what holds for that layer."""

    def __init__(self, function: Callable[[Any], Any], by_default: Any) -> None:
        self.function, self.by_default = function, by_default
        self.__doc__ = function.__doc__

    def __get__(self, layer: Any, cls: type) -> Any:
        return self.by_default if layer is None else self.function(layer)


def declared(by_default: Any) -> Callable[[Callable[[Any], Any]], Any]:
    """Make a property that can be read on the class as well, where it is ``by_default``.

    The registry, the list of normalizers and the choice of what a checkpoint is of ask classes, before there is a
    layer. A property would answer them with itself.

    Args:
        by_default: what holds with the default arguments.

    >>> class Layer:
    ...     statistics = "in"
    ...
    ...     @declared(True)
    ...     def train_uses_batch_stats(self):
    ...         return self.statistics != "in"
    >>> Layer.train_uses_batch_stats, Layer().train_uses_batch_stats
    (True, False)
    """
    return lambda function: _Declared(function, by_default)

"""Declarations of a class that some of its arguments change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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

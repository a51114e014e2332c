"""Wrap a method on one instance, and take the wrapper off again without a trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

BEFORE = "_lightning_norm_before"
"""On a wrapper that was taken off: what the instance held before, in a tuple; empty for the class's own method."""


class WrappedMethods:
    """The methods that a callback has wrapped on a LightningModule.

    ``LightningModule.configure_model`` and ``configure_optimizers`` are looked up on the instance by Lightning and by
    LightningCLI, which may have put its own function there: that one is called and comes back. Several callbacks may
    wrap the same method and take their wrappers off in any order.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def wrap(self, instance: Any, name: str, around: Callable[..., Any]) -> None:
        """Replace ``instance.name`` by a function that calls ``around(original, *args)``."""
        original = getattr(instance, name)
        was_own = name in instance.__dict__

        @functools.wraps(original)
        def wrapper(*args: Any) -> Any:
            return original(*args) if hasattr(wrapper, BEFORE) else around(original, *args)

        del wrapper.__wrapped__  # Lightning looks through it and would find the method not overridden

        def undo() -> None:
            setattr(wrapper, BEFORE, (original,) if was_own else ())
            while (before := getattr(instance.__dict__.get(name), BEFORE, None)) is not None:
                del instance.__dict__[name]
                if before:
                    instance.__dict__[name] = before[0]

        instance.__dict__[name] = wrapper
        self._undo.append(undo)

    def clear(self) -> None:
        """Take every wrapper off."""
        while self._undo:
            self._undo.pop()()

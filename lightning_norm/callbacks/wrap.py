"""Wrap a method on one instance, and take the wrapper off again without a trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class WrappedMethods:
    """The methods that a callback has wrapped on a LightningModule.

    ``LightningModule.configure_model`` and ``configure_optimizers`` are looked up on the instance by Lightning and by
    LightningCLI, which may have put its own function there: that one is called and comes back.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def wrap(self, instance: Any, name: str, around: Callable[[Callable[..., Any]], Any]) -> None:
        """Replace ``instance.name`` by a function that calls ``around(original)``."""
        original = getattr(instance, name)
        was_own = name in instance.__dict__

        @functools.wraps(original)
        def wrapper() -> Any:
            return around(original)

        del wrapper.__wrapped__  # Lightning looks through it and would find the method not overridden

        def undo() -> None:
            if instance.__dict__.get(name) is wrapper:
                if was_own:
                    instance.__dict__[name] = original
                else:
                    del instance.__dict__[name]

        instance.__dict__[name] = wrapper
        self._undo.append(undo)

    def clear(self) -> None:
        """Take every wrapper off."""
        while self._undo:
            self._undo.pop()()

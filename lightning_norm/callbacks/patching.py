"""Wrap a method on one instance, and take the wrapper off again without a trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class WrappedMethods:
    """The methods that a callback has wrapped on a LightningModule or on what belongs to the Trainer.

    ``LightningModule.configure_model`` and ``configure_optimizers`` are looked up on the instance by Lightning and by
    LightningCLI, which may have put its own function there: that one is called and comes back. Several callbacks may
    wrap the same method and take their wrappers off in any order.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def wrap(self, instance: Any, name: str, around: Callable[..., Any]) -> None:
        """Replace ``instance.name`` by a function that calls ``around(original, *args)`` with what it is given."""
        original = getattr(instance, name)
        below = instance.__dict__.get(name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) if done(wrapper) else around(original, *args, **kwargs)

        del wrapper.__wrapped__  # Lightning looks through it and would find the method not overridden
        wrapper.__dict__.update(_below=below, _done=False)

        def undo() -> None:
            wrapper.__dict__["_done"] = True
            while done(instance.__dict__.get(name)):  # a wrapper on top of it may still be in use: it undoes both
                under = instance.__dict__[name]._below
                if under is None:
                    del instance.__dict__[name]
                else:
                    instance.__dict__[name] = under

        instance.__dict__[name] = wrapper
        self._undo.append(undo)

    def clean_up(self, strategy: Any, clean: Callable[[], None]) -> None:
        """Call ``clean`` when a run fails, also where a finder has put other callbacks into the Trainer for a while."""

        def failed(original: Callable[..., Any], *args: Any) -> Any:
            clean()
            return original(*args)

        self.wrap(strategy, "on_exception", failed)

    def clear(self) -> None:
        """Take every wrapper off."""
        while self._undo:
            self._undo.pop()()


def done(function: Any) -> bool:
    """Tell whether this is a wrapper whose time is over."""
    return bool(getattr(function, "_done", False))

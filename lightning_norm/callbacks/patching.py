"""Replace a method of an object or of a class for a while, and undo it without a trace."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from typing_extensions import Self


class Patch:
    """A function that stands in the ``__dict__`` of an object or a class in place of a method.

    It calls ``around(original, *args)``, where ``original`` is what stood there before: the method of the class, or
    what somebody else has put on the instance, as LightningCLI does with ``configure_optimizers``. On a class, the
    instance is the first of ``args``, and ``original`` takes it, too.

    A copy or a pickle of the object takes the patch along. There it calls the copy's own method, and ``around`` only if
    ``follows_copies`` says so, since nobody would undo it.

    Args:
        target: the object or class.
        name: of the method.
        around: what is called.
        follows_copies: ``around`` can be copied and pickled, and is to work in copies as well.

    Raises:
        AttributeError: the target has no such method.
    """

    def __init__(self, target: Any, name: str, around: Callable[..., Any], follows_copies: bool = False) -> None:
        self.target, self.name = target, name
        self.around: Callable[..., Any] | None = around
        self.follows_copies = follows_copies
        self.covered = vars(target).get(name)  # None: the target inherits the method
        # Name and documentation only: attributes of the wrapped function would be carried into copies.
        functools.update_wrapper(self, getattr(target, name), updated=())
        del self.__dict__["__wrapped__"]  # Lightning would look through it and find the method not overridden

    @property
    def __code__(self) -> types.CodeType:
        """Lightning compares this with the code of its own method, to know whether a hook is overridden."""
        return type(self).__call__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``around``, or the original once the patch is undone."""
        original = self.original()
        return original(*args, **kwargs) if self.around is None else self.around(original, *args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind as a function does; Python asks for it where the patch stands on a class."""
        return self if instance is None else types.MethodType(self, instance)

    def __getstate__(self) -> dict[str, Any]:
        names = ("target", "name", "covered", "follows_copies")
        return {name: getattr(self, name) for name in names} | {"around": self.around if self.follows_copies else None}

    def original(self) -> Any:
        """Return what is called without the patch, looked up anew, so that a copy finds its own method."""
        if isinstance(self.target, type):
            return getattr(super(self.target, self.target), self.name) if self.covered is None else self.covered
        if self.covered is not None:
            return self.covered
        # Not getattr on the target, which would find this patch.
        method = inspect.getattr_static(type(self.target), self.name)
        return method.__get__(self.target, type(self.target)) if hasattr(method, "__get__") else method

    def put_on(self) -> None:
        """Take the method's place."""
        _put(self.target, self.name, self)

    def take_off(self) -> None:
        """Put back what was covered, or leave that to the patch on top, which may be in use for longer."""
        # From now on the patch only calls what it covers, wherever references to it are left.
        self.around = None
        # A patch below that was undone earlier is taken off as soon as it is on top.
        while isinstance(top := vars(self.target).get(self.name), Patch) and top.around is None:
            _put(self.target, self.name, top.covered)


class Patches:
    """Patches that are undone together, at the end of a run or of a ``with`` block.

    Several owners may patch the same method and undo their patches in any order.
    """

    def __init__(self) -> None:
        self._patches: list[Patch] = []

    def wrap(self, target: Any, name: str, around: Callable[..., Any], follows_copies: bool = False) -> None:
        """Let ``target.name(*args)`` call ``around(original, *args)`` from now on; see :class:`Patch`."""
        # The patch looks at the target before it stands there itself.
        patch = Patch(target, name, around, follows_copies)
        # Noted before it stands there: an interrupt in between must not leave it behind.
        self._patches.append(patch)
        patch.put_on()

    def undo_on_exception(self, strategy: Any, undo: Callable[[], None]) -> None:
        """Call ``undo`` when a run fails.

        Lightning's finders put other callbacks into the Trainer while they train, so that ``Callback.on_exception`` of
        ours would not be called; that of the strategy always is.
        """

        def failed(original: Callable[..., Any], *args: Any) -> Any:
            undo()
            return original(*args)

        # The strategy belongs to one Trainer, so that nothing outlives it.
        self.wrap(strategy, "on_exception", failed)

    def undo(self) -> None:
        """Take every patch off."""
        while self._patches:
            self._patches.pop().take_off()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def is_patched(target: Any, name: str, around: Callable[..., Any]) -> bool:
    """Tell whether a patch with this ``around``, or with a partial of it, stands on the target."""
    # Patches of other owners may lie on top.
    top = vars(target).get(name)
    while isinstance(top, Patch):
        if getattr(top.around, "func", top.around) is around:
            return True
        top = top.covered
    return False


def _put(target: Any, name: str, value: Any) -> None:
    """Set or, with ``None``, delete an entry of ``__dict__``, past the ``__setattr__`` of ``nn.Module``."""
    # The dictionary of a class is read-only, and nn.Module would look for parameters to register.
    setter = type if isinstance(target, type) else object
    if value is None:
        setter.__delattr__(target, name)
    else:
        setter.__setattr__(target, name, value)

"""The type of NormSwap's norm for jsonargparse: a wrong name is told while a configuration is parsed."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lightning_norm.normalizers import resolve

Function = TypeVar("Function", bound=Callable[..., Any])


class NormName(str):
    """A key or a dotted path of a normalizer that exists.

    >>> NormName("sn")
    'sn'
    """

    def __new__(cls, name: Any) -> NormName:
        """Check the name.

        Raises:
            ValueError, TypeError: nothing has it, or it is no normalizer; the nearest names are given.
        """
        if not isinstance(name, str):
            raise TypeError(f"expected a key such as 'sn', or a dotted path, got {name!r}.")
        resolve(name)
        return super().__new__(cls, name)


def names_are_checked(function: Function) -> Function:
    """Decorate a function with an argument ``norm``, so that command lines check it; Python code is not concerned."""
    # A parser does not build what it parses, and an error while that is built is a traceback in a script of the user.
    signature = inspect.signature(function)
    checked = signature.parameters["norm"].replace(annotation=NormName | Mapping[str, Any] | None)
    function.__dict__["__signature__"] = signature.replace(
        parameters=[checked if name == "norm" else p for name, p in signature.parameters.items()]
    )
    return function


# Only command lines need it, and Lightning does without.
with contextlib.suppress(ImportError):
    from jsonargparse.typing import register_type

    register_type(NormName, serializer=str, deserializer=NormName)

"""What the callbacks say of themselves, and where they say it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from lightning_norm.callbacks.lightning_compat import rank_zero_only


class Described:
    """Mixin: ``repr`` is the call that makes an equal object, without the arguments that are at their default."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({call_text(type(self).__init__, self._arguments())})"

    def _arguments(self) -> Mapping[str, Any]:
        """Return argument -> value."""
        return vars(self)


def call_text(function: Any, values: Mapping[str, Any]) -> str:
    """Return the arguments of a call, those at their default left out.

    Args:
        function: takes the arguments.
        values: argument -> value; arguments that are missing there are left out.

    >>> call_text(lambda norm, power=2, sync=True: 0, {"norm": "sn", "power": 2, "sync": False})
    "norm='sn', sync=False"
    """
    parameters = inspect.signature(function).parameters
    return ", ".join(
        f"{name}={values[name]!r}"
        for name, parameter in parameters.items()
        if name in values and not _same(values[name], parameter.default)
    )


def _same(value: Any, default: Any) -> bool:
    """Tell whether a value is a default; what cannot be compared is not."""
    return value is default or (type(value) is type(default) and bool(value == default))


@rank_zero_only
def print_report(text: str) -> None:
    """Print a report to stdout, once for all ranks; whoever has silenced Lightning's own lines hears nothing."""
    # Lightning's log goes to stderr, and a report is what the run was asked for.
    if logging.getLogger("lightning.pytorch").isEnabledFor(logging.INFO):
        print(text, flush=True)

"""Optional dependencies: told before anything runs, with the extra to install."""

from __future__ import annotations

from importlib.util import find_spec


def missing(*modules: str) -> list[str]:
    """Return those of some top-level modules that are not installed.

    >>> missing("torch", "nobody_has_this")
    ['nobody_has_this']
    """
    # Looked for and not imported: it takes no time.
    return [name for name in modules if find_spec(name) is None]


def require(what: str, extra: str, *modules: str, otherwise: str = "") -> None:
    """Stop where something optional is not installed.

    Args:
        what: what the modules are for.
        extra: of this package, which installs them.
        modules: top-level modules.
        otherwise: what else the user can type.

    Raises:
        ModuleNotFoundError: one of the modules is not installed.
    """
    absent = missing(*modules)
    if absent:
        raise ModuleNotFoundError(
            f"not installed: {' and '.join(absent)}, for {what}. Type pip install 'lightning-norm[{extra}]'{otherwise}."
        )

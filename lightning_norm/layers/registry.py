"""Find a normalizer by what a user types: a key, a class name, a dotted path, a class, or a spec."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import nn

from lightning_norm.layers.base import Normalizer

NormSpec: TypeAlias = str | type[nn.Module] | Mapping[str, Any]


def normalizers() -> dict[str, type[Normalizer]]:
    """Return every registered normalizer by its key, the oldest method first.

    >>> list(normalizers())[0]
    'bn'
    """
    return dict(sorted(Normalizer.registry.items(), key=lambda item: item[1].paper.year if item[1].paper else 9999))


def create(norm: NormSpec, num_features: int, **arguments: Any) -> Normalizer:
    """Build a normalizer.

    Args:
        norm: a key ("sn"), a class name, a dotted path, a class, or ``{"class_path": ..., "init_args": {...}}``.
        num_features: channels.
        arguments: its other arguments; they win over ``init_args``.

    Raises:
        ValueError: nothing has that name; the nearest names are given.
        TypeError: not a normalizer, or an argument it does not take; the nearest name is given.

    >>> create("sn", 8, momentum=0.2).momentum
    0.2
    """
    cls, init_args = resolve(norm)
    return cls(num_features, **checked_arguments(cls, {**init_args, **arguments}))


def resolve(norm: NormSpec) -> tuple[type[Normalizer], dict[str, Any]]:
    """Return the class and the arguments that a spec names.

    Raises:
        ValueError: nothing has that name.
        TypeError: it is not a normalizer, or the spec has unknown entries.
    """
    if isinstance(norm, Mapping):
        unknown = set(norm) - {"class_path", "init_args"}
        if unknown or "class_path" not in norm:
            raise TypeError(
                f"a normalizer is written {{class_path: sn, init_args: {{...}}}}, got the entries "
                f"{sorted(map(str, norm))}."
            )
        cls, _ = resolve(norm["class_path"])
        return cls, dict(norm.get("init_args") or {})
    found: Any = _by_name(norm) if isinstance(norm, str) else norm
    if not (isinstance(found, type) and issubclass(found, Normalizer)):
        raise TypeError(
            f"{norm!r} is not a normalizer: expected a subclass of lightning_norm.MomentNorm, got {found!r}. "
            "examples/write_your_own.py shows one in 15 lines."
        )
    return found, {}


def arguments_of(cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of a class's ``__init__``, following ``**options`` to its bases."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if init is None:
            continue
        parameters = inspect.signature(init).parameters
        for name, parameter in parameters.items():
            if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(name, parameter)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return found


def checked_arguments(cls: type, arguments: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return arguments that a class takes, text as a number where one is expected; ``where`` precedes that error.

    Raises:
        TypeError: it takes no such argument; the nearest name is given.
        ValueError: text that is no number.
    """
    known = arguments_of(cls)
    for argument in arguments:
        if argument not in known:
            near = difflib.get_close_matches(argument, known, n=1)
            guess = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"{cls.__name__} takes no argument {argument!r}.{guess} It takes: {', '.join(sorted(known))}."
            )
    return {n: _number(v, known[n], f"{where}{cls.__name__}: {n}") for n, v in arguments.items()}


def _number(value: Any, parameter: inspect.Parameter, what: str) -> Any:
    """Return text as a number where the argument is one: YAML reads 1e-3, which has no point, as text."""
    annotation = inspect.formatannotation(parameter.annotation)
    is_float = isinstance(parameter.default, float) or re.search(r"\bfloat\b", annotation)
    if not isinstance(value, str) or not is_float or re.search(r"\bstr\b", annotation):
        return value
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"{what} must be a number, got the text {value!r}. Type it like 1.0e-3.") from error


def _by_name(name: str) -> Any:
    known = normalizers()
    by_class = {cls.__name__: cls for cls in known.values()}
    if name in known or name in by_class:
        return known.get(name) or by_class[name]
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot import the normalizer {name!r}: {error}. Check the dotted path.") from error
    lowered = {k.lower(): k for k in (*known, *by_class)}
    near = [lowered[n] for n in difflib.get_close_matches(name.lower(), lowered, n=2, cutoff=0.3)]
    hints = [f"{_key_of(n)!r} ({_class_of(n)})" for n in near]
    guess = f" Did you mean {' or '.join(dict.fromkeys(hints))}?" if hints else ""
    raise ValueError(
        f"no normalizer called {name!r}.{guess} Known: {', '.join(known)}. A class of your own: its dotted path."
    )


def _key_of(name: str) -> str:
    return next(k for k, cls in normalizers().items() if name in (k, cls.__name__))


def _class_of(name: str) -> str:
    return normalizers()[_key_of(name)].__name__

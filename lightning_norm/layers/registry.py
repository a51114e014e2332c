"""Find a normalizer by what a user types: a key, a class name, a dotted path, a class, or a spec."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import nn

from lightning_norm.layers.arguments import checked_arguments, plain_value
from lightning_norm.layers.base import MomentNorm, Normalizer

NormSpec: TypeAlias = str | type[nn.Module] | Mapping[str, Any]


def normalizers() -> dict[str, type[Normalizer]]:
    """Return every registered normalizer by its key, the oldest method first.

    >>> list(normalizers())[0]
    'bn'
    """
    # A class without a paper, such as a user's own, stands at the end.
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
    norm = plain_value(norm)
    # The form in which LightningCLI writes a class and its arguments.
    if isinstance(norm, Mapping):
        unknown = set(norm) - {"class_path", "init_args"}
        if unknown or "class_path" not in norm:
            raise TypeError(
                f"a normalizer is written {{class_path: sn, init_args: {{...}}}}, got the entries "
                f"{sorted(map(str, norm))}. What becomes of which layer goes in rules={{'layer1.*': 'sn'}}."
            )
        arguments = norm.get("init_args") or {}
        if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
            raise TypeError(f"init_args must be a mapping of names such as {{momentum: 0.2}}, got {arguments!r}.")
        return resolve(norm["class_path"])[0], dict(arguments)
    if isinstance(norm, (list, tuple, set)):
        raise TypeError(
            f"one normalizer is expected, got {norm!r}. Type rules={{'layer1.*': 'bn', '.*': 'sn'}} for several in one "
            "network, and lightning-norm compare --norms bn,sn for one training with each."
        )
    cls: Any = _by_name(norm) if isinstance(norm, str) else norm
    if isinstance(cls, Normalizer):
        name = type(cls).__name__
        raise TypeError(
            f"expected a key, a class or its path, got a layer, {norm!r}. Type {name}, and what it takes as norm_args: "
            "each layer gets the channels of the one that it replaces."
        )
    # A Normalizer that is no MomentNorm lacks most of what a swap, a report and a checkpoint ask a layer for.
    if not (isinstance(cls, type) and issubclass(cls, MomentNorm)):
        raise TypeError(
            f"{norm!r} is not a normalizer: expected a subclass of lightning_norm.MomentNorm, got {cls!r}. "
            f"{_in_place_of(cls) or 'examples/write_your_own.py shows one in 15 lines.'}"
        )
    return cls, {}


def _in_place_of(cls: Any) -> str:
    """Return which key to type for a class of torch's, ``""`` where there is none.

    >>> from torch import nn
    >>> _in_place_of(nn.BatchNorm2d), _in_place_of(nn.Linear)
    ("Type 'bn' for it.", '')
    """
    name = re.sub(r"^(Sync|Lazy)|\dd$", "", getattr(cls, "__name__", ""))
    return next((f"Type {key!r} for it." for key, ours in normalizers().items() if ours.__name__ == name), "")


def _by_name(name: str) -> Any:
    known = normalizers()
    by_class = {cls.__name__: cls for cls in known.values()}
    if name in known or name in by_class:
        return known.get(name) or by_class[name]
    if name.startswith("."):
        raise ValueError(f"{name!r} is a relative path: type the whole one, such as 'my_package{name}'.")
    if "." in name:
        # A dotted path imports its module, which may enter a class of the user's.
        module, _, attribute = name.rpartition(".")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot import the normalizer {name!r}: {error}. Check the dotted path.") from error
    # In lower case, for ``batchnorm`` and ``BatchNorm`` differ in two of nine letters.
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

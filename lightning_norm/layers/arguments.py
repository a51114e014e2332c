"""The arguments of a normalizer's ``__init__``: which there are, and errors that say what to type.

``Normalizer.__new__`` calls :func:`check_call`, so that ``SwitchableNorm(8, momentun=0.2)`` and
``create("sn", 8, momentun=0.2)`` say the same. A class declares its arguments in the signature of its ``__init__`` and
needs no checks of its own for names, nor for values out of a ``Literal``.
"""

from __future__ import annotations

import collections.abc
import decimal
import enum
import functools
import inspect
import numbers
import operator
import os
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, Literal, Union, get_args, get_origin

import torch

from lightning_norm.errors import counted, did_you_mean

TORCH_NAMES = {"num_channels": "num_features", "normalized_shape": "num_features", "elementwise_affine": "affine"}
"""Names of torch's arguments that have another name here."""

TORCH_ORDER = ("num_features", "eps", "momentum", "affine", "track_running_stats")
"""The order of torch's BatchNorm, which a user has in mind who types arguments by position."""


def arguments_of(cls: Any) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a class's ``__init__``, following ``**options`` to its bases."""
    return _arguments_of(cls)


@functools.cache
def _arguments_of(cls: type) -> Mapping[str, inspect.Parameter]:
    arguments: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if init is None:
            continue
        parameters = inspect.signature(init).parameters
        for name, parameter in parameters.items():
            if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                # A subclass's own default wins over that of its base.
                arguments.setdefault(name, parameter)
        # Without **options nothing reaches the bases.
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return types.MappingProxyType(arguments)


def check_call(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check the arguments of ``cls(*args, **kwargs)``.

    Raises:
        TypeError: too many arguments by position, or one that the class does not take; the nearest name is given.
        ValueError: a value that is not of the argument's kind, or none of those in its ``Literal``.
    """
    # Unpickling and copying call ``__new__`` without arguments.
    if not args and not kwargs:
        return
    known = arguments_of(cls)
    # A class that takes *args says itself what they are.
    if not any(p.kind is p.VAR_POSITIONAL for p in _parameters(cls)):
        positional = [p.name for p in _parameters(cls) if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(args) > len(positional):
            raise TypeError(_too_many(cls, args, positional, known))
        # From here on it does not matter how an argument was passed.
        kwargs = {**dict(zip(positional, args, strict=False)), **kwargs}
    check_names(cls, kwargs)
    for name, value in kwargs.items():
        _check_kind(cls, value, known[name])
    for name, (choices, several) in _choices(cls).items():
        if name in kwargs:
            default = known[name].default
            _check_choice(f"{cls.__name__}: {name}", kwargs[name], choices, several, f"{name}={default!r}")


def check_names(cls: type, names: Mapping[str, Any], where: str = "") -> None:
    """Check that a class has these arguments; ``where`` precedes the error.

    Raises:
        TypeError: it takes no such argument; the nearest name is given.
    """
    known = arguments_of(cls)
    for name in names:
        if name not in known:
            # Names of torch first: by their spelling alone they would not be near to ours.
            torch_name = TORCH_NAMES.get(name)
            guess = f" Did you mean {torch_name!r}?" if torch_name in known else did_you_mean(name, known)
            raise TypeError(
                f"{where}{cls.__name__} takes no argument {name!r}.{guess} It takes: {', '.join(sorted(known))}."
            )


def checked_arguments(cls: type, arguments: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return arguments that a class takes, text as a number where one is expected; ``where`` precedes that error.

    Raises:
        TypeError: it takes no such argument; the nearest name is given.
        ValueError: text that is no number.
    """
    check_names(cls, arguments, where)
    known = arguments_of(cls)
    return {n: _number(plain_value(v), known[n], f"{where}{cls.__name__}: {n}") for n, v in arguments.items()}


_PLAIN: tuple[tuple[Any, Any], ...] = (
    (bool, bool),
    (numbers.Integral, int),
    ((numbers.Real, decimal.Decimal), float),
    (str, str),
    (os.PathLike, os.fspath),
)
"""Kinds of values, the first that fits, and Python's own type of that kind."""


def plain_value(value: Any) -> Any:
    """Return numbers, text, lists and mappings of any library in Python's own types, and all else as it is.

    What a user's configuration brings, such as NumPy's and torch's scalars, enumerations, Hydra's lists, is then equal
    to what a checkpoint, a plan and YAML give back.

    >>> plain_value({"eps": decimal.Decimal("0.5"), "choices": range(2)})
    {'eps': 0.5, 'choices': [0, 1]}
    """
    if isinstance(value, enum.Enum):
        return plain_value(value.value)
    if isinstance(value, type):  # such as numpy.float32 for a dtype, which has the attributes of its numbers
        return value
    if hasattr(value, "tolist") and hasattr(value, "ndim"):  # NumPy's and torch's, and what is like them
        return plain_value(value.tolist())
    for kinds, plain in _PLAIN:
        if isinstance(value, kinds):
            return plain(value)
    if isinstance(value, Mapping):
        return {plain_value(k): plain_value(v) for k, v in value.items()}
    # Lists and sets, and what can be gone through once, such as a generator.
    if isinstance(value, (Sequence, Set, Iterator)) and not isinstance(value, (bytes, bytearray)):
        values = [plain_value(v) for v in value]
        if isinstance(value, (set, frozenset)):
            # Whose order is another one in each process, and the order of choices is that of a layer's weights.
            values.sort(key=repr)
        return tuple(values) if isinstance(value, tuple) else values
    return value


def check_count(what: str, value: Any) -> int:
    """Return a number of things as an int; ``what`` names it.

    Raises:
        ValueError: it is no whole number above 0.
    """
    count = as_int(value)
    if count is None or count < 1:
        raise ValueError(f"{what} must be a positive int, got {value!r}.")
    return count


def check_flags(who: str, **flags: Any) -> None:
    """Check values that are true or false; ``who`` precedes the error.

    Raises:
        ValueError: another value, such as the text "false", which Python takes for true.

    >>> check_flags("NormFreeze: ", affine=True)
    """
    for name, value in flags.items():
        if plain_value(value) not in (True, False):
            raise ValueError(f"{who}{name} must be True or False, got {value!r}.")


def is_at_least_zero(value: Any) -> bool:
    """Tell whether a value is a finite number >= 0, of any library; True and False are none.

    >>> is_at_least_zero(1e-5), is_at_least_zero(True), is_at_least_zero([1.0]), is_at_least_zero(1j)
    (True, False, False, False)
    """
    if isinstance(value, (bool, str)):
        return False
    try:
        return 0 <= float(value) < float("inf")
    except (TypeError, ValueError, RuntimeError):
        return False


def as_int(value: Any) -> int | None:
    """Return a whole number of any type, numpy's and a 0-dim tensor's too, as an int; ``None`` for anything else.

    >>> as_int(6), as_int(6.0), as_int(True)
    (6, None, None)
    """
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def merged_signature(cls: type) -> inspect.Signature:
    """Return the signature of a class with the arguments that its ``**options`` hand on, as keywords."""
    declared = {p.name: p for p in _parameters(cls) if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    inherited = [p for name, p in arguments_of(cls).items() if name not in declared]
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in inherited]
    return inspect.Signature([*declared.values(), *keywords])


def number_of_groups(
    who: str, num_features: int, num_groups: int | Literal["auto"], channels_per_group: int | None
) -> int:
    """Return in how many groups the channels lie.

    "auto" is the largest number up to the paper's 32 that divides the channels and leaves two or more in a group, for
    groups of one channel are instance normalization; 1 where there is none.

    Raises:
        ValueError: groups that do not divide the channels, or both a number and a size of groups.

    >>> [number_of_groups("GroupNorm", c, "auto", None) for c in (16, 24, 32, 64, 144, 1280, 7)]
    [8, 12, 16, 32, 24, 32, 1]
    >>> number_of_groups("GroupNorm", 96, "auto", 16)
    6
    """
    if channels_per_group is not None:
        if num_groups != "auto":
            raise ValueError(
                f"{who}: num_groups={num_groups!r} and channels_per_group={channels_per_group!r} say the same of a "
                "layer. Leave out one."
            )
        size = as_int(channels_per_group)
        if size is None or size < 1 or num_features % size:
            near = _nearest_divisors(num_features, channels_per_group)
            raise ValueError(
                f"{who}(channels_per_group={channels_per_group!r}) cannot split {counted(num_features, 'channel')}: "
                f"it must divide them. Divisors of {num_features} nearby: {near}. num_groups='auto' fits any number."
            )
        return num_features // size
    if num_groups == "auto":
        return max(d for d in range(1, 33) if num_features % d == 0 and (d == 1 or num_features >= 2 * d))
    number = as_int(num_groups)
    if number is None or number < 1 or num_features % number:
        near = _nearest_divisors(num_features, num_groups)
        raise ValueError(
            f"{who}(num_groups={num_groups!r}) cannot split {counted(num_features, 'channel')}: num_groups must divide "
            f"them. Divisors of {num_features} nearby: {near}. num_groups='auto' fits any number."
        )
    return number


def _nearest_divisors(number: int, wanted: Any) -> list[int]:
    """Return the divisors near to what was typed: those that one would type next."""
    fit = [d for d in range(1, number + 1) if number % d == 0]
    return sorted(sorted(fit, key=lambda d: abs(d - wanted) if isinstance(wanted, int) else d)[:4])


def settled_groups(cls: type, arguments: Mapping[str, Any], num_groups: int | None) -> dict[str, Any]:
    """Return arguments of a class with the number of groups that follows from them; ``None`` for no groups."""
    if "num_groups" not in arguments_of(cls):
        return dict(arguments)
    settled = {k: v for k, v in arguments.items() if k not in ("num_groups", "channels_per_group")}
    return settled if num_groups is None else {**settled, "num_groups": num_groups}


def check_zero_weight(layer: Any, source: Any) -> None:
    """Check that a layer with ``zero_weight`` takes over no weight from another layer.

    Raises:
        ValueError: it would, and the zero would be lost.
    """
    if getattr(layer, "zero_weight", False) and getattr(source, "weight", None) is not None:
        raise ValueError(
            f"{type(layer).__name__}: zero_weight=True would overwrite the weight that the swap moves. Build the "
            "network with its own zero-init option (torchvision: zero_init_residual=True) and leave zero_weight out."
        )


def stateless(who: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a class without running statistics.

    Raises:
        TypeError: they ask for some.
    """
    for name in ("track_running_stats", "momentum"):
        if name in options:
            raise TypeError(f"{who} keeps no running statistics: leave out {name}={options[name]!r}.")
    # The arguments exist in the base class, so that a silent default would look like an accepted value.
    return {**options, "track_running_stats": False}


def _parameters(cls: type) -> list[inspect.Parameter]:
    """Return the parameters of the ``__init__`` that a call reaches first, without ``self``."""
    init: Any = cls.__init__  # type: ignore[misc]  # of the class, not of an instance
    return list(inspect.signature(init).parameters.values())[1:]


def _too_many(cls: type, args: tuple[Any, ...], positional: list[str], known: Mapping[str, Any]) -> str:
    """Return the message for arguments by position beyond those that the class takes so."""
    # The call as it was typed, so that the reader finds it in the code.
    call = f"{cls.__name__}({', '.join(map(repr, args))})"
    # ``GroupNorm(4, 8)`` is right in torch and would be 4 channels here: it must not pass for a typing error.
    if "num_groups" in known and isinstance(args[1], int):
        return (
            f"{call} has torch's order (num_groups, num_channels); here the channels come first, and all else by name. "
            f"Type {cls.__name__}({args[1]!r}, num_groups={args[0]!r})."
        )
    order = [*positional, *(name for name in TORCH_ORDER if name in known and name not in positional)]
    named = [f"{name}={value!r}" for name, value in list(zip(order, args, strict=False))[len(positional) :]]
    typed = ", ".join([*(repr(value) for value in args[: len(positional)]), *named])
    return (
        f"{cls.__name__} takes {' and '.join(positional)} by position and all others by name, got "
        f"{call}. Type {cls.__name__}({typed}), say."
    )


@functools.cache
def _choices(cls: type) -> Mapping[str, tuple[tuple[Any, ...], bool]]:
    """Return the values that each ``Literal`` argument takes, and whether it is a list of them."""
    choices: dict[str, tuple[tuple[Any, ...], bool]] = {}
    for name, parameter in arguments_of(cls).items():
        annotation = parameter.annotation
        # Annotations are text here, for every file has ``from __future__ import annotations``.
        if isinstance(annotation, str) and "Literal" in annotation:
            owner = next(c for c in cls.__mro__ if name in inspect.signature(c.__init__).parameters)  # type: ignore[misc]
            try:
                # The text is a class's own annotation and comes from no user.
                annotation = eval(annotation, vars(sys.modules[owner.__module__]))
            except (KeyError, NameError):  # a name that exists for type checkers alone, or inside a function
                continue
        several = get_origin(annotation) is collections.abc.Sequence
        # ``Sequence[Literal[...]]`` means several of the values, ``Literal[...]`` one.
        values = _literals(get_args(annotation)[0] if several else annotation)
        if values:
            choices[name] = (values, several)
    return choices


def _literals(annotation: Any) -> tuple[Any, ...]:
    """Return the values of ``Literal[...]`` or of ``Literal[...] | None``; nothing for any other annotation.

    >>> _literals(Literal["clamp", "sigmoid"] | None)
    ('clamp', 'sigmoid', None)
    """
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) not in (Union, types.UnionType):
        return ()
    parts = [(None,) if part is type(None) else _literals(part) for part in get_args(annotation)]
    return tuple(value for part in parts for value in part) if all(parts) else ()


_KINDS: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "bool": ("True or False", (bool,)),
    "int": ("an int", (int,)),
    "float": ("a number", (int, float)),
    "Sequence": ("a list", (list, tuple)),
    "None": ("None", (type(None),)),
}
"""What an annotation names, in the words of a message, and which of Python's own types are of that kind."""


def _check_kind(cls: type, value: Any, parameter: inspect.Parameter) -> None:
    """Check that a value is of a kind that the annotation of its argument names; True is no number."""
    annotation = inspect.formatannotation(parameter.annotation).strip("'\"")  # text stands between quotes
    names = [part.strip().partition("[")[0] for part in annotation.split("|")]
    kinds = [_KINDS[name] for name in names if name in _KINDS]
    # The channels have no default: each class says itself what they are. So do scheduled values and single choices.
    if parameter.default is parameter.empty or not set(names) & {*_KINDS} - {"None"}:
        return
    words = re.findall(r"['\"](\w+)['\"]", annotation) if "Literal" in names else []
    plain = value if isinstance(value, Iterator) else plain_value(value)  # an iterator can be gone through once
    fits = isinstance(plain, tuple(t for _, types_ in kinds for t in types_)) or plain in words
    if isinstance(plain, bool) or ("bool" in names and plain in (0, 1)):
        fits = "bool" in names
    if not fits:
        expected = " or ".join([*(text for text, _ in kinds), *map(repr, words)])
        raise ValueError(
            f"{cls.__name__}: {parameter.name} must be {expected}, got {value!r}. Type "
            f"{parameter.name}={parameter.default!r}, say."
        )


def _check_choice(what: str, value: Any, choices: tuple[Any, ...], several: bool, example: str) -> None:
    if not several:
        # True equals 1 and 3.0 equals 3, and neither can stand where the other is meant.
        if not any(value == choice and type(plain_value(value)) is type(choice) for choice in choices):
            raise ValueError(f"{what} must be one of {choices}, got {value!r}. Type {example}, say.")
    elif isinstance(value, str) or any(v not in choices for v in value) or len(set(value)) < len(value):
        raise ValueError(
            f"{what} must be a list of distinct names out of {choices}, got {value!r}. Type {example}, say."
        )


def _number(value: Any, parameter: inspect.Parameter, what: str) -> Any:
    """Return text as a number where the argument is one: YAML reads 1e-3, which has no point, as text."""
    annotation = inspect.formatannotation(parameter.annotation)
    if parameter.name == "dtype" and isinstance(value, str):  # as a plan and a checkpoint hold it: "torch.float64"
        dtype = getattr(torch, value.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{what} must be a dtype, got the text {value!r}. Type it like torch.float64.")
        return dtype
    is_float = isinstance(parameter.default, float) or re.search(r"\bfloat\b", annotation)
    if not isinstance(value, str) or not is_float or re.search(r"\bstr\b", annotation):
        return value
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"{what} must be a number, got the text {value!r}. Type it like 1.0e-3.") from error

"""The arguments of a swap: the one list of them that ``swap``, ``NormSwap`` and the section ``norm:`` share."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, TypeAlias, TypeVar

from torch import nn

from lightning_norm.layers.arguments import TORCH_NAMES, arguments_of, as_int, check_flags, plain_value
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.registry import NormSpec
from lightning_norm.normalizers import resolve
from lightning_norm.ops.sync import check_group, check_sync

Pattern: TypeAlias = str | Sequence[str]
Source: TypeAlias = str | type[nn.Module] | Sequence[str | type[nn.Module]]
ResolvedNorm: TypeAlias = tuple[type[Normalizer], dict[str, Any]]
"""A normalizer's class and the arguments that the user wrote beside it."""


@dataclass(frozen=True)
class SwapOptions:
    """Which layers become what, and how they run.

    A field that is added here is an argument of :func:`lightning_norm.swap`, of :class:`lightning_norm.NormSwap` and
    of the section ``norm:`` of a configuration at once.

    Args:
        norm: a key ("sn"), a dotted path, a class, or ``{"class_path": ..., "init_args": {...}}``; may be left out
            with ``rules``.
        norm_args: arguments of ``norm``; those of a rule go in its ``init_args``.
        include: which layers; a string is a regular expression for the whole dotted name, a list holds names or their
            ends, and "last_of_block" is the last one of each residual block of a ResNet.
        exclude: which layers not; likewise.
        filter: which of them, by a function of the dotted name and the module that returns True for those to swap; in
            YAML its dotted path.
        skip_frozen: leave parts of the model whose parameters all require no gradient, such as a teacher.
        in_block: which of those that are chosen so far in each block, 0 for the first and -1 for the last, or a list. A
            block is the nearest module around a layer that holds several of them and whose class the model repeats.
        every: of those that are chosen so far, the first and then each so many, in the model's order.
        source: which kinds of layers are candidates: "BatchNorm" (the default: 1d, 2d, 3d and SyncBatchNorm),
            "LayerNorm", "GroupNorm", "InstanceNorm", "all", a class or its name, the key of a normalizer of this
            package, or a list of these.
        rules: ordered mapping from regular expression to a norm; ``None`` leaves the layer alone, the first match wins
            over ``norm``, ``include`` and ``exclude``.
        backend: "auto" for the Triton kernels on CUDA inputs that they can take and plain PyTorch elsewhere, "eager"
            for plain PyTorch everywhere, "triton" for the kernels or an error.
        compile: compile each layer's forward pass (the first pass of each input shape takes seconds).
        sync: pool statistics over the ranks of a distributed run, in training; "running" pools the running ones
            alone, those of all layers in one collective per optimizer step, and each rank normalizes by its own.
        sync_group: with which ranks: "world", "node" (those of one host) or a number of consecutive ranks.
        fuse_activation: let a layer compute the ReLU or SiLU module that follows it and serves it alone, in the pass
            that writes its output. Found in ``nn.Sequential``, and elsewhere by running the model on an example; or
            a mapping from layers to activations, as a plan holds it.

    Raises:
        ValueError: unknown norm, ``sync`` or ``sync_group``, ``norm_args`` without ``norm``, neither ``norm`` nor
            ``rules``.
        TypeError: ``rules`` or ``norm_args`` no mapping, or a norm that is no normalizer.

    >>> SwapOptions("sn").resolved_norm[0].__name__
    'SwitchableNorm'
    """

    norm: NormSpec | None = None
    norm_args: Mapping[str, Any] | None = None
    # The norm and its arguments may be given by position: the others have no order that one would remember.
    _: KW_ONLY
    include: Pattern | None = None
    exclude: Pattern | None = None
    filter: Callable[[str, nn.Module], bool] | None = None
    skip_frozen: bool = False
    in_block: int | list[int] | None = None
    every: int | None = None
    source: Source | None = None
    rules: Mapping[str, NormSpec | None] | None = None
    backend: Literal["auto", "eager", "triton"] = "auto"
    compile: bool = False
    sync: bool | str = True
    sync_group: str | int = "world"
    fuse_activation: bool | Mapping[str, str] = False

    what_to_type: ClassVar[str] = "swap needs norm='sn' (say) or rules={'layer1.*': 'sn', ...}."

    def __post_init__(self) -> None:
        self._make_plain()
        examples = {"norm_args": "{'momentum': 0.2}", "rules": "{'layer1.*': 'sn'}"}
        for name, example in examples.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(f"{name} must be a mapping such as {example}, got {value!r}.")
            for key in value or ():
                if not isinstance(key, str):
                    raise TypeError(f"{name} must have names as keys, as in {example}, got the key {key!r}.")
        # The names are looked up here, so that a wrong one is told before a model is built or a process started.
        if self.resolved_norm is None and not self.resolved_rules:
            raise ValueError(self.what_to_type)
        if self.norm is None and self.norm_args:
            raise ValueError(
                f"norm_args={dict(self.norm_args)!r} are arguments of norm, and this is a swap without norm. Put "
                "them in the rule: rules={'layer1.*': {'class_path': 'sn', 'init_args': {...}}}."
            )
        for norm in (self.resolved_norm, *self.resolved_rules.values()):
            _refuse_channels(norm)
        fused = self.fuse_activation
        if not isinstance(fused, (bool, Mapping)) or (
            isinstance(fused, Mapping) and not all(map(_is_name, [*fused, *fused.values()]))
        ):
            raise TypeError(
                f"fuse_activation must be true, false or a mapping from layers to activations such as "
                f"{{'conv1.1': 'conv1.2'}}, got {fused!r}."
            )
        check_sync(self.sync)
        check_group(self.sync_group)
        check_flags("", **{each.name: getattr(self, each.name) for each in fields(self) if each.type == "bool"})
        self._check_choice()

    def _check_choice(self) -> None:
        for name in ("include", "exclude"):
            check_pattern(name, getattr(self, name))
        if self.filter is not None and not callable(self.filter):
            raise TypeError(f"filter must be a function of a layer's name and the layer, got {self.filter!r}.")
        every = as_int(self.every)
        if self.every is not None and (every is None or every < 1):
            raise ValueError(f"every must be an int > 0: 2 for every second layer, got {self.every!r}.")
        positions = self.in_block if isinstance(self.in_block, (list, tuple)) else [self.in_block]
        if self.in_block is not None and (not positions or None in map(as_int, positions)):
            raise ValueError(
                f"in_block must be an int or a list of ints: 0 for a block's first, got {self.in_block!r}."
            )

    def _make_plain(self) -> None:
        """Turn values of other libraries, such as numpy's numbers, into Python's own types."""
        # Options come from anywhere, such as Hydra, and go into checkpoints, plans and the keys of callbacks' states.
        for each in fields(self):
            if each.metadata.get("as_it_is"):
                continue
            object.__setattr__(self, each.name, plain_value(getattr(self, each.name)))

    @functools.cached_property
    def resolved_norm(self) -> ResolvedNorm | None:
        """The class and the arguments that ``norm`` and ``norm_args`` stand for."""
        if self.norm is None:
            return None
        # norm_args win over the init_args of a spec, as arguments on the command line do over those of a file.
        cls, init_args = resolve(self.norm)
        return cls, {**init_args, **(self.norm_args or {})}

    @functools.cached_property
    def resolved_rules(self) -> dict[str, ResolvedNorm | None]:
        """The class and the arguments that each rule stands for."""
        return {pattern: None if norm is None else resolve(norm) for pattern, norm in (self.rules or {}).items()}

    @property
    def targets(self) -> set[type[Normalizer]]:
        """The classes that layers may become."""
        return {resolved[0] for resolved in (self.resolved_norm, *self.resolved_rules.values()) if resolved is not None}


def check_pattern(what: str, pattern: Any) -> Pattern | None:
    """Return what is to choose layers by their names in plain types; ``what`` names it.

    Raises:
        TypeError: it is neither a text nor a list of texts.
    """
    pattern = plain_value(pattern)
    several = isinstance(pattern, (list, tuple))
    for entry in pattern if several else [] if pattern is None else [pattern]:
        if not isinstance(entry, str):
            text = str(entry.pattern) if isinstance(entry, re.Pattern) else str(entry)
            remedy = f" Type {[text] if several else text!r}." if isinstance(entry, (re.Pattern, int)) else ""
            raise TypeError(f"{what} must be a regular expression or a list of names, as text, got {entry!r}.{remedy}")
    chosen: Pattern | None = pattern
    return chosen


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _refuse_channels(norm: ResolvedNorm | None) -> None:
    """Refuse a number of channels, under any of its names: it is that of the layer that is replaced."""
    cls, arguments = norm or (None, {})
    for name in arguments:
        if cls is not None and TORCH_NAMES.get(name, name) == "num_features":
            raise TypeError(
                f"{cls.__name__}: {name}={arguments[name]!r} is that of each layer that is replaced. Leave it out; to "
                "build a single layer, type lightning_norm.create(...)."
            )


Arguments = ParamSpec("Arguments")
First = TypeVar("First")
Options = TypeVar("Options", bound=SwapOptions)
Result = TypeVar("Result")


def takes_options(
    options_class: Callable[Arguments, Options],
) -> Callable[[Callable[[First, Options], Result]], Callable[Concatenate[First, Arguments], Result]]:
    """Decorate ``function(first, options)`` so that it is called with the fields of ``options_class`` as arguments.

    Its signature, as type checkers, ``inspect``, ``help`` and jsonargparse see it, and the lines under ``options`` in
    its docstring are those of the dataclass.
    """

    def decorate(function: Callable[[First, Options], Result]) -> Callable[Concatenate[First, Arguments], Result]:
        # The first argument is self or the model. All others are the fields of the dataclass.
        first = next(iter(inspect.signature(function).parameters))
        signature = _signature(options_class, first, typing.get_type_hints(function))

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Result:
            # The signature is bound here, so that a misspelt argument is told with the name of the function called.
            try:
                arguments = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                _refuse_arguments_of_norm(function.__qualname__, args, kwargs, signature)
                names = ", ".join(list(signature.parameters)[1:])
                raise TypeError(f"{function.__qualname__}: {error}. It takes {names}.") from None
            return function(arguments.pop(first), options_class(**arguments))  # type: ignore[call-arg]  # a TypeError tells

        # inspect.signature reads this attribute first, and through it help() and jsonargparse.
        wrapper.__dict__["__signature__"] = signature
        wrapper.__doc__ = with_fields(function.__doc__, options_class)
        return wrapper

    return decorate


def _refuse_arguments_of_norm(
    called: str, args: Sequence[Any], kwargs: Mapping[str, Any], signature: inspect.Signature
) -> None:
    """Tell where arguments of the normalizer go, if some stand among those of a swap, as in ``create``.

    Args:
        called: the function, for the error.
        args: its arguments by position; the second one is the norm.
        kwargs: its other arguments.
        signature: of the function.

    Raises:
        TypeError: all arguments that the function does not take are the normalizer's.
    """
    norm = kwargs.get("norm", args[1] if len(args) > 1 else None)
    strange = {name: value for name, value in kwargs.items() if name not in signature.parameters}
    if not strange or norm is None:
        return
    cls, _ = resolve(norm)
    if strange.keys() <= arguments_of(cls).keys():
        raise TypeError(f"{called}: what {cls.__name__} takes goes in one argument: type norm_args={strange!r}.")


def _signature(options_class: Any, first: str, hints: Mapping[str, Any]) -> inspect.Signature:
    # The annotations are resolved here: as strings they would be looked up in the module of whoever is decorated.
    types = typing.get_type_hints(options_class)
    fields = [p.replace(annotation=types[name]) for name, p in inspect.signature(options_class).parameters.items()]
    one = inspect.Parameter(first, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hints.get(first, Any))
    return inspect.Signature([one, *fields], return_annotation=hints.get("return", Any))


def with_fields(doc: str | None, options_class: Any) -> str | None:
    """Return a docstring in which the entry ``options: ...`` is replaced by one entry for each field.

    Args:
        doc: of a function or class; ``None`` under ``python -OO``.
        options_class: the dataclass; its docstring and its bases' describe the fields under ``Args:``.
    """
    entry = re.search(r"^( *)options: .*$", doc or "", re.MULTILINE)
    if doc is None or entry is None:
        return doc
    # A derived dataclass describes its own fields only, behind those of its bases, as they come in the signature.
    described = [cls.__doc__ for cls in reversed(options_class.__mro__) if is_dataclass(cls)]
    sections = [inspect.cleandoc(text or "").partition("Args:\n")[2].partition("\n\n")[0] for text in described]
    fields = textwrap.indent(textwrap.dedent("\n".join(sections)), entry[1])
    return doc.replace(entry[0], fields, 1)

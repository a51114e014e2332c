"""Files of the papers' authors: swap a network as such a file needs it and load it, or rewrite the file as ours."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_norm.errors import CheckpointError, PublishedFileWarning, counted
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.published_files import PublishedEntries, PublishedLayer, by_prefix
from lightning_norm.layers.registry import NormSpec
from lightning_norm.layers.state import published_keys
from lightning_norm.layers.swap_record import MANIFEST_KEY
from lightning_norm.normalizers import normalizers, resolve
from lightning_norm.surgery.checkpoint_files import File, read_checkpoint, take_out
from lightning_norm.surgery.convert import unchanged_on_error
from lightning_norm.surgery.manifest import manifest_of
from lightning_norm.surgery.options import SwapOptions
from lightning_norm.surgery.report import SwapReport
from lightning_norm.surgery.swap import prepare_swap
from lightning_norm.surgery.walk import modules_by_name, rename_for_wrappers
from lightning_norm.surgery.whole import num_channels_of

WEIGHTS = ("state_dict", "model", "model_state_dict", "net")
"""Entries under which the authors' training scripts keep the weights."""


@dataclass(frozen=True)
class PublishedFile:
    """What :func:`read_published` found.

    Args:
        path: of the file, for messages.
        cls: the normalizer.
        chosen: arguments that the user typed.
        layers: name -> layer.
        others: entries of no such layer, under their names.
    """

    path: str
    cls: type[Normalizer]
    chosen: dict[str, Any]
    layers: dict[str, PublishedLayer]
    others: dict[str, Tensor]

    def arguments(self, layer: PublishedLayer) -> dict[str, Any]:
        """Return the arguments of a layer: those that the weights need, and over them what the user typed."""
        return {**layer.arguments, **self.chosen}


def load_published(
    model: nn.Module, path: File, norm: NormSpec, *, rename: Mapping[str, str] | None = None, strict: bool = True
) -> SwapReport:
    """Swap the layers that a file of a paper's authors holds, with the arguments that its weights need, and load it.

    The file is read with ``weights_only=True``. Evaluation is then what the authors' code computes. Names of the
    authors' ResNets become torchvision's (``sn1``, ``bnet3``: ``bn1``, ``bn3``), and a ``module.`` before all names is
    dropped. If anything fails, the model is as it was.

    Args:
        model: the network, with BatchNorm where the file has the layers.
        path: the file: a ``state_dict``, or a checkpoint that holds one.
        norm: "sn", "bnet", "rbn", "bcn", "asr", "afn" or "cn", with ``{"class_path": ..., "init_args": {...}}`` where
            arguments are to be others than those that the weights need, or are in no file (the priors of cn).
        rename: regular expression -> replacement, for names of the file that the model has otherwise.
        strict: every entry of the file must be in the model, and the reverse.

    Returns:
        The report of the swap; ``undo()`` puts BatchNorm back, with the weights that both have.

    Raises:
        CheckpointError: the file cannot be read, is damaged, holds no such layer or does not fit; an argument is in no
            file and must be typed.
        FileNotFoundError: the file does not exist.
        TypeError: an argument that the normalizer does not take.
        ValueError: an unknown norm, or an argument out of range.

    >>> import tempfile, torch
    >>> names = {"weight": (1, 8, 1, 1), "bias": (1, 8, 1, 1), "mean_weight": (3,), "var_weight": (3,)}
    >>> state = {f"sn1.{name}": torch.ones(shape) for name, shape in names.items()}
    >>> state |= {f"sn1.running_{name}": torch.ones(1, 8, 1) for name in ("mean", "var")}
    >>> model = nn.Sequential()
    >>> model.add_module("bn1", nn.BatchNorm2d(8))
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     torch.save(state, file.name)
    ...     _ = load_published(model, file.name, "sn")
    >>> model.bn1.correction
    1
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_published expects a torch.nn.Module, got {type(model).__name__}.")
    modules = modules_by_name(model)
    file = read_published(path, norm, rename, modules)
    # All that can be wrong with names and channels is told before the first layer is replaced.
    _check_places(file, model, modules)
    _tell(file, model)
    report = _swap(file, model, modules)
    try:
        _load(file, model, strict)
    except CheckpointError:
        # The layers are in place by now; the way back is that of any swap.
        report.undo()
        raise
    return report


def convert_published(
    path: File, norm: NormSpec, *, rename: Mapping[str, str] | None = None, prefix: str = ""
) -> tuple[dict[str, Any], SwapReport]:
    """Return a file of a paper's authors as a checkpoint of this package, which says itself what was swapped.

    Args:
        path: the file.
        norm: as for :func:`load_published`.
        rename: likewise.
        prefix: what comes before all names, such as "net." for a LightningModule that holds the network as ``net``.

    Returns:
        ``{"state_dict": ..., "lightning_norm": ...}``, and the report of the swap that it stands for.

    Raises:
        CheckpointError: as for :func:`load_published`.

    >>> import tempfile, torch
    >>> names = {"weight": (1, 8, 1, 1), "bias": (1, 8, 1, 1), "mean_weight": (3,), "var_weight": (3,)}
    >>> state = {f"sn1.{name}": torch.ones(shape) for name, shape in names.items()}
    >>> state |= {f"sn1.running_{name}": torch.ones(1, 8, 1) for name in ("mean", "var")}
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     torch.save(state, file.name)
    ...     checkpoint, report = convert_published(file.name, "sn", prefix="net.")
    >>> checkpoint["state_dict"]["net.bn1.weight"].shape, report.layers[0].norm["init_args"]["correction"]
    (torch.Size([8]), 1)
    """
    file = read_published(path, norm, rename)
    prefix = prefix and prefix.removesuffix(".") + "."
    # A network of these layers and nothing else goes the way that a user's network goes.
    skeleton = nn.Module()
    for name, layer in file.layers.items():
        *parents, last = f"{prefix}{name}".split(".")
        parent = skeleton
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        # In the precision of the file, which the swap keeps.
        dtype = next(t.dtype for t in layer.tensors.values() if t.is_floating_point())
        parent.add_module(last, getattr(nn, layer.source)(layer.num_features, dtype=dtype))
    layers = {f"{prefix}{name}": layer for name, layer in file.layers.items()}
    renamed = PublishedFile(file.path, file.cls, file.chosen, layers, {})
    _tell(renamed, skeleton)
    report = _swap(renamed, skeleton, modules_by_name(skeleton))
    _load(renamed, skeleton, True)
    state = {**{f"{prefix}{name}": t for name, t in file.others.items()}, **skeleton.state_dict()}
    return {"state_dict": state, MANIFEST_KEY: manifest_of(skeleton)}, report


def read_published(
    path: File, norm: NormSpec, rename: Mapping[str, str] | None = None, names: Collection[str] = ()
) -> PublishedFile:
    """Read a file of a paper's authors.

    Args:
        path: the file.
        norm: the normalizer and its arguments.
        rename: regular expression -> replacement.
        names: of the modules of the model, which keep their names whatever ``published_names`` says.

    Raises:
        CheckpointError: as for :func:`load_published`.
    """
    cls, chosen = resolve(norm)
    where = repr(str(path))
    try:
        content = read_checkpoint(path, entries=WEIGHTS)
    except CheckpointError as error:
        # There is no argument for code in the file, which need be run once and never again.
        way = "take its weights out: torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pth')"
        raise CheckpointError(str(error).replace("pass weights_only=False", way)) from error
    if MANIFEST_KEY in content:
        raise CheckpointError(
            f"{where} was written by lightning_norm and not by the authors' code: load it with load_from_checkpoint, "
            "or NormSwap(plan=...) and ckpt_path."
        )
    state = _renamed(content["state_dict"], rename or {}, where, take_out(path, content))
    layers, others = _layers_of(cls, _as_in_torchvision(cls, state, names), where)
    if not layers:
        raise CheckpointError(f"{where} holds no layer as the authors' code of {cls.key!r} writes it{_instead(state)}.")
    for name, layer in layers.items():
        if lacking := {n: v for n, v in layer.ask.items() if n not in chosen}:
            raise CheckpointError(
                f"{where} holds {name!r} of {cls.key!r} without {', '.join(lacking)}, a constant of the authors' code "
                f"that its weights need. Type norm={{'class_path': {cls.key!r}, 'init_args': {lacking!r}}} with the "
                "numbers that it was trained with; these are what the code takes by default."
            )
    return PublishedFile(where, cls, chosen, layers, others)


def _renamed(state: Mapping[str, Any], rename: Mapping[str, str], where: str, hint: str) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    # As DataParallel saves them, with which most of the authors have trained.
    wrapped = all(name.startswith("module.") for name in state)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{where}: the entry {name!r} is {type(value).__name__} and no tensor.{hint}")
        new = name.removeprefix("module.") if wrapped else name
        for pattern, replacement in rename.items():
            try:
                new = re.sub(pattern, replacement, new)
            except re.error as error:
                raise ValueError(
                    f"rename: {pattern!r} -> {replacement!r} is no regular expression: {error}."
                ) from error
        if new in named:
            raise CheckpointError(f"{where}: rename gives two entries the name {new!r}.")
        named[new] = value
    return named


def _as_in_torchvision(cls: type[Normalizer], state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Rename layers of the authors' networks, but for those that the model has under the same name."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        new = name
        for pattern, replacement in cls.published_names.layers.items():
            match = re.search(pattern, new)
            if match and new[: match.end()] not in names:
                new = new[: match.start()] + match.expand(replacement) + new[match.end() :]
        # Where the new name is taken the old one stays, and the message about it is that of a name which does not fit.
        renamed[name if new in state and new != name else new] = value
    return renamed


def _layers_of(
    cls: type[Normalizer], state: Mapping[str, Tensor], where: str
) -> tuple[dict[str, PublishedLayer], dict[str, Tensor]]:
    layers: dict[str, PublishedLayer] = {}
    others = dict(state)
    for prefix, below in by_prefix(state).items():
        entries = PublishedEntries(below)
        try:
            layer = cls.read_published(entries)
        except CheckpointError as error:
            raise CheckpointError(
                f"{where}, layer {prefix or 'without a name'!r}, is not as the authors' code of {cls.key!r} writes it: "
                f"{error}."
            ) from error
        if layer is None:
            continue
        if not prefix:
            raise CheckpointError(f"{where} holds one layer by itself: type rename={{'^': 'NAME.'}} with its name.")
        # A tensor that is left over says that the authors' layer computes more than is known here.
        if unread := entries.unread():
            raise CheckpointError(
                f"{where}, layer {prefix!r}, holds {', '.join(unread)}, which the authors' code of {cls.key!r} does "
                "not write: it is of another version or another layer."
            )
        if damage := _damage(layer.tensors):
            raise CheckpointError(
                f"{where}, layer {prefix!r}: {damage}, and no network evaluates with that. Ask for another file, or "
                "load an earlier one of the same training."
            )
        layers[prefix] = layer
        for name in below:
            del others[f"{prefix}.{name}"]
    return layers, others


def _damage(tensors: Mapping[str, Tensor]) -> str:
    """Return what is wrong with the running statistics of a layer; "" for nothing."""
    for name in ("running_mean", "running_var"):
        values = tensors.get(name)
        if values is not None and not values.isfinite().all():
            return f"{name} holds NaN or infinity"
        if values is not None and name == "running_var" and (values < 0).any():
            return f"{name} holds values below 0"
    return ""


def _instead(state: Mapping[str, Any]) -> str:
    keys = published_keys(normalizers(), state)
    if keys:
        return f"; type norm={' or '.join(map(repr, keys))}, whose layers it holds"
    return f"; its entries: {', '.join([*state][:3])}, ..."


def _check_places(file: PublishedFile, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Check that the model has each layer, of the right number of channels."""
    for name, layer in file.layers.items():
        if name not in modules:
            raise CheckpointError(_no_place(file, name, model, modules))
        channels, there = num_channels_of(modules[name]), type(modules[name]).__name__
        if channels is None:
            raise CheckpointError(_no_norm(file, name, model, there))
        if channels != layer.num_features:
            raise CheckpointError(
                f"{file.path} has {counted(layer.num_features, 'channel')} at {name!r}, and this "
                f"{type(model).__name__} has a {there} of {channels} there. Build the network that the file is of."
            )


def _no_place(file: PublishedFile, name: str, model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    who = f"{file.path} holds {name!r}, and this {type(model).__name__} has no layer of that name"
    inner = [full.removesuffix(f".{name}") for full in modules if full.endswith(f".{name}")]
    # The usual mistakes: the file is of a part of the model that was passed, or the model is a part of the file's.
    for prefix in inner:
        if all(f"{prefix}.{each}" in modules for each in file.layers):
            return f"{who} but for {f'{prefix}.{name}'!r}: type load_published(model.{prefix}, ...)."
    tail = name.partition(".")[2]
    if tail and all(each.partition(".")[2] in modules for each in file.layers):
        head = re.escape(f"{name.partition('.')[0]}.")
        return f"{who} but for {tail!r}: type rename={{{'^' + head!r}: ''}}."
    near = difflib.get_close_matches(name, [n for n in modules if n], n=1, cutoff=0.0)
    hint = f" The nearest name is {near[0]!r}." if near else ""
    return f"{who}.{hint} Type rename={{'PATTERN': 'REPLACEMENT'}}, a regular expression over the names of the file."


def _no_norm(file: PublishedFile, name: str, model: nn.Module, there: str) -> str:
    return (
        f"{file.path} holds {name!r} of {file.cls.key!r}, and this {type(model).__name__} has a {there} there, which a "
        "swap leaves alone. Build the network with BatchNorm."
    )


def _swap(file: PublishedFile, model: nn.Module, modules: Mapping[str, nn.Module]) -> SwapReport:
    rules = {
        re.escape(name): {"class_path": file.cls, "init_args": file.arguments(layer)}
        for name, layer in file.layers.items()
    }
    sources = dict.fromkeys(type(modules[name]).__name__ for name in file.layers)
    report, _, _ = prepare_swap(model, SwapOptions(rules=rules, source=list(sources)))
    swapped = {name for row in report.layers for name in (row.name, *row.also)}
    if left := [name for name in file.layers if name not in swapped]:
        report.commit(False)
        raise CheckpointError(_no_norm(file, left[0], model, type(modules[left[0]]).__name__))
    report.commit()
    return report


def _load(file: PublishedFile, model: nn.Module, strict: bool) -> None:
    modules = modules_by_name(model)
    state = dict(file.others)
    for name, published in file.layers.items():
        layer = modules[name]
        # What an argument has switched off is registered as None, and what follows from arguments is in no file.
        slots = {**layer._parameters, **layer._buffers}
        tensors = {n: t for n, t in published.tensors.items() if slots.get(n) is not None or n not in slots}
        unsaved = layer._non_persistent_buffers_set
        # What the file does not hold, such as a counter of batches, keeps its start.
        start = {n: t for n, t in layer.named_buffers(recurse=False) if n not in unsaved}
        state |= {f"{name}.{n}": t for n, t in {**start, **tensors}.items()}
    try:
        with unchanged_on_error(list(model.modules())):
            model.load_state_dict(rename_for_wrappers(model, state), strict=strict)
    except RuntimeError as error:
        beyond = "Unexpected key" in str(error) or "Missing key" in str(error)
        hint = " Type strict=False if the network may lack what the file has, or have more." if beyond else ""
        raise CheckpointError(
            f"the weights of {file.path} do not fit this {type(model).__name__}: {error}{hint}"
        ) from error
    for name, published in file.layers.items():
        for parameter in published.fixed:
            modules[name].get_parameter(parameter).requires_grad_(False)


def _tell(file: PublishedFile, model: nn.Module) -> None:
    """Warn of what makes the network compute something else than the authors' code."""
    first = next(iter(file.layers.values()))
    other = {n: v for n, v in file.chosen.items() if n in first.arguments and _plain(v) != _plain(first.arguments[n])}
    if other:
        needed = {name: first.arguments[name] for name in other}
        warnings.warn(
            f"{file.path} was trained with {needed!r}, and {other!r} was typed: {file.cls.__name__} computes another "
            "function than the authors' code.",
            PublishedFileWarning,
            stacklevel=3,
        )
    # A difference of the networks themselves, which no weight shows.
    pool = getattr(model, "maxpool", None)
    if first.arguments.get("sparse") and "bn1" in file.layers and getattr(pool, "padding", 0) == 1:
        warnings.warn(
            f"{file.path} is of sparse layers, whose authors' ResNets pool without padding where torchvision's pad: "
            "type model.maxpool = torch.nn.MaxPool2d(3, 2, ceil_mode=True) if it is one of these.",
            PublishedFileWarning,
            stacklevel=3,
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

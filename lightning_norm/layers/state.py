"""Loading: a plain BatchNorm's checkpoint, a published one, and an answer to that of another normalizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_norm.errors import CheckpointError, OtherFileWarning, PublishedFileWarning
from lightning_norm.layers.published_files import PublishedEntries, PublishedLayer, PublishedNames, by_prefix
from lightning_norm.layers.running_stats import RunningStats
from lightning_norm.layers.scheduled import ScheduledValues, scheduled_value
from lightning_norm.layers.translation import Translation
from lightning_norm.ops.layout import at_least_float32
from lightning_norm.ops.torch_private import loads_strictly

KIND_KEY = "lightning_norm_kind"
"""The entry of a layer's metadata in a ``state_dict`` that says which function its tensors belong to."""

BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Loading(ScheduledValues, RunningStats):
    """Mixin: what ``load_state_dict`` accepts.

    * Its own file, tensor for tensor, with torch's meaning of ``strict``.
    * That of a plain BatchNorm: what it lacks keeps its starting value, what the layer holds in another form is
      translated, and running statistics that the layer does not keep are passed over.
    * That of the paper's authors where the tensors mean the same, (1, C, 1, 1) for (C,) included; it warns if the
      arguments with which the file was written make another function.
    * A file of another normalizer, or of the authors' code in a form that does not load, is refused with the swap or
      the arguments to type.

    >>> from torch import nn
    >>> from lightning_norm import SwitchableNorm
    >>> SwitchableNorm(4).load_state_dict(nn.BatchNorm2d(4).state_dict())
    <All keys matched successfully>
    """

    registry: ClassVar[dict[str, Any]]
    extra_parameters: ClassVar[dict[str, str]]
    key: ClassVar[str]
    _has_rows: ClassVar[bool] = False
    """Weight and bias are (K, C)."""

    @property
    def _translations(self) -> tuple[Translation, ...]:
        """Tensors of a BatchNorm that this layer holds in another form, under a name of its own.

        Each says how it is read from a checkpoint, taken in a swap and given back. ``weight`` becomes the centre tap of
        a kernel in BNET, ``running_var`` a standard deviation in DiminishingBatchNorm.
        """
        return ()

    evaluation_arguments: ClassVar[tuple[str, ...]] = ()
    """A class's own arguments that evaluation depends on, and that no tensor of a file shows."""

    def _kind_of_evaluation(self) -> dict[str, Any]:
        """Return what the same tensors evaluate by, in plain types: the method, and the arguments that no tensor shows.

        >>> from lightning_norm import create
        >>> create("gn", 8, num_groups=4)._kind_of_evaluation(), create("ln", 8)._kind_of_evaluation()
        ({'key': 'gn', 'num_groups': 4}, {'key': 'gn', 'num_groups': 1})
        """
        values = {name: getattr(self, name) for name in self.evaluation_arguments}
        plain = {name: list(v) if isinstance(v, (list, tuple)) else v for name, v in values.items()}
        return {"key": self.key or type(self).__name__, **plain}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A plain dictionary has no metadata, and then nothing is compared.
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata.setdefault(prefix[:-1], {})[KIND_KEY] = self._kind_of_evaluation()

    published_names: ClassVar[PublishedNames] = PublishedNames()

    @classmethod
    def read_published(cls, entries: PublishedEntries) -> PublishedLayer | None:
        """Return what the authors' file says of a layer, in this class's words; ``None`` if it is none of theirs.

        Raises:
            CheckpointError: it is theirs, and an entry is missing or wrong.
        """
        return None

    def _arguments_that_fit(self, name: str, tensor: Tensor) -> str:
        """Return what to type so that a checkpoint's tensor, of another shape than the layer's, fits; "" if unknown.

        Args:
            name: of the tensor.
            tensor: as it is in the checkpoint.
        """
        return ""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Bring this layer's part of a checkpoint into the layer's own form, and let torch load it.

        Raises:
            CheckpointError: the file is of the authors' code, in a form that does not load.
            RuntimeError: it is of another normalizer, or a tensor has a shape that other arguments would have made.
        """
        loaded = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        # First, before a tensor of another method could pass for one of this layer's.
        _refuse_published(self, loaded, prefix)
        _refuse_another(self, loaded, prefix)
        published = published_layer(type(self), loaded)
        theirs = {k: v for k, v in (published.arguments if published else {}).items() if getattr(self, k) != v}
        self._translate(state_dict, prefix, loads_strictly())
        for name in BATCH_NORM_BUFFERS:
            if getattr(self, name, None) is None:
                # A method without running statistics starts from a BatchNorm's weight and bias alone.
                state_dict.pop(prefix + name, None)
        strict = loads_strictly()
        if wrong := self._load_scheduled(state_dict, prefix, strict):
            args[4].append(f"{prefix[:-1] or 'this layer'}: {wrong}")
        counters = [name for name in self.extra_buffers.counters if getattr(self, name) is not None]
        # A BatchNorm's file has no counters; one that has some and lacks others is damaged, and torch says so.
        if strict and not any(prefix + name in state_dict for name in counters):
            state_dict.update({prefix + name: torch.tensor(0) for name in counters})
        for name, value in _saved_tensors(self).items():
            old = state_dict.get(prefix + name)
            # torch would call it missing: what a BatchNorm does not have keeps its starting value. With strict=False
            # what stays as it is does count as missing, but for the counter that torch fills in itself.
            if old is None and (strict or name == "num_batches_tracked") and _keeps_start(self, name, loaded):
                state_dict[prefix + name] = value.detach().clone()
            elif isinstance(old, Tensor) and old.shape != value.shape:
                _refuse_shape(self, name, old, value, prefix, theirs)
                # Published checkpoints hold (1, C, 1, 1) where this package has (C,).
                if old.numel() == value.numel():
                    state_dict[prefix + name] = old.reshape(value.shape)
        # torch passes local_metadata, strict and then the list of missing keys.
        missing: list[str] = args[2]
        before = len(missing)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        restore_precision(self)
        if not theirs and len(missing) == before:  # what is missing is told by torch
            _tell_of_another_kind(self, args[0], args[-1], prefix)
        if theirs:
            _warn_once_per_load(
                args[-1],
                f"the file is of the authors' code of {self.key!r}, by its shapes (first layer: "
                f"{prefix[:-1] or 'this'}), and with the arguments that it has {type(self).__name__} computes another "
                f"function. {convert_first(self.key)} Or type norm_args={theirs!r} before loading.",
            )
        # What is missing may mean that the file is another method's, and then that is the better message.
        others = likely(self.registry, loaded)
        made = {prefix + t.target for t in self._translations if t.target in self.extra_parameters}
        if len(missing) > before and not made & set(missing) and loaded and self.key not in [cls.key for cls in others]:
            last = missing[-1] = MissingKey(missing[-1])
            last.remark = f" ({_another(self, loaded, prefix, others)})"

    def _translate(self, state_dict: dict[str, Any], prefix: str, strict: bool = True) -> None:
        """Write what came in another form as this class holds it."""
        for translation in self._translations:
            translation.load(state_dict, prefix)


def _refuse_shape(
    layer: Loading, name: str, loaded: Tensor, value: Tensor, prefix: str, theirs: Mapping[str, Any]
) -> None:
    """Refuse a tensor of another shape where it is known which arguments give the layer that shape."""
    advice = layer._arguments_that_fit(name, loaded)
    if advice and theirs:
        arguments = ", ".join(f"{argument}={wanted!r}" for argument, wanted in theirs.items())
        advice = f"{arguments}, as the authors' code has it, whose file this is. {convert_first(layer.key)}"
    if advice:
        raise RuntimeError(
            f"{prefix[:-1] or 'this layer'}: the checkpoint has a {name} {tuple(loaded.shape)}, this "
            f"{type(layer).__name__} one of {tuple(value.shape)}. Type {advice.removesuffix('.')}."
        )


def _saved_tensors(layer: Loading) -> dict[str, Tensor]:
    """Return what ``state_dict`` saves of this layer alone; ``state_dict()`` itself would run hooks."""
    saved = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    return {name: t for name, t in saved.items() if name not in layer._non_persistent_buffers_set}


def _keeps_start(layer: Loading, name: str, loaded: Mapping[str, Any]) -> bool:
    """Tell whether a tensor that a plain BatchNorm's checkpoint lacks keeps its starting value."""
    if name == "num_batches_tracked":
        return True
    if name not in layer.extra_parameters or loaded.keys() & layer.extra_parameters.keys():
        return False
    # A checkpoint with a bias and without the weight of which this parameter is made is no BatchNorm's.
    return "bias" not in loaded or not any(t.target == name for t in layer._translations)


_last_load: tuple[object, set[str]] = (None, set())


def _tell_of_another_kind(layer: Loading, metadata: Mapping[str, Any], messages: object, prefix: str) -> None:
    """Warn where the tensors came from a layer that computes something else of them, as their names cannot tell."""
    saved, mine = metadata.get(KIND_KEY), layer._kind_of_evaluation()
    # A BatchNorm's file is taken by every method, as a swap takes the layer itself.
    if not isinstance(saved, dict) or saved.get("key") == "bn":
        return
    # A user's subclass without a key of its own takes the file of its method.
    if not layer.key and saved.get("key") in [vars(cls).get("key") for cls in type(layer).__mro__]:
        mine = {**mine, "key": saved["key"]}
    if saved == mine:
        return
    theirs, ours = (
        ", ".join([repr(kind.get("key")), *(f"{k}={v!r}" for k, v in kind.items() if k != "key" and other.get(k) != v)])
        for kind, other in ((saved, mine), (mine, saved))
    )
    _warn_once_per_load(
        messages,
        f"the file's layers are of {theirs} and these of {ours} (first layer: {prefix[:-1] or 'this'}): the tensors "
        "have the same names, and evaluation is another one. Build or swap the layers as the file says before loading.",
        OtherFileWarning,
    )


def _warn_once_per_load(messages: object, text: str, category: type[Warning] = PublishedFileWarning) -> None:
    """Warn, but not for each of the layers that one ``load_state_dict`` fills: they share its list of messages."""
    global _last_load
    if _last_load[0] is not messages:
        _last_load = (messages, set())
    kind = text.partition(" (first layer")[0]
    if kind not in _last_load[1]:
        _last_load[1].add(kind)
        warnings.warn(text, category, stacklevel=5)


def restore_precision(layer: Any) -> None:
    """After ``load_state_dict(assign=True)``: statistics in float32 at least, nothing left on the meta device."""
    for name in (*layer.running_names, *layer.extra_buffers.float32):
        stat = getattr(layer, name, None)
        if stat is not None:
            setattr(layer, name, stat.to(at_least_float32(stat.dtype)))
    # A layer that was built on the meta device has its device from what was loaded.
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    device = next((t.device for t in tensors if not t.is_meta), None)
    for name, t in list(layer.named_buffers(recurse=False)) if device is not None else ():
        # Buffers that no file holds would stay on the meta device. torch has no public way to ask for them.
        if t.is_meta and name in layer._non_persistent_buffers_set:
            setattr(layer, name, torch.full_like(t, scheduled_value(layer, name[1:]) or 0, device=device))


class MissingKey(str):
    """A missing key to whoever reads it, and in torch's message for ``strict=True`` also a remark."""

    remark = ""

    def __format__(self, spec: str) -> str:
        return f"{super().__format__(spec)}{self.remark}"


def marks(cls: Any) -> set[str]:
    """Return the names in a normalizer's checkpoint that a BatchNorm's has not."""
    return {*cls.extra_parameters, *cls.extra_buffers.counters, *cls.extra_buffers.float32}


def has_rows(loaded: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint has a weight or a bias per context.

    >>> has_rows({"weight": torch.ones(2, 8)}), has_rows({"weight": torch.ones(8)})
    (True, False)
    """
    affine = (loaded.get("weight"), loaded.get("bias"))
    return any(isinstance(t, Tensor) and t.dim() == 2 and t.shape[0] > 1 for t in affine)


def likely(registry: Mapping[str, Any], loaded: Mapping[str, Any]) -> list[Any]:
    """Return the normalizers that a layer's checkpoint is most likely of; several where it cannot be told.

    What counts, in this order: a row per context or not, names that only this class has, few of them missing, and
    running statistics where batches are normalized by them.

    Args:
        registry: key -> class.
        loaded: the layer's part of a checkpoint, name -> tensor.
    """
    tracked = any(name.startswith("running_") for name in loaded)

    def agreement(cls: Any) -> tuple[bool, int, int, bool]:
        expected = marks(cls)
        return (
            cls._has_rows == has_rows(loaded),
            len(expected & loaded.keys()),
            -len(expected - loaded.keys()),
            cls.train_uses_batch_stats == tracked,
        )

    best = max(agreement(cls) for cls in registry.values())
    return [cls for cls in registry.values() if agreement(cls) == best]


def _refuse_published(layer: Loading, loaded: Mapping[str, Any], prefix: str) -> None:
    """Refuse a file of the authors' code whose tensors are others than those held here, and say whose it is."""
    strange = [name for name in loaded if name not in _saved_tensors(layer)]
    counts = {cls: [n for n in strange if _begins(n, cls.published_names.tensors)] for cls in layer.registry.values()}
    most = max(map(len, counts.values()), default=0)
    if not most:
        return
    owners = [cls for cls, names in counts.items() if len(names) == most]
    if type(layer) in owners:
        owners = [type(layer), *(cls for cls in owners if cls is not type(layer))]
    keys = " or ".join(repr(cls.key) for cls in owners)
    came = _came(counts[owners[0]], loaded)
    readable = published_layer(owners[0], loaded) is not None
    remedy = convert_first(owners[0].key) if readable else "Entries are missing or wrong, or it is another layer."
    raise CheckpointError(
        f"{prefix[:-1] or 'this layer'} is {type(layer).__name__}, and the file holds {came}, as the "
        f"authors' code of {keys} writes it, which does not load as it is. {remedy}"
    )


def published_layer(cls: type[Loading], entries: Mapping[str, Any]) -> PublishedLayer | None:
    """Return what a class reads of a layer in its authors' file; ``None`` if it is none, or a damaged one."""
    try:
        return cls.read_published(PublishedEntries(entries))
    except CheckpointError:
        return None


def published_keys(registry: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Return the normalizers whose authors' code may have written layers of a network's entries."""
    # A class that is derived from a registered one has inherited how that one reads.
    readers = {key: cls for key, cls in registry.items() if not any(vars(base).get("key") for base in cls.__mro__[1:])}
    groups = by_prefix(state).values()
    return [key for key, cls in readers.items() if any(published_layer(cls, entries) for entries in groups)]


def convert_first(key: str) -> str:
    """Return what to type for a file of the authors' code."""
    return (
        f"lightning_norm.load_published(model, path, {key!r}) swaps a network that has not been swapped, and loads the "
        f"file; lightning-norm convert FILE --norm {key} --out OUT rewrites it."
    )


def _begins(name: str, beginnings: tuple[str, ...]) -> bool:
    """Tell whether a name is one of these, or begins with one that ends in a dot."""
    return any(name == b or (b.endswith(".") and name.startswith(b)) for b in beginnings)


def _came(names: list[str], loaded: Mapping[str, Any]) -> str:
    """Return up to three of the names, with their shapes."""
    came = [f"{n} {tuple(loaded[n].shape)}" if isinstance(loaded[n], Tensor) else n for n in names[:3]]
    return ", ".join(came + ["..."] * (len(names) > 3))


def _refuse_another(layer: Loading, loaded: Mapping[str, Any], prefix: str) -> None:
    """Refuse a file with tensors that only other normalizers have."""
    # Of the layer, whose arguments may give it more tensors than its class has by default.
    expected = marks(layer)
    foreign = {n for cls in layer.registry.values() for n in marks(cls) & loaded.keys() if n not in expected}
    if foreign or (has_rows(loaded) and not layer._has_rows):
        others = likely(layer.registry, loaded)
        raise RuntimeError(f"checkpoint of another normalizer: {_another(layer, loaded, prefix, others)}")


def _another(layer: Loading, loaded: Mapping[str, Any], prefix: str, others: list[Any]) -> str:
    """Return whose file it is, by its names and shapes, and what to type."""
    here, there = type(layer).__name__, " or ".join(cls.__name__ for cls in others)
    # Several classes may fit, and then the swap to any of them loads the file.
    key = others[0].key
    names = [name for name in loaded if not isinstance(getattr(layer, name, None), Tensor)] or list(loaded)
    came = _came(names, loaded)
    known = {"weight", "bias", *BATCH_NORM_BUFFERS}.union(*(marks(cls) for cls in layer.registry.values()))
    if not known & loaded.keys():
        return f"{prefix[:-1] or 'this layer'} is {here}, the file holds {came}: names of no normalizer of this package"
    return (
        f"{prefix[:-1] or 'this layer'} is {here}, the file holds {came}, as of {there}. "
        f"Swap to {key!r} before loading; swap(model, {layer.key or here!r}, source={key!r}) goes on from there."
    )

"""swap(model, norm): find, convert, replace; all or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_norm.errors import (
    AlreadySwappedError,
    LeftAloneWarning,
    NoEffectWarning,
    ParameterGrowthWarning,
    UnsuitableNormWarning,
    counted,
)
from lightning_norm.layers.arguments import plain_value
from lightning_norm.layers.base import Normalizer
from lightning_norm.normalizers.context.assignment import ContextState
from lightning_norm.ops.backend import explain
from lightning_norm.surgery.convert import convert, preserved
from lightning_norm.surgery.options import ResolvedNorm, Source, SwapOptions, takes_options
from lightning_norm.surgery.report import SwappedLayer, SwapReport
from lightning_norm.surgery.select import (
    ModuleSlot,
    assign_norms,
    check_source,
    explain_source,
    explain_unmatched,
    find_slots,
)
from lightning_norm.surgery.walk import named_normalizers


@dataclass(frozen=True, kw_only=True)
class SwapCall(SwapOptions):
    """What only a direct call of :func:`swap` takes.

    Args:
        dry_run: report what would happen and change nothing.
        on_empty: what to do when no layer is swapped: "warn" (NoEffectWarning) or "error".
        example: for ``fuse_activation``: a tensor, a tuple of arguments or a mapping of keyword arguments on which the
            model is run once in training and once in evaluation; nothing of that stays.
    """

    dry_run: bool = False
    on_empty: Literal["warn", "error"] = "warn"
    example: Any = field(default=None, metadata={"as_it_is": True})


@takes_options(SwapCall)
def swap(model: nn.Module, options: SwapCall) -> SwapReport:
    """Replace the normalization layers of a model, in place.

    Parameters, running statistics, training flag, hooks, ties and sharing move with each layer; an optimizer built
    before stays valid for what moved. If anything fails, the model is exactly as it was. A ParameterGrowthWarning tells
    of a model that grows by more than a tenth.

    Args:
        model: any module.
        options: the fields of :class:`SwapOptions` and :class:`SwapCall`, as keyword arguments.

    Returns:
        The report: ``len(report)``, ``print(report)``, ``report.undo()``.

    Raises:
        ValueError: unknown norm, source, backend, sync_group or pattern, a pattern that matches nothing, ``norm_args``
            without ``norm``, or nothing swapped with ``on_empty="error"``.
        TypeError: ``model`` is no module, ``rules`` or ``norm_args`` no mapping, an argument that the normalizer does
            not take, or a layer that cannot be converted.
        AlreadySwappedError: nothing is left to swap because the model was swapped before.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> report = swap(model, "sn")
    >>> len(report), type(model[1]).__name__
    (1, 'SwitchableNorm')
    """
    report, unmatched, slots = prepare_swap(model, options)
    # All that can be wrong is told before the model changes.
    check_patterns(model, slots, unmatched, options.source)
    check_not_empty(model, report, slots, options.source, options.on_empty)
    if report.growth():
        warnings.warn(report.growth(), ParameterGrowthWarning, stacklevel=3)
    if unsuitable := report.unsuitable():
        warnings.warn(unsuitable, UnsuitableNormWarning, stacklevel=3)
    if left := report.left_alone(options):
        warnings.warn(left, LeftAloneWarning, stacklevel=3)
    # In the model as it is: the example runs on the original layers.
    activations = report.find_activations(model, options.fuse_activation, options.example)
    report.commit(not options.dry_run)
    if not options.dry_run:
        report.take_activations(model, activations)
    return report


def prepare_swap(
    model: nn.Module, options: SwapOptions, *, skip: Collection[int] = ()
) -> tuple[SwapReport, list[str], list[ModuleSlot]]:
    """Build all replacements of a swap and put none in place: ``report.commit()`` does that.

    Args:
        model: the model.
        options: what becomes what.
        skip: ids of modules that are no candidates.

    Returns:
        The report, the patterns that matched nothing, and the candidates.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"swap expects a torch.nn.Module, got {type(model).__name__}. Type swap(model, {options.norm!r})."
        )
    # Whether the backend can run is asked here and not by the options: they may be built in another process.
    backend = explain(options.backend)
    slots, near_misses, others = find_slots(model, options.source)
    slots = [slot for slot in slots if id(slot.module) not in skip]
    assigned, unmatched, frozen, unchosen = assign_norms(model, slots, options)
    report = SwapReport([], near_misses, len(slots), others, frozen)
    report.unchosen, report.order = unchosen, [name for name, _ in model.named_modules()]
    report.total_before = sum(p.numel() for p in model.parameters() if not is_lazy(p))
    for slot, norm in assigned:
        # A failure from here on leaves the model as it was: the original modules are read and not changed.
        layer, arguments = convert(slot.module, slot.name, norm, slot.whole)
        layer.sync, layer.sync_group, layer.backend = options.sync, options.sync_group, options.backend
        if options.sync == "running" and layer.unsupported.window and layer.track_running_stats:
            raise ValueError(
                f"{slot.name}: sync='running': {type(layer).__name__} cannot wait for the optimizer step: "
                f"{layer.unsupported.window}. Type sync=True, or exclude the layer."
            )
        # For messages, since a layer does not know its own name.
        if isinstance(state := getattr(layer, "contexts", None), ContextState):
            state.name = slot.name
        if options.compile:
            layer.compile()
        row = _row(slot, layer, arguments, backend, norm)
        layer.origin = _origin(slot.module, row)
        layer._place = row.name
        report.add(slot, layer, row)
    return report, unmatched, slots


def _row(
    slot: ModuleSlot, layer: Normalizer, arguments: dict[str, Any], backend: str, norm: ResolvedNorm
) -> SwappedLayer:
    # A tensor counts as moved if the very same object is in the new layer: an optimizer that holds it stays valid.
    before = slot.module.state_dict(keep_vars=True)
    after = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    moved = [name for name, value in before.items() if _is_same(after.get(name), value)]
    same, reason = preserved(slot.module, layer, slot.name, norm, slot.whole)
    return SwappedLayer(
        name=slot.name,
        source=type(slot.module).__name__,
        target=type(layer).__name__,
        norm={"class_path": key_or_path(type(layer)), "init_args": _plain(arguments)},
        num_features=layer.num_features,
        preserves_eval=same,
        reason=reason,
        moved=moved,
        converted=[name for name in before if name in layer.translated_tensors],
        dropped=[name for name in before if name not in (*moved, *layer.translated_tensors)],
        added={n: p.numel() for n, p in layer.named_parameters(recurse=False) if n not in moved},
        removed=sum(p.numel() for n, p in slot.module.named_parameters(recurse=False) if n not in moved),
        backend=backend,
        compiled=layer.compiled,
        sync=_synced(layer),
        also=slot.names[1:],
    )


def _synced(layer: Normalizer) -> bool | str:
    """Return what of ``sync`` has an effect in a layer."""
    if layer.sync == "running":
        return layer.sync if layer.has_running_stats else False
    return layer.sync and (layer.train_uses_batch_stats or layer.track_running_stats)


def _is_same(after: Tensor | None, before: Tensor) -> bool:
    """Tell whether a tensor was taken over: the object itself, or the memory of a frozen layer's buffer."""
    if after is None or after is before or isinstance(before, nn.Parameter) or before.is_meta or after.is_meta:
        return after is before
    # The buffer of a frozen layer becomes a parameter of the same memory.
    return after.is_set_to(before)


def key_or_path(cls: type[Normalizer]) -> str:
    """Return what to type for a normalizer's class: its key, or the dotted path of one that has none.

    >>> from lightning_norm import SwitchableNorm
    >>> key_or_path(SwitchableNorm)
    'sn'
    """
    # A subclass inherits the key of its base, which stands for the base.
    return cls.key if Normalizer.registry.get(cls.key) is cls else f"{cls.__module__}.{cls.__qualname__}"


def _origin(module: nn.Module, row: SwappedLayer) -> dict[str, Any]:
    # A checkpoint is to rebuild the network from the user's code, which builds the layer of the first swap's source.
    earlier: dict[str, Any] | None = getattr(module, "origin", None)
    if earlier is None:
        return {"source": row.source, "norm": row.norm, "before": []}
    before = [*earlier["before"], earlier["norm"]]
    return {**earlier, "norm": row.norm, "before": before}


def _plain(value: Any) -> Any:
    """Return arguments in the types that YAML and a checkpoint hold without code."""
    value = plain_value(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def check_patterns(model: nn.Module, slots: list[ModuleSlot], unmatched: list[str], source: Source | None) -> None:
    """Refuse a ``source`` that names no class, and a pattern that matched nothing.

    Args:
        model: the model.
        slots: the candidates; without one no pattern can match, and :func:`check_not_empty` says why.
        unmatched: patterns that matched nothing.
        source: the kinds of layers that were asked for.

    Raises:
        ValueError: there is one.
    """
    check_source(model, slots, source)
    if unmatched and slots:
        raise ValueError(explain_unmatched(unmatched[0], slots))


def check_not_empty(
    model: nn.Module,
    report: SwapReport,
    slots: list[ModuleSlot],
    source: Source | None,
    on_empty: str,
    *,
    already_present: Collection[type] | None = None,
) -> None:
    """Raise or warn where a swap changed no layer, and say why.

    Args:
        model: the model.
        report: what was prepared.
        slots: the candidates.
        source: the kinds of layers that were asked for.
        on_empty: "warn" or "error".
        already_present: classes that the layers of a model which was swapped before may have without a warning; where
            it is left out, a second swap without a candidate is an error.

    Raises:
        ValueError: nothing is swapped and ``on_empty`` is "error".
        AlreadySwappedError: nothing is left to swap because the model was swapped before.
    """
    if report.layers:
        return
    # A model that holds normalizers and has no candidate was swapped before, most likely by the same code.
    present = dict(named_normalizers(model))
    # A NormSwap that is run again on its model finds the layers that it chose in place, and others left.
    in_place = already_present is not None and {type(layer) for layer in present.values()} & set(already_present)
    if present and (not slots or in_place):
        _tell_swapped_before(present, already_present)
        return
    text = (
        f"swap changed nothing: {counted(len(slots), 'candidate')}, none chosen"
        if slots
        else "swap changed nothing: no candidate found"
    )
    # With candidates it is what was asked for that leaves them, and no other source would change that.
    left = [*report.unchosen, *report.frozen] if slots else report.skipped
    hint = "; ".join(f"{n} is a {t}: {why}" for n, t, why in left[:3])
    text = f"{text}. {f'{hint}.' if hint else explain_source(model, source)}"
    if on_empty == "error":
        raise ValueError(text)
    warnings.warn(text, NoEffectWarning, stacklevel=4)


def _tell_swapped_before(present: Mapping[str, Normalizer], already_present: Collection[type] | None) -> None:
    kinds = ", ".join(sorted({type(layer).__name__ for layer in present.values()}))
    what = f"the model already holds {counted(len(present), 'layer')} of this package ({kinds}"
    name, first = next(iter(present.items()))
    source = first.key or type(first).__name__
    # Two calls of swap in a row are a mistake in the user's code. A NormSwap is run again by every trainer.fit and
    # trainer.test on a model that may be swapped already: it warns only where other classes are in its place.
    if already_present is None:
        raise AlreadySwappedError(
            f"nothing left to swap: {what}; first: {name}). Call undo() on the earlier report, or swap them again with "
            f"source={source!r}."
        )
    if not {type(layer) for layer in present.values()} & set(already_present):
        targets = ", ".join(sorted(cls.__name__ for cls in already_present))
        warnings.warn(
            f"nothing left to swap to {targets}: {what}). Swap them again with source={source!r}, or drop one "
            "NormSwap; the section norm: and --norm are one, which comes first.",
            NoEffectWarning,
            stacklevel=5,
        )

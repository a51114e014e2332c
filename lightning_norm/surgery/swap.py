"""swap(model, norm): find, convert, replace; all or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_norm.errors import AlreadySwappedError, NoEffectWarning, ParameterGrowthWarning
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.registry import NormSpec
from lightning_norm.normalizers import resolve
from lightning_norm.normalizers.context.assignment import ContextState
from lightning_norm.ops.backend import explain
from lightning_norm.ops.sync import check_group
from lightning_norm.surgery.convert import convert, unchanged_eval
from lightning_norm.surgery.report import SwappedLayer, SwapReport
from lightning_norm.surgery.select import (
    ModuleSlot,
    Pattern,
    Source,
    assign,
    check_source,
    explain_missed,
    explain_source,
    find_sites,
)


def swap(
    model: nn.Module,
    norm: NormSpec | None = None,
    *,
    include: Pattern | None = None,
    exclude: Pattern | None = None,
    source: Source | None = None,
    norm_args: Mapping[str, Any] | None = None,
    rules: Mapping[str, NormSpec | None] | None = None,
    backend: Literal["auto", "eager", "triton"] = "auto",
    compile: bool = False,
    sync: bool = True,
    sync_group: str | int = "world",
    dry_run: bool = False,
    on_empty: Literal["warn", "error"] = "warn",
) -> SwapReport:
    """Replace the normalization layers of a model, in place.

    Parameters, running statistics, training flag, hooks, ties and sharing move with each layer; an optimizer built
    before stays valid for what moved. If anything fails, the model is exactly as it was. A ParameterGrowthWarning tells
    of a model that grows by more than a tenth.

    Args:
        model: any module.
        norm: a key ("sn"), a dotted path, a class, or ``{"class_path": ..., "init_args": {...}}``; may be left out
            with ``rules``.
        include: which layers; a string is a regular expression for the whole dotted name, a list holds names or their
            ends, and "last_of_block" is the last one of each residual block of a ResNet.
        exclude: which layers not; likewise.
        source: which kinds of layers are candidates: "BatchNorm" (the default: 1d, 2d, 3d and SyncBatchNorm),
            "LayerNorm", "GroupNorm", "InstanceNorm", "all", a class or its name, the key of a normalizer of ours, or a
            list of these.
        norm_args: arguments of ``norm``; those of a rule go in its ``init_args``.
        rules: ordered mapping from regular expression to a norm; ``None`` leaves the layer alone, the first match wins
            over ``norm``, ``include`` and ``exclude``.
        backend: "auto" for the Triton kernels on CUDA inputs that they can take and plain PyTorch elsewhere, "eager"
            for plain PyTorch everywhere, "triton" for the kernels or an error.
        compile: compile each layer's forward pass (the first pass of each input shape takes seconds).
        sync: pool statistics over the ranks of a distributed run, in training.
        sync_group: with which ranks: "world", "node" (those of one host) or a number of consecutive ranks.
        dry_run: report what would happen and change nothing.
        on_empty: what to do when no layer is swapped: "warn" (NoEffectWarning) or "error".

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
    report, missed, sites = try_swap(
        model,
        norm,
        include=include,
        exclude=exclude,
        source=source,
        norm_args=norm_args,
        rules=rules,
        backend=backend,
        compile=compile,
        sync=sync,
        sync_group=sync_group,
    )
    check_result(model, report, missed, sites, on_empty, source=source)
    if report.growth():
        warnings.warn(report.growth(), ParameterGrowthWarning, stacklevel=2)
    report.commit(not dry_run)
    return report


def try_swap(
    model: nn.Module,
    norm: NormSpec | None = None,
    *,
    include: Pattern | None = None,
    exclude: Pattern | None = None,
    source: Source | None = None,
    norm_args: Mapping[str, Any] | None = None,
    rules: Mapping[str, NormSpec | None] | None = None,
    backend: str = "auto",
    compile: bool = False,
    sync: bool = True,
    sync_group: str | int = "world",
    leave: Collection[int] = (),
) -> tuple[SwapReport, list[str], list[ModuleSlot]]:
    """As :func:`swap`, but only prepare: returns the report, the patterns that matched nothing, and the candidates.

    ``leave`` holds the ids of modules that are no candidates.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap expects a torch.nn.Module, got {type(model).__name__}. Type swap(model, {norm!r}).")
    check_specs(norm, norm_args, rules)
    if norm is None and not rules:
        raise ValueError("swap needs norm='sn' (say) or rules={'layer1.*': 'sn', ...}.")
    if norm is None and norm_args:
        raise ValueError(
            f"norm_args={dict(norm_args)!r} are arguments of norm, and swap was called without norm. Put them in the "
            "rule: rules={'layer1.*': {'class_path': 'sn', 'init_args': {...}}}."
        )
    backend_text = explain(backend)
    check_group(sync_group)
    sites, skipped = find_sites(model, source)
    sites = [site for site in sites if id(site.module) not in leave]
    chosen, missed = assign(sites, norm, include, exclude, rules)
    report = SwapReport([], skipped, len(sites))
    report.total_before = sum(p.numel() for p in model.parameters() if not is_lazy(p))
    for site, spec, is_norm in chosen:
        layer, arguments = convert(site.module, site.name, spec, (norm_args or {}) if is_norm else {})
        layer.sync, layer.sync_group, layer.backend = sync, sync_group, backend
        if isinstance(state := getattr(layer, "contexts", None), ContextState):
            state.name = site.name
        if compile:
            layer.compile()
        row = _row(site, layer, arguments, backend_text)
        layer.origin = _origin(site.module, row)
        report.add(site, layer, row)
    return report, missed, sites


def check_specs(norm: NormSpec | None, norm_args: Any, rules: Any) -> None:
    """Check what layers are to become.

    Raises:
        ValueError: unknown norm.
        TypeError: not a normalizer, or a form that is none.
    """
    forms = (("norm_args", norm_args, "{'momentum': 0.2}"), ("rules", rules, "{'layer1.*': 'sn'}"))
    for name, value, example in forms:
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a mapping such as {example}, got {value!r}.")
    for spec in [norm, *(rules or {}).values()]:
        if spec is not None:
            resolve(spec)


def _row(site: ModuleSlot, layer: Normalizer, arguments: dict[str, Any], backend: str) -> SwappedLayer:
    before = site.module.state_dict(keep_vars=True)
    held = {**layer._parameters, **layer._buffers}
    moved = [name for name, value in before.items() if held.get(name) is value]
    preserved, reason = unchanged_eval(site.module, layer)
    cls = type(layer)
    path = cls.key or f"{cls.__module__}.{cls.__qualname__}"
    return SwappedLayer(
        name=site.name,
        source=type(site.module).__name__,
        target=cls.__name__,
        norm={"class_path": path, "init_args": _plain(arguments)},
        num_features=layer.num_features,
        preserved=preserved,
        reason=reason,
        moved=moved,
        converted=[name for name in before if name in layer.translated_tensors],
        dropped=[name for name in before if name not in (*moved, *layer.translated_tensors)],
        added={n: p.numel() for n, p in layer.named_parameters(recurse=False) if n not in moved},
        removed=sum(p.numel() for n, p in site.module.named_parameters(recurse=False) if n not in moved),
        backend=backend,
        compiled=layer.compiled,
        sync=layer.sync and (layer.train_uses_batch_stats or layer.track_running_stats),
        also=site.names[1:],
    )


def _origin(module: nn.Module, row: SwappedLayer) -> dict[str, Any]:
    earlier: dict[str, Any] | None = getattr(module, "origin", None)
    if earlier is None:
        return {"source": row.source, "norm": row.norm, "before": []}
    return {"source": earlier["source"], "norm": row.norm, "before": [*earlier["before"], earlier["norm"]]}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def check_result(
    model: nn.Module,
    report: SwapReport,
    missed: list[str],
    sites: list[ModuleSlot],
    on_empty: str,
    *,
    source: Source | None = None,
    fine: Collection[type] = (),
) -> None:
    """Raise or warn for patterns that matched nothing and for a swap without a layer.

    Args:
        model: the model.
        report: what was prepared.
        missed: patterns that matched nothing.
        sites: the candidates.
        on_empty: "warn" or "error".
        source: the kinds of layers that were asked for.
        fine: classes of normalizers that the model may hold already without a word.
    """
    check_source(model, sites, source)
    if missed and sites:
        raise ValueError(explain_missed(missed[0], sites))
    if report.layers:
        return
    ours = [(n.replace("_orig_mod.", ""), m) for n, m in model.named_modules() if isinstance(m, Normalizer)]
    if ours and not sites:
        kinds = sorted({type(m).__name__ for _, m in ours})
        held = ours[0][1].key or type(ours[0][1]).__name__
        if fine:
            if not {type(m) for _, m in ours} & set(fine):
                wanted = ", ".join(sorted(c.__name__ for c in fine))
                warnings.warn(
                    f"nothing left to swap to {wanted}: the model already holds {len(ours)} layers of this package "
                    f"({', '.join(kinds)}). Swap them again with source={held!r}, or drop one NormSwap.",
                    NoEffectWarning,
                    stacklevel=3,
                )
            return
        raise AlreadySwappedError(
            f"nothing left to swap: the model already holds {len(ours)} layers of this package ({', '.join(kinds)}; "
            "first: "
            f"{ours[0][0]}). Call undo() on the earlier report, or swap them again with source={held!r}."
        )
    text = (
        f"swap changed nothing: {len(sites)} candidates, none chosen"
        if sites
        else "swap changed nothing: no candidate found"
    )
    hint = "; ".join(f"{n} is a {t}: {why}" for n, t, why in report.skipped[:3])
    hint = hint or explain_source(model, source)
    if on_empty == "error":
        raise ValueError(f"{text}. {hint}.")
    warnings.warn(f"{text}. {hint}.", NoEffectWarning, stacklevel=3)

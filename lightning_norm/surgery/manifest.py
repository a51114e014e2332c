"""The manifest: what was swapped, in plain types, so that a checkpoint can rebuild its network or refuse another's.

``{"format": 1, "version": "0.1.0", "layers": [{"name", "also", "source", "target", "num_features", "norm", "before",
"options"}]}``; ``norm`` is ``{"class_path", "init_args"}`` and ``options`` holds sync, sync_group, backend, compile.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_norm.errors import CheckpointError
from lightning_norm.layers.arguments import arguments_of
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.swap_record import MANIFEST_KEY, swap_settings
from lightning_norm.normalizers import normalizers
from lightning_norm.surgery.report import SwapReport
from lightning_norm.surgery.select import clean_name
from lightning_norm.surgery.swap import try_swap

FORMAT = 1
ENTRIES = ("name", "source", "norm")


def manifest_of(model: nn.Module) -> dict[str, Any] | None:
    """Return the manifest of a model as it is now, or ``None`` if it holds no swapped layer."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(clean_name(name))
    layers = [
        _entry(names[id(layer)], layer.origin, swap_settings(layer), type(layer).__name__, layer.num_features)
        for layer in model.modules()
        if isinstance(layer, Normalizer) and layer.origin is not None
    ]
    return _manifest(layers, sys.modules[__name__.partition(".")[0]].__version__) if layers else None


def manifest_in(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the manifest that a checkpoint holds, or that the layers left in its ``state_dict``'s metadata.

    Raises:
        CheckpointError: it is of a later format, or not one.
    """
    manifest = checkpoint.get(MANIFEST_KEY)
    if manifest is None:
        metadata = getattr(checkpoint.get("state_dict"), "_metadata", None) or {}
        held = [(clean_name(name), entry[MANIFEST_KEY]) for name, entry in metadata.items() if MANIFEST_KEY in entry]
        layers = [_entry([name], origin, origin.get("options", {}), "", None) for name, origin in held]
        return _manifest(layers, "unknown") if layers else None
    if not isinstance(manifest, Mapping) or not isinstance(manifest.get("layers"), list):
        raise CheckpointError(
            f"the checkpoint's entry {MANIFEST_KEY!r} is not a list of swapped layers: {manifest!r:.80}."
        )
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"the checkpoint's manifest has format {manifest.get('format')}, written by lightning_norm "
            f"{manifest.get('version')}; this version reads format {FORMAT}. Update lightning_norm."
        )
    for row in manifest["layers"]:
        if not isinstance(row, Mapping) or any(entry not in row for entry in ENTRIES):
            raise CheckpointError(f"the checkpoint's manifest has a row without {', '.join(ENTRIES)}: {row!r:.80}.")
    return dict(manifest)


def rules_of(manifest: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the ``rules`` and the ``source`` with which :func:`lightning_norm.swap` does what the manifest says."""
    rows = manifest["layers"]
    rules = {re.escape(row["name"]): {**row["norm"], "class_path": loaded_class(row["norm"])} for row in rows}
    return rules, [*dict.fromkeys(row["source"] for row in rows)]


def loaded_class(spec: Mapping[str, Any]) -> type[Normalizer]:
    """Return the class that a manifest names, among those that are imported: a file must not import code.

    Raises:
        CheckpointError: there is none.
    """
    path = str(spec["class_path"])
    if path in normalizers():
        return normalizers()[path]
    for cls in _subclasses(Normalizer):
        if path == f"{cls.__module__}.{cls.__qualname__}":
            return cls
    raise CheckpointError(
        f"the checkpoint was written with the normalizer {path!r}, which is not imported. Import the module that "
        "defines it, then load again."
    )


def rebuild(model: nn.Module, manifest: Mapping[str, Any]) -> SwapReport | None:
    """Swap a freshly built model as the manifest says; layers that are so already are left alone.

    Raises:
        CheckpointError: a layer of the manifest is not in the model, or is something else there.
    """
    report: SwapReport | None = None
    rows = [row for row in manifest["layers"] if _wrong(model, row)]
    for level in range(max((len(row.get("before", [])) + 1 for row in rows), default=0)):
        chosen = [(row, [*row.get("before", []), row["norm"]][level:][:1]) for row in rows]
        rules = {
            re.escape(row["name"]): {
                "class_path": loaded_class(spec[0]),
                "init_args": {k: v for k, v in spec[0]["init_args"].items() if k not in ("device", "dtype")},
            }
            for row, spec in chosen
            if spec
        }
        earlier = [type(m).__name__ for m in model.modules() if isinstance(m, Normalizer) and level]
        sources = dict.fromkeys(["BatchNorm", *(row["source"] for row in rows), *earlier])
        made, _, _ = try_swap(model, rules=rules, source=list(sources))
        made.commit()
        report = made if report is None else report
    for row in rows:
        wrong = _wrong(model, row)
        if wrong:
            raise CheckpointError(
                f"the checkpoint has {row['norm']['class_path']} at {row['name']!r} in place of a {row['source']}, and "
                f"this {type(model).__name__} has {wrong} there. Build it with the arguments it was trained with."
            )
        _set_options(_named(model)[row["name"]], row.get("options", {}))
    return report


def difference(saved: Mapping[str, Any], own: Mapping[str, Any] | None) -> str | None:
    """Return the first difference between a checkpoint's manifest and a model's, in words; ``None`` if they agree."""
    there = {row["name"]: row for row in saved["layers"]}
    here = {row["name"]: row for row in (own or {"layers": []})["layers"]}
    shared = {name for row in here.values() for name in row.get("also", [])}
    for name in [*there, *(n for n in here if n not in there)]:
        a, b = there.get(name), here.get(name)
        if a is None or b is None:
            if name in shared:
                continue
            known = a or b
            assert known is not None
            kinds = [known["source"], known["norm"]["class_path"]]
            return "{} is {} in the file and {} here".format(name, *(kinds if a is None else kinds[::-1]))
        if a["norm"]["class_path"] != b["norm"]["class_path"]:
            return f"{name} is {a['norm']['class_path']} in the file and {b['norm']['class_path']} here"
        given, mine = (row["norm"].get("init_args") or {} for row in (a, b))
        for argument in sorted({*given, *mine} - {"device", "dtype"}):
            parameter = arguments_of(loaded_class(a["norm"])).get(argument)
            default = parameter.default if parameter is not None else None
            values = [_comparable(args.get(argument, default)) for args in (given, mine)]
            if values[0] != values[1]:
                return f"{name} ({a['norm']['class_path']}) has {argument}={values[0]} in the file and {values[1]} here"
    return None


def lacks_parameters(model: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    """Return the parameters of swapped layers that a ``state_dict`` does not hold, or holds in another size."""
    held = {clean_name(name): value for name, value in state_dict.items()}
    own = [
        (f"{clean_name(name)}.{n}", p)
        for name, layer in model.named_modules()
        if isinstance(layer, Normalizer) and layer.origin is not None
        for n, p in layer.named_parameters(recurse=False)
    ]
    return [n for n, p in own if not isinstance(held.get(n), Tensor) or held[n].numel() != p.numel()]


def learned_without_a_place(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, str]:
    """Return parameters that only a normalizer has and whose layer in the model has none: name -> key."""
    learned = {name: key for key, cls in normalizers().items() for name in cls.extra_parameters}
    modules = _named(model)
    found: dict[str, str] = {}
    for name in state_dict:
        layer, _, parameter = clean_name(name).rpartition(".")
        there = modules.get(layer)
        if parameter in learned and there is not None and parameter not in there._parameters:
            found[name] = learned[parameter]
    return found


def fit_names(model: nn.Module, state_dict: Mapping[str, Any]) -> Any:
    """Rename the keys of a ``state_dict`` to the model's, where torch.compile's ``_orig_mod.`` is all that differs."""
    own = {clean_name(name): name for name in model.state_dict()}
    renamed = {name: own.get(clean_name(name), name) for name in state_dict}
    if all(old == new for old, new in renamed.items()):
        return state_dict
    fitted = type(state_dict)()
    for old, new in renamed.items():
        fitted[new] = state_dict[old]  # type: ignore[index]  # a dict or an OrderedDict
    return fitted


def load_weights(model: nn.Module, checkpoint: Mapping[str, Any], path: str, strict: bool = True) -> None:
    """Load the weights of a checkpoint of this network, before or after its swap, and nothing else of it.

    Raises:
        CheckpointError: the file is of another swap, or does not fit.
    """
    saved = manifest_in(checkpoint)
    other = None if saved is None else difference(saved, manifest_of(model))
    if other:
        raise CheckpointError(
            f"{path!r} is a checkpoint of another swap: {other}. NormSwap(plan={path!r}) swaps as it was swapped there."
        )
    try:
        model.load_state_dict(fit_names(model, checkpoint["state_dict"]), strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f"the weights of {path!r} do not fit this {type(model).__name__}: {error}") from error


def _manifest(layers: list[dict[str, Any]], version: str) -> dict[str, Any]:
    return {"format": FORMAT, "version": version, "layers": layers}


def _entry(
    names: list[str], origin: Mapping[str, Any], options: Mapping[str, Any], target: str, num_features: int | None
) -> dict[str, Any]:
    row = {"name": names[0], "also": list(dict.fromkeys(names[1:])), "target": target, "num_features": num_features}
    return {**row, **{k: origin[k] for k in ("source", "norm", "before")}, "options": dict(options)}


def _named(model: nn.Module) -> dict[str, nn.Module]:
    return {clean_name(name): module for name, module in model.named_modules(remove_duplicate=False)}


def _wrong(model: nn.Module, row: Mapping[str, Any]) -> str | None:
    """Return what a layer is, if it is not what the row says."""
    module = _named(model).get(row["name"])
    if type(module) is loaded_class(row["norm"]):
        return None
    return "nothing" if module is None else type(module).__name__


def _set_options(layer: nn.Module, options: Mapping[str, Any]) -> None:
    assert isinstance(layer, Normalizer)
    layer.sync, layer.sync_group = options.get("sync", True), options.get("sync_group", "world")
    backend = options.get("backend", "auto")
    layer.backend = "auto" if backend == "triton" else backend  # the file may be read where there is no GPU
    if options.get("compile"):
        layer.compile()


def _comparable(value: Any) -> Any:
    return [_comparable(v) for v in value] if isinstance(value, (list, tuple)) else value


def _subclasses(cls: type[Normalizer]) -> Iterator[type[Normalizer]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)

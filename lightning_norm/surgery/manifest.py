"""The manifest: what was swapped, in plain types, so that a checkpoint can rebuild its network or refuse another's.

``{"format": 1, "version": "0.1.0", "layers": [{"name", "also", "source", "target", "num_features", "norm", "before",
"options"}]}``; ``norm`` is ``{"class_path", "init_args"}`` and ``options`` holds sync, sync_group, backend, compile,
the scheduled values that evaluation reads, and ``frozen`` where the statistics are.

It is the entry ``"lightning_norm"`` of a checkpoint. A checkpoint without that entry, such as a ``state_dict`` by
itself, may still have in its metadata what each layer wrote of itself (``layers/swap_record.py``).
"""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_norm.errors import CheckpointError, counted
from lightning_norm.layers.arguments import arguments_of
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.state import convert_first, published_keys
from lightning_norm.layers.swap_record import MANIFEST_KEY, swap_settings
from lightning_norm.normalizers import normalizers
from lightning_norm.surgery.convert import unchanged_on_error
from lightning_norm.surgery.options import SwapOptions
from lightning_norm.surgery.report import SwapReport
from lightning_norm.surgery.saved_rows import checked_rows
from lightning_norm.surgery.swap import prepare_swap
from lightning_norm.surgery.torch_private import STATE_DICT_METADATA
from lightning_norm.surgery.walk import (
    clean_name,
    modules_by_name,
    name_cleaner,
    named_normalizers,
    names_by_module,
    normalizers_of,
    rename_for_wrappers,
)

FORMAT = 1


def write_manifest(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Add the manifest to a checkpoint, if the model holds swapped layers."""
    manifest = manifest_of(model)
    if manifest is not None:
        checkpoint[MANIFEST_KEY] = manifest


def manifest_of(model: nn.Module) -> dict[str, Any] | None:
    """Return the manifest of a model as it is now, or ``None`` if it holds no swapped layer.

    It has a ``format``, the ``version`` of this package, and under ``layers`` a row for each swapped layer: its
    ``name`` and the other names that it has (``also``), the class that it was (``source``), what to type to get it
    (``norm``), the norms on its way (``before``), ``num_features`` and ``options``. Plain types alone:
    ``weights_only=True`` loads it.
    """
    names = names_by_module(model)
    # A layer that was built as it is has no origin: the user's code builds it again before a checkpoint is loaded.
    layers = [
        _entry(names[layer], layer.origin, swap_settings(layer), type(layer).__name__, layer.num_features)
        for layer in normalizers_of(model)
        if layer.origin is not None
    ]
    return _manifest(layers, sys.modules[__name__.partition(".")[0]].__version__) if layers else None


def manifest_in(checkpoint: Mapping[str, Any], where: str = "the checkpoint") -> dict[str, Any] | None:
    """Return the manifest that a checkpoint holds, or that the layers left in its ``state_dict``'s metadata.

    Args:
        checkpoint: the checkpoint.
        where: its file, for messages.

    Raises:
        CheckpointError: it is of a later format, or not one, or a row of it is wrong.
    """
    manifest = checkpoint.get(MANIFEST_KEY)
    if manifest is None:
        # A weights-only file of another framework's loop, or torch.save(model.state_dict()), has no entry of its own.
        # torch keeps the metadata of each layer as an attribute of the state_dict, which a plain dict does not have.
        metadata = getattr(checkpoint.get("state_dict"), STATE_DICT_METADATA, None) or {}
        entries = metadata.items() if isinstance(metadata, Mapping) else ()
        origins = {clean_name(n): e[MANIFEST_KEY] for n, e in entries if isinstance(e, Mapping) and MANIFEST_KEY in e}
        layers = [{**origin, "name": n} if isinstance(origin, Mapping) else origin for n, origin in origins.items()]
        return _manifest(checked_rows(layers, where, CheckpointError), "unknown") if layers else None
    if not isinstance(manifest, Mapping) or not isinstance(manifest.get("layers"), list):
        raise CheckpointError(
            f"{where}: the entry {MANIFEST_KEY!r} is not a list of swapped layers: {reprlib.repr(manifest)}."
        )
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{where}: the manifest has format {manifest.get('format')!r:.80}, written by lightning_norm "
            f"{manifest.get('version')!s:.80}; this version reads format {FORMAT}. Update lightning_norm."
        )
    return {**manifest, "layers": checked_rows(manifest["layers"], f"{where}: the manifest", CheckpointError)}


def activations_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return layer -> the activation that it computes as well, as the rows of a file say."""
    return {row["name"]: row["activation"] for row in rows if row.get("activation")}


def rules_of(manifest: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Return the ``rules``, ``source`` and ``fuse_activation`` with which a swap does what the manifest says.

    Raises:
        CheckpointError: a normalizer's class is not imported.
    """
    # The rules hold classes and not their paths: to resolve a path imports code, and a file may name any module.
    rows = manifest["layers"]
    rules = {
        re.escape(row["name"]): {"class_path": loaded_class(row["norm"]), "init_args": arguments_in(row["norm"])}
        for row in rows
    }
    return rules, [*dict.fromkeys(row["source"] for row in rows)], activations_of(rows)


def loaded_class(spec: Mapping[str, Any], where: str = "the checkpoint") -> type[Normalizer]:
    """Return the class that a manifest names, among those that are imported: a file must not import code.

    Raises:
        CheckpointError: there is none.
    """
    path = str(spec["class_path"])
    # A key, as a user types it; a class of the user's has its path.
    if path in normalizers():
        return normalizers()[path]
    for cls in _subclasses(Normalizer):
        if path == f"{cls.__module__}.{cls.__qualname__}":
            return cls
    raise CheckpointError(
        f"{where} was written with the normalizer {path!r}, which is not imported. Import the module that "
        "defines it, then load again."
    )


def arguments_in(spec: Mapping[str, Any], where: str = "the checkpoint") -> dict[str, Any]:
    """Return the arguments with which a layer of a manifest was built, what an earlier version left out included.

    Raises:
        CheckpointError: its class is not imported.
    """
    return loaded_class(spec, where)._earlier_arguments(spec.get("init_args") or {})


def rebuild(model: nn.Module, manifest: Mapping[str, Any], where: str = "the checkpoint") -> SwapReport | None:
    """Swap a freshly built model as the manifest says; layers that are so already are left alone.

    Args:
        model: the model; it is as it was if anything fails.
        manifest: from :func:`manifest_in`.
        where: its file, for messages.

    Raises:
        CheckpointError: a layer of the manifest is not in the model, is something else there, or cannot be built.
    """
    modules = modules_by_name(model)
    rows = [row for row in manifest["layers"] if _other_class(modules, row, where)]
    for row in rows:
        module = modules.get(row["name"])
        there, here = row.get("num_features"), getattr(module, "num_features", None)
        if there is not None and isinstance(here, int) and here != there:
            raise CheckpointError(
                f"{where} has {counted(there, 'channel')} at {row['name']!r}, and this {type(model).__name__} has "
                f"{here}. Build it with the arguments it was trained with."
            )
        _check_scheduled(row, where)
    reports: list[SwapReport] = []
    try:
        _rebuild_levels(model, rows, reports, where)
        modules = modules_by_name(model)
        for row in rows:
            _check_rebuilt(model, modules, row, where)
        if reports:
            reports[-1].take_activations(model, reports[-1].find_activations(model, activations_of(rows)))
        for row in rows:
            _set_options(modules[row["name"]], row.get("options") or {})
    except (TypeError, ValueError, RuntimeError) as error:
        # The last level first, as each has replaced the layers of the one before.
        for report in reversed(reports):
            report.undo()
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{where}: {error}") from error
    return reports[0] if reports else None


def _rebuild_levels(model: nn.Module, rows: list[dict[str, Any]], reports: list[SwapReport], where: str) -> None:
    """Swap as often as the network was swapped, one report for each time."""
    # A layer that was swapped several times goes through all of its norms again, one per level: each takes arguments
    # over from the one before it, so that the last one alone would not be the layer that was trained.
    norms = [[*row["before"], row["norm"]] for row in rows]
    for level in range(max(map(len, norms), default=0)):
        rules = {
            re.escape(row["name"]): {
                "class_path": loaded_class(steps[level], where),
                # The file may be read on another machine: the layer goes where the module is that it replaces.
                "init_args": {
                    k: v for k, v in arguments_in(steps[level], where).items() if k not in ("device", "dtype")
                },
            }
            for row, steps in zip(rows, norms, strict=True)
            if level < len(steps)
        }
        # Behind the first level, the layers that are swapped once more are those of the level before.
        earlier = [type(layer).__name__ for layer in normalizers_of(model) if level]
        sources = dict.fromkeys(["BatchNorm", *(row["source"] for row in rows), *earlier])
        report, _, _ = prepare_swap(model, SwapOptions(rules=rules, source=list(sources)))
        if len(report):
            report.commit()
            reports.append(report)


def _check_rebuilt(model: nn.Module, modules: Mapping[str, nn.Module], row: Mapping[str, Any], where: str) -> None:
    """Refuse a model in which a layer is not what the row says.

    Raises:
        CheckpointError: what the file has there and what the model has.
    """
    actual = _other_class(modules, row, where)
    if actual:
        raise CheckpointError(
            f"{where} has {row['norm']['class_path']} at {row['name']!r} in place of a {row['source']}, and "
            f"this {type(model).__name__} has {actual} there. Build it with the arguments it was trained with."
        )


def difference(saved: Mapping[str, Any], current: Mapping[str, Any] | None) -> str | None:
    """Return the first difference between a checkpoint's manifest and a model's, in words; ``None`` if they agree.

    Args:
        saved: of the checkpoint.
        current: of the model; ``None`` where nothing was swapped.
    """
    there = {row["name"]: row for row in saved["layers"]}
    here = {row["name"]: row for row in (current or {"layers": []})["layers"]}
    # A shared layer is listed under its first name, which may be another one in the file.
    shared = {name for row in here.values() for name in row.get("also", [])}
    # The order is the file's, so that the first difference is the same one on every machine.
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
        arguments_there, arguments_here = (arguments_in(row["norm"]) for row in (a, b))
        # An argument that was left out counts with its default: to type a default is no other swap. Nor is a layer in
        # another place or precision.
        for argument in sorted({*arguments_there, *arguments_here} - {"device", "dtype"}):
            parameter = arguments_of(loaded_class(a["norm"])).get(argument)
            default = parameter.default if parameter is not None else None
            values = [_comparable(args.get(argument, default)) for args in (arguments_there, arguments_here)]
            if values[0] != values[1]:
                return f"{name} ({a['norm']['class_path']}) has {argument}={values[0]} in the file and {values[1]} here"
    return None


def check_manifest(model: nn.Module, checkpoint: Mapping[str, Any], path: str, *, resumes: bool) -> list[str]:
    """Refuse a checkpoint that a swapped model cannot be loaded from.

    Args:
        model: the model, swapped.
        checkpoint: the checkpoint.
        path: of its file, for messages.
        resumes: the optimizer's state is to be loaded as well.

    Returns:
        The parameters that keep their starting values, because the checkpoint is of the network before the swap.

    Raises:
        CheckpointError: it is of another swap, or it has no manifest and the optimizer's state cannot fit.
    """
    saved, current = manifest_in(checkpoint, repr(path)), manifest_of(model)
    if saved is not None:
        _check_same_layers(model, saved, current, checkpoint, path)
        other = difference(saved, current)
        if other:
            raise CheckpointError(
                f"{path!r} is a checkpoint of another swap: {other}. Type NormSwap(plan={path!r}) to swap as it was "
                "swapped there, or the arguments that it was trained with."
            )
        return []
    # Without a manifest the file may be of the network before the swap. Its weights fit, and what the normalizers learn
    # beyond them starts anew; the optimizer's state is per parameter and cannot be filled up.
    missing = missing_parameters(model, checkpoint.get("state_dict", {})) if current is not None else []
    if missing and resumes:
        raise CheckpointError(
            f"{path!r} is a checkpoint of the network before the swap: it has no {missing[0]}, so the state of its "
            f"optimizer does not fit. To start from its weights alone, leave out ckpt_path and type NormSwap(..., "
            f"warm_start={path!r})."
        )
    return missing


def rebuild_from(model: nn.Module, checkpoint: Mapping[str, Any], where: str = "the checkpoint") -> None:
    """Swap a freshly built model as a checkpoint says; one of a network that was never swapped changes nothing.

    Raises:
        CheckpointError: a layer of the manifest is not in the model, or a parameter of a normalizer is in the
            checkpoint and nothing says how the network was swapped.
    """
    manifest = manifest_in(checkpoint, where)
    if manifest is not None:
        rebuild(model, manifest, where)
        return
    # A file with a normalizer's parameters and no manifest would load with strict=False and lose them without a word.
    for name, key in unplaced_parameters(model, checkpoint.get("state_dict", {})).items():
        raise CheckpointError(
            f"{where} holds {name!r} of {key!r}, and neither says what was swapped nor does "
            f"{type(model).__name__} swap by itself. Call lightning_norm.swap in its __init__, as in training."
        )


def _check_same_layers(
    model: nn.Module,
    saved: Mapping[str, Any],
    current: Mapping[str, Any] | None,
    checkpoint: Mapping[str, Any],
    path: str,
) -> None:
    """Refuse a file of a network with more or fewer layers: no swap would make it fit.

    Raises:
        CheckpointError: a swapped layer of the one is not in the other.
    """
    modules, clean, who = modules_by_name(model), name_cleaner(model), type(model).__name__
    # Without a row there may be weights, of a layer that was not swapped; and with one none, which the user took out.
    in_file = {clean(name).rpartition(".")[0] for name in checkpoint.get("state_dict", {})}
    in_file = in_file and in_file.union(*map(_names, saved["layers"]))
    found = [
        f"has {row['norm']['class_path']} at {row['name']!r}, and this {who} has nothing there"
        for row in saved["layers"]
        if not modules.keys() & _names(row)
    ]
    found += [
        f"has nothing at {row['name']!r}, and this {who} has {row['norm']['class_path']} there"
        for row in (current or {"layers": []})["layers"]
        if in_file and not in_file & _names(row) and modules[row["name"]].state_dict()
    ]
    if found:
        raise CheckpointError(f"{path!r} {found[0]}. Build it with the arguments it was trained with.")


def _names(row: Mapping[str, Any]) -> set[str]:
    """Return all names that a row says its layer has."""
    return {row["name"], *row.get("also", ())}


def missing_parameters(model: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    """Return the parameters of swapped layers that a ``state_dict`` does not hold, or holds in another size.

    Args:
        model: swapped.
        state_dict: of a checkpoint, under whatever names its wrappers gave.
    """
    clean = name_cleaner(model)
    saved = {clean(name): value for name, value in state_dict.items()}
    parameters = [
        (f"{name}.{n}", p)
        for name, layer in named_normalizers(model)
        if layer.origin is not None
        for n, p in layer.named_parameters(recurse=False)
    ]
    return [n for n, p in parameters if not isinstance(saved.get(n), Tensor) or saved[n].numel() != p.numel()]


def unplaced_parameters(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters that only a normalizer has and whose layer in the model has none: name -> key.

    Args:
        model: as it was built.
        state_dict: of a checkpoint.
    """
    # By names that no layer of torch's has: a weight alone tells nothing.
    keys = {name: key for key, cls in normalizers().items() for name in cls.extra_parameters}
    clean, modules = name_cleaner(model), modules_by_name(model)
    unplaced: dict[str, str] = {}
    for name in state_dict:
        layer_name, _, parameter = clean(name).rpartition(".")
        layer = modules.get(layer_name)
        if parameter in keys and layer is not None and parameter not in dict(layer.named_parameters(recurse=False)):
            unplaced[name] = keys[parameter]
    return unplaced


def load_weights(model: nn.Module, checkpoint: Mapping[str, Any], path: str, strict: bool = True) -> None:
    """Load the weights of a checkpoint of this network, before or after its swap, and nothing else of it.

    If it fails, the model is as it was.

    Args:
        model: swapped or not.
        checkpoint: as :func:`lightning_norm.surgery.checkpoint_files.read_checkpoint` returns it.
        path: of its file, for messages.
        strict: as for ``load_state_dict``.

    Raises:
        CheckpointError: the file is of another swap, or does not fit.
    """
    saved = manifest_in(checkpoint, repr(path))
    # Before anything is loaded: two swaps may have tensors of the same names and shapes.
    current = manifest_of(model)
    if saved is not None:
        _check_same_layers(model, saved, current, checkpoint, path)
    other = None if saved is None else difference(saved, current)
    if other:
        raise CheckpointError(
            f"{path!r} is a checkpoint of another swap: {other}. NormSwap(plan={path!r}) swaps as it was swapped there."
        )
    try:
        # torch loads what fits before it raises for what does not.
        with unchanged_on_error(list(model.modules())):
            model.load_state_dict(rename_for_wrappers(model, checkpoint["state_dict"]), strict=strict)
    except RuntimeError as error:
        keys = [] if "load_published" in str(error) else published_keys(normalizers(), checkpoint["state_dict"])
        hint = f" The file is as the authors' code of {keys[0]!r} writes it. {convert_first(keys[0])}" if keys else ""
        raise CheckpointError(
            f"the weights of {path!r} do not fit this {type(model).__name__}: {error}{hint}"
        ) from error


def _manifest(layers: list[dict[str, Any]], version: str) -> dict[str, Any]:
    return {"format": FORMAT, "version": version, "layers": layers}


def _entry(
    names: list[str], origin: Mapping[str, Any], options: Mapping[str, Any], target: str, num_features: int | None
) -> dict[str, Any]:
    """Return the row of a layer."""
    # Wrappers that are left out of names can give one module the same name twice.
    row = {"name": names[0], "also": list(dict.fromkeys(names[1:])), "target": target, "num_features": num_features}
    more = {k: origin[k] for k in ("source", "norm", "before", "activation") if k in origin}
    return {**row, **more, "options": dict(options)}


def _other_class(modules: Mapping[str, nn.Module], row: Mapping[str, Any], where: str = "the file") -> str | None:
    """Return what a layer is, if it is not what the row says."""
    module = modules.get(row["name"])
    if type(module) is loaded_class(row["norm"], where):
        return None
    return "nothing" if module is None else type(module).__name__


def _check_scheduled(row: Mapping[str, Any], where: str) -> None:
    """Check the scheduled values of a row.

    Raises:
        CheckpointError: the file, the row, and the value that is out of its range.
    """
    cls = loaded_class(row["norm"], where)
    for name, value in (row.get("options") or {}).get("scheduled", {}).items():
        if name in cls.ranges:
            try:
                cls.ranges[name].check(cls.__name__, name, value)
            except ValueError as error:
                raise CheckpointError(f"{where}, row {row['name']!r}: {error}") from error


def _set_options(layer: nn.Module, options: Mapping[str, Any]) -> None:
    """Set on a layer what the file has beside the normalizer's arguments."""
    assert isinstance(layer, Normalizer)
    layer.sync, layer.sync_group = options.get("sync", True), options.get("sync_group", "world")
    # Entries that a file of an earlier version lacks have the defaults of a swap.
    backend = options.get("backend", "auto")
    # The file may be read where there is no GPU: "auto" takes the kernels as well, where they can run.
    layer.backend = "auto" if backend == "triton" else backend
    for name, value in options.get("scheduled", {}).items():
        if name in layer.ranges:
            setattr(layer, name, value)
    if options.get("frozen") and layer.has_running_stats:
        layer.freeze_statistics()
    if options.get("compile"):
        layer.compile()


def _comparable(value: Any) -> Any:
    """Return a value in which tuples are lists, as YAML and JSON write them."""
    return [_comparable(v) for v in value] if isinstance(value, (list, tuple)) else value


def _subclasses(cls: type[Normalizer]) -> Iterator[type[Normalizer]]:
    """Yield all classes below one, at any depth."""
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)

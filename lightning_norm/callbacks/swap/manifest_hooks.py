"""Checkpoints of swapped networks in Lightning: the two hooks of the module, and ``load_from_checkpoint``."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lightning_norm.callbacks.lightning_compat import pl, rank_zero_info
from lightning_norm.callbacks.patching import Patches, is_patched
from lightning_norm.errors import CheckpointError
from lightning_norm.layers.swap_record import MANIFEST_KEY
from lightning_norm.surgery.files import File, check_file, read_checkpoint, unreadable
from lightning_norm.surgery.manifest import (
    difference,
    fit_names,
    lacks_parameters,
    learned_without_a_place,
    load_weights,
    manifest_in,
    manifest_of,
    rebuild,
)

Module = TypeVar("Module", bound=pl.LightningModule)


def patch_checkpoint_hooks(patches: Patches, pl_module: pl.LightningModule, resumes: bool) -> None:
    """Let the module's own checkpoint hooks write the manifest and compare it, in copies of the module as well.

    Lightning calls ``LightningModule.on_save_checkpoint`` for weights-only files too, and ``on_load_checkpoint`` before
    anything of the file is loaded; those of callbacks come too late or not at all.

    Args:
        patches: who undoes it.
        pl_module: the module.
        resumes: the optimizer's state is loaded as well.
    """
    if is_patched(pl_module, "on_save_checkpoint", save_with_manifest):
        return  # a second NormSwap in the Trainer would say everything twice
    save = functools.partial(save_with_manifest, pl_module)
    load = functools.partial(load_with_manifest, pl_module, resumes=resumes)
    patches.wrap(pl_module, "on_save_checkpoint", save, follows_copies=True)
    patches.wrap(pl_module, "on_load_checkpoint", load, follows_copies=True)


def save_with_manifest(pl_module: pl.LightningModule, original: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
    """Add the manifest of the module as it is now, then call the module's own hook."""
    write_manifest(pl_module, checkpoint)
    original(checkpoint)


def load_with_manifest(
    pl_module: pl.LightningModule, original: Callable[..., Any], checkpoint: dict[str, Any], *, resumes: bool
) -> None:
    """Check, call the module's own hook, and rename what torch.compile has named differently."""
    check_manifest(pl_module, checkpoint, resumes)
    original(checkpoint)
    _fit(pl_module, checkpoint)


def check_manifest(pl_module: pl.LightningModule, checkpoint: dict[str, Any], resumes: bool) -> None:
    """Refuse a checkpoint of another swap before anything of it is loaded.

    Raises:
        CheckpointError: the manifests differ, or there is none and the optimizer's state cannot fit.
    """
    path = _checkpoint_path(pl_module)
    saved, current = manifest_in(checkpoint), manifest_of(pl_module)
    if saved is not None:
        other = difference(saved, current)
        if other:
            raise CheckpointError(
                f"{path!r} is a checkpoint of another swap: {other}. Type NormSwap(plan={path!r}) to swap as it "
                "was swapped there, or the arguments that it was trained with."
            )
    elif current is not None:
        lacking = lacks_parameters(pl_module, checkpoint.get("state_dict", {}))
        if lacking and resumes:
            raise CheckpointError(
                f"{path!r} is a checkpoint of the network before the swap: it has no {lacking[0]}, so the state of "
                f"its optimizer does not fit. To start from its weights alone, leave out ckpt_path and type "
                f"NormSwap(..., warm_start={path!r})."
            )
        if lacking:
            rank_zero_info(
                f"NormSwap: {path!r} is of the network before the swap; {len(lacking)} parameters of the "
                f"normalizers (first: {lacking[0]}) keep their starting values."
            )


def _checkpoint_path(pl_module: pl.LightningModule) -> str:
    try:
        trainer = pl_module.trainer
    except RuntimeError:  # a copy of the module that no Trainer runs
        return "the checkpoint"
    return str(trainer.ckpt_path or "the checkpoint")


def write_manifest(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Add the manifest to a checkpoint, if the module holds swapped layers."""
    manifest = manifest_of(module)
    if manifest is not None:
        checkpoint[MANIFEST_KEY] = manifest


def reading(original: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    """Read a checkpoint for the Trainer, and name the path and the reason where that fails."""
    check_file(path, kwargs.get("weights_only", args[0] if args else None))
    try:
        return original(path, *args, **kwargs)
    except (FileNotFoundError, IsADirectoryError):
        raise
    except Exception as error:
        raise unreadable(path, error) from error


def start_from(module: pl.LightningModule, path: str) -> None:
    """Load the weights of a checkpoint, of the network before or after the swap, and nothing else of it."""
    load_weights(module, read_checkpoint(path), path, strict=module.strict_loading)
    rank_zero_info(f"NormSwap: weights of {path!r} loaded; optimizer, epoch and step start anew.")


def load_from_checkpoint(
    cls: type[Module], path: File, map_location: Any = None, strict: bool | None = None, **kwargs: Any
) -> Module:
    """Build a module from a checkpoint, swap it as the checkpoint says, and load it.

    What ``cls.load_from_checkpoint`` does, with the swap between building and loading. A checkpoint of a network that
    was never swapped is loaded as it is.

    Args:
        cls: the LightningModule's class.
        path: the file; one of WeightAveraging gives the averaged weights.
        map_location: where tensors go, as in :func:`torch.load`.
        strict: every key must match; by default what the module says (``strict_loading``), which is True.
        kwargs: ``hparams_file``, ``weights_only``, and arguments of ``cls`` that win over the saved ones.

    Raises:
        CheckpointError: the file cannot be read, or its swap does not fit the module.
        FileNotFoundError: the file does not exist.

    >>> import lightning_norm
    >>> lightning_norm.load_from_checkpoint(pl.LightningModule, "nowhere.ckpt")
    Traceback (most recent call last):
    FileNotFoundError: no checkpoint 'nowhere.ckpt': the file does not exist.
    """
    weights_only = kwargs.pop("weights_only", None)
    held = check_file(path, weights_only)
    if held and "pytorch-lightning_version" not in held:
        raise CheckpointError(
            f"{str(path)!r} holds weights alone and was not written by a Trainer: build the {cls.__name__}, swap it "
            "and load them with load_state_dict."
        )
    if not held:
        read_checkpoint(path, "cpu", weights_only)
    with _rebuilding(cls):
        return cls.load_from_checkpoint(
            Path(path), map_location=map_location, strict=strict, weights_only=weights_only, **kwargs
        )


_lock = threading.RLock()


@contextmanager
def _rebuilding(cls: type[pl.LightningModule]) -> Iterator[None]:
    """While it is open, modules of a class or its subclasses rebuild the swap of a checkpoint before they load it.

    Lightning has no hook between building and loading but the module's own ``on_load_checkpoint``.
    """
    with _lock, Patches() as patches:
        for each in _family(cls):
            if each is cls or "on_load_checkpoint" in vars(each):
                patches.wrap(each, "on_load_checkpoint", _rebuild_first)
        yield


def _rebuild_first(original: Callable[..., Any], pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    manifest = manifest_in(checkpoint)
    if manifest is not None:
        rebuild(pl_module, manifest)
    else:
        homeless = learned_without_a_place(pl_module, checkpoint.get("state_dict", {}))
        for name, key in homeless.items():
            raise CheckpointError(
                f"the checkpoint holds {name!r} of {key!r}, and neither says what was swapped nor does "
                f"{type(pl_module).__name__} swap by itself. Call lightning_norm.swap in its __init__, as in training."
            )
    original(pl_module, checkpoint)
    _fit(pl_module, checkpoint)


def _family(cls: Any) -> Iterator[Any]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _family(sub)


def _fit(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    for states in ("state_dict", "current_model_state"):
        if states in checkpoint:
            checkpoint[states] = fit_names(module, checkpoint[states])

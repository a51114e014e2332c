"""Checkpoints of swapped networks in Lightning: the two hooks of the module, and ``load_from_checkpoint``."""

from __future__ import annotations

import functools
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lightning_norm.callbacks.lightning_compat import pl, rank_zero_info
from lightning_norm.callbacks.patching import Patches, is_patched
from lightning_norm.errors import CheckpointError, counted
from lightning_norm.surgery.checkpoint_files import File, check_file, is_url, read_checkpoint, unreadable
from lightning_norm.surgery.manifest import check_manifest, load_weights, rebuild_from, write_manifest
from lightning_norm.surgery.walk import rename_for_wrappers

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
    path = _checkpoint_path(pl_module)
    # Before the module's own hook, which may look for tensors that only the swapped network has.
    unchanged = check_manifest(pl_module, checkpoint, path, resumes=resumes)
    if unchanged:
        rank_zero_info(
            f"NormSwap: {path!r} is of the network before the swap; "
            f"{counted(len(unchanged), 'parameter')} of the normalizers (first: {unchanged[0]}) at the starting value."
        )
    original(checkpoint)
    _rename_states(pl_module, checkpoint)


def _checkpoint_path(pl_module: pl.LightningModule) -> str:
    """Return the path of the file that is being loaded, for messages."""
    try:
        trainer = pl_module.trainer
    except RuntimeError:  # a copy of the module that no Trainer runs
        return "the checkpoint"
    return str(trainer.ckpt_path or "the checkpoint")


def reading(original: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    """Read a checkpoint for the Trainer, and name the path and the reason where that fails."""
    # By position or by name, as Lightning's versions call it.
    weights_only = kwargs.get("weights_only", args[0] if args else None)
    check_file(path, weights_only)
    if is_url(path) and weights_only is None:
        # Lightning's default is to run whatever code the pickle at a URL holds.
        args, kwargs = (), {**kwargs, "weights_only": True}
    try:
        return original(path, *args, **kwargs)
    except (FileNotFoundError, IsADirectoryError):
        # These say themselves what is wrong, and a folder may be a checkpoint of a sharded strategy.
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
    if not isinstance(cls, type) or isinstance(path, type):
        raise TypeError(
            f"load_from_checkpoint expects the class of the module and then the path, got {cls!r} and {path!r}."
        )
    weights_only = kwargs.pop("weights_only", None)
    # The file is checked before Lightning builds the module, which may take long.
    content = check_file(path, weights_only)
    if content and "pytorch-lightning_version" not in content:
        raise CheckpointError(
            f"{str(path)!r} holds weights alone and was not written by a Trainer: build the {cls.__name__}, swap it "
            "and load them with load_state_dict."
        )
    url = is_url(path)
    if not content and not url:
        read_checkpoint(path, "cpu", weights_only)
    arguments = {"map_location": map_location, "strict": strict, **kwargs}
    try:
        with _rebuilding(cls, repr(str(path))):
            if url:  # where Lightning's default is to run whatever code the pickle holds
                safe = True if weights_only is None else weights_only
                return cls.load_from_checkpoint(str(path), weights_only=safe, **arguments)
            return cls.load_from_checkpoint(Path(path), weights_only=weights_only, **arguments)
    except pickle.UnpicklingError as error:
        raise unreadable(path, error) from error


_lock = threading.RLock()


@contextmanager
def _rebuilding(cls: type[pl.LightningModule], where: str) -> Iterator[None]:
    """While it is open, modules of a class or its subclasses rebuild the swap of a checkpoint before they load it.

    Lightning has no hook between building and loading but the module's own ``on_load_checkpoint``.
    """
    # Classes are patched, so that two threads which load at once must not undo each other's patches.
    with _lock, Patches() as patches:
        # LightningModule.load_from_checkpoint may build a subclass, whose own hook would hide that of the class.
        for each in _with_subclasses(cls):
            if each is cls or "on_load_checkpoint" in vars(each):
                patches.wrap(each, "on_load_checkpoint", functools.partial(_rebuild_first, where))
        yield


def _rebuild_first(
    where: str, original: Callable[..., Any], pl_module: pl.LightningModule, checkpoint: dict[str, Any]
) -> None:
    """Swap the module as the checkpoint says, and then let its own hook see a ``state_dict`` of its names."""
    rebuild_from(pl_module, checkpoint, where)
    original(pl_module, checkpoint)
    _rename_states(pl_module, checkpoint)


def _with_subclasses(cls: Any) -> Iterator[Any]:
    """Yield a class and all classes below it."""
    yield cls
    for sub in cls.__subclasses__():
        yield from _with_subclasses(sub)


def _rename_states(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Give the entries of a checkpoint's states the names that they have in the module."""
    # WeightAveraging writes the averaged weights as state_dict, and those being trained beside them.
    for states in ("state_dict", "current_model_state"):
        if states in checkpoint:
            checkpoint[states] = rename_for_wrappers(module, checkpoint[states])

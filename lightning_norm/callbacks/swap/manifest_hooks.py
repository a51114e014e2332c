"""Checkpoints of swapped networks in Lightning: the two hooks of the module, and ``load_from_checkpoint``."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_norm.errors import CheckpointError
from lightning_norm.surgery.checkpoint_files import File, check_file, read_checkpoint, unreadable
from lightning_norm.surgery.manifest import check_manifest, load_weights, rebuild_from, write_manifest
from lightning_norm.surgery.walk import rename_for_wrappers

Module = TypeVar("Module", bound=pl.LightningModule)


class ModuleHook:
    """Stands on one module in place of a method and calls it; a copy or a pickle of the module takes it along.

    Args:
        module: the module.
    """

    name: ClassVar[str]

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        # LightningCLI and other callbacks put functions on the instance as well: theirs is called, and comes back.
        self.instance_attribute = module.__dict__.get(self.name)

    def original(self, checkpoint: dict[str, Any]) -> None:
        """Call the module's own method."""
        # The class is asked at the call, and not when the hook is put on: load_from_checkpoint patches classes.
        if self.instance_attribute is not None:
            self.instance_attribute(checkpoint)
        else:
            getattr(type(self.module), self.name)(self.module, checkpoint)

    def put_on(self) -> None:
        """Take the method's place, once."""
        if not isinstance(self.instance_attribute, type(self)):
            self.module.__dict__[self.name] = self

    def take_off(self) -> None:
        """Put back what was there."""
        if self.module.__dict__.get(self.name) is self:
            del self.module.__dict__[self.name]
            if self.instance_attribute is not None:
                self.module.__dict__[self.name] = self.instance_attribute


class WriteManifest(ModuleHook):
    """``on_save_checkpoint`` that adds the manifest; Lightning calls it for weights-only files too."""

    name = "on_save_checkpoint"

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Add the manifest of the module as it is now, then call the module's own hook."""
        write_manifest(self.module, checkpoint)
        self.original(checkpoint)


class CheckManifest(ModuleHook):
    """``on_load_checkpoint`` that refuses a checkpoint of another swap before anything of it is loaded.

    Args:
        module: the module.
        resumes: the optimizer's state is loaded as well.
    """

    name = "on_load_checkpoint"

    def __init__(self, module: pl.LightningModule, resumes: bool) -> None:
        super().__init__(module)
        self.resumes = resumes

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Check, call the module's own hook, and rename what torch.compile has named differently."""
        path = _path_of(self.module)
        unchanged = check_manifest(self.module, checkpoint, path, resumes=self.resumes)
        if unchanged:
            rank_zero_info(
                f"NormSwap: {path!r} is of the network before the swap; {len(unchanged)} parameters of the normalizers "
                f"(first: {unchanged[0]}) keep their starting values."
            )
        self.original(checkpoint)
        _rename_states(self.module, checkpoint)


def _path_of(module: pl.LightningModule) -> str:
    try:
        return str(module.trainer.ckpt_path or "the checkpoint")
    except RuntimeError:  # no Trainer is attached to a copy of the module
        return "the checkpoint"


def reading(original: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    """Read a checkpoint for the Trainer, and name the path and the reason where that fails."""
    check_file(path, kwargs.get("weights_only", args[0] if args else None))
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
    weights_only = kwargs.pop("weights_only", None)
    # The file is checked before Lightning builds the module, which may take long.
    content = check_file(path, weights_only)
    if content and "pytorch-lightning_version" not in content:
        raise CheckpointError(
            f"{str(path)!r} holds weights alone and was not written by a Trainer: build the {cls.__name__}, swap it "
            "and load them with load_state_dict."
        )
    if not content:
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
    # Classes are patched, so that two threads which load at once must not undo each other's patches.
    with _lock:
        patched: list[tuple[Any, Any]] = []
        # LightningModule.load_from_checkpoint may build a subclass, whose own hook would hide that of the class.
        for each in _with_subclasses(cls):
            if each is cls or "on_load_checkpoint" in each.__dict__:
                patched.append((each, each.__dict__.get("on_load_checkpoint")))
                each.on_load_checkpoint = _rebuild_first(each.on_load_checkpoint)
        try:
            yield
        finally:
            for each, defined in patched:
                if defined is None:
                    del each.on_load_checkpoint
                else:
                    each.on_load_checkpoint = defined


def _rebuild_first(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def on_load_checkpoint(self: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        rebuild_from(self, checkpoint)
        original(self, checkpoint)
        _rename_states(self, checkpoint)

    return on_load_checkpoint


def _with_subclasses(cls: Any) -> Iterator[Any]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _with_subclasses(sub)


def _rename_states(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    # WeightAveraging writes the averaged weights as state_dict, and those being trained beside them.
    for states in ("state_dict", "current_model_state"):
        if states in checkpoint:
            checkpoint[states] = rename_for_wrappers(module, checkpoint[states])

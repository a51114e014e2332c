"""Training batches, as the training loop would hand them to the model, for callbacks that read them by themselves."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_norm.callbacks.lightning_compat import is_overridden, pl
from lightning_norm.surgery.restore import stream_in


def as_in_training(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """Return a batch of a loader in the precision and on the device of the training, after the hooks on transfers.

    Args:
        trainer: whose strategy moves it and whose precision plugin converts it.
        pl_module: whose ``on_before_batch_transfer`` it goes through, unless the DataModule has its own.
        batch: as the loader returns it.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    # Lightning chooses between the hooks of the two in this way, and offers the choice in private only.
    datamodule = getattr(trainer, "datamodule", None)
    hooks: Any = datamodule if is_overridden("on_before_batch_transfer", datamodule) else pl_module
    batch = hooks.on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def refuse_stream(who: str, loaders: Iterable[Any]) -> None:
    """Refuse training data that another reading may not get again.

    Raises:
        ValueError: one of them is an iterator or an IterableDataset, or reads from one.
    """
    for loader in loaders:
        if (stream := stream_in(loader)) is not None:
            raise ValueError(
                f"{who} would take samples of a stream ({type(stream).__name__}) that the training then misses or has "
                f"not seen yet. Type {who}(loader=...): other data, or this very loader if each reading of it starts "
                "anew."
            )


def import_function(who: str, argument: str, path: str | Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Return a function, or import it by its dotted path.

    >>> import_function("NormContext", "context_fn", "math.sqrt")(9)
    3.0

    Args:
        who: the callback, for messages.
        argument: its argument, for messages.
        path: the function itself, its dotted path, or ``None``.

    Raises:
        ValueError: there is none.
    """
    if path is None or callable(path):
        return path
    try:
        function = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{who}: cannot import {argument}={path!r}: {error}. Check the dotted path.") from error
    if not callable(function):
        raise ValueError(f"{who}: {argument}={path!r} is no function but {type(function).__name__}.")
    return function  # type: ignore[no-any-return]


def loader_of(who: str, loader: Any) -> Any:
    """Return an iterable of batches: the argument, or what the function that it is or names returns.

    >>> list(loader_of("NormRecalibrate", lambda: [1, 2]))
    [1, 2]

    Args:
        who: the callback, for messages.
        loader: an iterable, a function, or its dotted path.

    Raises:
        ValueError: no such function, or nothing that can be read batch by batch.
    """
    if isinstance(loader, str) or (callable(loader) and not hasattr(loader, "__iter__")):
        function = import_function(who, "loader", loader)
        assert function is not None
        loader = function()
    if not hasattr(loader, "__iter__"):
        raise ValueError(
            f"{who}: loader must be an iterable of batches, or a function that returns one, got {loader!r}."
        )
    return loader


def part_of(batch: Any, key: str | int | None) -> Any:
    """Return what a batch holds under a key or an index, ``None`` for nothing."""
    try:
        return batch[key]
    except (KeyError, IndexError, TypeError):
        return None


def shape_of(batch: Any) -> str:
    """Describe a batch, for messages."""
    if isinstance(batch, Mapping):
        return f"a mapping with the keys {sorted(map(str, batch))}"
    return f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (list, tuple)) else "")

"""Parameters that stop to move in the middle of a training.

Where a wrapper of the model waits for the gradients of the parameters it has seen at its start, as
DistributedDataParallel does, they keep their gradients until just before the optimizer's step and lose them there.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lightning_norm.callbacks.lightning_compat import pl
from lightning_norm.layers.arguments import as_int


def check_epoch(what: str, epoch: int | None) -> int | None:
    """Return an epoch, counted from 0, or ``None`` for never.

    Raises:
        ValueError: not an int, or below 0.
    """
    number = as_int(epoch)
    if epoch is not None and (number is None or number < 0):
        raise ValueError(f"{what} must be an epoch (an int >= 0) or None, got {epoch!r}.")
    return number


def may_stop_gradients(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Tell whether parameters may stop to require gradients: no wrapper waits for those."""
    # Whatever wraps the module stands there in its place.
    return trainer.strategy.model is pl_module


def drop_gradients(parameters: Iterable[Tensor | None]) -> None:
    """Drop the gradients of what does not move any more, just before the optimizer's step."""
    for p in parameters:
        if p is not None:
            # None and not zero: momentum and weight decay would move the parameter all the same.
            p.grad = None

"""Everything public of Lightning that the callbacks and plugins use, imported in one place.

Lightning is published under two names, ``lightning.pytorch`` and ``pytorch_lightning``, with the same code and with
classes of their own. This package serves both: a Trainer calls callbacks by the names of their hooks, and what depends
on a class of Lightning asks :func:`is_instance`, which knows both by their names and imports neither.
"""

from __future__ import annotations

import re
import sys
from typing import Any, TypeGuard, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning_utilities.core.overrides import is_overridden as differs_from

__all__ = [
    "BaseFinetuning",
    "Callback",
    "CombinedLoader",
    "DDPStrategy",
    "EarlyStopping",
    "FSDPStrategy",
    "GradientAccumulationScheduler",
    "Logger",
    "ModelCheckpoint",
    "ModelPruning",
    "StochasticWeightAveraging",
    "TensorBoardLogger",
    "TorchSyncBatchNorm",
    "WeightAveraging",
    "callbacks_of",
    "is_instance",
    "is_overridden",
    "lightning_base",
    "pl",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "take_as_layer_sync",
]


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer, an attribute that Lightning sets where type checkers do not see it."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


T = TypeVar("T")
NAMES = r"^(lightning\.pytorch|pytorch_lightning)\b"
"""The two names of Lightning, at the beginning of a module's name."""


def lightning_base(value: Any, kind: type[T]) -> type[T] | None:
    """Return the class that ``kind`` is or has as its twin under the other name, where ``value`` is an instance of it.

    Args:
        value: anything.
        kind: a class of Lightning, from either.

    >>> lightning_base(pl.LightningModule(), pl.LightningModule) is pl.LightningModule
    True
    >>> lightning_base(3, pl.LightningModule)
    """
    # By names, so that no comparison imports the package of the other name.
    module = kind.__module__
    modules = (re.sub(NAMES, "lightning.pytorch", module), re.sub(NAMES, "pytorch_lightning", module))
    named = (c for c in type(value).__mro__ if c.__qualname__ == kind.__qualname__ and c.__module__ in modules)
    return next(named, None)


def is_instance(value: Any, *kinds: type[T]) -> TypeGuard[T]:
    """Tell whether a value is of one of Lightning's classes, under either name of Lightning.

    >>> is_instance(EarlyStopping("loss"), EarlyStopping, ModelCheckpoint)
    True
    """
    return any(lightning_base(value, kind) is not None for kind in kinds)


def is_overridden(name: str, holder: Any) -> bool:
    """Tell whether a LightningModule or a LightningDataModule has a method of its own in place of Lightning's.

    >>> is_overridden("forward", pl.LightningModule())
    False
    """
    kinds: tuple[type[Any], ...] = (pl.LightningModule, pl.LightningDataModule)
    return any(differs_from(name, holder, base) for kind in kinds if (base := lightning_base(holder, kind)) is not None)


def take_as_layer_sync(kind: type[LayerSync]) -> None:
    """Let a Trainer of ``pytorch_lightning`` take a plugin of ours, which it looks up by its own base class."""
    # Whoever has such a Trainer has imported its package.
    twin = sys.modules.get("pytorch_lightning.plugins.layer_sync")
    if twin is not None:
        # Of the class itself, beside which ``Trainer(sync_batchnorm=True)`` takes no plugin of another.
        twin.TorchSyncBatchNorm.register(kind)

"""Everything public of Lightning that the callbacks and plugins use, imported in one place.

Lightning is published under two names, ``lightning.pytorch`` and ``pytorch_lightning``, whose classes do not mix. What
is to serve both has this one file to choose in.
"""

from __future__ import annotations

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
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

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
    "is_overridden",
    "isolate_rng",
    "pl",
    "rank_zero_info",
    "rank_zero_warn",
]


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer, an attribute that Lightning sets where type checkers do not see it."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks

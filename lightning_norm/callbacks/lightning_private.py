"""Every private name of Lightning and torch that the callbacks and plugins read, each with its reason.

Nothing private is replaced anywhere. ``tests/callbacks/test_lightning_private.py`` asks the real classes for each name
and fails when one has disappeared.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import nn

from lightning_norm.callbacks.lightning_compat import CombinedLoader, TensorBoardLogger, is_instance, pl
from lightning_norm.surgery.torch_private import without_iterator


def starts_processes(trainer: pl.Trainer) -> bool:
    """Tell whether the strategy spawns or forks its processes, as ``ddp_spawn`` and ``ddp_notebook`` do.

    ``_MultiProcessingLauncher``: strategies of both kinds are ``DDPStrategy``, and only the launcher tells.
    """
    return is_instance(trainer.strategy.launcher, _MultiProcessingLauncher)


def synchronizes_batchnorm(trainer: pl.Trainer) -> bool:
    """Tell whether the Trainer has ``sync_batchnorm=True`` or a plugin for it.

    ``Strategy._layer_sync``: the Trainer keeps its argument nowhere else.
    """
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def averaged_model(callback: Any) -> nn.Module | None:
    """Return the copy of the network that WeightAveraging or StochasticWeightAveraging averages into.

    ``_average_model`` of both: whether the copy has the layers of the network is seen nowhere else.
    """
    # Missing before the callback's setup, and None before the averaging starts.
    average: nn.Module | None = getattr(callback, "_average_model", None)
    return average


def fresh_training_loader(trainer: pl.Trainer) -> CombinedLoader:
    """Return the training data once more, combined in the same way, with iterators of its own.

    ``_FitLoop._combined_loader`` and ``CombinedLoader._mode``: ``Trainer.train_dataloader`` is without the mode.
    """
    # A mode such as "sequential" changes what a batch is, not only how many there are.
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    fresh = CombinedLoader(combined.iterables, combined._mode)
    fresh.flattened = [without_iterator(loader) for loader in fresh.flattened]
    return fresh


def tag_prefix(logger: TensorBoardLogger) -> str:
    """Return what the logger puts before each tag.

    ``TensorBoardLogger._prefix``: the argument is kept nowhere else.
    """
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""


def event_writer(logger: TensorBoardLogger) -> Any:
    """Return what writes ready-made summaries into the event file.

    ``SummaryWriter._get_file_writer``: ``add_scalar`` writes one event per scalar, ten times as slow.
    """
    return logger.experiment._get_file_writer()


def logs_hyperparameters(holder: pl.LightningModule | pl.LightningDataModule) -> bool:
    """Tell whether ``save_hyperparameters`` was called with ``logger=True``.

    ``_log_hyperparams``: the hyper-parameters themselves do not say whether they are logged.
    """
    return bool(holder._log_hyperparams)

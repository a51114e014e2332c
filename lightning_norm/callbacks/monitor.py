"""NormMonitor: what the normalizers have learned, in any logger."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_norm.errors import NoEffectWarning
from lightning_norm.normalizers.base import Normalizer


class NormMonitor(Callback):
    """Log each layer's learned quantities, such as the importance weights of switchable normalization.

    Tags read ``norm/<key>/<quantity>/<layer name>``: ``norm/sn/mean_bn/net.layer1.0.bn1``. All values of a step leave
    the device in one transfer, and only in the steps that are logged.

    Args:
        every_n_steps: cadence; the Trainer's ``log_every_n_steps`` by default.
        prefix: first part of the tags.

    Raises:
        ValueError: ``every_n_steps`` is not a positive int.
    """

    def __init__(self, every_n_steps: int | None = None, prefix: str = "norm") -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"NormMonitor: every_n_steps must be at least 1 or None, got {every_n_steps!r}.")
        self.every_n_steps, self.prefix = every_n_steps, prefix
        self._last = -1

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = -1
        if not trainer.loggers:
            warnings.warn(
                "NormMonitor logs nothing: the Trainer has no logger. Pass logger=True.", NoEffectWarning, stacklevel=2
            )
        elif not self.quantities(pl_module):
            warnings.warn(
                "NormMonitor logs nothing: no layer of the model has anything to show.", NoEffectWarning, stacklevel=2
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step that Lightning's own monitors log at
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % every == 0:
            self._log(trainer, pl_module, step)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer, pl_module, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def quantities(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """Return tag -> 0-dim tensor for every layer that has something to show."""
        return {
            f"{self.prefix}/{layer.key or type(layer).__name__}/{quantity}/{name}": value
            for name, layer in model.named_modules()
            if isinstance(layer, Normalizer)
            for quantity, value in layer.monitor().items()
        }

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if not trainer.loggers or not trainer.is_global_zero or step == self._last:  # gradients accumulate: same step
            return
        self._last = step
        found = self.quantities(pl_module)
        if found:
            values = torch.stack([v.float() for v in found.values()]).tolist()
            for logger in trainer.loggers:
                logger.log_metrics(dict(zip(found, values, strict=True)), step=step)

"""Freeze the kernels of BNET layers in the middle of a training."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl

from lightning_norm.errors import NoEffectWarning
from lightning_norm.normalizers.bnet import BNET


class KernelFreeze:
    """What NormSwap does about ``freeze_kernel_at``.

    Where a wrapper of the model waits for the gradients of the parameters it has seen at its start, as
    DistributedDataParallel does, they keep their gradients until just before the optimizer's step and lose them there.

    Args:
        at: first epoch in which nothing moves; ``None`` for never.

    Raises:
        ValueError: not an int, or below 0.
    """

    def __init__(self, at: int | None) -> None:
        if at is not None and (not isinstance(at, int) or isinstance(at, bool) or at < 0):
            raise ValueError(f"NormSwap: freeze_kernel_at must be an epoch (an int >= 0) or None, got {at!r}.")
        self.at = at

    def check(self, model: pl.LightningModule) -> None:
        """Warn where there is nothing to freeze."""
        if self.at is not None and not layers(model):
            warnings.warn(
                f"NormSwap: freeze_kernel_at={self.at} freezes nothing: the model holds no BNET layer. Leave it out, "
                "or swap some layers to bnet.",
                NoEffectWarning,
                stacklevel=3,
            )

    def start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Freeze if it is time."""
        if self._now(trainer) and trainer.strategy.model is model:
            for layer in layers(model):
                layer.freeze_kernel()

    def before_step(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Drop the gradients of what is frozen."""
        if self._now(trainer):
            for layer in layers(model):
                for p in (layer.kernel, layer.bias):
                    if p is not None:
                        p.grad = None

    def _now(self, trainer: pl.Trainer) -> bool:
        return self.at is not None and trainer.current_epoch >= self.at


def layers(model: pl.LightningModule) -> list[BNET]:
    """Return the layers with a kernel."""
    return [module for module in model.modules() if isinstance(module, BNET)]

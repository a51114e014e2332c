"""Freeze the kernels of BNET layers in the middle of a training."""

from __future__ import annotations

import warnings

from lightning_norm.callbacks.frozen_parameters import check_epoch, drop_gradients, may_stop_gradients
from lightning_norm.callbacks.lightning_compat import pl
from lightning_norm.errors import NoEffectWarning
from lightning_norm.normalizers.bnet import BNET
from lightning_norm.surgery.walk import normalizers_of


class KernelFreeze:
    """What NormSwap does about ``freeze_kernel_at``.

    Args:
        at: first epoch in which nothing moves; ``None`` for never.

    Raises:
        ValueError: not an int, or below 0.
    """

    def __init__(self, at: int | None) -> None:
        self.at = check_epoch("NormSwap: freeze_kernel_at", at)

    def warn_if_nothing_to_freeze(self, pl_module: pl.LightningModule) -> None:
        """Warn where there is nothing to freeze."""
        # An argument without any effect is most likely a mistake.
        if self.at is not None and not bnet_layers(pl_module):
            warnings.warn(
                f"NormSwap: freeze_kernel_at={self.at} freezes nothing: the model holds no BNET layer. Leave it out, "
                "or swap some layers to bnet.",
                NoEffectWarning,
                stacklevel=3,
            )

    def freeze_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze the kernels from the chosen epoch on."""
        if self._is_due(trainer) and may_stop_gradients(trainer, pl_module):
            for layer in bnet_layers(pl_module):
                layer.freeze_kernel()

    def drop_gradients(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop the gradients of what does not move any more, just before the optimizer's step."""
        if self._is_due(trainer):
            drop_gradients(p for layer in bnet_layers(pl_module) for p in (layer.kernel, layer.bias))

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Tell whether the kernels are frozen in the current epoch."""
        # By the epoch alone, so that a resumed run freezes as the uninterrupted one did.
        return self.at is not None and trainer.current_epoch >= self.at


def bnet_layers(pl_module: pl.LightningModule) -> list[BNET]:
    """Return the layers whose kernel can be frozen."""
    return [layer for layer in normalizers_of(pl_module) if isinstance(layer, BNET)]

"""Freeze the kernels of BNET layers in the middle of a training."""

from __future__ import annotations

import warnings

from lightning_norm.callbacks.lightning_compat import pl
from lightning_norm.errors import NoEffectWarning
from lightning_norm.normalizers.bnet import BNET
from lightning_norm.surgery.walk import normalizers_of


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
        # A wrapper such as DistributedDataParallel would wait for gradients that no longer come.
        if self._is_due(trainer) and trainer.strategy.model is pl_module:
            for layer in bnet_layers(pl_module):
                layer.freeze_kernel()

    def drop_gradients(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop the gradients of what does not move any more, just before the optimizer's step."""
        if self._is_due(trainer):
            for layer in bnet_layers(pl_module):
                for p in (layer.kernel, layer.bias):
                    if p is not None:
                        # None and not zero: momentum and weight decay would move the parameter all the same.
                        p.grad = None

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Tell whether the kernels are frozen in the current epoch."""
        return self.at is not None and trainer.current_epoch >= self.at


def bnet_layers(pl_module: pl.LightningModule) -> list[BNET]:
    """Return the layers whose kernel can be frozen."""
    return [layer for layer in normalizers_of(pl_module) if isinstance(layer, BNET)]

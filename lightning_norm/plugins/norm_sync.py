"""NormSync: ``Trainer(sync_batchnorm=True)`` without harm to our layers, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_norm.callbacks.lightning_compat import (
    TorchSyncBatchNorm,
    is_instance,
    pl,
    rank_zero_info,
    rank_zero_warn,
    take_as_layer_sync,
)
from lightning_norm.callbacks.patching import Patches
from lightning_norm.callbacks.rank_checks import check_same_on_ranks
from lightning_norm.errors import SyncWarning
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.pooling import pause_sync
from lightning_norm.ops.sync import check_group
from lightning_norm.surgery.options import SwapOptions
from lightning_norm.surgery.report import SwapReport
from lightning_norm.surgery.swap import prepare_swap
from lightning_norm.surgery.walk import normalizers_of


class NormSync(TorchSyncBatchNorm):
    """Synchronize torch's BatchNorm layers while a model is fitted, and choose the epoch in which that starts.

    Layers of this package synchronize by themselves and are left whole. torch's (BatchNorm1d to 3d, SyncBatchNorm)
    become ``bn`` for the time of the fit, on the CPU and on CUDA alike, for torch's SyncBatchNorm cannot run on the
    former and breaks the graph under torch.compile; after the fit the very modules are back, with what was learned.
    Checkpoints are those of a plain network all along.

    With ``Trainer(plugins=[NormSync()])``, with or without ``sync_batchnorm=True``. Of Lightning's strategies DDP and
    FSDP call it; with others NormSwap warns. It logs nothing, and prints a line when synchronization begins or ends.

    Args:
        sync_group: of the layers that it converts; as for :func:`lightning_norm.swap`. Others keep their own.
        start_epoch: first epoch, counted from 0, in which statistics are synchronized, of all layers, those of NormSwap
            included; before it, each rank has its own.

    Raises:
        ValueError: a ``sync_group`` or ``start_epoch`` that cannot be.
        RuntimeError: ranks have different layers.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(plugins=[NormSync()], sync_batchnorm=True, logger=False, enable_checkpointing=False)

    Each rank by itself for five epochs, then pooled among the ranks of one machine:

    >>> plugin = NormSync(sync_group="node", start_epoch=5)
    """

    def __init__(self, sync_group: str | int = "world", start_epoch: int = 0) -> None:
        self.sync_group = check_group(sync_group)
        if not isinstance(start_epoch, int) or isinstance(start_epoch, bool) or start_epoch < 0:
            raise ValueError(f"NormSync: start_epoch is an epoch counted from 0, got {start_epoch!r}.")
        self.start_epoch = start_epoch
        self._report: SwapReport | None = None
        self._paused: list[Normalizer] = []
        self._patches = Patches()
        take_as_layer_sync(type(self))

    @override
    def apply(self, model: nn.Module) -> nn.Module:
        """Convert torch's BatchNorm layers; the strategy calls it before it wraps the model.

        Raises:
            RuntimeError: ranks have different layers.
            TypeError: ``start_epoch`` needs the epochs of a Trainer, and this is no LightningModule.
        """
        self.revert(model)  # an earlier fit that was killed by an exception may not have reverted
        # Nothing is checked yet: a model without BatchNorm of torch's is no mistake here.
        report, _, _ = prepare_swap(model, SwapOptions("bn", sync_group=self.sync_group))
        for name, kind, why in report.skipped:
            rank_zero_warn(f"NormSync: {name} ({kind}) is not synchronized: {why}.", category=SyncWarning)
        converted = report.commit()
        normalizers = normalizers_of(model)
        for layer in normalizers:
            if id(layer) in converted:
                layer.origin = None  # checkpoints are to be those of a plain network, without a manifest
        # Only what was converted can be undone.
        self._report = report if converted else None
        lines = [f"{row.name} {row.source} {self}" for row in report.layers] or [str(self)]
        remedy = "Every rank must build the same model and the same NormSync."
        check_same_on_ranks("what NormSync converts", "layers", lines, remedy)
        if self.start_epoch:
            self._pause_until_start(model, normalizers)
        return model

    @override
    def revert(self, model: nn.Module) -> nn.Module:
        """Put the layers back, with what they learned; the strategy calls it when the fit is over."""
        self._patches.undo()
        # First the pauses, because the layers that undo takes out may be among them.
        pause_sync(self._paused, False)
        self._paused = []
        if self._report is not None:
            self._report.undo()
            self._report = None
        return model

    def _pause_until_start(self, model: nn.Module, layers: list[Normalizer]) -> None:
        """Let each rank use its own statistics until the epoch ``start_epoch`` begins."""
        # The current epoch is asked from the module, which knows its Trainer.
        if not is_instance(model, pl.LightningModule):
            raise TypeError(
                f"NormSync(start_epoch={self.start_epoch}) needs the epochs of a LightningModule's Trainer."
            )
        self._paused = layers

        def update(original: Callable[[], Any]) -> Any:
            # Decided anew in every epoch, so that a resumed run starts in the right state.
            paused = model.current_epoch < self.start_epoch
            if pause_sync(layers, paused):
                rank_zero_info(
                    f"NormSync: synchronization is {'off' if paused else 'on'} in epoch {model.current_epoch}"
                )

            return original()

        # A plugin has no hook of its own per epoch, and a resumed epoch begins without on_train_epoch_start.
        for hook in ("on_train_start", "on_train_epoch_start"):
            self._patches.wrap(model, hook, update)

    def __repr__(self) -> str:
        return f"NormSync(sync_group={self.sync_group!r}, start_epoch={self.start_epoch})"

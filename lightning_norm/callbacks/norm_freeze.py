"""NormFreeze: from an epoch on, normalization layers keep their statistics, or what they learn, as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_norm.callbacks.described import Described
from lightning_norm.callbacks.frozen_parameters import check_epoch, drop_gradients, may_stop_gradients
from lightning_norm.callbacks.lightning_compat import Callback, pl, rank_zero_info, rank_zero_warn
from lightning_norm.callbacks.patching import Patches
from lightning_norm.errors import NoEffectWarning, counted
from lightning_norm.layers.arguments import check_flags
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.behind import stays_in_evaluation
from lightning_norm.surgery.options import Pattern, check_pattern
from lightning_norm.surgery.select import choose_layers
from lightning_norm.surgery.torch_layers import TORCH_NORMS
from lightning_norm.surgery.torch_private import TorchRunningNormBase


class NormFreeze(Described, Callback):
    """Freeze normalization layers from an epoch on: those of this package, and torch's own that a model still has.

    Frozen statistics: the layers normalize by their running statistics in training as well, and these stand still,
    whatever calls ``train()``; what the layers learn goes on learning. Everything follows from the epoch alone, so that
    a resumed run is frozen as the uninterrupted one. The end of the run ends it.

    .. code-block:: yaml

        trainer:
          callbacks:
            - {class_path: NormFreeze, init_args: {at_epoch: 60}}
            - {class_path: NormFreeze, init_args: {at_epoch: 0, affine: true, include: "backbone.*"}}

    When: fine-tuning on small batches, or the last epochs of a detector. When not: before statistics have moved at all,
    of which it warns.

    Args:
        at_epoch: first epoch, counted from 0, in which they are frozen; 0 freezes from the start.
        statistics: freeze running statistics.
        affine: freeze what the layers learn: weight, bias, and a kernel, a mixture's weights or a gate.
        include: which layers; as in :func:`lightning_norm.swap`.
        exclude: which layers not; likewise.

    Attributes:
        layers: name -> layer, of what is frozen at this moment.

    Raises:
        ValueError: a bad epoch, nothing to freeze asked for, or a pattern that matches no layer.

    >>> from lightning.pytorch import Trainer
    >>> callbacks = [NormFreeze(at_epoch=5, include="backbone.*")]
    >>> trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        at_epoch: int = 0,
        statistics: bool = True,
        affine: bool = False,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
    ) -> None:
        epoch = check_epoch("NormFreeze: at_epoch", at_epoch)
        if epoch is None:
            raise ValueError("NormFreeze: at_epoch must be an epoch (an int >= 0), got None. Leave out NormFreeze.")
        check_flags("NormFreeze: ", statistics=statistics, affine=affine)
        if not statistics and not affine:
            raise ValueError("NormFreeze(statistics=False, affine=False) freezes nothing. Type affine=True, say.")
        self.at_epoch, self.statistics, self.affine = epoch, statistics, affine
        self.include: Pattern | None = check_pattern("NormFreeze: include", include)
        self.exclude: Pattern | None = check_pattern("NormFreeze: exclude", exclude)
        self.layers: dict[str, nn.Module] = {}
        self._chosen: dict[str, nn.Module] = {}
        self._patches = Patches()
        self._undo: list[Callable[[], None]] = []

    @property
    @override
    def state_key(self) -> str:
        # Several of them differ in what they freeze, and when.
        names = ("at_epoch", "statistics", "affine", "include", "exclude")
        arguments = {name: getattr(self, name) for name in names}
        return f"{type(self).__qualname__}{arguments!r}"

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()
        self._patches.undo_on_exception(trainer.strategy, self._release)
        # Every layer is built and swapped by now.
        norms = (Normalizer, *TORCH_NORMS)
        chosen = choose_layers(pl_module, norms, self.include, self.exclude, "NormFreeze")
        self._chosen = {name: m for name, m in chosen.items() if self._freezes_something(m)}
        if not self._chosen:
            what = " and ".join(n for n in ("statistics", "affine") if getattr(self, n))
            rank_zero_warn(
                f"NormFreeze({what}) freezes nothing: none of {counted(len(chosen), 'normalization layer')} has any. "
                "Leave it out.",
                category=NoEffectWarning,
            )
        # An epoch that is resumed in its middle has no on_train_epoch_start.
        self._freeze_if_due(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._freeze_if_due(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # What wrote ``training`` past train(), as Lightning does behind a validation, is set right.
        for layer in self.layers.values() if self.statistics else ():
            if layer.training and holds_statistics(layer):
                layer.training = False

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self.affine:
            drop_gradients(p for layer in self.layers.values() for p in _learned(layer))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    def _freezes_something(self, layer: nn.Module) -> bool:
        return (self.statistics and holds_statistics(layer)) or (self.affine and bool(_learned(layer)))

    def _freeze_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch < self.at_epoch or self.layers or not self._chosen:
            return
        self.layers = self._chosen
        for layer in self.layers.values():
            if self.statistics and holds_statistics(layer):
                self._freeze_statistics(pl_module, layer)
            # Where a wrapper waits for their gradients, these are dropped before each step instead.
            for p in _learned(layer) if self.affine and may_stop_gradients(trainer, pl_module) else ():
                if p.requires_grad:
                    p.requires_grad_(False)
                    self._undo.append(functools.partial(setattr, p, "requires_grad", True))
        # Once for each freeze, so that the log of a run says in which epoch it began.
        what = [n for n, wanted in (("statistics", self.statistics), ("parameters", self.affine)) if wanted]
        rank_zero_info(
            f"NormFreeze: {' and '.join(what)} of {counted(len(self.layers), 'layer')} are frozen from now on."
        )
        if self.statistics:
            _warn_of_fresh(self.layers)

    def _freeze_statistics(self, pl_module: pl.LightningModule, layer: nn.Module) -> None:
        if isinstance(layer, Normalizer):
            if not stays_in_evaluation(layer):
                self._undo.append(functools.partial(_release_statistics, pl_module, layer, layer.training))
                layer.freeze_statistics()
            return

        # torch's layers have no flag for it: train() reaches the layer, and leaves it in evaluation.
        def stay(original: Callable[[bool], Any], mode: bool = True) -> nn.Module:
            original(mode)
            layer.training = False
            return layer

        self._undo.append(functools.partial(_release_statistics, pl_module, layer, layer.training))
        self._patches.wrap(layer, "train", stay)
        layer.training = False

    def _release(self) -> None:
        self._patches.undo()
        while self._undo:
            self._undo.pop()()
        self.layers, self._chosen = {}, {}


def holds_statistics(layer: nn.Module) -> bool:
    """Tell whether a layer has running statistics, of this package or of torch.

    >>> holds_statistics(nn.BatchNorm2d(4)), holds_statistics(nn.LayerNorm(4))
    (True, False)
    """
    if isinstance(layer, Normalizer):
        return layer.has_running_stats
    return isinstance(layer, TorchRunningNormBase) and layer.running_mean is not None


def _release_statistics(pl_module: pl.LightningModule, layer: nn.Module, trained: bool) -> None:
    # A validation in between has asked for a mode of its own, and Lightning puts back the one it sees.
    if isinstance(layer, Normalizer):
        layer.freeze_statistics(False)
    layer.training = trained and pl_module.training


def _learned(layer: nn.Module) -> list[Tensor]:
    # Without the modules that a layer calls behind its normalization.
    return list(layer.parameters(recurse=False))


def _warn_of_fresh(layers: dict[str, nn.Module]) -> None:
    """Warn of running statistics that nothing has moved: normalizing by 0 and 1 leaves the input as it is."""
    fresh = [name for name, layer in layers.items() if holds_statistics(layer) and _is_fresh(layer)]
    if fresh:
        rank_zero_warn(
            f"NormFreeze: the running statistics of {counted(len(fresh), 'layer')} (first: {fresh[0]}) are at their "
            "start, mean 0 and variance 1: frozen, these layers do not normalize. Load weights first, or type a later "
            "at_epoch.",
            category=NoEffectWarning,
        )


def _is_fresh(layer: nn.Module) -> bool:
    names = layer.running_names if isinstance(layer, Normalizer) else ("running_mean", "running_var")
    mean, var = (layer.get_buffer(name) for name in names)
    return not mean.any() and bool((var == 1).all())

"""What does not go together with a swap, or not in this order: told before anything is lost, with what to type."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_norm.errors import ConflictError, ConflictWarning
from lightning_norm.surgery.walk import named_normalizers, normalizers_of

HOLDS = {
    WeightAveraging: "average the network as it was before the swap",
    StochasticWeightAveraging: "average the network as it was before the swap",
    ModelPruning: "prune layers that the swap then takes out of the network",
}
"""Callbacks that take hold of the network's layers in their ``setup``, and what they would do before a swap."""


def check_order(trainer: pl.Trainer, swap: Callback) -> None:
    """Refuse callbacks in front of a swap that keep what they find in the network.

    Raises:
        ConflictError: there is one.
    """
    for callback in _callbacks(trainer):
        if callback is swap:
            return
        for kind, harm in HOLDS.items():
            if isinstance(callback, kind):
                raise ConflictError(
                    f"{type(callback).__name__} stands before NormSwap in the callbacks and would {harm}. Put NormSwap "
                    "first. (Callbacks of LightningModule.configure_callbacks stand behind the Trainer's: give both to "
                    "one of them.)"
                )


def check_settings(trainer: pl.Trainer, swap: Any) -> None:
    """Compare a NormSwap with the other ones, and with what the Trainer synchronizes.

    Raises:
        ConflictError: two of them choose parameter groups.
    """
    for name in ("norm_weight_decay", "switch_lr_scale"):
        chosen = [getattr(c.options, name) for c in _callbacks(trainer) if isinstance(c, type(swap))]
        chosen = [value for value in chosen if value is not None]
        if len(chosen) > 1:
            raise ConflictError(
                f"two NormSwap callbacks set {name} ({chosen[0]} and {chosen[1]}), which is about all layers of this "
                "package in the model. Set it in one of them."
            )
    if getattr(trainer.strategy, "_layer_sync", None) is not None and not swap.options.sync:
        rank_zero_warn(
            "Trainer(sync_batchnorm=True) reaches torch's BatchNorm layers only, and NormSwap(sync=False) keeps the "
            "statistics of the swapped ones on each rank. Type NormSwap(sync=True), or leave out sync_batchnorm.",
            category=ConflictWarning,
        )


def check_copies(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Check that callbacks which average weights hold a copy of this network, and that statistics are taken care of.

    Raises:
        ConflictError: a copy was made before a layer was built.
    """
    for callback in _callbacks(trainer):
        if not isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            continue
        name, copy = type(callback).__name__, getattr(callback, "_average_model", None)
        copy = getattr(copy, "module", copy) if isinstance(callback, WeightAveraging) else copy
        if copy is not None:
            there, here = ({n: p.shape for n, p in m.named_parameters()} for m in (copy, model))
            apart = [n for n in here if there.get(n) != here[n]] + [n for n in there if n not in here]
            if apart:
                raise ConflictError(
                    f"{name} copied the network before {apart[0]} was built, and would mix up the parameters. Build "
                    "all layers in the module's __init__ (WeightAveraging also knows those of configure_model)."
                )
        if isinstance(callback, StochasticWeightAveraging) and not _recalibrates(trainer):
            _check_statistics(name, model)


def _check_statistics(name: str, model: nn.Module) -> None:
    layers = {n: layer for n, layer in named_normalizers(model) if layer.track_running_stats}
    fixed = [n for n, layer in layers.items() if layer.no_recalibration]
    fix = f"Add NormRecalibrate({f'exclude={fixed!r}' if fixed else ''}) as the last callback."
    if len(fixed) == len(layers):
        fix = "EMAWeightAveraging averages them with the weights."
    if layers:
        rank_zero_warn(
            f"{name} re-estimates the running statistics of torch's BatchNorm layers only: after it, those of "
            f"{len(layers)} layers of this package belong to weights that were not averaged. {fix}",
            category=ConflictWarning,
        )


def tell_frozen(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Say which layers a finetuning callback has frozen: it leaves torch's BatchNorm layers alone, and not ours."""
    for callback in _callbacks(trainer):
        held = [m for m in normalizers_of(model) if any(True for _ in m.parameters())]
        frozen = [m for m in held if not any(p.requires_grad for p in m.parameters())]
        if isinstance(callback, BaseFinetuning) and frozen:
            name = type(callback).__name__
            rank_zero_info(
                f"NormSwap: {len(frozen)} of {len(held)} layers are frozen with the rest until {name} unfreezes them; "
                f"their running statistics follow the data. With {name} in front of NormSwap they train, as BatchNorm "
                "layers do under it."
            )


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by the callback connector
    return callbacks


def _recalibrates(trainer: pl.Trainer) -> bool:
    from lightning_norm.callbacks.norm_recalibrate import NormRecalibrate

    return any(isinstance(c, NormRecalibrate) for c in _callbacks(trainer))

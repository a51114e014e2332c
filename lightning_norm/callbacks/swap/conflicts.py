"""What does not go together with a swap, or not in this order: told before anything is lost, with what to type."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_norm.callbacks.lightning_compat import (
    BaseFinetuning,
    Callback,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
    callbacks_of,
    is_instance,
    pl,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_norm.callbacks.lightning_private import averaged_model, starts_processes, synchronizes_batchnorm
from lightning_norm.callbacks.norm_recalibrate import NormRecalibrate
from lightning_norm.errors import ConflictError, ConflictWarning, counted
from lightning_norm.surgery.walk import named_normalizers, normalizers_of

HARM_BEFORE_SWAP = {
    WeightAveraging: "average the network as it was before the swap",
    StochasticWeightAveraging: "average the network as it was before the swap",
    ModelPruning: "prune layers that the swap then takes out of the network",
}
"""Callbacks that take hold of the network's layers in their ``setup``, and what they would do before a swap."""


def check_order(trainer: pl.Trainer, swap: Callback) -> None:
    """Refuse callbacks in front of a swap that keep what they find in the network.

    Args:
        trainer: with all callbacks, in the order in which they are called.
        swap: the NormSwap that asks; callbacks behind it see the swapped network.

    Raises:
        ConflictError: there is one.
    """
    for callback in callbacks_of(trainer):
        # Those behind the swap see the swapped network and may keep what they find.
        if callback is swap:
            return
        for kind, harm in HARM_BEFORE_SWAP.items():
            if is_instance(callback, kind):
                raise ConflictError(
                    f"{type(callback).__name__} stands before NormSwap in the callbacks and would {harm}. Put NormSwap "
                    "first. (Callbacks of LightningModule.configure_callbacks stand behind the Trainer's: give both to "
                    "one of them.)"
                )


def check_settings(trainer: pl.Trainer, swap: Any) -> None:
    """Compare a NormSwap with the other ones, and with what the Trainer synchronizes.

    Args:
        trainer: with all callbacks.
        swap: the NormSwap that asks.

    Raises:
        ConflictError: two of them choose parameter groups.
    """
    for name in ("norm_weight_decay", "switch_lr_scale"):
        # A second regrouping would split groups that the first one has made.
        chosen = [getattr(c.options, name) for c in callbacks_of(trainer) if isinstance(c, type(swap))]
        chosen = [value for value in chosen if value is not None]
        if len(chosen) > 1:
            raise ConflictError(
                f"two NormSwap callbacks set {name} ({chosen[0]} and {chosen[1]}), which is about all layers of this "
                "package in the model. Set it in one of them."
            )
    # The two settings contradict each other; neither is changed behind the user's back.
    if synchronizes_batchnorm(trainer) and not swap.options.sync:
        rank_zero_warn(
            "Trainer(sync_batchnorm=True) reaches torch's BatchNorm layers only, and NormSwap(sync=False) keeps the "
            "statistics of the swapped ones on each rank. Type NormSwap(sync=True), or leave out sync_batchnorm.",
            category=ConflictWarning,
        )


def check_launcher(trainer: pl.Trainer, stage: str, parent_is_swapped: bool) -> None:
    """Refuse to train where the process that called ``fit`` would lose what the new layers learn.

    Args:
        trainer: whose strategy starts processes or does not.
        stage: "fit", "validate", "test" or "predict".
        parent_is_swapped: the network came to this process swapped, or there was nothing to swap.

    Raises:
        ConflictError: the strategy starts processes that train copies, and the network came to them without the swap.
    """
    # Evaluation sends no weights back.
    if stage == "fit" and not parent_is_swapped and starts_processes(trainer):
        raise ConflictError(
            "this strategy (ddp_spawn, ddp_notebook) trains copies of the network in other processes and drops what "
            "the new layers learn on the way back, because the network of the process that called fit has no place "
            "for it. Type norm_swap.swap_before_launch(model) before trainer.fit(model), norm_swap being the NormSwap "
            "among the callbacks, or strategy='ddp'."
        )


def check_copies(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Check that callbacks which average weights hold a copy of this network, and that statistics are taken care of.

    Args:
        trainer: with all callbacks.
        pl_module: the module after the swap, and after ``configure_model``.

    Raises:
        ConflictError: a copy was made before a layer was built.
    """
    for callback in callbacks_of(trainer):
        if not is_instance(callback, WeightAveraging, StochasticWeightAveraging):
            continue
        # None until the average is begun, which may be in the middle of the run.
        name, average = type(callback).__name__, averaged_model(callback)
        if is_instance(callback, WeightAveraging):
            average = getattr(average, "module", average)  # torch's AveragedModel keeps the network in an attribute
        if average is not None:
            # Names and shapes of the two must match, because averaging pairs parameters by their order.
            there, here = ({n: p.shape for n, p in m.named_parameters()} for m in (average, pl_module))
            differing = [n for n in here if there.get(n) != here[n]] + [n for n in there if n not in here]
            if differing:
                raise ConflictError(
                    f"{name} copied the network before {differing[0]} was built, and would mix up the parameters. "
                    "Build all layers in the module's __init__ (WeightAveraging also knows those of configure_model)."
                )
        # Lightning finds layers to update by torch's own class, and ours are not of it.
        if is_instance(callback, StochasticWeightAveraging) and not _recalibrates(trainer):
            _warn_of_statistics(name, pl_module)


def _warn_of_statistics(name: str, pl_module: nn.Module) -> None:
    """Warn that a callback re-estimates torch's running statistics alone, with the callback that does ours."""
    layers = {n: layer for n, layer in named_normalizers(pl_module) if layer.track_running_stats}
    # NormRecalibrate refuses layers that normalize by their running statistics; they are to be excluded.
    excluded = [n for n, layer in layers.items() if layer.unsupported.recalibration]
    fix = f"Add NormRecalibrate({f'exclude={excluded!r}' if excluded else ''}) as the last callback."
    if len(excluded) == len(layers):
        fix = "EMAWeightAveraging averages them with the weights."
    if layers:
        rank_zero_warn(
            f"{name} re-estimates the running statistics of torch's BatchNorm layers only: after it, those of "
            f"{counted(len(layers), 'layer')} of this package belong to weights that were not averaged. {fix}",
            category=ConflictWarning,
        )


def tell_frozen(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Say which layers a finetuning callback has frozen: it leaves torch's BatchNorm layers alone, and not ours."""
    for callback in callbacks_of(trainer):
        learning = [layer for layer in normalizers_of(pl_module) if any(True for _ in layer.parameters())]
        frozen = [layer for layer in learning if not any(p.requires_grad for p in layer.parameters())]
        # Both orders are right, so this is a line of information and no warning.
        if is_instance(callback, BaseFinetuning) and frozen:
            name = type(callback).__name__
            rank_zero_info(
                f"NormSwap: frozen with the rest until {name} unfreezes them: {len(frozen)} of "
                f"{counted(len(learning), 'layer')}; their running statistics follow the data. With {name} in front "
                "of NormSwap they train, as BatchNorm layers do under it."
            )


def _recalibrates(trainer: pl.Trainer) -> bool:
    """Tell whether a NormRecalibrate is among the callbacks."""
    return any(isinstance(callback, NormRecalibrate) for callback in callbacks_of(trainer))

"""What ranks must agree on, compared before they would wait for each other in vain."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lightning_norm.errors import SyncWarning
from lightning_norm.layers.swap_record import swap_settings
from lightning_norm.ops.sync import gather
from lightning_norm.surgery.torch_layers import TORCH_BATCH_NORMS
from lightning_norm.surgery.walk import named_normalizers, normalizers_of


def agree(what: str, unit: str, lines: Sequence[str], remedy: str) -> None:
    """Compare a hash over all ranks, which must all call it, and the lines themselves only where hashes differ.

    Args:
        what: on what ranks are to agree.
        unit: what one line is of, in the plural.
        lines: what this rank has.
        remedy: what to do.

    Raises:
        RuntimeError: ranks differ; all ranks raise it, with the first difference.
    """
    plans = gather(hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8])
    if len(set(plans)) == 1:
        return
    held: list[list[str]] = gather(list(lines))
    rank = next(rank for rank, plan in enumerate(plans) if plan != plans[0])
    extra = [line for line in held[0] if line not in held[rank]]
    more = [line for line in held[rank] if line not in held[0]]
    if extra and more:
        difference = f"{more[0]!r} there, {extra[0]!r} on rank 0"
    else:
        difference = f"missing there: {extra[0]}" if extra else f"only there: {more[0]}" if more else "in another order"
    raise RuntimeError(
        f"ranks disagree on {what}: rank 0 has {len(held[0])} {unit} (plan {plans[0]}), rank {rank} has "
        f"{len(held[rank])} (plan {plans[rank]}; {difference}). {remedy}"
    )


def check_layers(model: pl.LightningModule) -> None:
    """Compare the normalizers, their arguments and how they synchronize.

    Raises:
        RuntimeError: ranks differ.
    """
    lines = [
        f"{name} {(layer.origin or {}).get('norm', type(layer).__name__)} {swap_settings(layer)}"
        for name, layer in named_normalizers(model)
    ]
    agree("the swap", "layers", lines, "Every rank must build the same model and use the same NormSwap.")


def check_batches(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Compare how many batches an epoch has, where statistics are synchronized.

    Raises:
        RuntimeError: ranks differ.
    """
    if any(layer.sync for layer in normalizers_of(model)):
        agree(
            "the training data",
            "entries",
            [f"{trainer.num_training_batches} batches"],
            "A rank that has no batch left would keep the others waiting: use Lightning's distributed sampler, "
            "limit_train_batches, or NormSwap(sync=False).",
        )


def warn_ignored(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Tell of a strategy that takes ``sync_batchnorm`` and does nothing with it."""
    strategy = trainer.strategy
    if getattr(strategy, "_layer_sync", None) is None or isinstance(strategy, (DDPStrategy, FSDPStrategy)):
        return
    left = sum(isinstance(module, TORCH_BATCH_NORMS) for module in model.modules())
    rank_zero_warn(
        f"{type(strategy).__name__} ignores sync_batchnorm and plugins=[NormSync()]. Layers of this package are "
        f"synchronized all the same; {left} BatchNorm layers of torch's keep the statistics of each rank: swap them to "
        "'bn' with NormSwap.",
        category=SyncWarning,
    )

"""What ranks must have in common, compared before they would wait for each other in vain."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from lightning_norm.callbacks.lightning_compat import DDPStrategy, FSDPStrategy, is_instance, pl, rank_zero_warn
from lightning_norm.callbacks.lightning_private import synchronizes_batchnorm
from lightning_norm.errors import SyncWarning, counted
from lightning_norm.layers.swap_record import swap_settings
from lightning_norm.ops.sync import gather
from lightning_norm.surgery.torch_layers import TORCH_BATCH_NORMS
from lightning_norm.surgery.walk import named_normalizers, normalizers_of


def check_same_on_ranks(what: str, unit: str, lines: Sequence[str], remedy: str) -> None:
    """Compare lines of text over all ranks, which must all call this function.

    Only a hash of the lines is sent, and the lines themselves where hashes differ.

    Args:
        what: on what ranks are to agree.
        unit: what one line describes, in the plural.
        lines: those of this rank.
        remedy: what to do.

    Raises:
        RuntimeError: ranks differ; all ranks raise it, with the first difference.

    >>> check_same_on_ranks("the swap", "layers", ["bn1 sn"], "Swap them alike.")  # in one process nothing differs
    """
    # Eight characters from each rank instead of a line per layer, in the usual case that all are equal.
    hashes = gather(hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8])
    if len(set(hashes)) == 1:
        return
    lines_of: list[list[str]] = gather(list(lines))
    # Ranks raise the same message, so that whichever log is read tells the difference.
    rank = next(rank for rank, value in enumerate(hashes) if value != hashes[0])
    only_zero = [line for line in lines_of[0] if line not in lines_of[rank]]
    only_there = [line for line in lines_of[rank] if line not in lines_of[0]]
    if only_zero and only_there:
        difference = f"{only_there[0]!r} there, {only_zero[0]!r} on rank 0"
    elif only_zero:
        difference = f"missing there: {only_zero[0]}"
    else:
        difference = f"only there: {only_there[0]}" if only_there else "in another order"
    raise RuntimeError(
        f"ranks disagree on {what}: rank 0 has {len(lines_of[0])} {unit} (hash {hashes[0]}), rank {rank} has "
        f"{len(lines_of[rank])} (hash {hashes[rank]}; {difference}). {remedy}"
    )


def check_layers(pl_module: pl.LightningModule) -> None:
    """Compare the normalizers of all ranks, their arguments and how they synchronize.

    Raises:
        RuntimeError: ranks differ.
    """
    lines = [
        f"{name} {(layer.origin or {}).get('norm', type(layer).__name__)} {swap_settings(layer)}"
        for name, layer in named_normalizers(pl_module)
    ]
    remedy = "Every rank must build the same model and use the same NormSwap."
    check_same_on_ranks("the swap", "layers", lines, remedy)


def check_batches(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Compare how many batches an epoch has on each rank, where statistics are synchronized.

    Raises:
        RuntimeError: ranks differ.
    """
    # Ranks that do not synchronize may run for different numbers of batches as they like.
    if any(layer.sync for layer in normalizers_of(pl_module)):
        check_same_on_ranks(
            "the training data",
            "entries",
            [counted(trainer.num_training_batches, "batch", "batches")],
            "A rank that has no batch left would keep the others waiting: use Lightning's distributed sampler, "
            "limit_train_batches, or NormSwap(sync=False).",
        )


def warn_ignored(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Warn of a strategy that takes ``sync_batchnorm`` and does nothing with it."""
    strategy = trainer.strategy
    if not synchronizes_batchnorm(trainer) or is_instance(strategy, DDPStrategy, FSDPStrategy):
        return
    # Told in numbers: what is left to the user is what the swap has not reached.
    unswapped = sum(isinstance(module, TORCH_BATCH_NORMS) for module in pl_module.modules())
    kept = counted(unswapped, "BatchNorm layer of torch's keeps", "BatchNorm layers of torch's keep")
    rank_zero_warn(
        f"{type(strategy).__name__} ignores sync_batchnorm and plugins=[NormSync()]. Layers of this package are "
        f"synchronized all the same; {kept} the statistics of each rank: swap them to 'bn' with NormSwap.",
        category=SyncWarning,
    )

"""Strategies that spawn or fork their processes: the process that started them gets the swap as well."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher


def swap_before_weights_return(swap: Callable[[Any, pl.LightningModule], None], kind: type) -> None:
    """Let the parent swap its network just before it loads what its workers have learned.

    With ``ddp_spawn`` and ``ddp_notebook`` the callbacks of a fit run in the workers alone. Lightning then loads rank
    0's weights into the parent's network and drops without a word those that find no place there; no hook comes before.

    Args:
        swap: called with a callback and the parent's model.
        kind: of the callbacks.
    """
    original = _MultiProcessingLauncher._recover_results_in_main_process
    if getattr(original, "_swaps", False):
        return

    @functools.wraps(original)
    def recover(self: Any, worker_output: Any, trainer: pl.Trainer) -> None:
        if worker_output.weights_path is not None:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by the callback connector
                if isinstance(callback, kind):
                    swap(callback, trainer.lightning_module)
        original(self, worker_output, trainer)

    recover.__dict__["_swaps"] = True
    _MultiProcessingLauncher._recover_results_in_main_process = recover  # type: ignore[method-assign]

"""Running statistics of an accumulation window: gathered over its batches, and moved once per optimizer step."""

from __future__ import annotations

import warnings
from typing import Any

from lightning_norm.callbacks.lightning_compat import pl, rank_zero_info
from lightning_norm.errors import NoEffectWarning
from lightning_norm.layers.accumulators import AccumulationWindow
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.running_stats import close_window, open_window
from lightning_norm.surgery.walk import named_normalizers


class Accumulation:
    """What NormSwap does about ``accumulate_statistics``, for every layer of this package in the model.

    With gradients accumulated over k batches, the optimizer sees one batch of k times the size; BatchNorm's running
    statistics move k times, by the statistics of k small ones. Here the moments of the k batches are merged as if they
    had been one batch, and the running statistics move once, by ``momentum``. The output of a training batch still
    depends on that batch alone.

    Args:
        enabled: the argument of NormSwap; without it every method does nothing.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._layers: dict[str, Normalizer] = {}
        self._loaded: dict[str, Any] = {}
        self._step = 0

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open a window in every layer with running statistics, and go on with that of a resumed run.

        Raises:
            ValueError: a layer cannot wait for the end of a window; it says why.
        """
        if not self.enabled:
            if self._loaded:
                rank_zero_info(
                    "NormSwap: the checkpoint was written between two optimizer steps with accumulate_statistics=True; "
                    "what was gathered is dropped without it."
                )
            return
        self._layers = {n: layer for n, layer in named_normalizers(pl_module) if layer.track_running_stats}
        if not self._layers:
            warnings.warn(
                "NormSwap: accumulate_statistics=True does nothing: no layer keeps running statistics. Leave it out.",
                NoEffectWarning,
                stacklevel=3,
            )
        for name, layer in self._layers.items():
            # Checked for all layers before the first window opens, so that a refusal leaves nothing behind.
            if layer.no_window:
                self.stop()
                raise ValueError(
                    f"NormSwap: accumulate_statistics: {name} is {type(layer).__name__}: {layer.no_window}. "
                    "Type accumulate_statistics=False."
                )
        for layer in self._layers.values():
            open_window(layer)
        self._step = trainer.global_step
        self._fill()

    def after_batch(self, trainer: pl.Trainer) -> None:
        """Move the running statistics if the optimizer has stepped."""
        # Whatever decides when the optimizer steps, the step counter tells that it has.
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            for layer in self._layers.values():
                close_window(layer)

    def state_dict(self) -> dict[str, Any]:
        """Return what was gathered since the last optimizer step: layer -> count, mean and variance so far."""
        if not self.enabled:
            return {}
        accumulators = {n: layer.accumulator for n, layer in self._layers.items()}
        windows = {n: window for n, window in accumulators.items() if isinstance(window, AccumulationWindow)}
        gathered = {n: [t.clone() for t in window.tensors()] for n, window in windows.items() if window.count.any()}
        # Never empty as a whole: Lightning would skip load_state_dict, and windows would keep what they have.
        return {"window": gathered}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what a checkpoint has gathered; a finder restores one in the middle of the training."""
        self._loaded = state_dict.get("window", {})
        if self._layers:
            self._fill()

    def stop(self) -> None:
        """Take the windows off; what no optimizer step has followed is dropped, as its gradients are."""
        for layer in self._layers.values():
            layer.accumulator = None
        self._layers = {}
        self._loaded = {}

    def _fill(self) -> None:
        """Empty every window, and put in what a checkpoint has gathered."""
        for name, layer in self._layers.items():
            assert isinstance(layer.accumulator, AccumulationWindow)
            # What batches of a finder's trial run have gathered goes, before the saved state comes in.
            layer.accumulator.clear()
            for tensor, saved in zip(layer.accumulator.tensors(), self._loaded.get(name, ()), strict=False):
                tensor.copy_(saved)
        self._loaded = {}

"""Running statistics of an accumulation window: gathered over its batches, and moved once per optimizer step."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_norm.errors import NoEffectWarning
from lightning_norm.layers.accumulators import AccumulationWindow
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.running_stats import close_window, open_window
from lightning_norm.surgery.select import clean_name

WINDOW = "lightning_norm_window"
"""Entry of a checkpoint that was written inside a window: layer -> count, mean and variance so far."""


class Accumulation:
    """What NormSwap does about ``accumulate_statistics``, for every layer of this package in the model.

    Args:
        on: do it.
    """

    def __init__(self, on: bool) -> None:
        self.on = on
        self._layers: dict[str, Normalizer] = {}
        self._loaded: dict[str, Any] = {}
        self._step = 0

    def start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        """Open a window in every layer with running statistics, and go on with that of a resumed run.

        Raises:
            ValueError: a layer cannot wait for the end of a window; it says why.
        """
        if not self.on:
            if self._loaded:
                rank_zero_info(
                    "NormSwap: the checkpoint was written between two optimizer steps with accumulate_statistics=True; "
                    "what was gathered is dropped without it."
                )
            return
        named = {clean_name(n): m for n, m in model.named_modules() if isinstance(m, Normalizer)}
        self._layers = {n: m for n, m in named.items() if m.track_running_stats}
        if not self._layers:
            warnings.warn(
                "NormSwap: accumulate_statistics=True does nothing: no layer keeps running statistics. Leave it out.",
                NoEffectWarning,
                stacklevel=3,
            )
        for name, layer in self._layers.items():
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
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            for layer in self._layers.values():
                close_window(layer)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write what was gathered since the last step into a checkpoint, if there is anything."""
        accumulators = {n: layer.accumulator for n, layer in self._layers.items()}
        windows = {n: window for n, window in accumulators.items() if isinstance(window, AccumulationWindow)}
        held = {n: [t.clone() for t in window.tensors()] for n, window in windows.items() if window.count.any()}
        if held:
            checkpoint[WINDOW] = held

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Remember what a checkpoint has gathered; a finder restores one in the middle of the training."""
        self._loaded = checkpoint.get(WINDOW, {})
        if self._layers:
            self._fill()

    def stop(self) -> None:
        """Take the windows off; what no optimizer step has followed is dropped, as its gradients are."""
        for layer in self._layers.values():
            layer.accumulator = None
        self._layers = {}
        self._loaded = {}

    def _fill(self) -> None:
        for name, layer in self._layers.items():
            assert isinstance(layer.accumulator, AccumulationWindow)
            layer.accumulator.clear()
            for own, saved in zip(layer.accumulator.tensors(), self._loaded.get(name, ()), strict=False):
                own.copy_(saved)
        self._loaded = {}

"""Running statistics that are gathered over batches, and over ranks, and moved once per optimizer step."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from lightning_norm.callbacks.lightning_compat import pl, rank_zero_info
from lightning_norm.errors import NoEffectWarning
from lightning_norm.layers.accumulators import AccumulationWindow
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.pooling import attend, move_by_windows, pool_windows, ranks_of_window
from lightning_norm.layers.running_stats import drop_window, open_window, window_of
from lightning_norm.ops.sync import Ranks
from lightning_norm.surgery.walk import named_normalizers


class Accumulation:
    """What NormSwap does about ``accumulate_statistics``, for every layer of this package in the model.

    With gradients accumulated over k batches, the optimizer sees one batch of k times the size; BatchNorm's running
    statistics move k times, by the statistics of k small ones. Here the moments of the k batches are merged as if they
    had been one batch, and the running statistics move once, by ``momentum``. The output of a training batch still
    depends on that batch alone. The same for layers with ``sync="running"``, whose ranks meet once per optimizer step.

    Args:
        enabled: the argument of NormSwap; without it, only layers with ``sync="running"`` have a window.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._layers: dict[str, Normalizer] = {}
        self._loaded: dict[str, Any] = {}
        self._step = 0

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open a window in every layer with running statistics, and go on with that of a resumed run.

        Args:
            trainer: whose count of optimizer steps tells when a window ends.
            pl_module: the swapped module.

        Raises:
            ValueError: a layer cannot wait for the end of a window; it says why.
        """
        tracking = {n: layer for n, layer in named_normalizers(pl_module) if layer.track_running_stats}
        self._layers = {n: t for n, t in tracking.items() if self.enabled or ranks_of_window(t) is not None}
        if not self.enabled and not self._layers:
            if self._loaded:
                rank_zero_info(
                    "NormSwap: the checkpoint was written between two optimizer steps with accumulate_statistics=True "
                    "or sync='running'; what was gathered is dropped without it."
                )
            return
        if not self._layers:
            warnings.warn(
                "NormSwap: accumulate_statistics=True does nothing: no layer keeps running statistics. Leave it out.",
                NoEffectWarning,
                stacklevel=3,
            )
        asked = "accumulate_statistics" if self.enabled else "sync='running'"
        for name, layer in self._layers.items():
            # Checked for all layers before the first window opens, so that a refusal leaves nothing behind.
            if layer.unsupported.window:
                self.stop()
                raise ValueError(
                    f"NormSwap: {asked}: {name} is {type(layer).__name__}: {layer.unsupported.window}. "
                    f"Type {'accumulate_statistics=False' if self.enabled else 'sync=True'}."
                )
        for layer in self._layers.values():
            open_window(layer)
        # Ranks compare their layers before the first batch, where a difference is told by name.
        attend(self._layers.values())
        self._step = trainer.global_step
        self._fill()

    def after_batch(self, trainer: pl.Trainer) -> None:
        """Move the running statistics if the optimizer has stepped."""
        # Whatever decides when the optimizer steps, the step counter tells that it has.
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            move_by_windows(list(self._layers.values()))

    def state_dict(self) -> dict[str, Any]:
        """Return what was gathered since the last optimizer step: layer -> count, mean and variance so far.

        Every rank must call it: what ranks gathered by themselves is put together, for one of them writes the file.
        """
        if not self.enabled and not self._layers:
            return {}
        copies = {n: copy.deepcopy(window_of(layer)) for n, layer in self._layers.items()}
        windows = {n: window for n, window in copies.items() if window is not None}
        together: dict[Ranks, list[AccumulationWindow]] = {}
        for name, window in windows.items():
            if ranks := ranks_of_window(self._layers[name]):
                together.setdefault(ranks, []).append(window)
        for ranks, pooled in together.items():
            pool_windows(pooled, ranks)
        gathered = {n: [*window.tensors()] for n, window in windows.items() if window.count.any()}
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
            drop_window(layer)
        self._layers = {}
        self._loaded = {}

    def _fill(self) -> None:
        """Empty every window, and put in what a checkpoint has gathered."""
        for name, layer in self._layers.items():
            window = window_of(layer)
            assert window is not None
            # What batches of a finder's trial run have gathered goes, before the saved state comes in.
            window.clear()
            # The file holds what all ranks gathered together: one of them takes it.
            ranks = ranks_of_window(layer)
            loaded = self._loaded.get(name, ()) if ranks is None or ranks.rank == 0 else ()
            for tensor, saved in zip(window.tensors(), loaded, strict=False):
                tensor.copy_(saved)
        self._loaded = {}

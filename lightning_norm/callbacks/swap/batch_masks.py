"""Masks of the batches, for every normalizer of the model: what NormSwap does about ``mask_key`` and ``mask_fn``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_norm.callbacks.lightning_compat import pl
from lightning_norm.callbacks.training_data import import_function, part_of, shape_of
from lightning_norm.errors import MaskError
from lightning_norm.layers.base import MomentNorm
from lightning_norm.surgery.masks import assign, layers_with_masks


class BatchMasks:
    """Tells the layers the mask of each batch, and takes it back at its end.

    Args:
        key: where the batch holds the mask.
        function: or from the batch to its mask.
        size: of the padded input, for lengths.

    Raises:
        ValueError: both, or a function that cannot be imported.
    """

    def __init__(self, key: str | int | None, function: str | Callable[[Any], Any] | None, size: int | None) -> None:
        if key is not None and function is not None:
            raise ValueError("NormSwap: mask_key and mask_fn exclude each other.")
        if size is not None and key is None and function is None:
            raise ValueError("NormSwap: mask_size belongs to mask_key or mask_fn, and neither is there.")
        self._key, self._size = key, size
        self._function = import_function("NormSwap", "mask_fn", function)
        self._layers: dict[str, MomentNorm] = {}

    @property
    def enabled(self) -> bool:
        """Whether there is anything to do."""
        return self._key is not None or self._function is not None

    @property
    def source(self) -> str:
        """Where a batch's mask comes from, in words; "" where nothing asks for one."""
        if self._function is not None:
            return f"{getattr(self._function, '__qualname__', 'mask_fn')}(batch)"
        return "" if self._key is None else f"batch[{self._key!r}]"

    def start(self, pl_module: pl.LightningModule) -> None:
        """Look up the layers."""
        if self.enabled:
            # At the start of a run, when every layer has been built and swapped.
            self._layers = layers_with_masks(pl_module)

    def give(self, batch: Any) -> None:
        """Tell the layers the mask of a batch, which each takes at the size of its own map.

        Args:
            batch: as the data loader made it, on its device.

        Raises:
            MaskError: the batch has none.
        """
        if not self.enabled:
            return
        mask = self._function(batch) if self._function is not None else part_of(batch, self._key)
        if mask is None:
            place = f"mask_key={self._key!r}" if self._function is None else "mask_fn"
            raise MaskError(f"NormSwap: {place} found no mask in a batch ({shape_of(batch)}).")
        assign(self._layers, mask, self._size)

    def forget(self) -> None:
        """Take back the mask of a finished batch."""
        if self.enabled:
            # A pass between two batches, of another callback say, must not meet the mask of the last one.
            assign(self._layers, None)

    def stop(self) -> None:
        """Take back what was told."""
        self.forget()
        self._layers = {}

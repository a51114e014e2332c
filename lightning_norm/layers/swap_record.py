"""Where a layer came from, in plain types, and in the metadata of every ``state_dict`` that holds it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lightning_norm.layers.scheduled import saved_values

MANIFEST_KEY = "lightning_norm"
"""The entry of a checkpoint, and of a layer's metadata, that says what was swapped."""


class SwapRecord(nn.Module):
    """Mixin: ``origin`` is ``None`` for a layer that was built as it is, and otherwise what a swap made of what.

    It reads ``{"source": "BatchNorm2d", "norm": {"class_path": ..., "init_args": {...}}, "before": [...]}``, with the
    norms that the layer was on its way under ``before``.
    """

    origin: dict[str, Any] | None = None
    _place: str = ""
    """Its name in the model that it was swapped in, for messages."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # ``state_dict(destination={})`` passes a plain dictionary, which has no metadata.
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None and self.origin is not None:
            metadata.setdefault(prefix[:-1], {})[MANIFEST_KEY] = {
                **copy.deepcopy(self.origin),
                "options": swap_settings(self),
            }


def swap_settings(layer: Any) -> dict[str, Any]:
    """Return what is set on the layer beside the normalizer's arguments, scheduled values among it.

    >>> from lightning_norm import BatchNorm
    >>> swap_settings(BatchNorm(3))
    {'sync': True, 'sync_group': 'world', 'backend': 'auto', 'compile': False}
    """
    # The attribute and the argument of ``swap`` have one name, but for ``compile``, which is a method of nn.Module.
    names = {"sync": "sync", "sync_group": "sync_group", "backend": "backend", "compiled": "compile"}
    settings = {written: getattr(layer, name) for name, written in names.items()}
    scheduled = saved_values(layer)  # as they are now: evaluation reads them
    more = {"scheduled": scheduled} if scheduled else {}
    return {**settings, **more, **({"frozen": True} if layer._always_eval else {})}

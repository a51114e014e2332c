"""Loading: a plain BatchNorm's checkpoint, a published one, and an answer to that of another normalizer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_norm.normalizers.scheduled import Scheduled
from lightning_norm.ops.layout import at_least_float32

BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Loading(nn.Module):
    """Mixin: what ``load_state_dict`` accepts."""

    registry: ClassVar[dict[str, Any]]
    learns: ClassVar[dict[str, str]]
    ranges: ClassVar[dict[str, Scheduled]]
    running_names: ClassVar[tuple[str, str]]
    wide_names: ClassVar[tuple[str, ...]]
    _values: Any

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        given = {k[len(prefix) :] for k in state_dict if k.startswith(prefix)}
        foreign = {k: n.__name__ for n in self.registry.values() for k in n.learns if k in given - set(self.learns)}
        if foreign:
            raise RuntimeError(
                f"checkpoint of another normalizer: {prefix[:-1] or 'this layer'} is {type(self).__name__}, the file "
                "holds "
                f"{foreign}. Swap the model to that normalizer before loading."
            )
        own = {
            **self._parameters,
            **{k: v for k, v in self._buffers.items() if k not in self._non_persistent_buffers_set},
        }
        for name in BATCH_NORM_BUFFERS:
            if own.get(name) is None:
                state_dict.pop(prefix + name, None)  # a BatchNorm's statistics, for a method without them
        for name, value in own.items():
            old = state_dict.get(prefix + name)
            if value is None:
                continue
            if old is None and (
                name == "num_batches_tracked" or (name in self.learns and not given & set(self.learns))
            ):
                state_dict[prefix + name] = (
                    value.detach().clone()
                )  # a plain BatchNorm's checkpoint: keep the starting value
            elif isinstance(old, Tensor) and old.shape != value.shape and old.numel() == value.numel():
                state_dict[prefix + name] = old.reshape(value.shape)  # (1, C, 1, 1) in published checkpoints
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._settle()

    def _settle(self) -> None:
        """After ``load_state_dict(assign=True)``: statistics in float32 at least, nothing left on the meta device."""
        for name in (*self.running_names, *self.wide_names):
            stat = self._buffers.get(name)
            if stat is not None:
                self._buffers[name] = stat.to(at_least_float32(stat.dtype))
        held = [t for t in (*self._parameters.values(), *self._buffers.values()) if t is not None and not t.is_meta]
        for name, t in self._buffers.items() if held else ():
            if t is not None and t.is_meta and name in self._non_persistent_buffers_set:
                value = self._values.get(name[1:]) if name[1:] in self.ranges else 0
                self._buffers[name] = torch.full_like(t, value or 0, device=held[0].device)

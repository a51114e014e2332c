"""Loading: a plain BatchNorm's checkpoint, a published one, and an answer to that of another normalizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_norm.layers.scheduled import Scheduled
from lightning_norm.ops.layout import at_least_float32

BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Loading(nn.Module):
    """Mixin: what ``load_state_dict`` accepts."""

    registry: ClassVar[dict[str, Any]]
    extra_parameters: ClassVar[dict[str, str]]
    ranges: ClassVar[dict[str, Scheduled]]
    running_names: ClassVar[tuple[str, str]]
    float32_buffers: ClassVar[tuple[str, ...]]
    key: ClassVar[str]
    has_rows: ClassVar[bool] = False
    """Weight and bias are (K, C)."""
    _values: Any

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        given = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        self._refuse_another(given, prefix)
        self._translate(state_dict, prefix)
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
                name == "num_batches_tracked"
                or (name in self.extra_parameters and not given.keys() & self.extra_parameters.keys())
            ):
                state_dict[prefix + name] = (
                    value.detach().clone()
                )  # a plain BatchNorm's checkpoint: keep the starting value
            elif isinstance(old, Tensor) and old.shape != value.shape and old.numel() == value.numel():
                state_dict[prefix + name] = old.reshape(value.shape)  # (1, C, 1, 1) in published checkpoints
        missing: list[str] = args[2]
        before = len(missing)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._settle()
        others = likely(self.registry, given)
        if len(missing) > before and given and self.key not in [cls.key for cls in others]:
            last = missing[-1] = MissingKey(missing[-1])
            last.remark = f" ({self._another(given, prefix, others)})"

    def _refuse_another(self, given: Mapping[str, Any], prefix: str) -> None:
        own = marks(type(self))
        foreign = {name for cls in self.registry.values() for name in marks(cls) & given.keys() if name not in own}
        if foreign or (rows_in(given) and not self.has_rows):
            raise RuntimeError(
                f"checkpoint of another normalizer: {self._another(given, prefix, likely(self.registry, given))}"
            )

    def _another(self, given: Mapping[str, Any], prefix: str, others: list[Any]) -> str:
        here, there = type(self).__name__, " or ".join(cls.__name__ for cls in others)
        key = others[0].key
        names = [name for name in given if name not in {**self._parameters, **self._buffers}] or list(given)
        held = [(name, given[name]) for name in names[:3]]
        came = [f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else name for name, value in held]
        came += ["..."] * (len(names) > 3)
        return (
            f"{prefix[:-1] or 'this layer'} is {here}, the file holds {', '.join(came)}, as of {there}. "
            f"Swap to {key!r} before loading; swap(model, {self.key or here!r}, source={key!r}) goes on from there."
        )

    def _translate(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Write what came in another form as this class holds it."""

    def _settle(self) -> None:
        """After ``load_state_dict(assign=True)``: statistics in float32 at least, nothing left on the meta device."""
        for name in (*self.running_names, *self.float32_buffers):
            stat = self._buffers.get(name)
            if stat is not None:
                self._buffers[name] = stat.to(at_least_float32(stat.dtype))
        held = [t for t in (*self._parameters.values(), *self._buffers.values()) if t is not None and not t.is_meta]
        for name, t in self._buffers.items() if held else ():
            if t is not None and t.is_meta and name in self._non_persistent_buffers_set:
                value = self._values.get(name[1:]) if name[1:] in self.ranges else 0
                self._buffers[name] = torch.full_like(t, value or 0, device=held[0].device)


class MissingKey(str):
    """A missing key to whoever reads it, and in torch's message for ``strict=True`` also a remark."""

    remark = ""

    def __format__(self, spec: str) -> str:
        return f"{super().__format__(spec)}{self.remark}"


def marks(cls: Any) -> set[str]:
    """Return the names in a normalizer's checkpoint that a BatchNorm's has not."""
    return {*cls.extra_parameters, *cls.counters, *cls.float32_buffers}


def rows_in(given: Mapping[str, Any]) -> bool:
    """Tell whether there is a weight or a bias per context."""
    held = (given.get("weight"), given.get("bias"))
    return any(isinstance(t, Tensor) and t.dim() == 2 and t.shape[0] > 1 for t in held)


def likely(registry: Mapping[str, Any], given: Mapping[str, Any]) -> list[Any]:
    """Return the normalizers that a layer's checkpoint is most likely of; several where it cannot be told."""
    tracked = any(name.startswith("running_") for name in given)

    def fit(cls: Any) -> tuple[bool, int, int, bool]:
        own = marks(cls)
        return (
            cls.has_rows == rows_in(given),
            len(own & given.keys()),
            -len(own - given.keys()),
            cls.train_uses_batch_stats == tracked,
        )

    best = max(fit(cls) for cls in registry.values())
    return [cls for cls in registry.values() if fit(cls) == best]

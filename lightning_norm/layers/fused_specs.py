"""What the fused descriptions of all normalizers share: eps, weight, bias and running statistics of the layer.

A method writes ``fused_spec(layout)`` with these and adds what is its own. It returns ``None`` for inputs or
arguments that the kernels do not know, and then the algebra runs as written.
"""

from __future__ import annotations

from typing import Any

from lightning_norm.ops.fused.mixture import MixtureSpec, Running
from lightning_norm.ops.fused.per_channel import PerChannelSpec


def mixture_spec(layer: Any, statistics: tuple[str, ...], **more: Any) -> MixtureSpec:
    """Return a description with the layer's eps, weight, bias and running statistics; ``more`` are further fields."""
    running = None
    if layer.track_running_stats and "bn" in statistics:
        mean, var = (layer._buffers[name] for name in layer.running_names)
        tracked, skipped = layer.num_batches_tracked, layer.skipped_updates
        assert mean is not None
        assert var is not None
        assert tracked is not None
        assert skipped is not None
        running = Running(mean, var, tracked, skipped, layer._buffers["_momentum"], not layer.training)
    return MixtureSpec(statistics, layer.eps, layer.weight, layer.bias, running=running, **more)


def per_channel_spec(layer: Any, numbers: dict[str, float], **plan: int) -> PerChannelSpec:
    """Return a description with the layer's weight, bias and running statistics, and these further fields."""
    if not layer.track_running_stats:
        return PerChannelSpec(layer.weight, layer.bias, plan, {"eps": layer.eps, **numbers})
    names = (*layer.running_names, "num_batches_tracked", "skipped_updates")
    momentum = layer._buffers.get("_momentum")
    track = (2 if momentum is None else 1) if layer.training else 0
    plan = {"frozen": not layer.training, "track": track, **plan}
    running = tuple(layer._buffers[name] for name in names)
    return PerChannelSpec(layer.weight, layer.bias, plan, {"eps": layer.eps, **numbers}, running=running, rate=momentum)

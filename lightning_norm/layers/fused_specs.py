"""What the fused descriptions of all normalizers share: eps, weight, bias and running statistics of the layer.

A method writes ``fused_spec(layout)`` with these and adds what is its own. It returns ``None`` for inputs or
arguments that the kernels do not know, and then the algebra runs as written.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_norm.kernels.mixture.flags import MixtureFlags
from lightning_norm.kernels.per_channel.flags import PerChannelFlags, PerChannelNumbers
from lightning_norm.ops.fused.mixture import MixtureSpec, Running
from lightning_norm.ops.fused.per_channel import PerChannelSpec


def mixture_spec(
    layer: Any, statistics: tuple[str, ...], *, w: Tensor | None = None, v: Tensor | None = None, **flags: Any
) -> MixtureSpec:
    """Describe the layer with its eps, weight, bias and running statistics; ``flags`` as ``MixtureFlags.of``."""
    running = None
    # Statistics of a sample or a layer have no running ones, whatever the layer keeps.
    if layer.track_running_stats and "bn" in statistics:
        mean, var = (layer._buffers[name] for name in layer.running_names)
        tracked, skipped = layer.num_batches_tracked, layer.skipped_updates
        assert mean is not None
        assert var is not None
        assert tracked is not None
        assert skipped is not None
        momentum = layer._buffers["_momentum"]
        running = Running(mean, var, tracked, skipped, momentum)
        flags["frozen"] = not layer.training
        # 2 is the cumulative average, whose weight the kernel computes from the number of batches.
        flags["track"] = (2 if momentum is None else 1) if layer.training else 0
    known = MixtureFlags.of(statistics, weighted=w is not None, **flags)
    return MixtureSpec(known, layer.eps, layer.weight, layer.bias, w, v, running)


def per_channel_spec(layer: Any, numbers: dict[str, float], **flags: Any) -> PerChannelSpec:
    """Return a description with the layer's weight, bias and running statistics, with these flags and numbers."""
    known = PerChannelNumbers(layer.eps, **numbers)
    if not layer.track_running_stats:
        return PerChannelSpec(layer.weight, layer.bias, PerChannelFlags(**flags), known)
    names = (*layer.running_names, "num_batches_tracked", "skipped_updates")
    momentum = layer._buffers.get("_momentum")
    track = (2 if momentum is None else 1) if layer.training else 0
    # A method that moves its running statistics in another way says so by its own flags, which win.
    flags = {"frozen": not layer.training, "track": track, **flags}
    running = tuple(layer._buffers[name] for name in names)
    return PerChannelSpec(layer.weight, layer.bias, PerChannelFlags(**flags), known, running=running, rate=momentum)

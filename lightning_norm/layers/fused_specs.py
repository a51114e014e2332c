"""What the fused descriptions of all normalizers share: eps, weight, bias and running statistics of the layer.

A method writes ``fused_spec(layout)`` with these and adds what is its own. It returns ``None`` for inputs or
arguments that the kernels do not know, and then the algebra runs as written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_norm.kernels.mixture.flags import MixtureFlags
from lightning_norm.kernels.per_channel.flags import PerChannelFlags, PerChannelNumbers
from lightning_norm.ops.fused.mixture import MixtureSpec, Running
from lightning_norm.ops.fused.per_channel import PerChannelSpec


def uses_running_stats(layer: Any) -> bool:
    """Tell whether the next forward pass reads or moves the running statistics."""
    uses: bool = layer.moves_running_stats if layer.training else layer.has_running_stats
    return uses


def running_stats(layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return running mean and variance, the number of updates and that of skipped ones, as the kernels move them.

    In evaluation the first two are copies where a backward pass may read them after the next update.
    """
    mean, var = (layer._buffers[name] for name in layer.running_names)
    if not layer.training and torch.is_grad_enabled():
        mean, var = mean.clone(), var.clone()
    counters = (layer._buffers.get(name) for name in ("num_batches_tracked", "skipped_updates"))
    tracked, skipped = (mean.new_zeros((), dtype=torch.long) if t is None else t for t in counters)
    return mean, var, tracked, skipped


def mixture_spec(
    layer: Any, statistics: tuple[str, ...], *, w: Tensor | None = None, v: Tensor | None = None, **flags: Any
) -> MixtureSpec:
    """Describe the layer with its eps, weight, bias and running statistics; ``flags`` as ``MixtureFlags.of``."""
    running = None
    # Statistics of a sample or a layer have no running ones, whatever the layer keeps.
    if "bn" in statistics and uses_running_stats(layer):
        mean, var, tracked, skipped = running_stats(layer)
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
    if not uses_running_stats(layer):
        return PerChannelSpec(layer.weight, layer.bias, PerChannelFlags(**flags), known)
    momentum = layer._buffers.get("_momentum")
    track = (2 if momentum is None else 1) if layer.training else 0
    # A method that moves its running statistics in another way says so by its own flags, which win.
    flags = {"frozen": not layer.training, "track": track, **flags}
    running = running_stats(layer)
    return PerChannelSpec(layer.weight, layer.bias, PerChannelFlags(**flags), known, running=running, rate=momentum)

"""How a normalizer tells the kernels its equations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_norm.kernels.encoder_decoder.flags import EncoderDecoderFlags
from lightning_norm.kernels.mixture.flags import MixtureFlags
from lightning_norm.kernels.per_channel.flags import PerChannelFlags, PerChannelNumbers
from lightning_norm.ops.fused.encoder_decoder import EncoderDecoderSpec
from lightning_norm.ops.fused.mixture import MixtureSpec, Running
from lightning_norm.ops.fused.per_channel import GATES, PerChannelSpec
from lightning_norm.ops.layout import Layout

CONTEXTS = 16
"""Contexts that a kernel holds at once."""

EQUATIONS = {
    "algebra",
    "algebra_of",
    "standardize",
    "track",
    "running",
    "running_target",
    "statistic_size",
    "_update",
    "_shift",
    *("_mix", "depthwise_conv"),
    *("_rectified", "_gain", "_gate", "_choose", "_condensed"),
    *("_lambda", "_move", "_held", "_steps", "_new_weight"),
    *("recode", "drop", "_dropped", "_decode", "_linear"),
    *("mixture", "statistics", "fold", "unseen", "_drawn"),
    *("gate", "_affine", "rows", "shares", "prior_or_uniform", "posterior"),
}
"""Methods whose change makes a recipe another normalizer's."""


def mixture_spec(
    layer: Any, statistics: tuple[str, ...], *, w: Tensor | None = None, v: Tensor | None = None, **flags: Any
) -> MixtureSpec:
    """Return a recipe with the layer's eps, weight, bias and running statistics; ``flags`` as ``MixtureFlags.of``."""
    running = None
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
        flags["track"] = (2 if momentum is None else 1) if layer.training else 0
    known = MixtureFlags.of(statistics, weighted=w is not None, **flags)
    return MixtureSpec(known, layer.eps, layer.weight, layer.bias, w, v, running)


def per_channel_spec(layer: Any, numbers: dict[str, float], **flags: Any) -> PerChannelSpec:
    """Return a recipe with the layer's weight, bias and running statistics, of equations without more in them."""
    known = PerChannelNumbers(layer.eps, **numbers)
    if not layer.track_running_stats:
        return PerChannelSpec(layer.weight, layer.bias, PerChannelFlags(**flags), known)
    names = (*layer.running_names, "num_batches_tracked", "skipped_updates")
    momentum = layer._buffers.get("_momentum")
    track = (2 if momentum is None else 1) if layer.training else 0
    flags = {"frozen": not layer.training, "track": track, **flags}
    running = tuple(layer._buffers[name] for name in names)
    return PerChannelSpec(
        layer.weight, layer.bias, PerChannelFlags(**flags), known, running=running, rate=momentum
    )  # fmt: skip


def rectified(layer: Any, layout: Layout) -> PerChannelSpec:
    """Return the recipe of rbn."""
    unit = {f"unit_{part}": 1 + math.exp(-list(v.values())[-1]) for part, v in layer.starts.items() if len(v) == 2}
    numbers = unit if layer.gate_init == "unit" else {}
    found = per_channel_spec(layer, numbers, needs_moments=True, **dict.fromkeys(layer.rectify, True))
    return replace(found, gates=tuple(getattr(layer, name, None) for name in GATES))


def unified(layer: Any, layout: Layout) -> PerChannelSpec:
    """Return the recipe of ubn, which measures the condensation where a threshold is set."""
    found, threshold = rectified(layer, layout), layer.scheduled("threshold")
    if threshold is None or not layer.training or not layer.track_running_stats:
        return found
    how = 2 if layer.mode == "gate" else {"detach": 1, "renorm": 3}[layer.condensed_grad]
    flags = replace(found.flags, condensed=how, min_updates=layer.min_updates, max_skip=layer.max_skip)
    counters = tuple(layer._buffers[name] for name in ("condensation", *layer.counters))
    return replace(found, flags=flags, counters=counters, threshold=threshold)


def diminishing(layer: Any, layout: Layout) -> PerChannelSpec:
    """Return the recipe of dbn."""
    kept, frozen = layer.track_running_stats, layer.track_running_stats and not layer.training
    flags: dict[str, Any] = {"needs_moments": not frozen, "std": layer.average == "std"}
    if not kept or frozen:
        return per_channel_spec(layer, {}, **flags)
    flags |= {"blend": True, "powers": layer.power is not None, "detach": layer.stat_grad == "none", "track": 1}
    found = per_channel_spec(layer, {"power": layer.power or 1.0}, **flags)
    return replace(found, counters=(layer.updates, layer.gap), rate=layer.scheduled("alpha"))


def contextual(layer: Any, layout: Layout) -> PerChannelSpec | None:
    """Return the recipe of cn; what concerns the posterior is computed in PyTorch."""
    g, gated, kept = layer.contexts.g, layer.context == "gate", layer.track_running_stats
    frozen, posterior = kept and not layer.training, layer.missing == "posterior"
    if layer.num_contexts > CONTEXTS or (posterior and not frozen):
        return None
    pooled, needs_grad = not gated and g is None, not gated and g is not None and g.requires_grad
    if needs_grad or (pooled and posterior):
        return None
    flags = {"contexts": layer.num_contexts, "prior": layer.prior_scale, "gate": gated, "pooled": pooled and frozen}
    numbers = {"least": float(layer.min_count)}
    found = per_channel_spec(layer, numbers, needs_moments=gated or not frozen, **flags)
    if pooled and not frozen:  # evaluation without running statistics: the batch's, and all contexts alike
        held = layer.prior_or_uniform()
        g = held.new_full((layout.n, layer.num_contexts), 1 / layer.num_contexts, dtype=torch.float32)
    gates = tuple(getattr(layer, name, None) for name in GATES)
    responsibilities = None if gated or g is None else g.float().contiguous()
    return replace(found, gates=gates, responsibilities=responsibilities, counters=(layer.prior,))


def coded(layer: Any, layout: Layout) -> EncoderDecoderSpec | None:
    """Return the recipe of afn and asr, for encoders and decoders of one dtype."""
    linears = tuple(p for pair in layer._linears() for p in pair)
    if len({p.dtype for p in linears}) > 1:
        return None
    gates = tuple(layer._parameters[f"lambda_{name}"] for name in ("mu", "sigma", "beta", "gamma"))
    flags = EncoderDecoderFlags(batch=layer.train_uses_batch_stats)
    found = EncoderDecoderSpec(
        layer.weight, layer.bias, gates, linears, flags, layer.eps, drop_prob=layer._dropped()
    )  # fmt: skip
    if not layer.train_uses_batch_stats or not layer.track_running_stats:
        return found
    names = (*layer.running_names, "num_batches_tracked", "skipped_updates", "_momentum")
    running = tuple(layer._buffers[name] for name in names)
    track = (2 if running[4] is None else 1) if layer.training else 0
    return replace(found, flags=replace(flags, frozen=not layer.training, track=track), running=running)


def same_equations(cls: type) -> bool:
    """Tell whether no class below the one with the recipe changes what the recipe describes."""
    for base in cls.__mro__:
        if "fused_spec" in vars(base):
            return True
        if EQUATIONS & vars(base).keys():
            return False
    return False

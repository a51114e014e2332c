"""How a normalizer tells the kernels its equations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

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
    *("_rectified", "_gain", "_gate", "_choose", "_is_condensed"),
    *("_lambda", "_move", "_held", "_steps", "_new_weight"),
    *("recode", "drop", "drop_prob", "_decode", "_linear"),
    *("mixture", "statistics", "update_running_stats", "unseen", "_shrink_small_contexts", "_step_size"),
    *("gate", "per_context_affine", "running_per_context", "seen_prior", "prior_or_uniform", "posterior"),
}
"""Methods whose change makes a recipe another normalizer's."""


def mixture_spec(layer: Any, statistics: tuple[str, ...], **more: Any) -> MixtureSpec:
    """Return a recipe with the layer's eps, weight, bias and running statistics; ``more`` are further fields."""
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
    """Return a recipe with the layer's weight, bias and running statistics, of equations without more in them."""
    if not layer.track_running_stats:
        return PerChannelSpec(layer.weight, layer.bias, plan, {"eps": layer.eps, **numbers})
    names = (*layer.running_names, "num_batches_tracked", "skipped_updates")
    momentum = layer._buffers.get("_momentum")
    track = (2 if momentum is None else 1) if layer.training else 0
    plan = {"frozen": not layer.training, "track": track, **plan}
    running = tuple(layer._buffers[name] for name in names)
    return PerChannelSpec(layer.weight, layer.bias, plan, {"eps": layer.eps, **numbers}, running=running, rate=momentum)


def rectified(layer: Any, layout: Layout) -> PerChannelSpec:
    """Return the recipe of rbn."""
    gated = {part: starts for part, starts in layer.rectifications.items() if len(starts) == 2}
    unit = {f"unit_{part}": 1 + math.exp(-list(starts.values())[-1]) for part, starts in gated.items()}
    numbers = unit if layer.gate_init == "unit" else {}
    found = per_channel_spec(layer, numbers, own=1, **dict.fromkeys(layer.rectify, 1))
    return replace(found, gates=tuple(getattr(layer, name, None) for name in GATES))


def unified(layer: Any, layout: Layout) -> PerChannelSpec:
    """Return the recipe of ubn, which measures the condensation where a threshold is set."""
    found, threshold = rectified(layer, layout), layer.scheduled("threshold")
    if threshold is None or not layer.training or not layer.track_running_stats:
        return found
    how = 2 if layer.mode == "gate" else {"detach": 1, "renorm": 3}[layer.condensed_grad]
    choose = {"choose": how, "min_updates": layer.min_updates, "max_skip": layer.max_skip}
    counters = tuple(layer._buffers[name] for name in ("condensation", *layer.counters))
    return replace(found, plan={**found.plan, **choose}, counters=counters, threshold=threshold)


def diminishing(layer: Any, layout: Layout) -> PerChannelSpec:
    """Return the recipe of dbn."""
    kept, frozen = layer.track_running_stats, layer.track_running_stats and not layer.training
    plan: dict[str, int] = {"own": not frozen, "std": layer.average == "std"}
    if not kept or frozen:
        return per_channel_spec(layer, {}, **plan)
    plan |= {"blend": 1, "powers": layer.power is not None, "detach": layer.stat_grad == "none", "track": 1}
    found = per_channel_spec(layer, {"power": layer.power or 1.0}, **plan)
    return replace(found, counters=(layer.updates, layer.gap), rate=layer.scheduled("alpha"))


def contextual(layer: Any, layout: Layout) -> PerChannelSpec | None:
    """Return the recipe of cn; what concerns the posterior is computed in PyTorch."""
    g, gated, kept = layer.contexts.responsibilities, layer.context == "gate", layer.track_running_stats
    frozen, posterior = kept and not layer.training, layer.missing == "posterior"
    if layer.num_contexts > CONTEXTS or (posterior and not frozen):
        return None
    pooled, needs_grad = not gated and g is None, not gated and g is not None and g.requires_grad
    if needs_grad or (pooled and posterior):
        return None
    plan = {"own": gated or not frozen, "contexts": layer.num_contexts, "prior": layer.prior_scale, "gate": gated}
    found = per_channel_spec(layer, {"least": float(layer.min_count)}, pooled=pooled and frozen, **plan)
    if pooled and not frozen:  # evaluation without running statistics: the batch's, and all contexts alike
        held = layer.prior_or_uniform()
        g = held.new_full((layout.n, layer.num_contexts), 1 / layer.num_contexts, dtype=torch.float32)
    gates = tuple(getattr(layer, name, None) for name in GATES)
    shares = None if gated or g is None else g.float().contiguous()
    return replace(found, gates=gates, shares=shares, counters=(layer.prior,))


def coded(layer: Any, layout: Layout) -> EncoderDecoderSpec | None:
    """Return the recipe of afn and asr, for encoders and decoders of one dtype."""
    coders = tuple(p for pair in layer.linear_parameters() for p in pair)
    if len({p.dtype for p in coders}) > 1:
        return None
    gates = tuple(layer._parameters[f"lambda_{name}"] for name in ("mu", "sigma", "beta", "gamma"))
    found = EncoderDecoderSpec(
        layer.weight, layer.bias, gates, coders, [int(layer.train_uses_batch_stats), 0, 0], layer.eps
    )
    found = replace(found, share=layer.drop_prob())
    if not layer.train_uses_batch_stats or not layer.track_running_stats:
        return found
    names = (*layer.running_names, "num_batches_tracked", "skipped_updates", "_momentum")
    running = tuple(layer._buffers[name] for name in names)
    track = (2 if running[4] is None else 1) if layer.training else 0
    return replace(found, plan=[1, int(not layer.training), track], running=running)


def same_equations(cls: type) -> bool:
    """Tell whether no class below the one with the recipe changes what the recipe describes."""
    for base in cls.__mro__:
        if "fused_spec" in vars(base):
            return True
        if EQUATIONS & vars(base).keys():
            return False
    return False

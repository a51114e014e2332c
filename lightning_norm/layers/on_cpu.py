"""The shortest ways that the CPU has, with a layer's tensors: torch's functions, and mixtures written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_norm.layers.running_stats import moves_running_stats, update_running
from lightning_norm.ops import mixture_on_cpu, native, rectified_on_cpu, torch_private
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.moments import Moments
from lightning_norm.ops.vectors import quiet

FEW = 8
"""Of groups with fewer elements the algebra computes the statistics."""

MANY = 512
"""Positions of a large channels-last map."""


def batch_norm(layer: Any, x: Tensor, layout: Layout, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Return x normalized by the batch, and move the running statistics of the layer as torch's BatchNorm does.

    ``None`` where torch's is not the same function at the same precision; then nothing has moved.
    """
    running = tuple(layer._buffers[name] for name in layer.running_names) if moves_running_stats(layer) else None
    if not native.takes(x, weight, bias, *(running or ())):
        return None
    batches, momentum = layer.num_batches_tracked, 0.0
    if running is not None:
        weight_of_new = layer.scheduled("momentum")
        # Without, the average of all batches.
        count = 0 if batches is None or weight_of_new is not None else batches.item()
        momentum = 1.0 / (count + 1) if weight_of_new is None else weight_of_new.item()
    y = native.batch_norm(x, layout, weight, bias, layer.eps, running, momentum)
    if y is not None and running is not None and batches is not None:
        batches.add_(1)
    return y


def renormalized(layer: Any, x: Tensor, layout: Layout) -> Tensor | None:
    """Return x normalized by the batch and brought to other statistics, which a :class:`BlendedNorm` moves.

    With r and d constant that is batch normalization with the weight gamma r and the bias gamma d + beta. ``None`` as
    for :func:`batch_norm`.
    """
    buffers = [layer._buffers[name] for name in (*layer.blend_names, "gap")]
    if layer.averages_blend or not native.takes(x, layer.weight, layer.bias, *buffers):
        return None
    with quiet():
        measured = native.statistics(x, layout)
        constants = None if measured is None else layer.renormalize_at_once(measured[0], measured[1].astype(np.float64))
        if constants is None:
            return None

        def scale_of(var: Tensor) -> Tensor:
            # Of r s the value and the gradient: r is a constant, which is only needed here.
            scale: Tensor = layer.scale_of(layer.std_or_var_of(var))
            return scale / scale.detach() * torch.from_numpy(constants.scale)

        return native.standardize(x, layout, layer.weight, layer.bias, constants, scale_of)


def group_norm(
    layer: Any, x: Tensor, layout: Layout, groups: int, weight: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """Return x normalized by the statistics of each sample's groups; ``None`` as for :func:`batch_norm`."""
    # Few elements often have a mean that is large against their standard deviation: ATen would compute in vain. And of
    # (N, C) inputs it keeps two numbers of each group.
    few = layout.size * layout.c // groups < (FEW if layout.size > 1 else 2 * FEW)
    # Channels-last, its kernel for groups of one channel is slower than the passes, and on large maps for all groups.
    slow = not x.is_contiguous() and (groups == layout.c or (groups > 1 and layout.size > MANY))
    fatal = not x.is_contiguous() and not torch_private.CHANNELS_LAST_GROUP_NORM
    if layout.channel_dim != 1 or not native.takes(x, weight, bias):
        return None
    y = None if few or slow or fatal else native.group_norm(x, layout, groups, weight, bias, layer.eps)
    # The algebra would keep many times as much of (N, C) inputs.
    return native.wide_group_norm(x, layout, groups, weight, bias, layer.eps) if y is None and layout.size == 1 else y


def mixture(
    layer: Any,
    x: Tensor,
    layout: Layout,
    statistics: tuple[str, ...],
    w: Tensor | None = None,
    v: Tensor | None = None,
    *,
    entries: tuple[int, ...] = (),
    outputs: bool = False,
) -> Tensor | None:
    """Return x normalized by a :class:`lightning_norm.ops.mixture_on_cpu.Mixture`; ``None`` where it cannot."""
    if not native.takes(x, layer.weight, layer.bias, w, v):
        return None

    track = _track_of(layer, layout) if "bn" in statistics else None
    how = mixture_on_cpu.Mixture(layout, statistics, layer.eps, entries, outputs, track)
    return mixture_on_cpu.normalize(x, how, layer.weight, layer.bias, w, v)


def rectified(
    layer: Any,
    x: Tensor,
    layout: Layout,
    factor: float,
    chooses: Callable[[Tensor, Moments], bool] | None = None,
) -> Tensor | None:
    """Return x normalized by the batch and rectified, with the gates times a factor; ``None`` where it cannot.

    Args:
        layer: the layer.
        x: its input.
        layout: of x.
        factor: of the gates.
        chooses: tells, given x and the moments of each sample, whether the batch's statistics are taken; otherwise
            nothing moves. ``None`` where they always are.
    """
    names = rectified_on_cpu.Parameters._fields
    parameters = rectified_on_cpu.Parameters(*[layer._parameters.get(name) for name in names])
    if not native.takes(x, *parameters):
        return None
    move = _track_of(layer, layout)

    def track(mean: Tensor, var: Tensor | None, batch: tuple[Tensor, Tensor]) -> bool:
        of_samples = Moments(mean, torch.zeros_like(mean) if var is None else var, layout.size)
        if chooses is not None and not chooses(x.detach(), of_samples):
            return False
        if move is not None:
            move(*batch)
        return True

    how = rectified_on_cpu.Rectified(layout, layer.eps, factor, track)
    return rectified_on_cpu.normalize(x, how, parameters)


def _track_of(layer: Any, layout: Layout) -> Callable[[Tensor, Tensor], None] | None:
    """Return what moves the running statistics towards those of a batch; ``None`` where they stay."""

    def track(mean: Tensor, var: Tensor) -> None:
        update_running(layer, Moments(mean, var, layout.n * layout.size))

    return track if moves_running_stats(layer) else None


def is_read_as_one_sample(layer: Any, x: Tensor, layout: Layout) -> bool:
    """Tell whether a batch is measured as one sample: where ATen's kernels for it are fast, and it pays."""
    return layer._of_batch_alone and (layout.size == 1 or not x.is_contiguous()) and native.takes(x)


def outruns_graphs(layer: Any, x: Tensor) -> bool:
    """Tell whether a layer in training takes a channels-last map by ATen, which takes less time than Inductor's code.

    For that of batch normalization by 1.1 to 1.7, for that of group normalization by 2 to 5.
    """
    trains = layer._aten_on_cpu and layer.training and layer._fused_spec_holds and layer._accumulator is None
    last = layer.channel_dim == 1 and x.dim() > 2 and not x.is_contiguous()
    return trains and last and layer.backend == "auto" and native.takes(x)

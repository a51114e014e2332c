"""What the fused descriptions of all normalizers share: eps, weight, bias and running statistics of the layer.

A method writes ``fused_spec(layout)`` with these and adds what is its own. It returns ``None`` for inputs or
arguments that the kernels do not know, and then the algebra runs as written.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_norm.kernels.launcher import DTYPE
from lightning_norm.kernels.mixture.flags import MixtureFlags
from lightning_norm.kernels.per_channel.flags import PerChannelFlags, PerChannelNumbers
from lightning_norm.layers.pausing import is_paused
from lightning_norm.layers.running_stats import moves_running_stats, reads_copies
from lightning_norm.ops import torch_private
from lightning_norm.ops.fused import recorded
from lightning_norm.ops.fused.elementwise import ElementwiseSpec
from lightning_norm.ops.fused.mixture import CONVOLVED, MixtureSpec, Running
from lightning_norm.ops.fused.per_channel import PerChannelSpec
from lightning_norm.ops.layout import Layout

MANY = 64
"""Shapes whose descriptions a layer remembers."""

SPECS = "_fused_specs"


class _Specs(dict[Any, Any]):
    """Descriptions by the shape of x, each with the layer's tensors; copies and pickles of a layer begin with none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _Remembered(NamedTuple):
    """A description and what it was made of.

    Args:
        spec: the description.
        tensors: parameters and buffers of the layer, the very objects.
        there: those of them that are not ``None``.
        dtypes: of those; ``.data = ...`` changes a tensor that stays the same object.
        attributes: all others of the layer.
        place: of what it remembers among them, left out: it would be a cycle of references.
        device: of the constants in the description, which do not move with the layer; ``None`` without any.
    """

    spec: Any
    tensors: tuple[Tensor | None, ...]
    there: list[Tensor]
    dtypes: list[torch.dtype]
    attributes: list[Any]
    place: int
    device: torch.device | None


_constants: dict[Any, Tensor] = {}


def constant(key: Any, device: torch.device | None, make: Any) -> Tensor:
    """Return a tensor that is the same for all layers alike, and may stand in a description that is remembered.

    Args:
        key: what it follows from.
        device: of the layer.
        make: returns it, given the device.
    """
    known = _constants.get((key, device))
    if known is None:
        # What is made while somebody watches or captures is a stand-in, or belongs to a graph.
        stand_in = torch.compiler.is_compiling() or torch_private.watched()
        if device is not None and device.type == "cuda":
            stand_in = stand_in or torch.cuda.is_current_stream_capturing()
        with torch.inference_mode(False):
            known = make(device)
        if not stand_in:
            if len(_constants) > MANY:
                _constants.clear()
            _constants[key, device] = known
    return known


def spec_of(layer: Any, layout: Layout) -> Any:
    """Return ``layer.fused_spec(layout)``, remembered as long as attributes and tensors of the layer are the same.

    ``None`` where the kernels cannot read the layer's tensors, which they take to be contiguous. Only a description
    made of nothing but the layer's tensors is remembered.
    """
    # A graph calls it once, while it is traced: there is nothing to remember.
    if layer.fused_spec_varies or torch.compiler.is_compiling():
        return _readable(layer.fused_spec(layout))
    key = _key(layer, layout.shape)
    spec = _remembered(layer, key)
    if spec is None:
        spec = _readable(layer.fused_spec(layout))
        tensors = _tensors(layer)
        ids = {*map(id, tensors)}
        others = [] if spec is None else [t for t in (*spec.parameters, *spec.buffers) if t is not None and id(t) not in ids]  # noqa: E501  # fmt: skip
        of_layer = spec is not None and all(any(t is c for c in _constants.values()) for t in others)
        # Those of torch.func.functional_call may hang on a graph, which must not live longer than the call.
        if of_layer and all(t is None or t.is_leaf for t in tensors):
            specs = vars(layer).get(SPECS)
            # Inputs of ever new shapes must not fill the memory: from time to time all are forgotten.
            if specs is None or len(specs) > MANY:
                specs = vars(layer)[SPECS] = _Specs()
            there = [t for t in tensors if t is not None]
            place = list(vars(layer)).index(SPECS)
            device = others[0].device if others else None
            specs[key] = _Remembered(
                spec, tensors, there, [*map(DTYPE, there)], _attributes(layer, place), place, device
            )
    return spec


def _readable(spec: Any) -> Any:
    if spec is None or not all(t is None or t.is_contiguous() for t in (*spec.parameters, *spec.buffers)):
        return None
    return spec


def same_as_before(layer: Any, x: Tensor, activation: str, residual: Tensor | None) -> Tensor | None:
    """Return the output if a call like this was recorded and nothing has changed since; ``None`` otherwise."""
    spec = _remembered(layer, _key(layer, x.shape)) if isinstance(x, Tensor) else None
    convolved = None if spec is None else vars(spec).get(CONVOLVED)
    if convolved is not None:
        # A kernel with other axes than the layer's, or tokens with their axes moved, are views made in that call.
        if layer.channel_dim != 1 or not any(convolved.kernel is p for p in layer._parameters.values()):
            return None
        spec = convolved
    return None if spec is None else recorded.again(x, spec, layer.channel_dim % x.dim(), activation, residual)


def _key(layer: Any, shape: Any) -> Any:
    # Evaluation is described by the running statistics or by copies of them.
    return shape, layer.training, reads_copies(), is_paused(layer), type(layer).fused_spec, layer.fused_spec_key


def _remembered(layer: Any, key: Any) -> Any:
    known = vars(layer).get(SPECS, {}).get(key)
    if known is None or not _is_equal(known.attributes, _attributes(layer, known.place)):
        return None
    tensors = _tensors(layer)
    if len(tensors) != len(known.tensors) or not all(map(operator.is_, known.tensors, tensors)):
        return None
    # By map, for a loop of Python's takes three times as long.
    if [*map(DTYPE, known.there)] != known.dtypes or not all(map(Tensor.is_contiguous, known.there)):
        return None
    if known.device is not None and known.device != next((t.device for t in known.there), None):
        return None
    return known.spec


def _is_equal(before: list[Any], now: list[Any]) -> bool:
    try:
        return before == now  # takes no time for objects that are the same
    except Exception:  # arrays and tensors have no one answer
        return False


def _attributes(layer: Any, place: int) -> list[Any]:
    attributes = [*vars(layer).values()]
    attributes[place : place + 1] = []
    return attributes


def _tensors(layer: Any) -> tuple[Tensor | None, ...]:
    return *layer._parameters.values(), *layer._buffers.values()


def uses_running_stats(layer: Any) -> bool:
    """Tell whether the next forward pass reads or moves the running statistics."""
    uses: bool = moves_running_stats(layer) if layer.training else layer.has_running_stats
    return uses


def running_stats(layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return running mean and variance, the number of updates and that of skipped ones, as the kernels move them.

    In evaluation the first two are copies where a backward pass may read them after the next update.
    """
    mean, var = (layer._buffers[name] for name in layer.running_names)
    if not layer.training and reads_copies():
        mean, var = mean.clone(), var.clone()
    counters = (layer._buffers.get(name) for name in ("num_batches_tracked", "skipped_updates"))
    tracked, skipped = (mean.new_zeros((), dtype=torch.long) if t is None else t for t in counters)
    return mean, var, tracked, skipped


def mixture_spec(
    layer: Any, statistics: tuple[str, ...], *, w: Tensor | None = None, v: Tensor | None = None, **flags: Any
) -> MixtureSpec:
    """Describe the layer with its eps, weight, bias and running statistics; ``flags`` as ``MixtureFlags.of``.

    Args:
        layer: the normalizer.
        statistics: which of "in", "ln" and "bn" are mixed, in the order of the weights.
        w: weights of the means, (len(statistics),); ``None`` for a single statistic.
        v: those of the variances.
        flags: what else tells this equation from others of the family.
    """
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
    return MixtureSpec(known, float(layer.eps), layer.weight, layer.bias, w, v, running)


def per_channel_spec(layer: Any, numbers: dict[str, float], **flags: Any) -> PerChannelSpec:
    """Return a description with the layer's weight, bias and running statistics, with these flags and numbers.

    Args:
        layer: the normalizer.
        numbers: constants of the equation beside eps, by their names in ``PerChannelNumbers``.
        flags: which parts of the equation run, by their names in ``PerChannelFlags``.
    """
    known = PerChannelNumbers(float(layer.eps), **{name: float(number) for name, number in numbers.items()})
    if not uses_running_stats(layer):
        return PerChannelSpec(layer.weight, layer.bias, PerChannelFlags(**flags), known)
    momentum = layer._buffers.get("_momentum")
    track = (2 if momentum is None else 1) if layer.training else 0
    # A method that moves its running statistics in another way says so by its own flags, which win.
    flags = {"frozen": not layer.training, "track": track, **flags}
    running = running_stats(layer)
    return PerChannelSpec(layer.weight, layer.bias, PerChannelFlags(**flags), known, running=running, rate=momentum)


def elementwise_spec(layer: Any, name: str) -> ElementwiseSpec:
    """Return a description with the layer's weight, bias, alpha and offset; ``name`` is that of f for the kernels."""
    return ElementwiseSpec(layer.weight, layer.bias, layer.alpha, layer.offset, name, type(layer))

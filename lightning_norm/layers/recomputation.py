"""Activation checkpointing: a forward pass inside of a backward pass is the second run of one that has been counted.

``torch.utils.checkpoint`` throws activations away and computes them again while autograd runs. The second run must give
the values of the first and move nothing: each batch counts once in the running statistics. (torch's BatchNorm counts it
twice.) So it works on copies of the buffers: as they are now, or, for a layer whose output in training depends on them,
as they were before the first run.
"""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from lightning_norm.errors import ConflictWarning
from lightning_norm.ops import torch_private

MOST_WITHOUT_GRAPH = 64
"""First runs that are remembered of each layer where no graph tells how long: under ``use_reentrant=True``."""


class FirstRun:
    """One forward pass that may run again.

    Args:
        layer: that runs.
        x: its input, of which a few numbers are kept, to know it again.
    """

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        self.buffers = {name: b.clone() for name, b in layer._buffers.items() if b is not None}
        self.shape, self.picked = x.shape, picked(x)

    def keep(self, layer: nn.Module, y: Tensor) -> None:
        """Remember it as long as the graph of its output lives, or until there are many more."""
        if torch.is_grad_enabled():
            if y.grad_fn is not None:
                y.grad_fn.metadata[FirstRun] = self  # type: ignore[index]  # a dict, which torch annotates as a method
                _with_graph.setdefault(layer, WeakSet()).add(self)
        else:
            _without_graph.setdefault(layer, deque(maxlen=MOST_WITHOUT_GRAPH)).append(self)


# Weak references: what is remembered of a run keeps neither a layer nor a graph alive.
_with_graph: WeakKeyDictionary[nn.Module, WeakSet[FirstRun]] = WeakKeyDictionary()
_without_graph: WeakKeyDictionary[nn.Module, deque[FirstRun]] = WeakKeyDictionary()


def picked(x: Tensor) -> Tensor:
    """Return at most 8 x 8 x 4 x ... numbers of x, spread over all of it."""
    # At fixed strides, so that the second run picks the same numbers.
    most = (8, 8, 4, 4, 4)
    steps = (-(-size // wanted) or 1 for size, wanted in zip(x.shape, (*most, *x.shape[len(most) :]), strict=False))
    return x.detach()[tuple(slice(None, None, step) for step in steps)].float().nan_to_num()


def may_run_again() -> bool:
    """Tell whether this forward pass looks like the first run of activation checkpointing.

    That is without gradients where ``use_reentrant=True``, and else under hooks for saved tensors.
    """
    return not torch.is_grad_enabled() or torch_private.recomputes_saved_tensors()


@torch_private.constant_in_graphs
def tell_of_graph(who: str) -> None:
    """Warn that a graph of torch.compile moves running statistics in each of the two runs of checkpointing."""
    warnings.warn(
        f"{who}: torch.compile makes a graph of what activation checkpointing runs twice, and the graph moves the "
        "running statistics both times, as it does of torch's BatchNorm. Call checkpoint inside of what is compiled, "
        "as model.compile() does of a model that checkpoints its blocks, or compile the layers alone: "
        "NormSwap(..., compile=True).",
        ConflictWarning,
        stacklevel=3,
    )


@contextmanager
def second_run(layer: Any, x: Tensor) -> Iterator[None]:
    """Run a layer that is in training on copies of its buffers: as they are, or as its first run on x found them."""
    # Copies stand in for the buffers: whatever the layer writes, the real ones are put back untouched.
    now, accumulator = dict(layer._buffers), layer._accumulator
    layer._buffers.update({name: b.clone() for name, b in now.items() if b is not None})
    if layer.train_uses_running_stats:
        layer._buffers.update(_buffers_of_first_run(layer, x))
    if accumulator is not None:
        # Past ``__setattr__``, which would forget what the compiled graph of the layer is.
        vars(layer)["_accumulator"] = copy.deepcopy(accumulator)
    try:
        yield
    finally:
        layer._buffers.update(now)
        if accumulator is not None:
            vars(layer)["_accumulator"] = accumulator


def _buffers_of_first_run(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return copies of the buffers as the first run on x found them; nothing where no such run is known."""
    runs = [r for r in (*_with_graph.get(layer, ()), *_without_graph.get(layer, ())) if r.shape == x.shape]
    if not runs:
        return {}
    if len(runs) == 1:
        return {name: b.clone() for name, b in runs[0].buffers.items()}
    # Chosen on the device, without a value that the host would wait for. The second run may round otherwise.
    apart = torch.stack([(r.picked - picked(x)).abs().sum() for r in runs])
    nearest = apart.argmin().reshape(1)
    return {name: torch.stack([r.buffers[name] for r in runs]).index_select(0, nearest)[0] for name in runs[0].buffers}

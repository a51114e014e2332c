"""Compile a layer's forward pass on its own, at static shapes, without ever meeting the recompile limit.

torch.compile keeps at most ``recompile_limit`` variants per code object and then falls back, and all layers of a class
share one code object. So each combination of class, shape, strides, dtype and mode gets a code object of its own.
Layers that agree in all of these share one compiled graph: 53 layers of a resnet50 need a dozen graphs and not 53.
"""

from __future__ import annotations

import types
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.errors import CompileWarning

MANY_SHAPES = 16
"""Input shapes of one kind of layer beyond which it is compiled once more, for every shape."""

_graphs: dict[Hashable, Callable[[nn.Module, Tensor], Tensor]] = {}
_shapes: Counter[Hashable] = Counter()
_observers: list[Callable[[str], None]] = []


def compiled_forward(layer: nn.Module, x: Tensor, forward: Callable[[Any, Tensor], Tensor], kind: Hashable) -> Tensor:
    """Run ``forward(layer, x)`` under torch.compile(fullgraph=True).

    Args:
        layer: the layer.
        x: its input.
        forward: the plain function to compile.
        kind: what must agree, beside the input, for two layers to share a graph.
    """
    kind = (forward, kind, x.dtype, x.dim(), x.device.type, x.device.index, layer.training, torch.is_grad_enabled())
    key: Hashable = (kind, tuple(x.shape), x.stride(), x.requires_grad)
    if key not in _graphs and _shapes[kind] >= MANY_SHAPES:
        key = kind
    graph = _graphs.get(key)
    if graph is None:
        graph = _graphs[key] = _new_graph(layer, forward, kind, f"{type(layer).__name__} {tuple(x.shape)}")
    return graph(layer, x)


def graphs() -> int:
    """Return how many graphs were compiled in this process."""
    return len(_graphs)


def on_compile(observer: Callable[[str], None]) -> Callable[[], None]:
    """Call ``observer`` with a line of text before each compilation; the returned function ends that."""
    _observers.append(observer)
    return lambda: _observers.remove(observer)


def _new_graph(
    layer: nn.Module, forward: Callable[[Any, Tensor], Tensor], kind: Hashable, what: str
) -> Callable[[nn.Module, Tensor], Tensor]:
    _shapes[kind] += 1
    dynamic = _shapes[kind] > MANY_SHAPES
    if dynamic:
        warnings.warn(
            f"{type(layer).__name__} met more than {MANY_SHAPES} input shapes: compiled once more for all shapes, "
            "which is "
            "slower than a graph per shape. Resize or bucket the inputs, or pass compile=False.",
            CompileWarning,
            stacklevel=5,
        )
    for observer in _observers:
        observer(what)

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        return forward(layer, x)

    own = types.FunctionType(
        run.__code__.replace(co_name=f"run_{len(_graphs)}"), run.__globals__, closure=run.__closure__
    )
    compiled: Callable[[nn.Module, Tensor], Tensor] = torch.compile(own, fullgraph=True, dynamic=dynamic)
    return compiled

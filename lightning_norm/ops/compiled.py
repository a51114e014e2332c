"""Compile a layer's forward pass on its own, at static shapes, without ever meeting the recompile limit.

torch.compile keeps at most ``recompile_limit`` variants per code object and then falls back, and all layers of a class
share one code object. So each combination of class, shape, strides, dtype and mode gets a code object of its own.
Layers that agree in all of these share one compiled graph: 53 layers of a resnet50 need a dozen graphs and not 53.
"""

from __future__ import annotations

import types
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.errors import CompileWarning

MANY_SHAPES = 16
"""Input shapes of one kind of layer beyond which it is compiled once more, for every shape."""

GRAPH_KEY = "_compiled_kind"
"""Name under which a layer keeps what it must agree in with others; whoever sets an attribute deletes it."""

_graphs: dict[Hashable, Callable[[nn.Module, Tensor], Tensor]] = {}
_shapes: Counter[Hashable] = Counter()
_observers: list[Callable[[str], None]] = []


def compiled_forward(
    layer: nn.Module,
    x: Tensor,
    forward: Callable[[Any, Tensor], Tensor],
    ranks: Hashable = None,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """Run ``forward(layer, x)`` under torch.compile(fullgraph=True).

    Args:
        layer: the layer.
        x: its input.
        forward: the plain function to compile.
        ranks: the ranks it pools with, which a graph takes for constant.
        options: further arguments of ``torch.compile``.
    """
    options = options or {}
    kind = (
        forward,
        ranks,
        repr(options),
        _kind_of(layer),
        x.dtype,
        x.dim(),
        x.device,
        x.requires_grad,
        torch.is_grad_enabled(),
    )
    key: Hashable = (kind, tuple(x.shape), x.stride())
    if key not in _graphs and _shapes[kind] >= MANY_SHAPES:
        key = kind
    if key not in _graphs:
        _graphs[key] = _new_graph(layer, x, forward, kind, options)
    try:
        return _graphs[key](layer, x)
    except Exception as error:
        if type(error).__name__ != "FailOnRecompileLimitHit":  # importing it would import the whole compiler
            raise
        # torch guards on something that the key does not hold: begin again with a code object that has no variants yet.
        _graphs[key] = _new_graph(layer, x, forward, kind, options)
        return _graphs[key](layer, x)


def _kind_of(layer: nn.Module) -> Hashable:
    """What two layers must agree in to share a graph: the class, its plain attributes, what its tensors are.

    Kept on the layer until an attribute of it is set: this runs in every forward pass.
    """
    kind: Hashable = vars(layer).get(GRAPH_KEY)
    if kind is not None:
        return kind
    plain = tuple(v for v in vars(layer).values() if isinstance(v, (bool, int, float, str, tuple, type(None))))
    tensors = (*layer._parameters.values(), *layer._buffers.values())
    kinds = tuple(None if t is None else (t.dtype, t.requires_grad) for t in tensors)
    kind = layer.__dict__[GRAPH_KEY] = (type(layer), repr(plain), kinds)
    return kind


def snapshot(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors as they are now, for a gradient that depends on buffers which the forward pass then changes.

    Under torch.compile the backward pass may compute cheap values again from such buffers, as they are by then: a wrong
    gradient, without a word (pytorch/pytorch#197039). It saves the result of a concatenation and never repeats one.
    """
    if not torch.compiler.is_compiling():
        return tensors
    flat = torch.cat([t.to(tensors[0].dtype).reshape(-1) for t in tensors])
    parts = torch.split(flat, [t.numel() for t in tensors])
    return tuple(part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True))


def graphs() -> int:
    """Return how many graphs were compiled in this process."""
    return len(_graphs)


def on_compile(observer: Callable[[str], None]) -> Callable[[], None]:
    """Call ``observer`` with a line of text before each compilation; the returned function ends that."""
    _observers.append(observer)
    return lambda: _observers.remove(observer)


def _new_graph(
    layer: nn.Module,
    x: Tensor,
    forward: Callable[[Any, Tensor], Tensor],
    kind: Hashable,
    options: Mapping[str, Any],
) -> Callable[[nn.Module, Tensor], Tensor]:
    _shapes[kind] += 1
    dynamic = _shapes[kind] > MANY_SHAPES
    if dynamic:
        warnings.warn(
            f"{type(layer).__name__} met more than {MANY_SHAPES} input shapes: compiled once more for all of them, "
            "which is slower than a graph per shape. Resize or bucket the inputs, or pass compile=False.",
            CompileWarning,
            stacklevel=5,
        )
    for observer in _observers:
        observer(f"{type(layer).__name__} {tuple(x.shape)}")

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        return forward(layer, x)

    own = types.FunctionType(
        run.__code__.replace(co_name=f"run_{len(_graphs)}"), run.__globals__, closure=run.__closure__
    )
    compiled: Callable[[nn.Module, Tensor], Tensor] = torch.compile(
        own, **{"fullgraph": True, "dynamic": dynamic, **options}
    )
    return compiled

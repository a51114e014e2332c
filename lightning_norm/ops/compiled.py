"""Compile a layer's forward pass on its own, at static shapes, without ever meeting the recompile limit.

torch.compile keeps at most ``recompile_limit`` variants of one code object and then runs it uncompiled, and all layers
of a class have the same code object. So each combination of class, shape, strides, dtype and mode gets a code object
of its own. Layers that agree in all of these share one compiled graph: 53 layers of a resnet50 need a dozen graphs.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.errors import CompileWarning
from lightning_norm.ops import torch_private

MANY_SHAPES = 16
"""Input shapes of layers with one cache key beyond which one more graph is compiled, for every shape."""

GRAPH_KEY = "_graph_key"
"""Attribute in which a layer caches its cache key: the properties two layers must share to reuse one compiled graph.

A layer's ``__setattr__`` invalidates it, since a new value may be a new property.
"""

_graphs: dict[Hashable, Callable[[nn.Module, Tensor], Tensor]] = {}
"""Cache key, shape and strides -> compiled graph; cache key alone -> the graph for every shape."""

_shapes: Counter[Hashable] = Counter()
"""Cache key -> how many graphs were compiled for it."""

_observers: list[Callable[[str], None]] = []


def compiled_forward(
    layer: nn.Module,
    x: Tensor,
    forward: Callable[..., Tensor],
    ranks: Hashable = None,
    options: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Run ``forward(layer, x)`` under torch.compile(fullgraph=True).

    Args:
        layer: the layer.
        x: its input.
        forward: the plain function to compile.
        ranks: the ranks it pools with, which are a constant in a graph.
        options: further arguments of ``torch.compile``.
        mask: a further argument of ``forward``.
    """
    options, inputs = options or {}, (layer, x) if mask is None else (layer, x, mask)
    # What torch.compile would compile anew for: here each has a graph of its own from the start.
    mode = (x.dtype, x.dim(), x.device, x.requires_grad, torch.is_grad_enabled())
    any_shape: Hashable = (forward, ranks, repr(options), _graph_key_of(layer), *mode)
    key: Hashable = (any_shape, tuple(x.shape), x.stride())
    if mask is not None:
        any_shape = (any_shape, "masked")
        key = (any_shape, tuple(x.shape), x.stride(), tuple(mask.shape), mask.stride())
    if key not in _graphs and _shapes[any_shape] >= MANY_SHAPES:
        key = any_shape
    if key not in _graphs:
        _graphs[key] = _new_graph(layer, x, forward, any_shape, options)
    try:
        return _graphs[key](*inputs)
    except Exception as error:
        # Importing the class would import the whole compiler, a second that uncompiled runs would pay.
        if type(error).__name__ != "FailOnRecompileLimitHit":
            raise
        # torch guards on something that the key does not hold: begin again with a code object that has no variants yet.
        _graphs[key] = _new_graph(layer, x, forward, any_shape, options)
        return _graphs[key](*inputs)


def _graph_key_of(layer: nn.Module) -> Hashable:
    """Return the properties two layers must share to reuse one graph: class, plain attributes, dtypes of tensors.

    It is cached on the layer, for a forward pass on small inputs would spend a good part of its time here.
    """
    key: Hashable = vars(layer).get(GRAPH_KEY)
    if key is not None:
        return key
    kinds = (bool, int, float, str, tuple, type(None))
    # A layer's place in the model is in its messages only.
    plain = tuple(v for name, v in vars(layer).items() if name != "_place" and isinstance(v, kinds))
    # A frozen parameter has another backward pass, so requires_grad is part of the key.
    tensors = (*layer._parameters.values(), *layer._buffers.values())
    dtypes = tuple(None if t is None else (t.dtype, t.requires_grad) for t in tensors)
    # vars, since setting an attribute of the layer would delete the key again.
    key = vars(layer)[GRAPH_KEY] = (type(layer), repr(plain), dtypes)
    return key


def snapshot(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors as they are now, for a gradient that depends on buffers which the forward pass then changes.

    Under torch.compile the backward pass may compute cheap values again from such buffers, when they have changed: a
    wrong gradient, without an error (pytorch/pytorch#197039). The result of a concatenation it saves instead.
    """
    if not torch.compiler.is_compiling():
        return tensors
    # A concatenation costs little here, for the tensors are (C,) or 0-dim. In the widest dtype, which loses no digit.
    widest = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    joined = torch.cat([t.to(widest).reshape(-1) for t in tensors])
    parts = torch.split(joined, [t.numel() for t in tensors])
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
    forward: Callable[..., Tensor],
    any_shape: Hashable,
    options: Mapping[str, Any],
) -> Callable[[nn.Module, Tensor], Tensor]:
    _shapes[any_shape] += 1
    # A graph per shape is faster, but a detection network would compile one for each size of image.
    dynamic = _shapes[any_shape] > MANY_SHAPES
    if dynamic:
        warnings.warn(
            f"{type(layer).__name__} met more than {MANY_SHAPES} input shapes: compiled once more for all of them, "
            "which is slower than a graph per shape. Resize or bucket the inputs, or pass compile=False.",
            CompileWarning,
            stacklevel=5,
        )
    for observer in _observers:
        observer(f"{type(layer).__name__} {tuple(x.shape)}")

    def run(layer: nn.Module, *inputs: Tensor) -> Tensor:
        return forward(layer, *inputs)

    # A copy of ``run`` with a code object of its own, which torch.compile counts its variants by.
    code = run.__code__.replace(co_name=f"run_{len(_graphs)}")
    copied = types.FunctionType(code, run.__globals__, closure=run.__closure__)
    chosen = {"fullgraph": torch_private.TRACES_CONTEXT_VARIABLES, "dynamic": dynamic, **options}
    # The user's options come last and win, ``fullgraph=False`` included.
    compiled: Callable[[nn.Module, Tensor], Tensor] = torch.compile(copied, **chosen)
    return compiled

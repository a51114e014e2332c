"""Running statistics that stand still for a while: which layers are paused, in this thread or async task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from lightning_norm.ops.torch_private import in_backward_pass

_pauses: ContextVar[tuple[tuple[frozenset[nn.Module], object], ...]] = ContextVar("lightning_norm_pauses", default=())
"""The layers of each open ``with`` block of this thread or async task, the innermost last."""


@contextmanager
def pausing(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Note these layers as paused in this thread or async task, and in those that inherit its context variables."""
    block = object()
    _pauses.set((*_pauses.get(), (frozenset(layers), block)))
    try:
        yield
    finally:
        # By itself and not by restoring what was there before: blocks of generators may be left in any order.
        _pauses.set(tuple(entry for entry in _pauses.get() if entry[1] is not block))


def is_paused_here(layer: nn.Module) -> bool:
    """Tell whether a block of this thread or async task pauses the layer."""
    return any(layer in layers for layers, _ in _pauses.get())


def is_paused(layer: Any) -> bool:
    """Tell whether a forward pass of a normalizer must leave its running statistics, and all it counts, as they are."""
    # The attribute first, which costs next to nothing: hardly any call is in such a block.
    if not layer._statistics_paused:
        return False
    return runs_for_any_thread(layer) or is_paused_here(layer)


def runs_for_any_thread(layer: nn.Module) -> bool:
    """Tell whether the code that asks does not run in the thread that has called the model.

    A graph serves every thread, DataParallel runs replicas in threads of its own, and a backward pass may do so with
    what activation checkpointing computes again. All of these go by what is set on the layer.
    """
    return torch.compiler.is_compiling() or "_is_replica" in vars(layer) or in_backward_pass()

"""What layers are told about the samples of a batch by code outside of the model, whose forward has no place for it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from lightning_norm.ops import torch_private

_blocks: ContextVar[tuple[tuple[dict[Told, Tensor | None], object], ...]] = ContextVar(
    "lightning_norm_told", default=()
)
"""What layers were told in this thread or async task: one entry per open ``with`` block, the innermost last.

Entries are replaced and not changed, for tasks that were started inside of a block hold the same ones.
"""


def _read() -> tuple[tuple[dict[Told, Tensor | None], object], ...]:
    return _blocks.get()


if not torch_private.TRACES_CONTEXT_VARIABLES:
    _read = torch_private.outside_of_graphs(_read)


class Told:
    """What one layer was told about the samples of the batch, and its dotted name for messages.

    Neither a Module nor a buffer: nothing of it is saved. Copies of a layer, such as an average of the weights, share
    the state of the original, so that they hear what it hears. What is told belongs to the thread or the async task
    that told it, and to those that inherit its context variables, such as ``asyncio.to_thread``.

    Args:
        name: dotted name of the layer.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.forwards: weakref.WeakSet[_Forward] = weakref.WeakSet()

    @property
    def value(self) -> Tensor | None:
        """What was told, one row for each sample; ``None`` for nothing."""
        # The innermost block that says anything of this layer wins, also where it says None.
        for told, _ in reversed(_read()):
            if self in told:
                return told[self]
        return None

    @value.setter
    def value(self, value: Tensor | None) -> None:
        tell({self: value})

    def remember(self, y: Tensor) -> None:
        """Keep what a forward pass was told as long as its graph lives, for a second run in the backward pass."""
        value = self.value
        if y.grad_fn is not None and value is not None:
            forward = _Forward(value)
            # In the graph itself, so that what was told is freed with it.
            y.grad_fn.metadata[self] = forward  # type: ignore[index]  # a dict, which torch annotates as a method
            self.forwards.add(forward)

    def of_forward(self, n: int) -> Tensor | None:
        """Return what the forward passes of n samples whose graphs live were told, ``None`` unless it is the same.

        ``None`` as well where activation checkpointing keeps no graph of the first run: with ``use_reentrant=True``.
        """
        if not torch_private.recomputes_saved_tensors():
            return None
        told = [f.value for f in self.forwards if f.value.shape[0] == n]
        same = all(t is told[0] or torch.equal(t, told[0]) for t in told[1:])
        return told[0] if told and same else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Told:
        return self

    def __reduce__(self) -> tuple[type[Told], tuple[str]]:
        return type(self), (self.name,)


class _Forward:
    """What one forward pass was told."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def tell(news: Mapping[Any, Tensor | None]) -> None:
    """Tell layers in the innermost block, or outside of all."""
    *outer, (told, opened) = _blocks.get() or (({}, None),)
    told = {**told, **news}
    # Outside of all blocks no entry is left of a layer of which nothing is known any longer.
    told = told if opened is not None else {state: known for state, known in told.items() if known is not None}
    _blocks.set((*outer, (told, opened)) if told or opened is not None else ())


@contextmanager
def block() -> Iterator[None]:
    """Forget at the end what layers are told inside."""
    # A new object, by which this block finds its own entry again.
    opened = object()
    _blocks.set((*_blocks.get(), ({}, opened)))
    try:
        yield
    finally:
        # By itself and not by restoring what was there before: blocks of generators may be left in any order.
        _blocks.set(tuple(entry for entry in _blocks.get() if entry[1] is not opened))

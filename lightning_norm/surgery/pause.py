"""paused_statistics(model): forward passes that move no running statistics, of any normalization layer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.pausing import is_paused_here, pausing, runs_for_any_thread
from lightning_norm.surgery.torch_private import TorchBatchNormBase, TorchRunningNormBase


@contextmanager
def paused_statistics(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in this block without moving running statistics; what it computes is what it computes without.

    For a second forward pass on the same data (SAM, virtual adversarial training, LBFGS closures) and for passes on
    data that evaluation is not to follow (adversarial examples, generated images). Layers in training normalize by the
    batch, as they do otherwise, and leave running statistics, counters and moving averages as they are: the layers of
    this package, torch's own BatchNorm and InstanceNorm, and what derives from these.

    Blocks may be nested, and what an exception ends is undone. A block counts in the thread or async task that opened
    it, and in those that inherit its context variables, such as ``asyncio.to_thread``: another thread that trains the
    same layers meanwhile moves their statistics. In a distributed run every rank must pause the same passes.

    Args:
        model: any module; a model without running statistics has nothing to pause.

    Raises:
        TypeError: ``model`` is no module.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> with paused_statistics(model):
    ...     y = model(torch.randn(4, 3, 8, 8))
    >>> int(model[1].num_batches_tracked)
    0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"paused_statistics expects a torch.nn.Module, got {type(model).__name__}.")
    layers = [m for m in model.modules() if isinstance(m, (Normalizer, TorchRunningNormBase))]
    with ExitStack() as open_pauses:
        for layer in layers:
            open_pauses.callback(_take(layer).leave)
        with pausing(layers):
            yield


class _Pause:
    """What is set on one layer while any thread pauses it: an attribute, which compiled graphs read as well.

    torch's layers know no thread, so that hooks around their forward pass set the attribute back for threads that do
    not pause them, one thread at a time.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.blocks = layer, 0
        self.name, paused = "_statistics_paused", True
        if isinstance(layer, TorchBatchNormBase):
            self.name, paused = "track_running_stats", False
        elif isinstance(layer, TorchRunningNormBase):
            # InstanceNorm moves its statistics whatever the flag says; with this weight it moves them by nothing.
            self.name, paused = "momentum", 0  # type: ignore[assignment]
        # As it was set by the user, which the last block to end puts back.
        self.before, self.paused = getattr(layer, self.name), paused
        self.lock, self.owner = threading.Lock(), 0
        self.handles: list[Any] = []
        if not isinstance(layer, Normalizer):
            self.handles = [
                layer.register_forward_pre_hook(_before_forward, prepend=True),
                layer.register_forward_hook(_after_forward, always_call=True),
            ]
        setattr(layer, self.name, paused)

    def leave(self) -> None:
        """End one block, and with the last one the pause."""
        with _all:
            self.blocks -= 1
            # The layer stays paused as long as any block is open, of whichever thread.
            if self.blocks:
                return
            # A thread that does not pause may be in the middle of its forward pass, and at its end look for this pause.
            with self.lock:
                del _open[self.layer]
                for handle in self.handles:
                    handle.remove()
                setattr(self.layer, self.name, self.before)


_all = threading.RLock()
_open: weakref.WeakKeyDictionary[nn.Module, _Pause] = weakref.WeakKeyDictionary()


def _take(layer: nn.Module) -> _Pause:
    with _all:
        if layer not in _open:
            _open[layer] = _Pause(layer)
        _open[layer].blocks += 1
        return _open[layer]


def _before_forward(module: nn.Module, arguments: Any) -> None:
    if runs_for_any_thread(module):
        return
    # One thread at a time, for the attribute is the layer's and not the thread's. A layer that calls itself goes on.
    while (pause := _open.get(module)) is not None and pause.owner != threading.get_ident():
        pause.lock.acquire()
        if _open.get(module) is pause:
            pause.owner = threading.get_ident()
        else:  # it ended while this thread waited
            pause.lock.release()
    if pause is None:
        return
    setattr(module, pause.name, pause.paused if is_paused_here(module) else pause.before)


def _after_forward(module: nn.Module, arguments: Any, output: Any) -> None:
    if runs_for_any_thread(module) or (pause := _open.get(module)) is None:
        return
    # Not so where another hook has failed in front of the one above.
    if pause.owner == threading.get_ident():
        setattr(module, pause.name, pause.paused)
        pause.owner = 0
        pause.lock.release()

"""warm_up(model, batch): the kernels of every normalizer compiled before the first step, side by side."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.errors import BackendWarning, KernelError
from lightning_norm.kernels import launcher
from lightning_norm.layers.base import Normalizer
from lightning_norm.surgery.reach import eagerly, unchanged


def warm_up(model: nn.Module, *args: Any, progress: bool = True, workers: int | None = None, **kwargs: Any) -> int:
    """Compile the Triton kernels that the normalizers will need in training and in evaluation, before they do.

    Triton compiles a kernel where it is first launched: the first step of a network waits for one after the other. Here
    the model is run once, forward, to learn what each layer is called with; then all kernels are compiled at once and
    loaded, and none is launched. Triton keeps them on the disk (``TRITON_CACHE_DIR``), where later runs find them.

    Afterwards a step on inputs of the same shapes compiles and loads nothing, so a CUDA graph may capture it. Other
    shapes mostly meet kernels that are there. Parameters, buffers, gradients, modes and random states stay as they are.
    Under autocast, call it under autocast. In a distributed run every rank calls it. Layers that do not run on the
    kernels, as on a CPU, have nothing to compile, and layers with ``compile=True`` are left to torch.compile.

    Args:
        model: on its device, in its memory format.
        args: what the model is called with, as in training.
        progress: show a bar.
        workers: threads that compile; by default as many as there are processors.
        kwargs: further arguments of the model.

    Returns:
        How many kernels were compiled, or read from the disk.

    Raises:
        TypeError: ``model`` is no module.
        KernelError: a kernel does not compile or load, and a layer has ``backend="triton"``; else a warning says so.

    >>> from lightning_norm import create
    >>> warm_up(nn.Sequential(nn.Conv2d(3, 8, 3), create("sn", 8)), torch.randn(2, 3, 8, 8))  # nothing, on a CPU
    0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"warm_up expects a torch.nn.Module, got {type(model).__name__}.")
    layers = [m for m in model.modules() if isinstance(m, Normalizer) and not m.compiled]
    with unchanged(model), torch.enable_grad():
        calls = _calls_of(layers, model, args, kwargs)
        with _Pool(workers or os.cpu_count() or 1, progress) as pool:
            try:
                with launcher.compiling_ahead(pool, pool.wait):
                    for layer, look in calls:
                        _call(layer, look)
            except KernelError as error:
                if any(layer.backend == "triton" for layer in layers):
                    raise
                warnings.warn(
                    f"warm_up ended early: {error}. Each layer will try its own kernels in the first step, and run in "
                    "plain PyTorch where one is refused.",
                    BackendWarning,
                    stacklevel=2,
                )
            return len(pool.futures)


def _calls_of(layers: list[Normalizer], model: nn.Module, args: Any, kwargs: Any) -> list[tuple[Normalizer, Any]]:
    """Run the model in plain PyTorch, and return each call of a layer, with what it takes to make its tensors again."""
    calls: list[tuple[Normalizer, Any]] = []

    def see(layer: nn.Module, args: Any, kwargs: Any) -> None:
        looks = tuple(map(_look_of, args)), {name: _look_of(a) for name, a in kwargs.items()}
        if isinstance(layer, Normalizer) and (layer, looks) not in calls:
            calls.append((layer, looks))

    handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    model.train()
    try:
        with _backend(layers, "eager"), eagerly():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def _backend(layers: list[Normalizer], backend: str) -> Iterator[None]:
    before = [layer.backend for layer in layers]
    for layer in layers:
        layer.backend = backend
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.backend = own


def _look_of(a: Any) -> Any:
    return (a.shape, a.stride(), a.dtype, a.device, a.requires_grad) if isinstance(a, Tensor) else a


def _made(look: Any) -> Any:
    if not isinstance(look, tuple) or not isinstance(look[0], torch.Size):
        return look
    *how, requires_grad = look
    shape, stride, dtype, device = how
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).requires_grad_(requires_grad)


def _call(layer: Normalizer, looks: Any) -> None:
    """Call a layer as it was called, forward and backward in training, and forward in evaluation."""
    args, kwargs = [_made(look) for look in looks[0]], {name: _made(look) for name, look in looks[1].items()}
    layer.train()
    # By its method: hooks of the user's have nothing to see here.
    y = layer.forward(*args, **kwargs)
    tensors = [t for t in (*args, *kwargs.values(), *layer.parameters()) if isinstance(t, Tensor) and t.requires_grad]
    if tensors and y.requires_grad:
        torch.autograd.grad(y, tensors, torch.empty_like(y), allow_unused=True)
    layer.eval()
    with torch.no_grad():
        layer.forward(*args, **kwargs)


class _Pool(ThreadPoolExecutor):
    """Threads that compile, and a bar of how far they are."""

    def __init__(self, workers: int, progress: bool) -> None:
        super().__init__(workers)
        self.progress = progress
        self.futures: list[Future[Any]] = []

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start a task, and remember it."""
        self.futures.append(super().submit(*args, **kwargs))
        return self.futures[-1]

    def wait(self) -> None:
        """Wait for all tasks."""
        from concurrent.futures import as_completed

        from tqdm import tqdm  # type: ignore[import-untyped]

        bar = tqdm(as_completed(self.futures), "Kernels", len(self.futures), disable=not self.progress, leave=False)
        for _ in bar:
            pass

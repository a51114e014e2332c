"""Which backend runs a pass, the kernels or plain PyTorch, and why. Decided here and nowhere else."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from lightning_norm.kernels.grid import LONGEST, is_channels_last
from lightning_norm.ops.layout import Layout

BACKENDS = ("auto", "eager", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _installed() -> bool:
    try:
        # Asked without an import, which takes a second and which the CPU path does not need.
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a test has put None for it into sys.modules
        return False


INSTALLED = _installed()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads the variable when it is imported, so it holds for the whole process."""


def on_kernels(x: Tensor, layout: Layout, backend: str, empty: bool = False) -> bool:
    """Return whether x goes to the Triton kernels; an x without samples only if ``empty``.

    Raises:
        RuntimeError: ``backend="triton"`` and it cannot.
    """
    # On a CPU the kernels run only if they are asked for by name: there they are interpreted, for tests.
    if backend == "eager" or (backend == "auto" and not x.is_cuda):
        return False
    reason = obstacle(x, layout, empty)
    if reason is not None and backend == "triton":
        raise RuntimeError(f"backend='triton' cannot take this input: {reason}. Type backend='auto'.")
    return reason is None


def obstacle(x: Tensor, layout: Layout, empty: bool = False) -> str | None:
    """Return why the kernels cannot take x, ``None`` where they can; ``empty`` allows an x without samples."""
    if not INSTALLED:
        return "Triton is not installed"
    # From here on each line is a limit of the kernels, the cheapest question first.
    if not x.is_cuda and not (INTERPRETED and x.is_cpu):
        return f"it is on {x.device.type}, and the kernels need CUDA (or, for tests on a CPU, TRITON_INTERPRET=1)"
    if x.dtype not in DTYPES:
        return f"its dtype is {x.dtype}, and the kernels take float32, bfloat16 and float16"
    # Compute capability 8.0 is the first that has bfloat16 in hardware.
    if x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_properties(x.device).major < 8:
        return "bfloat16 needs compute capability 8.0"
    if layout.n * layout.c == 0 and not empty:
        return "it is empty"
    if is_channels_last(x, layout.channel_dim) is None:
        return f"its strides {x.stride()} are neither contiguous nor channels_last"
    # Offsets are computed in 32 bits, which is faster, and a larger x would wrap around in silence.
    if layout.size >= LONGEST or layout.n * layout.c >= LONGEST or layout.size * layout.c >= 1 << 31:
        return "one sample of it leaves 32-bit offsets"
    return None


def explain(backend: str) -> str:
    """Return the backend that swapped layers will run on and why, for the swap report.

    Raises:
        ValueError: an unknown backend, or "triton" in a process that cannot run it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}.")
    if backend == "eager":
        return "eager: asked for"
    missing = None
    if not INSTALLED:
        missing = "Triton is not installed"
    elif not (INTERPRETED and backend == "triton") and not torch.cuda.is_available():
        missing = "no CUDA device"
    if backend == "triton" and missing is not None:
        raise ValueError(f"backend='triton': {missing}. Type backend='auto'.")
    if missing is not None:
        return f"eager: {missing}"
    return "triton: asked for" if backend == "triton" else "triton: on CUDA inputs it can take; eager on others"

"""Which backend runs a pass, the kernels or plain PyTorch, and why. Decided here and nowhere else."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_norm.errors import BackendWarning, KernelError
from lightning_norm.kernels.grid import LONGEST, is_channels_last
from lightning_norm.ops import torch_private
from lightning_norm.ops.layout import Layout

BACKENDS = ("auto", "eager", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

IN_GRAPHS = "operators"
"""How layers on the kernels run in a graph of torch.compile: "operators", each family's own, which fuse with nothing;
"transparent", where only the statistics are operators; or "plain", without kernels, unless a layer asks for "triton".
``python -m benchmarks.graphs`` counts kernels and bytes of all three; no GPU has timed them yet."""


def _installed() -> bool:
    try:
        # Asked without an import, which takes a second and which the CPU path does not need.
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a test has put None for it into sys.modules
        return False


INSTALLED = _installed()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads the variable when it is imported, so it holds for the whole process."""


def on_kernels(x: Tensor, layout: Layout, backend: str, empty: bool = False, what: Any = None) -> bool:
    """Return whether x goes to the Triton kernels; an x without samples only if ``empty``.

    Args:
        x: the input.
        layout: its layout.
        backend: one of ``BACKENDS``.
        empty: an x without samples is let pass.
        what: will be computed; a kernel that has not run yet may not be launched in a CUDA graph capture.

    Raises:
        RuntimeError: ``backend="triton"`` and it cannot.
    """
    # On a CPU the kernels run only if they are asked for by name: there they are interpreted, for tests.
    if backend == "eager" or (backend == "auto" and not x.is_cuda):
        return False
    reason = obstacle(x, layout, empty)
    if reason is None and x.is_cuda:
        reason = _device_obstacle(x.device.index)
    if reason is None and x.is_cuda and not torch.compiler.is_compiling():
        key = _kind_of_call(x, layout, what)
        reason = _failed.get(key) or _first_in_capture(key, torch.cuda.is_current_stream_capturing())
    if reason is not None and backend == "triton":
        raise RuntimeError(f"backend='triton' cannot take this input: {reason}. Type backend='auto'.")
    return reason is None


def _kind_of_call(x: Tensor, layout: Layout, what: Any) -> Any:
    # Triton compiles other code for an x that does not begin at a multiple of 16 bytes.
    begin = x.data_ptr() & 15
    return x.device, x.dtype, x.shape, x.stride(), begin, layout.channel_dim, torch.is_grad_enabled(), what


def give_up(x: Tensor, layout: Layout, backend: str, what: Any, error: KernelError) -> None:
    """Note that the kernels of a call like this one do not compile or load; a warning says it once per reason.

    The kernel launched for trial ran, and one of another shape, dtype or method does not: it may need more of the
    device than there is, or meet an error of the compiler.

    Raises:
        KernelError: the kernels were asked for by name, or some of them may have moved running statistics.
    """
    if backend == "triton":
        raise error
    if error.after_others:
        raise KernelError(f"{error}, behind others of the same call. Type backend='eager'.") from error
    _failed[_kind_of_call(x, layout, what)] = str(error)
    tell_of(x, error)


def tell_of(x: Tensor, error: KernelError) -> None:
    """Warn, once for each reason, that plain PyTorch takes the place of a kernel that does not compile or load."""
    _tell(str(error), f"layers run in plain PyTorch for inputs like {tuple(x.shape)} of {x.dtype}: {error}.")


def _tell(reason: str, text: str) -> None:
    """Warn, once for each reason."""
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f"{text} backend='eager' says that plain PyTorch is meant.", BackendWarning, stacklevel=3)


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


@torch_private.constant_in_graphs  # nothing in it can be traced
def _device_obstacle(index: int | None) -> str | None:
    # The trial itself would be a first launch; its answer is not known before the capture is over.
    if torch.cuda.is_current_stream_capturing() and index not in _tried:
        return _told_in_capture("a CUDA graph is being captured, and no kernel ran before the capture")
    _tried.add(index)
    return launch_obstacle(index)


@functools.cache
def launch_obstacle(index: int | None) -> str | None:
    """Return why no kernel can run on a CUDA device, ``None`` where one did; a warning says it once.

    Without a C compiler, on a device that the installed Triton does not know, or with a driver that does not match,
    the first launch would fail, in the middle of the first step.
    """
    if torch.version.hip is not None:
        reason = "the kernels are written for CUDA, and this is ROCm"
        _tell(reason, f"layers run in plain PyTorch: {reason}.")
        return reason
    try:
        from lightning_norm.kernels import trial

        trial.launch(torch.device("cuda" if index is None else f"cuda:{index}"))
    except Exception as raised:
        error = raised.__cause__ or raised
        first = (str(error).strip().splitlines() or [""])[0]
        reason = f"a kernel launched for trial failed ({type(error).__name__}: {first})"
        _tell(
            reason,
            f"layers run in plain PyTorch: {reason}. Triton needs a C compiler (gcc, clang or the variable CC), and "
            "a version that knows the device.",
        )
        return reason
    return None


_failed: dict[Any, str] = {}
"""Kinds of calls whose kernels do not compile or load, and why."""

_told: set[str] = set()
_launched: set[Any] = set()
_tried: set[int | None] = set()
"""Devices with an answer of ``launch_obstacle``."""


def _first_in_capture(key: Any, capturing: bool) -> str | None:
    """Return why a launch cannot be made in a CUDA graph capture; note it as made where there is none."""
    if not capturing:
        _launched.add(key)
        return None
    # The first launch loads the kernel, which a capture forbids and does not survive.
    if key in _launched:
        return None
    return _told_in_capture("a CUDA graph is being captured, and no such step ran before the capture")


def _told_in_capture(reason: str) -> str:
    # The graph will replay plain PyTorch for as long as it lives, and no report says so.
    _tell(reason, f"layers run in plain PyTorch: {reason}. Run a step, or lightning_norm.warm_up, before the capture.")
    return reason


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
    elif not (INTERPRETED and backend == "triton"):
        missing = "no CUDA device" if not torch.cuda.is_available() else _device_obstacle(torch.cuda.current_device())
    if backend == "triton" and missing is not None:
        raise ValueError(f"backend='triton': {missing}. Type backend='auto'.")
    if missing is not None:
        return f"eager: {missing}"
    return "triton: asked for" if backend == "triton" else "triton: on CUDA inputs it can take; eager on others"

"""A Triton driver over a stubbed libcuda: real compiler, real launcher, no GPU; the kernels run on nothing.

What the host does for a call is as on a machine with a GPU, but for the driver's own two microseconds or so per launch.
The values that kernels would write are garbage. Needs a C compiler, as Triton itself does.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

_loaded: list[Any] = []


def install(capability: int = 90, backend: str = "cuda") -> None:
    """Make the stub Triton's driver in this process, and let tensors of the CPU through to the kernels.

    Args:
        capability: of the device, 90 for 9.0.
        backend: of Triton, "cuda" or "hip".
    """
    # A folder of this process alone: tests run side by side.
    folder = tempfile.TemporaryDirectory(prefix="stubbed_cuda_")
    library = _build(Path(folder.name))
    os.environ["TRITON_LIBCUDA_PATH"] = folder.name
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    for function in (stub.stub_launches, stub.stub_loads, stub.stub_asked):
        function.restype = ctypes.c_ulonglong
    stub.stub_asked.argtypes = ctypes.c_ulonglong, ctypes.c_int
    stub.stub_expect.argtypes = ctypes.c_ulonglong, ctypes.c_int, ctypes.c_int
    stub.stub_shared_memory.argtypes = stub.stub_refuse_loads.argtypes = (ctypes.c_int,)
    _loaded[:] = [stub, folder]
    # torch meets the stub as well, and has no use for it.
    warnings.filterwarnings("ignore", message="CUDA initialization")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    from lightning_norm.ops import backend as ours

    class Stubbed(CudaDriver):
        def __init__(self) -> None:
            self.launcher_cls = CudaLauncher
            self.get_device_capability = lambda device=0: divmod(capability, 10)
            self.get_current_stream = lambda device=0: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        @functools.cached_property
        def utils(self) -> CudaUtils:
            # Compiled by a C compiler when the first kernel is, as in Triton's own driver.
            return CudaUtils()

        def get_current_target(self) -> GPUTarget:
            return GPUTarget(backend, capability if backend == "cuda" else "gfx942", 32 if backend == "cuda" else 64)

    triton.runtime.driver.set_active(Stubbed())
    assert hasattr(ours, "INTERPRETED")
    ours.INTERPRETED = True


def take_for_device() -> None:
    """Let torch say in this process that there is a CUDA device, which has the memory of the CPU."""
    from lightning_norm.kernels import trial

    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: None  # type: ignore[assignment,return-value]
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.device = lambda device: nullcontext()  # type: ignore[assignment,misc,return-value]
    launch = trial.launch
    trial.launch = lambda device: launch(torch.device("cpu"))


@contextmanager
def tensors_on_device() -> Iterator[None]:
    """Let tensors of the CPU say that they are on CUDA, so that layers choose what runs as they do there."""
    torch.Tensor.is_cuda, torch.Tensor.is_cpu = property(lambda t: True), property(lambda t: False)  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch.Tensor.is_cuda, torch.Tensor.is_cpu


def shared_memory(size: int) -> None:
    """Say how many bytes of shared memory a program may have from now on."""
    _loaded[0].stub_shared_memory(size)


def refuse_loads(error: int) -> None:
    """Answer with this error of CUDA's when a kernel is to be loaded, 0 for none; 222 is that of a driver too old."""
    _loaded[0].stub_refuse_loads(error)


def launches() -> int:
    """Return how many kernels were launched in this process."""
    return int(_loaded[0].stub_launches())


def loads() -> int:
    """Return how many kernels were loaded into the device, which happens once after each was compiled."""
    return int(_loaded[0].stub_loads())


def expect(kernels: list[Any]) -> None:
    """Say which compiled kernels are launched next, at most 64, so that :func:`asked` can tell their parameters."""
    for launch, compiled in enumerate(kernels, launches()):
        for i, size in enumerate(_parameters(compiled)):
            _loaded[0].stub_expect(launch, i, size)


def asked(kernels: list[Any]) -> list[tuple[int, ...]]:
    """Return what the last launches were asked for, as expected.

    Grid, threads, shared memory, stream, function, whether all programs run at once, and parameters.
    """
    first = launches() - len(kernels)
    counts = [8 + len(_parameters(compiled)) for compiled in kernels]
    return [tuple(int(_loaded[0].stub_asked(first + i, j)) for j in range(n)) for i, n in enumerate(counts)]


def _parameters(compiled: Any) -> list[int]:
    """Return the bytes of each parameter of a compiled kernel."""
    head = compiled.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
    return [int(bits) // 8 for bits in re.findall(r"\.param\s+\.[a-z](\d+)\b", head)]


def _build(folder: Path) -> Path:
    """Compile the stub with the headers that come with Triton."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    compiler = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    flags = ["-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    subprocess.run([compiler, *flags, str(Path(__file__).with_name("cuda.c")), "-o", str(library)], check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    return library

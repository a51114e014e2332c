"""A Triton driver over a stubbed libcuda: real compiler, real launcher, no GPU; the kernels run on nothing.

What the host does for a call is as on a machine with a GPU, but for the driver's own two microseconds or so per launch.
The values that kernels would write are garbage. Needs a C compiler, as Triton itself does.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sysconfig
import tempfile
import warnings
from pathlib import Path
from typing import Any

_loaded: list[Any] = []


def install() -> None:
    """Make the stub Triton's driver in this process, and let tensors of the CPU through to the kernels."""
    # A folder of this process alone: tests run side by side.
    folder = tempfile.TemporaryDirectory(prefix="stubbed_cuda_")
    library = _build(Path(folder.name))
    os.environ["TRITON_LIBCUDA_PATH"] = folder.name
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    for function in (stub.stub_launches, stub.stub_loads, stub.stub_asked):
        function.restype = ctypes.c_ulonglong
    stub.stub_asked.argtypes = ctypes.c_ulonglong, ctypes.c_int
    stub.stub_expect.argtypes = ctypes.c_ulonglong, ctypes.c_int, ctypes.c_int
    _loaded[:] = [stub, folder]
    # torch meets the stub as well, and has no use for it.
    warnings.filterwarnings("ignore", message="CUDA initialization")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    from lightning_norm.ops import backend

    class Stubbed(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_stream = lambda device=0: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Stubbed())
    assert hasattr(backend, "INTERPRETED")
    backend.INTERPRETED = True


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
    """Return grid, threads, shared memory, stream, function and parameters of the last launches, as expected."""
    first = launches() - len(kernels)
    counts = [7 + len(_parameters(compiled)) for compiled in kernels]
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

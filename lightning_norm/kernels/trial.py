"""A launch on a device for trial: whether Triton can compile and run kernels there is known only then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import triton

from lightning_norm.kernels.passes.launch import moments

KNOWN = frozenset((50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 103, 120, 121))
"""Compute capabilities, times ten, that LLVM in Triton 3.6 knows: the version for torch 2.11. Later ones know more."""


def launch(device: torch.device) -> None:
    """Compile and run the moments of a few numbers.

    Raises:
        Exception: whatever Triton, its C compiler, the driver or the device raise.
        ArithmeticError: the device returned something else than the moments.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":  # the interpreter has no device to ask
        target = triton.runtime.driver.active.get_current_target()
        if target.backend == "cuda" and target.arch not in KNOWN:
            _compile_elsewhere(target.arch)
    # Moments of small whole numbers are exact in any order of adding: any other result is a fault.
    x = torch.tensor([[1.0, 3.0], [0.0, 4.0]], device=device)[:, None]
    got = moments(x, 1)[[0, 2]].flatten().tolist()
    if got != [2.0, 2.0, 1.0, 4.0]:
        raise ArithmeticError(f"the kernels return {got} where [2, 2, 1, 4] is right")


def _compile_elsewhere(capability: int) -> None:
    """Compile for a device that Triton may not know, where LLVM may end the process.

    Raises:
        RuntimeError: it does not know it.
    """
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), str(capability)]
    # Nothing is read from the terminal, and what LLVM prints about itself would hide the warning that follows.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if "LLVM ERROR" in line]
        raise RuntimeError(
            f"Triton {triton.__version__} cannot compile for compute capability {capability / 10:.1f}"
            + "".join(f"; {line.strip()}" for line in said[:1])
        )

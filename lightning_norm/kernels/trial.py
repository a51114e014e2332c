"""A launch on a device for trial: whether Triton can compile and run kernels there is known only then."""

from __future__ import annotations

import torch

from lightning_norm.kernels.passes.launch import moments


def launch(device: torch.device) -> None:
    """Compile and run the moments of a few numbers.

    Raises:
        Exception: whatever Triton, its C compiler, the driver or the device raise.
        ArithmeticError: the device returned something else than the moments.
    """
    x = torch.tensor([[1.0, 3.0], [0.0, 4.0]], device=device)[:, None]
    got = moments(x, 1)[[0, 2]].flatten().tolist()
    if got != [2.0, 2.0, 1.0, 4.0]:
        raise ArithmeticError(f"the kernels return {got} where [2, 2, 1, 4] is right")

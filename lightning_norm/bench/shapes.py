"""Time forward and backward of every contender at one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.bench.clock import Run, Timed, interleaved
from lightning_norm.bench.contenders import (
    PEER_FACTOR,
    PEERS,
    TOLERANCE,
    check,
    contenders,
    saved_for_backward,
    shared_code,
)
from lightning_norm.bench.tables import rows_of


def bench_shape(
    shape: tuple[int, ...],
    keys: Sequence[str],
    channels_last: bool,
    device: str,
    repeats: int,
    compiled: bool,
    activation: str = "none",
) -> list[dict[str, Any]]:
    """Time one forward and backward of every contender at one shape.

    Args:
        shape: of x, (N, C, *).
        keys: of the normalizers.
        channels_last: memory format of x and of the output's gradient.
        device: "cpu" or "cuda".
        repeats: rounds, in each of which every contender runs once.
        compiled: time each contender under torch.compile as well.
        activation: "relu" or "silu" behind each contender, or "none".

    Returns:
        A row per contender: milliseconds (median, quartiles), ratios to nn.BatchNorm and to its own naive formula.

    Raises:
        ArithmeticError: a contender's output or input gradient is not what float64 says.
    """
    # Random values of one seed: the times do not depend on them, the checked errors do.
    torch.manual_seed(0)
    x, dy = torch.randn(shape, device=device), torch.randn(shape, device=device)
    if channels_last:
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        x, dy = (t.contiguous(memory_format=last) for t in (x, dy))
    # After the change of the format, whose result would otherwise be no leaf and have no gradient.
    x.requires_grad_()
    with shared_code():
        layers = dict(contenders(shape, keys, device, compiled, activation=activation))
        # Before anything is timed: the time of a wrong result is worth nothing.
        for name, layer in layers.items():
            check(name, layer, x, dy, TOLERANCE * (PEER_FACTOR if name in PEERS.values() else 1))
        # No CUDA graphs here: a user's step in eager mode pays for the work of the host, too.
        runs = {name: Timed(_step(layer, x, dy), device, graph=False) for name, layer in layers.items()}
        times = interleaved(runs, repeats)
        saved = {name: saved_for_backward(layer, x) for name, layer in layers.items() if "naive" not in name}
    label = "x".join(map(str, shape)) + (" channels_last" if channels_last else "")
    label += "" if activation == "none" else f" + {activation}"
    return rows_of(label, times, saved)


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Run:
    """Return a function that runs the layer forward and backward once."""
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), wanted, dy)

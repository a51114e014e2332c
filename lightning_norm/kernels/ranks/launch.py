"""Launches of the kernels in ``ranks``, around a sum over ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_norm.kernels.grid import cdiv
from lightning_norm.kernels.launcher import launch
from lightning_norm.kernels.passes.launch import device_of
from lightning_norm.kernels.ranks.pack import pack, pack_gradient, unpack, unpack_gradient

BLOCK = 256
"""Channels of a program."""

AllReduce = Callable[[Tensor], Tensor]
"""Adds a tensor up over the ranks."""


def pool_ranks(batch: Tensor, count: int, over_ranks: AllReduce) -> Tensor:
    """Turn the statistics (3, C) of ``count`` elements of this rank into those of all ranks; return the sums."""
    channels = batch.shape[1]
    # In float64, the same message as an algebra in PyTorch sends, so that ranks on either may meet.
    message = torch.empty(1, 1 + 2 * channels, device=batch.device, dtype=torch.float64)
    grid = (cdiv(channels, BLOCK),)
    with device_of(batch):
        launch(pack, *grid)(batch, message, count, channels, BLOCK=BLOCK, num_warps=4)
    total = over_ranks(message)
    with device_of(batch):
        launch(unpack, *grid)(total, batch, channels, BLOCK=BLOCK, num_warps=4)
    return total


def pool_ranks_gradient(dbatch: Tensor, batch: Tensor, total: Tensor, count: int, over_ranks: AllReduce) -> None:
    """Turn the gradients (3, C) of mean and variance of all ranks into those for ``count`` elements of this rank."""
    channels, message = batch.shape[1], torch.empty_like(total)
    grid = (cdiv(channels, BLOCK),)
    with device_of(batch):
        launch(pack_gradient, *grid)(dbatch, batch, total, message, channels, BLOCK=BLOCK, num_warps=4)
    gathered = over_ranks(message)
    with device_of(batch):
        launch(unpack_gradient, *grid)(gathered, batch, dbatch, count, channels, BLOCK=BLOCK, num_warps=4)


def empty_gradient(batch: Tensor, total: Tensor, over_ranks: AllReduce | None) -> Tensor:
    """Meet the other ranks, with nothing to add, and return zeros (C,): the gradient of a parameter."""
    zeros = torch.zeros_like(batch)
    if over_ranks is not None:
        pool_ranks_gradient(zeros, batch, total, 0, over_ranks)
    return torch.zeros_like(batch[0])

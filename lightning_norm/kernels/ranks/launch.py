"""Launches of the kernels in ``ranks``, around a sum over ranks."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lightning_norm.kernels.grid import cdiv
from lightning_norm.kernels.launcher import launch
from lightning_norm.kernels.passes.launch import device_of
from lightning_norm.kernels.ranks.pack import pack, pack_gradient, unpack, unpack_gradient

BLOCK = 256
"""Channels of a program."""


class AllReduce(Protocol):
    """Adds a tensor up over the ranks, of which this process is one."""

    @property
    def rank(self) -> int:
        """The place of this process."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum(self, t: Tensor) -> Tensor:
        """Return the sum over ranks."""


def pool_ranks(batch: Tensor, count: int, over_ranks: AllReduce) -> Tensor:
    """Turn the statistics (3, C) of ``count`` elements of this rank into those of all ranks; return every rank's."""
    channels, ranks = batch.shape[1], over_ranks.size
    # In float64, the same message as an algebra in PyTorch sends, so that ranks on either may meet.
    message = torch.zeros(1, 1 + ranks * (1 + 2 * channels), device=batch.device, dtype=torch.float64)
    grid = (cdiv(channels, BLOCK),)
    with device_of(batch):
        launch(pack, *grid)(batch, message, count, over_ranks.rank, channels, BLOCK=BLOCK, num_warps=4)
    gathered = over_ranks.sum(message)
    with device_of(batch):
        launch(unpack, *grid)(gathered, batch, channels, ranks, BLOCK=BLOCK, num_warps=4)
    return gathered


def pool_ranks_gradient(dbatch: Tensor, gathered: Tensor, over_ranks: AllReduce) -> None:
    """Turn the gradients (3, C) of mean and variance of all ranks into those for the elements of this rank."""
    channels, ranks, message = dbatch.shape[1], over_ranks.size, torch.empty_like(gathered)
    grid = (cdiv(channels, BLOCK),)
    with device_of(dbatch):
        launch(pack_gradient, *grid)(dbatch, gathered, message, channels, ranks, BLOCK=BLOCK, num_warps=4)
    # The losses of all ranks depend on each rank's statistics: their gradients are added up.
    dgathered = over_ranks.sum(message)
    with device_of(dbatch):
        launch(unpack_gradient, *grid)(
            dgathered, gathered, dbatch, over_ranks.rank, channels, ranks, BLOCK=BLOCK, num_warps=4
        )


def empty_gradient(batch: Tensor, gathered: Tensor, over_ranks: AllReduce | None) -> Tensor:
    """Meet the other ranks, with nothing to add, and return zeros (C,): the gradient of a parameter."""
    zeros = torch.zeros_like(batch)
    # Without its part, of zeros, the other ranks would wait for ever.
    if over_ranks is not None:
        pool_ranks_gradient(zeros, gathered, over_ranks)
    return torch.zeros_like(batch[0])

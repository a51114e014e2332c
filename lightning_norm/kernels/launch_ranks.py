"""Launches of the kernels in ``ranks``, around a sum over ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_norm.kernels.blocks import cdiv
from lightning_norm.kernels.launch import on
from lightning_norm.kernels.ranks import pack, pack_gradient, unpack, unpack_gradient

BLOCK = 256
"""Channels of a program."""

Sum = Callable[[Tensor], Tensor]
"""Adds a tensor up over the ranks."""


def pool(batch: Tensor, count: int, over_ranks: Sum) -> Tensor:
    """Turn the statistics (3, C) of ``count`` elements of this rank into those of all ranks; return the sums."""
    channels = batch.shape[1]
    message = torch.empty(1, 1 + 2 * channels, device=batch.device, dtype=torch.float64)
    grid = (cdiv(channels, BLOCK),)
    with on(batch):
        pack[grid](batch, message, count, channels, BLOCK=BLOCK, num_warps=4)
    total = over_ranks(message)
    with on(batch):
        unpack[grid](total, batch, channels, BLOCK=BLOCK, num_warps=4)
    return total


def pool_gradient(by_batch: Tensor, batch: Tensor, total: Tensor, count: int, over_ranks: Sum) -> None:
    """Turn the gradients (2, C) of the mean and variance of all ranks into those for this rank's ``count`` elements."""
    channels, message = batch.shape[1], torch.empty_like(total)
    grid = (cdiv(channels, BLOCK),)
    with on(batch):
        pack_gradient[grid](by_batch, batch, total, message, channels, BLOCK=BLOCK, num_warps=4)
    found = over_ranks(message)
    with on(batch):
        unpack_gradient[grid](found, batch, by_batch, count, channels, BLOCK=BLOCK, num_warps=4)

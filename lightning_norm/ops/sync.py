"""Statistics across ranks: one all-reduce forward and one backward, weighted by counts.

The sums travel in float64, so that n*(var + mean^2) keeps its digits (relative error about 1e-10 at mean/std = 1e3) and
one SUM is enough. Counts travel with them, because the last batch of an epoch is uneven and a rank may be empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The ranks whose statistics are pooled, named by their process group.

    Args:
        group: the name that torch.distributed gave the process group.
    """

    group: str

    def pool(self, count: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pool (K, 1) counts and (K, C) moments over the ranks, by the law of total variance."""
        c = mean.shape[1]
        n, m, v = count.double(), mean.double(), var.double()
        total: Tensor = _AllReduceSum.apply(torch.cat([n, n * m, n * (v + m.square())], dim=1), self.group)
        n = total[:, :1]
        safe = n.clamp_min(torch.finfo(torch.float32).tiny)
        m = total[:, 1 : 1 + c] / safe
        v = (total[:, 1 + c :] / safe - m.square()).clamp_min(0.0)
        return n.to(count.dtype), m.to(mean.dtype), v.to(var.dtype)

    def sum(self, t: Tensor) -> Tensor:
        """Return the sum of t over the ranks, the same bits on each; t has one shape on all of them."""
        total: Tensor = _AllReduceSum.apply(t, self.group)
        return total


def active_ranks(sync: bool, training: bool, group: str = "world") -> Ranks | None:
    """Return the ranks to pool with, or ``None`` outside of training, with one process, or with ``sync=False``.

    Raises:
        NotImplementedError: a ``group`` other than "world".
    """
    if not (sync and training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    if group != "world":
        raise NotImplementedError(f"sync_group={group!r}: only 'world' is supported by now. Type sync_group='world'.")
    world = dist.group.WORLD
    assert world is not None
    return Ranks(world.group_name)


def gather(value: Any) -> list[Any]:
    """Return what every rank passed, in their order; ``[value]`` for one process. All ranks must call it."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; its transpose is the same sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _AllReduceSum.apply(grads[0], ctx.group), None


def _sum(x: Tensor, group: str) -> Tensor:
    from torch.distributed import _functional_collectives as collectives  # what torch.compile traces; no public name

    total: Tensor = collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))  # type: ignore[no-untyped-call, arg-type]
    return total

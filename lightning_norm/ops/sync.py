"""Statistics across ranks: one all-reduce forward and one backward, weighted by counts.

Each rank writes its count, mean and variance into a place of its own among zeros, so that the one SUM tells every rank
what every other measured, exactly. A sum of x^2 would travel in less, and lose its digits where the mean is large.
Counts travel too, because the last batch of an epoch is uneven and a rank may be empty.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import socket
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_norm.errors import SyncError, SyncWarning, counted
from lightning_norm.ops import torch_private

# Tells whether this process is one of a distributed run. Some builds of torch, such as Apple's, have no such function.
is_running: Callable[[], bool] = dist.is_initialized if dist.is_available() else bool


@dataclass(frozen=True)
class Ranks:
    """The ranks whose statistics are pooled, named by their process group.

    Args:
        group: the name that torch.distributed gave the process group.
    """

    group: str

    def pool(self, count: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Pool (K, 1) counts and (K, C) moments over the ranks, by the law of total variance.

        .. math::
            \mu = \frac{\sum_r n_r \mu_r}{\sum_r n_r}, \qquad
            \sigma^2 = \frac{\sum_r n_r (\sigma_r^2 + (\mu_r - \mu)^2)}{\sum_r n_r}
        """
        # One tensor, so that one collective is enough: (K, 1 + R (1 + 2C)), the total count and a row of each rank.
        k, c = mean.shape
        n, m, v = count.double(), mean.double(), var.double()
        before, after = (n.new_zeros(k, ranks * (1 + 2 * c)) for ranks in (self.rank, self.size - 1 - self.rank))
        total = self.sum(torch.cat([n, before, n, m, v, after], dim=1))
        n, rows = total[:, :1], total[:, 1:].view(k, self.size, 1 + 2 * c)
        # Where all ranks are empty, 0 / tiny is 0 and not NaN.
        part = rows[:, :, :1] / n.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
        means, variances = rows[:, :, 1 : 1 + c], rows[:, :, 1 + c :]
        m = (part * means).sum(1)
        v = (part * (variances + (means - m.unsqueeze(1)).square())).sum(1)
        return n.to(count.dtype), m.to(mean.dtype), v.to(var.dtype)

    @property
    def rank(self) -> int:
        """The place of this process among the ranks, from 0."""
        return _place_in(self.group)[0]

    @property
    def size(self) -> int:
        """The number of ranks."""
        return _place_in(self.group)[1]

    def agree(self, text: str, device: torch.device) -> None:
        """Compare what ranks are about to pool for, in one small collective; no rank goes on if one differs.

        Raises:
            SyncError: on every rank, with what each has.
        """
        # 48 bits of a hash: an integer that every backend can reduce.
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        # The greatest and the negative of the smallest: equal on all ranks if these two are.
        numbers = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
        group = _process_groups.by_name[self.group]
        with _meeting(text):
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)
            greatest, smallest = numbers.tolist()
            if greatest == -smallest:
                return
            texts: list[Any] = [None] * group.size()
            dist.all_gather_object(texts, text, group=group)
        ranks = dist.get_process_group_ranks(group)
        other = next(i for i, each in enumerate(texts) if each != texts[0])
        raise SyncError(
            f"ranks are about to pool the statistics of different layers: {texts[0]} on rank {ranks[0]}, "
            f"{texts[other]} on rank {ranks[other]}. Every rank must build the same model, swap it in the same "
            "way, and run its layers in the same order."
        )

    def largest(self, number: int, device: torch.device) -> int:
        """Return the largest of the numbers that the ranks bring, in one small collective."""
        numbers = torch.tensor([number], device=device)
        with _meeting("a normalizer"):
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=_process_groups.by_name[self.group])
        return int(numbers.item())

    def sum(self, t: Tensor, backwards: int = 0) -> Tensor:
        """Return the sum of t over the ranks, the same bits on each; t has one shape on all of them.

        ``backwards`` is 1 in a backward pass: a rank that is in a forward pass meanwhile is told.
        """
        if torch_private.is_transformed() or torch_private.is_batched(t):
            raise RuntimeError(
                "statistics cannot be pooled over ranks inside of torch.func, forward-mode AD or torch.jit.trace, nor "
                "with batched gradients; torch's SyncBatchNorm cannot either. Type model.eval(), or swap with "
                "sync=False."
            )
        total: Tensor = _AllReduceSum.apply(t, self.group, backwards)
        return total


def active_ranks(sync: bool, training: bool, group: str | int = "world") -> Ranks | None:
    """Return the ranks to pool with, or ``None`` outside of training, with ``sync=False``, or for a rank by itself.

    The first call for a ``group`` creates its process groups, which all ranks must do together.

    Args:
        sync: pool at all.
        training: the layer is in training.
        group: "world", "node", or a number of consecutive ranks.

    Raises:
        ValueError: not such a group, or a number that does not divide the ranks.
    """
    if not (sync and training and is_running()):
        return None
    # A name and no process group: that could be neither copied nor pickled with a layer.
    name = _name_of(group)
    return Ranks(name) if name else None


def check_sync(sync: Any) -> bool | str:
    """Return ``sync`` if it is what it may be: ``True``, ``False`` or "running".

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(sync, bool) or sync == "running":
        return sync  # type: ignore[no-any-return]
    raise ValueError(
        f"sync must be True (statistics are pooled in each forward pass), 'running' (the running ones alone, once per "
        f"optimizer step) or False, got {sync!r}."
    )


def check_group(group: Any) -> str | int:
    """Return ``group`` if it is what ``sync_group`` may be: "world", "node" or a positive number of ranks.

    Raises:
        ValueError: it is none of these.
    """
    if group in ("world", "node") or (isinstance(group, int) and not isinstance(group, bool) and group > 0):
        return group  # type: ignore[no-any-return]
    raise ValueError(
        f"sync_group must be 'world', 'node' or a positive number of ranks, got {group!r}. Type sync_group='world', or "
        "sync=False for statistics of each rank by itself."
    )


def split(group: str | int, nodes: list[Any]) -> list[list[int]]:
    """Return the ranks of each process group.

    Args:
        group: "world", "node" or a number.
        nodes: the node of each rank.

    Raises:
        ValueError: a number that does not divide the ranks.

    >>> split(2, ["a"] * 4), split("node", ["a", "b", "a", "b"])
    ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    """
    world = len(nodes)
    if check_group(group) == "world":
        return [[*range(world)]]
    if group == "node":
        return [[rank for rank in range(world) if nodes[rank] == node] for node in dict.fromkeys(nodes)]
    size = int(group)
    if world % size:
        # What divides is what can be typed instead.
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        raise ValueError(
            f"sync_group={size} does not divide the {counted(world, 'rank')} of this run. Type one of {divisors}, "
            "'node' or 'world'."
        )
    return [[*range(first, first + size)] for first in range(0, world, size)]


def node() -> tuple[str, str]:
    """Return what ranks of one node have in common: the host, and the number that torchrun, Slurm or Lightning gave."""
    # Not the host name alone: containers of one host may be nodes of their own, and hosts may share a name.
    numbers = (os.environ.get(name) for name in ("GROUP_RANK", "SLURM_NODEID", "NODE_RANK"))
    return socket.gethostname(), next((number for number in numbers if number is not None), "")


@dataclass
class _ProcessGroups:
    """The process groups that were created for layers, until another world of ranks takes the place of this one.

    Layers and :class:`Ranks` hold their names alone: a process group in a layer could not be copied, pickled or saved.
    """

    name_of: dict[str | int, str] = field(default_factory=dict)
    """A layer's ``sync_group`` -> name of this rank's process group, "" where the rank is by itself."""

    by_name: dict[str, dist.ProcessGroup] = field(default_factory=dict)

    attempts: int = 0
    """How often this rank has begun to create groups in this world, by which ranks find each other."""

    world: Callable[[], Any] = lambda: None
    """A weak reference to the default process group at that time."""


_process_groups = _ProcessGroups()


@torch_private.constant_in_graphs  # nothing in it can be traced
def _name_of(group: str | int) -> str:
    """Return the name of this rank's process group, "" where it is by itself; create the groups where there are none.

    Not the default group for "world" either: DDP reduces gradients there, in an order that is not ours. Every rank
    creates the groups of all ranks, in one order, as ``torch.distributed.new_group`` demands.
    """
    # Not the default group itself, but the mark of this world: a later one must get new groups.
    world = dist.group.WORLD
    assert world is not None
    # This is the first time, or another world has taken the place of the one before.
    if _process_groups.world() is not world:
        _process_groups.world = weakref.ref(world)
        _process_groups.name_of.clear()
        _process_groups.by_name.clear()
        _process_groups.attempts = 0
        end_gloo_before_exit()
    check_group(group)
    if group not in _process_groups.name_of:
        members = split(group, _nodes(world, group))
        name = ""
        if max(map(len, members)) > 1:
            # A user who raised the timeout for slow ranks means these collectives as well.
            timeout = torch_private.timeout_of(world)
            with _meeting(f"layers with sync_group={group!r}"):
                created, _ = dist.new_subgroups_by_enumeration(members, timeout=timeout)
            assert isinstance(created, dist.ProcessGroup)
            # A rank by itself needs no collective, and each would cost a call.
            if created.size() > 1:
                name = created.group_name
                _process_groups.by_name[name] = created
        _process_groups.name_of[group] = name
    return _process_groups.name_of[group]


@torch_private.constant_in_graphs
def _place_in(name: str) -> tuple[int, int]:
    """Return the rank of this process in the process group of that name, and the group's size."""
    group = _process_groups.by_name[name]
    return group.rank(), group.size()


def _nodes(world: dist.ProcessGroup, group: str | int) -> list[Any]:
    """Return the node of each rank, once every rank has said that it makes the same groups.

    Through the store by which the ranks found each other, and no collective: a rank that makes no groups meanwhile may
    be in a collective of its own, and would take this one for it.

    Raises:
        SyncError: a rank makes other groups, or none until the timeout.
    """
    # Under a key that counts attempts, for the store still holds what an earlier one wrote.
    store, rank, size = torch_private.store_of(world), world.rank(), world.size()
    _process_groups.attempts += 1
    prefix = f"lightning_norm/groups/{_process_groups.attempts}"
    keys = [f"{prefix}/{each}" for each in range(size)]
    store.set(keys[rank], json.dumps([group, *node()]))
    with _meeting(f"layers with sync_group={group!r}"):
        try:
            store.wait(keys, torch_private.timeout_of(world))
        except RuntimeError as error:
            missing = [each for each in range(size) if not store.check([keys[each]])]
            raise RuntimeError(f"ranks {missing} did not come. {error}") from error
    said = [json.loads(each) for each in store.multi_get(keys)]
    other = next((each for each in range(size) if said[each][0] != said[0][0]), None)
    if other is not None:
        raise SyncError(
            f"ranks are about to pool over different groups: sync_group={said[0][0]!r} on rank 0, "
            f"sync_group={said[other][0]!r} on rank {other}. Every rank must swap its model in the same way."
        )
    return [tuple(each[1:]) for each in said]


def gather(value: Any) -> list[Any]:
    """Return what every rank passed, in their order; ``[value]`` for one process. All ranks must call it."""
    if not (is_running() and dist.get_world_size() > 1):
        return [value]
    end_gloo_before_exit()
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


GRACE = 5.0
"""Seconds that a process waits at its end for its process groups, which may wait for other ranks."""


@functools.cache
def end_gloo_before_exit() -> None:
    """Arrange that process groups of gloo, if there are any at the end of this process, end before Python does.

    gloo's threads let go of tensors a moment after a collective is done. One that does so while Python shuts down
    aborts the process ("terminate called without an active exception", status 134) although the training went well.
    Lightning ends NCCL's groups alone.
    """
    at_exit = threading.Event()

    def end() -> None:
        at_exit.wait()
        _process_groups.by_name.clear()
        dist.destroy_process_group()

    # In a thread, for it waits for collectives that are under way, and a rank that failed may never take part in one;
    # started now, for Python 3.12 starts none at its end.
    thread = threading.Thread(target=end, name="lightning_norm gloo", daemon=True)
    thread.start()

    def join() -> None:
        if is_running() and dist.get_backend() == "gloo":
            at_exit.set()
            thread.join(GRACE)

    atexit.register(join)


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks. Every rank's input is in every rank's output, so the backward pass is the same sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, backwards: int = 0) -> Tensor:
        ctx.group, ctx.backwards = group, 1 - backwards
        return _sum(x, group, backwards)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return Ranks(ctx.group).sum(grads[0], ctx.backwards), None, None


def _sum(x: Tensor, group: str, backwards: int = 0) -> Tensor:
    # On a CPU the direction travels along: a rank that runs the network once more than the others would otherwise add
    # its statistics to their gradients without a word. On CUDA, looking at it would stop the queue of launches.
    tagged = x.is_cpu
    # all_reduce works in place, and x belongs to the caller's graph.
    total = x.clone(memory_format=torch.contiguous_format)
    if tagged:
        total = torch.cat([total.view(-1), total.new_full((1,), float(backwards))])
    process_group = _process_groups.by_name[group]
    # A graph cannot hold the error handling below.
    if torch.compiler.is_compiling():
        dist.all_reduce(total, group=process_group)
    else:
        with _meeting("a normalizer"):
            dist.all_reduce(total, group=process_group)
        if tagged and total[-1].item() != backwards * process_group.size():
            raise SyncError(
                "one rank is in the forward pass and another one in the backward pass: a rank has run the network in "
                "training mode when the others did not, for samples or a log perhaps. Call model.eval() for it."
            )
    return total[:-1].view(x.shape) if tagged else total


WAITING_TOLD_AFTER = 15.0
"""Seconds after which a rank says what it is waiting for."""


class _Watch:
    """Tells, from a thread of its own, that this rank has been waiting for the others."""

    def __init__(self) -> None:
        self.waits: tuple[float, str] | None = None
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        # A thread does not survive a fork, and one that was started before is no longer alive there.
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self._run, name="lightning_norm ranks", daemon=True)
            self.thread.start()

    def _run(self) -> None:
        told: tuple[float, str] | None = None
        while True:
            time.sleep(WAITING_TOLD_AFTER / 5)
            waits = self.waits
            if waits is not None and waits is not told and time.monotonic() - waits[0] > WAITING_TOLD_AFTER:
                told = waits
                warnings.warn(
                    f"this rank has been waiting for {WAITING_TOLD_AFTER:.0f} s to pool the statistics of {waits[1]}. "
                    "Others that are not just slow do not run this layer in training, or have sync=False for it. "
                    "A forward pass on one rank alone, for samples or a log, needs model.eval().",
                    SyncWarning,
                    stacklevel=1,
                )


_watch = _Watch()


@contextmanager
def _meeting(what: str) -> Iterator[None]:
    """Wait for the other ranks; say so where it takes long, and what it may be where it fails."""
    # The thread is there once and sleeps; a timer for each collective would cost more than the collective.
    _watch.start()
    _watch.waits = (time.monotonic(), what)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, SyncError):
            raise
        raise SyncError(
            f"the ranks did not meet to pool the statistics of {what}: one has ended, has failed, takes fewer "
            "batches, or skips this layer. Look at the other ranks' errors first; give each rank as many batches "
            "(Lightning's distributed sampler does), call model.eval() for a forward pass on one rank alone, or type "
            f"sync=False. The network said: {error}"
        ) from error
    finally:
        _watch.waits = None

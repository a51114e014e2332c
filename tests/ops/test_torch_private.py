"""Each private name of torch still exists and means what this package takes it for."""

import datetime

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from lightning_norm.ops import torch_private
from lightning_norm.testing.ranks import run_ranks


def test_in_backward_pass():
    seen = []

    def fn(x):
        seen.append(torch_private.in_backward_pass())
        return x.exp()

    checkpoint(fn, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True]


def test_recomputes_saved_tensors():
    for use_reentrant in (False, True):
        seen = []

        def fn(x, seen=seen):
            seen.append(torch_private.in_backward_pass() and torch_private.recomputes_saved_tensors())
            return x.exp()

        checkpoint(fn, torch.ones(2, requires_grad=True), use_reentrant=use_reentrant).sum().backward()
        assert seen == [False, not use_reentrant]


def timeouts(rank):
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=datetime.timedelta(seconds=77)
    )
    return torch_private.timeout_of(dist.group.WORLD)


def test_timeout_of():
    assert run_ranks(timeouts, 1) == [datetime.timedelta(seconds=77)]


def test_a_constant_is_marked_as_torch_marks_it():
    marked = torch_private.constant_in_graphs(lambda: 1)
    assert vars(marked) == vars(torch.compiler.assume_constant_result(lambda: 1)) != {}

"""Each private name of torch still exists and means what this package takes it for."""

import datetime

import pytest
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


def test_reshaped_is_neither_a_copy_nor_a_view():
    storages = []

    class Reshape(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, view):
            y = x * 2
            storages.append(y.data_ptr())
            return y.view(3, 2) if view else torch_private.reshaped(y, (3, 2))

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy.reshape(6), None

    x = torch.arange(6.0, requires_grad=True)
    y = Reshape.apply(x, False)
    assert y.data_ptr() == storages[0]
    y.relu_().sum().backward()
    assert x.grad.tolist() == [0, 2, 2, 2, 2, 2]
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        Reshape.apply(x, True).relu_()


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


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_watched():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.autograd import forward_ad

    seen = []

    def look(x):
        seen.append(torch_private.watched())
        return x.exp()

    x = torch.ones(2)
    look(x)
    torch.func.vmap(look)(x)
    torch.func.grad(lambda x: look(x).sum())(x)
    torch.jit.trace(look, x, check_trace=False)
    with FakeTensorMode():
        look(torch.ones(2))
    with forward_ad.dual_level():
        look(x)
    look(x)
    assert seen == [False, True, True, True, True, True, False]

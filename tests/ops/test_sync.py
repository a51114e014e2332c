"""Pooling over real gloo processes."""

import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_norm import Affine, BatchNorm, InstanceNorm, Moments, normalize, normalizers
from lightning_norm.ops import sync
from lightning_norm.ops.sync import active_ranks
from lightning_norm.testing.ranks import run_ranks

F64 = torch.float64


def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, 5, generator=g, dtype=F64), torch.randn(6, 4, 5, generator=g, dtype=F64)


def soft(m, weights):
    pooled = m.over_batch(weights)
    return Affine(weights @ pooled.mean, weights @ (pooled.var + 0.1).rsqrt())


WEIGHTS = torch.rand(6, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
SPLIT = [2, 0, 4]


class Collectives(TorchDispatchMode):
    """Counts the all-reduces that are dispatched."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "allreduce" in str(func)
        return func(*args, **(kwargs or {}))


def collectives():
    """Normalizer -> all-reduces in the forward and in the backward pass."""
    collected = {}
    for key, cls in normalizers().items():
        layer, x = cls(6, **cls.test_arguments), torch.randn(4, 6, 5, requires_grad=True)
        layer(x)  # ranks compare their layers once, in a collective of its own
        with Collectives() as forward:
            y = layer(x)
        with Collectives() as backward:
            y.square().sum().backward()
        collected[key] = (forward.count, backward.count)
    return collected


def everything(rank):
    """One group of three processes, for all of the tests: starting them is what takes time."""
    collected = {"ranks": active_ranks(True, True) is not None}
    collected["off"] = [active_ranks(False, True), active_ranks(True, False)]
    collected |= groups(rank)
    x, dy = (t.split(SPLIT)[rank].clone() for t in data())
    weights = WEIGHTS.split(SPLIT)[rank].clone().requires_grad_()
    x.requires_grad_()
    y = normalize(x, lambda m: soft(m, weights), ranks=active_ranks(True, True))
    collected["soft"] = (y.detach(), *torch.autograd.grad(y, [x, weights], dy))

    far = BatchNorm(4, momentum=1.0)
    far(data()[0].split([3, 1, 2])[rank].float() + 1000)
    collected["far"] = far.running_var

    instance = InstanceNorm(4, track_running_stats=True, momentum=1.0).double()
    instance(x.detach())
    collected["instance"] = (instance.running_mean, instance.running_var)

    local = BatchNorm(4, momentum=1.0).double()
    local.sync = False
    local(data()[0].split([3, 1, 2])[rank])
    collected["local"] = local.running_mean

    nan = BatchNorm(4).double()
    bad = data()[0].split([3, 1, 2])[rank].clone()
    if rank == 1:
        bad[0, 0, 0] = float("nan")
    nan(bad)
    collected["skipped"] = (int(nan.skipped_updates), nan.running_mean)
    collected["collectives"] = collectives()
    collected["alone"] = len(refusal(rank))
    return collected


def mean_over(group, x):
    layer = BatchNorm(4, momentum=1.0).double()
    layer.sync_group = group
    layer(x)
    return layer.running_mean


def groups(rank):
    """Recipes of process groups; ranks 0 and 2 are on one node and rank 1 on another."""
    os.environ["GROUP_RANK"] = str(rank % 2)
    x = data()[0].split([3, 1, 2])[rank]
    collected = {f"mean over {group}": mean_over(group, x) for group in ("world", "node", 3, 1)}
    for group in (2, 0, True, "rack"):
        try:
            mean_over(group, x)
        except ValueError as error:
            collected[f"refused {group}"] = str(error)
    layer = BatchNorm(4)
    layer.sync_group = "node"
    before = layer.state_dict()
    layer(x.float())
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.sync_group == "node"
    assert layer.state_dict().keys() == before.keys()
    names = {group: active_ranks(True, True, group) for group in ("world", "node", 3, 1)}
    collected["names"] = {group: None if ranks is None else ranks.group for group, ranks in names.items()}
    collected["default"] = dist.group.WORLD.group_name

    @torch.compile(fullgraph=True, backend="eager")
    def step(x):
        return mean_of(fresh, x)

    fresh = BatchNorm(4, momentum=1.0).double()
    os.environ["GROUP_RANK"] = str(rank // 2)
    sync._process_groups.name_of.pop("node")  # created anew, with other nodes, while it is compiled
    fresh.sync_group = "node"
    collected["compiled"] = step(x)
    return collected


def mean_of(layer, x):
    layer(x)
    return layer.running_mean


def refusal(rank):
    """Two ranks with one value each: the statistic has two, and nobody may refuse on what it sees alone."""
    x = torch.full((1 if rank < 2 else 0, 4), float(rank))
    return BatchNorm(4)(x)


@pytest.fixture(scope="module")
def results():
    return run_ranks(everything, 3)


def test_who_is_asked(results):
    for collected in results:
        assert collected["ranks"]
        assert collected["off"] == [None, None]
    assert active_ranks(True, True) is None  # no process group here


def test_one_collective_per_layer_and_direction(results):
    for collected in results:
        for key, counts in collected["collectives"].items():
            assert counts == ((1, 1) if normalizers()[key].train_uses_batch_stats else (0, 0)), key


def test_groups_are_recipes(results):
    x = data()[0].split([3, 1, 2])
    for rank, collected in enumerate(results):
        alone = x[rank].mean((0, 2))
        node = alone if rank == 1 else torch.cat([x[0], x[2]]).mean((0, 2))
        for group, expected in (
            ("world", data()[0].mean((0, 2))),
            ("node", node),
            (3, data()[0].mean((0, 2))),
            (1, alone),
        ):
            torch.testing.assert_close(collected[f"mean over {group}"], expected, rtol=1e-10, atol=1e-10)
        assert "sync_group=2 does not divide the 3 ranks of this run. Type one of [1, 3], " in collected["refused 2"]
        for group in (0, True, "rack"):
            assert f"got {group!r}. Type sync_group='world'" in collected[f"refused {group}"]


def test_each_recipe_has_a_group_of_its_own(results):
    for rank, collected in enumerate(results):
        names = collected["names"]
        assert names[1] is None
        assert (names["node"] is None) == (rank == 1)
        used = [name for name in names.values() if name is not None]
        assert len({*used, collected["default"]}) == len(used) + 1


def test_a_group_is_made_while_compiling(results):
    x = data()[0].split([3, 1, 2])
    for rank, collected in enumerate(results):
        expected = x[2].mean((0, 2)) if rank == 2 else torch.cat(x[:2]).mean((0, 2))
        torch.testing.assert_close(collected["compiled"], expected, rtol=1e-10, atol=1e-10)


def test_soft_assignments_over_uneven_and_empty_ranks(results):
    x, dy = data()
    weights = WEIGHTS.clone().requires_grad_()
    x.requires_grad_()
    y = normalize(x, lambda m: soft(m, weights))
    expected = (y, *torch.autograd.grad(y, [x, weights], dy))
    for i, name in enumerate(("output", "input gradient", "gradient of the weights")):
        got = torch.cat([collected["soft"][i] for collected in results])
        torch.testing.assert_close(got, expected[i].detach(), rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_large_means_keep_their_variance(results):
    expected = (data()[0].float() + 1000).double().var((0, 2))
    for collected in results:  # float64 sums of n (var + mean^2): 1e-16 * 1e6 of the variance
        torch.testing.assert_close(collected["far"].double(), expected, rtol=1e-6, atol=0)


def test_instance_norm_pools_its_running_statistics(results):
    x, _ = data()
    for collected in results:
        torch.testing.assert_close(collected["instance"][0], x.mean((0, 2)), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(collected["instance"][1], x.var(2).mean(0), rtol=1e-10, atol=1e-10)


def test_sync_off_is_local(results):
    for collected, part in zip(results, data()[0].split([3, 1, 2]), strict=True):
        torch.testing.assert_close(collected["local"], part.mean((0, 2)), rtol=1e-10, atol=1e-10)


def test_nan_on_one_rank_is_skipped_on_all(results):
    for collected in results:
        assert collected["skipped"][0] == 1
        assert torch.equal(collected["skipped"][1], torch.zeros(4, dtype=F64))


def test_ranks_with_one_value_each_are_enough(results):
    assert [collected["alone"] for collected in results] == [1, 1, 0]


def fail(rank):
    raise ZeroDivisionError("on purpose")


def hang_on_one(rank):
    if rank == 0:
        dist.barrier()


def test_run_ranks_reports_a_failure():
    with pytest.raises(RuntimeError, match=r"rank 0 of 1 failed:[\s\S]*ZeroDivisionError: on purpose"):
        run_ranks(fail, 1)


@pytest.mark.slow
def test_run_ranks_reports_a_hang():
    with pytest.raises((TimeoutError, RuntimeError), match=r"still ran after|rank 0 of 2 failed"):
        run_ranks(hang_on_one, 2, timeout=15)


def test_count_is_a_tensor_once_pooled():
    m = Moments(torch.zeros(3, 2), torch.ones(3, 2), 5).over_batch(torch.ones(3, 1))
    assert isinstance(m.count, torch.Tensor)


def at_offset(rank, x):
    layer = BatchNorm(6, momentum=1.0, dtype=x.dtype)
    layer(x.chunk(2)[rank])
    return layer.running_var


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5, 1e7])
def test_ranks_keep_the_digits_that_one_process_keeps(offset):
    x = torch.randn(8, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + offset
    exact = x.var((0, 2, 3))
    for of_rank in run_ranks(at_offset, 2, x):
        torch.testing.assert_close(of_rank, exact, rtol=1e-15 + 1e-16 * offset, atol=0.0)

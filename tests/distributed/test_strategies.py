"""Strategies that run on the CPU train as one process does; FSDP's mixed precision leaves statistics in float32."""

import warnings

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lightning_norm import NormScheduler, NormSwap, NormSync, SwitchableNorm, SyncWarning
from lightning_norm.testing.ranks import run_ranks
from tests.callbacks.toy import trainer as one_process
from tests.distributed.inside import Uneven, batches, trainer

SHARES = (4, 2)
BF16 = torch.bfloat16


class Sharded(Uneven):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for part in (self.net, self.built, self.late):
            fully_shard(part, mesh=mesh)
        fully_shard(self, mesh=mesh)


def fit(rank, strategy):
    sharded = isinstance(strategy, ModelParallelStrategy)
    model = Sharded() if sharded else Uneven()
    callbacks = [NormSwap("sn"), NormScheduler({"momentum": 0.2})]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(rank, 2, strategy=strategy, plugins=[NormSync()], callbacks=callbacks).fit(
            model, batches(rank, 2, SHARES)
        )
    state = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}
    return state, [str(w.message) for w in caught if issubclass(w.category, SyncWarning)]


def narrow(rank, wrap):
    """One step of a layer whose momentum is lost on statistics in bfloat16: 1 + 0.001 is 1 there."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), SwitchableNorm(6, momentum=0.001))
    layer, wrapped = net[1], wrap(net)
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(SHARES)[rank]
    wrapped(x).square().sum().backward()
    stats = [layer.running_mean, layer.running_var, layer._buffers["_momentum"]]
    return [s.detach().clone() for s in stats]


def fsdp1(net):
    precision = MixedPrecision(param_dtype=BF16, reduce_dtype=torch.float32, buffer_dtype=BF16)
    return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True, mixed_precision=precision)


def fsdp2(net):
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    return fully_shard(net, mesh=dist.init_device_mesh("cpu", (2,)), mp_policy=policy)


STRATEGIES = {
    "ddp": lambda: "ddp",
    "ddp_find_unused_parameters_true": lambda: "ddp_find_unused_parameters_true",
    "ddp, static graph": lambda: DDPStrategy(static_graph=True, gradient_as_bucket_view=True),
    "ModelParallel": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
}


def everything(rank):
    got = {name: fit(rank, make()) for name, make in STRATEGIES.items()}
    return got, {"fsdp1": narrow(rank, fsdp1), "fsdp2": narrow(rank, fsdp2)}


@pytest.mark.slow
def test_strategies():
    expected = Uneven()
    one_process(NormSwap("sn"), NormScheduler({"momentum": 0.2}), max_epochs=2).fit(expected, batches(0, 1, None))
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 3)
    y = conv(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))).detach()
    for rank, (fits, narrowed) in enumerate(run_ranks(everything, 2)):
        for name, (state, told) in fits.items():
            assert len(told) == (name == "ModelParallel" and rank == 0), told
            assert all("ModelParallelStrategy ignores sync_batchnorm" in text for text in told)
            for key, value in expected.state_dict().items():  # float64, eight steps
                torch.testing.assert_close(
                    state[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name, k=key: f"{n}, {k}: {m}"
                )
        for name, (mean, var, momentum) in narrowed.items():
            assert (mean.dtype, var.dtype) == (torch.float32, torch.float32), name
            assert float(momentum) == 0.001
            # 1e-3 of statistics of activations in bfloat16, whose rounding is 2^-9
            torch.testing.assert_close(mean, 1e-3 * y.mean((0, 2, 3)), rtol=0, atol=1e-3 * 2**-7)
            torch.testing.assert_close(var - 1, 1e-3 * (y.var((0, 2, 3)) - 1), rtol=0, atol=1e-3 * 2**-7)

"""Ulyanov et al. 2016, equation (3)."""

import pytest
import torch
from torch import nn

from lightning_norm import InstanceNorm
from tests.normalizers.paper import agrees, along, data, same_as_torch, shaken

SHAPES = [(5, 6, 7), (5, 6, 7, 3), (3, 6, 2, 5, 3)]
TORCH = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def paper(x, p, eps=1e-5):
    dims = list(range(2, x.dim()))
    mean = x.mean(dims, keepdim=True)
    var = ((x - mean) ** 2).mean(dims, keepdim=True)
    return along(p["weight"], x) * (x - mean) / torch.sqrt(var + eps) + along(p["bias"], x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equation(shape, training):
    agrees(shaken(InstanceNorm(6)).train(training), paper, data(*shape))
    agrees(shaken(InstanceNorm(6, eps=0.3)).train(training), lambda x, p: paper(x, p, 0.3), data(*shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("arguments", [{"affine": True}, {"affine": False}, {"affine": True, "eps": 0.1}])
def test_same_as_torch(shape, arguments):
    same_as_torch(InstanceNorm(6, **arguments), TORCH[len(shape)](6, **arguments), shape)


@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_running_statistics_as_torch(momentum):
    arguments = {"affine": True, "track_running_stats": True, "momentum": momentum}
    ours, theirs = InstanceNorm(6, **arguments), nn.InstanceNorm2d(6, **arguments)
    theirs.register_forward_hook(count)  # torch's never counts its batches
    same_as_torch(ours, theirs, (5, 6, 7, 3))


def count(layer, args, output):
    layer.num_batches_tracked += layer.training


def test_momentum_none_averages():
    layer = InstanceNorm(6, track_running_stats=True, momentum=None).double()
    batches = [data(4, 6, 7, 3, seed=seed) for seed in range(3)]
    for x in batches:
        layer(x)
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([x.var((2, 3)).mean(0) for x in batches]).mean(0))


def test_one_pixel_is_refused():
    with pytest.raises(ValueError, match="more than one value per statistic"):
        InstanceNorm(6)(torch.randn(4, 6, 1, 1))

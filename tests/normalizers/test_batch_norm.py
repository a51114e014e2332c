"""Ioffe and Szegedy 2015, algorithms 1 and 2."""

import pytest
import torch
from torch import nn

from lightning_norm import BatchNorm
from tests.normalizers.paper import agrees, along, data, same_as_torch, shaken

SHAPES = [(5, 6), (5, 6, 7), (5, 6, 7, 3), (3, 6, 2, 5, 3)]
TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def whole(x):
    dims = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(dims)
    return mean, ((x - along(mean, x)) ** 2).mean(dims)


def paper(x, p, eps=1e-5):
    mean, var = whole(x)
    return along(p["weight"], x) * (x - along(mean, x)) / torch.sqrt(along(var, x) + eps) + along(p["bias"], x)


@pytest.mark.parametrize("shape", SHAPES)
def test_equation(shape):
    agrees(shaken(BatchNorm(6)), paper, data(*shape))
    agrees(shaken(BatchNorm(6, eps=0.3)), lambda x, p: paper(x, p, 0.3), data(*shape))


def test_evaluation_uses_the_running_statistics():
    layer = shaken(BatchNorm(6)).eval()

    def reference(x, p):
        u = (x - along(layer.running_mean, x)) / torch.sqrt(along(layer.running_var, x) + 1e-5)
        return along(p["weight"], x) * u + along(p["bias"], x)

    agrees(layer, reference, data(5, 6, 7, 3))


def test_running_statistics():
    layer = BatchNorm(6, momentum=0.3).double()
    mean, var = torch.zeros(6).double(), torch.ones(6).double()
    for seed in range(3):
        x = data(5, 6, 7, 3, seed=seed)
        layer(x)
        m, v = whole(x)
        mean, var = 0.7 * mean + 0.3 * m, 0.7 * var + 0.3 * v * 105 / 104  # 5 * 7 * 3 elements
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"eps": 0.1, "momentum": 0.7}],
)
def test_same_as_torch(shape, arguments):
    same_as_torch(BatchNorm(6, **arguments), TORCH[len(shape)](6, **arguments), shape)


def test_constant_channel_has_the_gradient_of_torch():
    x = data(5, 6, 7, 3)
    x[:, 2] = 4.0
    results = []
    for layer in (BatchNorm(6).double(), nn.BatchNorm2d(6).double()):
        a = x.clone().requires_grad_()
        y = layer(a)
        results.append((y, *torch.autograd.grad(y, a, data(5, 6, 7, 3, seed=1))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_synchronized_batch_norm_leaves_it_alone():
    network = nn.Sequential(BatchNorm(6))
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(network)[0]) is BatchNorm
    assert not isinstance(network[0], nn.modules.batchnorm._BatchNorm)

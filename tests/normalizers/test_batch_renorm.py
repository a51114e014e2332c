"""Ioffe 2017: algorithm 1 of batch renormalization, batch after batch."""

import functools
import math

import pytest
import torch
from torch import nn

from lightning_norm import BatchNorm, BatchRenorm, recalibrate, swap
from lightning_norm.testing import checks
from tests.normalizers.paper import agrees, along, data

F64 = torch.float64


class Paper:
    """Mean and deviation of all batches so far, and the normalization of the next, on the whole tensor in float64."""

    def __init__(self, momentum, r_max, d_max, eps, average):
        self.momentum, self.r_max, self.d_max, self.eps, self.average = momentum, r_max, d_max, eps, average
        self.m, self.mean, self.sigma = 0, None, None

    def batch(self, x):
        self.m += 1
        dims = [d for d in range(x.dim()) if d != 1]
        mean = x.mean(dims)
        sigma = ((x - along(mean, x)).square().mean(dims) + self.eps).sqrt()
        if self.m == 1:
            self.mean, self.sigma = mean.detach(), sigma.detach()
        r = (sigma / self.sigma).detach().clamp(1 / self.r_max, self.r_max)
        d = ((mean - self.mean) / self.sigma).detach().clamp(-self.d_max, self.d_max)
        alpha = 1 / self.m if self.momentum is None else self.momentum
        self.mean = self.mean + alpha * (mean.detach() - self.mean)
        if self.average == "std":
            self.sigma = self.sigma + alpha * (sigma.detach() - self.sigma)
        else:
            self.sigma = ((1 - alpha) * self.sigma.square() + alpha * sigma.detach().square()).sqrt()
        return (x - along(mean, x)) / along(sigma, x) * along(r, x) + along(d, x)


@pytest.mark.parametrize("average", ["std", "var"])
@pytest.mark.parametrize(("momentum", "r_max", "d_max"), [(0.3, 3.0, 5.0), (0.3, 1.05, 0.02), (None, 2.0, 1.0)])
def test_equation(momentum, r_max, d_max, average):
    layer = BatchRenorm(6, momentum=momentum, r_max=r_max, d_max=d_max, average=average, eps=1e-3).double()
    with torch.no_grad():
        layer.weight.copy_(data(1, 6)[0])
        layer.bias.copy_(data(1, 6, seed=1)[0])
    paper = Paper(momentum, r_max, d_max, 1e-3, average)

    def trained(x, p):
        return along(p["weight"], x) * paper.batch(x) + along(p["bias"], x)

    for seed in range(4):
        agrees(layer, trained, data(5, 6, 7, 3, seed=seed) * (1 + seed))

    def evaluated(x, p):
        return along(p["weight"], x) * (x - along(paper.mean, x)) / along(paper.sigma, x) + along(p["bias"], x)

    agrees(layer.eval(), evaluated, data(5, 6, 7, 3, seed=9))


def step(layer, x):
    a = x.clone().requires_grad_()
    y = layer(a)
    return (y, *torch.autograd.grad(y, [a, *layer.parameters()], data(*x.shape, seed=9)))


def test_without_room_it_is_batch_norm():
    ours, theirs = BatchRenorm(6, r_max=1, d_max=0).double(), BatchNorm(6).double()
    for seed in range(3):
        torch.testing.assert_close(*(step(layer, data(5, 6, 7, 3, seed=seed)) for layer in (ours, theirs)))


def test_with_all_room_it_has_the_value_of_the_running_statistics():
    layer = BatchRenorm(6, r_max=math.inf, d_max=math.inf).double()
    layer(data(5, 6, 7, 3))
    x = 3 * data(5, 6, 7, 3, seed=1) + 1
    expected = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), expected, rtol=1e-10, atol=1e-10)


def test_a_batch_norm_moves_in_and_out():
    model = nn.Sequential(nn.BatchNorm2d(6, momentum=1.0))
    model(data(5, 6, 7, 3, seed=8).float())
    x = data(4, 6, 7, 3, seed=9).float()
    expected = model.eval()(x)
    report = swap(model, "brn", norm_args={"momentum": 0.1})
    assert report.layers[0].preserves_eval
    torch.testing.assert_close(model.eval()(x), expected)
    mean = model[0].running_mean.clone()
    model.train()(x)
    torch.testing.assert_close(model[0].running_mean, 0.9 * mean + 0.1 * x.mean((0, 2, 3)))
    report.undo()
    assert isinstance(model[0], nn.BatchNorm2d)


@pytest.mark.parametrize("average", ["std", "var"])
def test_statistics_can_be_estimated_anew(average):
    layer = BatchRenorm(6, average=average).double()
    batches = [data(5, 6, 7, 3, seed=seed) for seed in range(3)]
    recalibrate(nn.Sequential(layer), batches)
    whole = torch.cat(batches)
    torch.testing.assert_close(layer.running().mean[0], whole.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running().var[0], whole.var((0, 2, 3), unbiased=False))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"r_max": 0.5}, "r_max must lie in"), ({"d_max": -1}, "d_max must lie in"), ({"average": "mean"}, "'mean'")],
)
def test_refuses(arguments, word):
    with pytest.raises(ValueError, match=word):
        BatchRenorm(6, **arguments)


@pytest.mark.parametrize("name", ["loads_batch_norm", "preserves_eval", "nan_does_not_poison", "recalibrates"])
def test_conforms_with_variances(name):
    checks()[name](functools.partial(BatchRenorm, average="var", momentum=None))

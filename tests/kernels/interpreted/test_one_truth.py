"""What a subclass or an instance changes is what ``backend="triton"`` computes, for the kernels are left."""

import copy

import pytest
import torch

from lightning_norm import SwitchableNorm, create
from lightning_norm.testing.kit import features


class Halved(SwitchableNorm):
    def _statistic(self, k, m):
        s = super()._statistic(k, m)
        return type(s)(s.mean / 2, s.var, s.count, s.ranks)


def outputs(layer):
    x, other = features(4, 6, 5, 3), copy.deepcopy(layer)
    layer.backend, other.backend = "triton", "eager"
    return layer(x), other(x)


def test_a_subclass():
    ours, eager = outputs(Halved(6))
    torch.testing.assert_close(ours, eager)
    assert (ours - outputs(SwitchableNorm(6))[0]).abs().max() > 0.1


@pytest.mark.parametrize(("key", "name"), [("bn", "standardize"), ("rbn", "_gain")])
def test_an_instance(key, name):
    layer = create(key, 6)
    method = getattr(layer, name)
    first = {"standardize": lambda mean, var: method(mean, 4 * var)}
    setattr(layer, name, first.get(name, lambda *arguments: method(*arguments) / 2))
    torch.testing.assert_close(*outputs(layer))

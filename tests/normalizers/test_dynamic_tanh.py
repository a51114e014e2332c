"""Zhu et al. 2025 and Chen et al. 2025: the two functions, their starts, and where they belong."""

import warnings

import pytest
import torch
from torch import nn

from lightning_norm import DynamicErf, DynamicTanh, NormSwap, UnsuitableNormWarning, swap
from tests.callbacks.toy import Net, loader, trainer
from tests.normalizers.paper import agrees, along, data, shaken


def tanh(x, p):
    e = torch.exp(2 * p["alpha"] * x)
    return along(p["weight"], x) * (e - 1) / (e + 1) + along(p["bias"], x)


def erf(x, p):
    return along(p["weight"], x) * torch.special.erf(p["alpha"] * x + p["offset"]) + along(p["bias"], x)


CLASSES = [(DynamicTanh, tanh), (DynamicErf, erf)]


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7), (5, 6, 7, 3), (3, 6, 2, 5, 3)])
@pytest.mark.parametrize(("cls", "paper"), CLASSES)
def test_equation(cls, paper, shape):
    agrees(shaken(cls(6)), paper, data(*shape))


@pytest.mark.parametrize(("cls", "paper"), CLASSES)
def test_tokens(cls, paper):
    layer, x = shaken(cls(6, channel_dim=-1)), data(5, 7, 6)
    expected = paper(x.movedim(-1, 1), dict(layer.named_parameters())).movedim(1, -1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_starting_values():
    assert float(DynamicTanh(6, alpha_init=0.8).monitor()["alpha"]) == pytest.approx(0.8)
    assert {name: float(t) for name, t in DynamicErf(6).monitor().items()} == {"alpha": 0.5, "offset": 0.0}


@pytest.mark.parametrize("key", ["dyt", "derf"])
def test_in_place_of_a_layer_norm(key):
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2))
    weight = model[0].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnsuitableNormWarning)
        report = swap(model, key, source="LayerNorm")
    assert model[0].weight is weight
    assert model[0].channel_dim == -1
    assert not report.layers[0].preserves_eval
    x = torch.randn(3, 5, 6)
    f = torch.tanh if key == "dyt" else torch.erf
    torch.testing.assert_close(model[0](x), f(0.5 * x))


@pytest.mark.parametrize("key", ["dyt", "derf"])
def test_a_swap_of_batch_norms_warns(key):
    with pytest.warns(UnsuitableNormWarning, match=r"1 BatchNorm layer.*0.*without loss.*source='LayerNorm'"):
        swap(nn.Sequential(nn.BatchNorm2d(6)), key)
    with pytest.warns(UnsuitableNormWarning, match="without loss"):
        trainer(NormSwap(key)).fit(Net(), loader())


def test_refuses():
    with pytest.raises(ValueError, match="alpha_init must be a finite number"):
        DynamicTanh(6, alpha_init=float("nan"))
    with pytest.raises(TypeError, match="keeps no running statistics"):
        DynamicErf(6, momentum=0.1)
    with pytest.raises(ValueError, match="residual has shape"):
        DynamicTanh(6)(torch.randn(2, 6, 3), "relu", torch.randn(2, 6, 1))

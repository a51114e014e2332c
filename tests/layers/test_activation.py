"""A layer's own activation and residual: the same as written out, in every layer and with channels last."""

import pytest
import torch

import lightning_norm
from lightning_norm.testing.kit import features, noise

KEYS = [("bn", {}), ("sn", {}), ("cn", {"context": "gate"}), ("bnet", {}), ("bnet", {"channel_dim": -1})]


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize(("key", "arguments"), KEYS, ids=str)
def test_as_written_out(key, arguments, activation):
    layer = lightning_norm.create(key, 6, **arguments)
    x, r = features(4, 6, 5, 6), noise(4, 6, 5, 6, seed=9)
    act = {"none": lambda t: t, "relu": torch.relu, "silu": torch.nn.functional.silu}[activation]
    torch.testing.assert_close(layer(x, activation=activation, residual=r), act(layer(x) + r))
    torch.testing.assert_close(layer(x, activation), act(layer(x)))


def test_bad_input():
    layer, x = lightning_norm.BatchNorm(6), features(4, 6, 5, 3)
    with pytest.raises(ValueError, match=r"activation must be one of \('none', 'relu', 'silu'\), got 'gelu'"):
        layer(x, activation="gelu")
    with pytest.raises(ValueError, match="residual has shape"):
        layer(x, residual=x[:1])


@pytest.mark.slow
def test_compiled():
    layer, plain = lightning_norm.BatchNorm(6), lightning_norm.BatchNorm(6)
    layer.compile()
    x, r = features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=9)
    torch.testing.assert_close(layer(x, "relu", r), plain(x, "relu", r))

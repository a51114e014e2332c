"""Khaled et al. 2023: X, Y and their mixture."""

import copy

import pytest
import torch
from torch import nn

from lightning_norm import BatchChannelNorm
from tests.normalizers.paper import agrees, along, data, shaken

SHAPES = [(5, 6), (5, 6, 7), (5, 6, 7, 3), (3, 6, 2, 5, 3)]
MIX = {None: lambda iota: iota, "clamp": lambda iota: iota.clamp(0, 1), "sigmoid": torch.sigmoid}


def paper(constraint=None, running=None, eps=1e-5):
    def reference(x, p):
        b = [d for d in range(x.dim()) if d != 1]
        c = list(range(1, x.dim()))
        mb, vb = running or (x.mean(b), x.var(b, unbiased=False))
        bn = (x - along(mb, x)) / torch.sqrt(along(vb, x) + eps)
        ln = (x - x.mean(c, keepdim=True)) / torch.sqrt(x.var(c, unbiased=False, keepdim=True) + eps)
        iota = along(MIX[constraint](p["iota"]), x)
        return along(p["weight"], x) * (iota * bn + (1 - iota) * ln) + along(p["bias"], x)

    return reference


@pytest.mark.parametrize("constraint", [None, "clamp", "sigmoid"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equation(shape, constraint):
    layer = shaken(BatchChannelNorm(6, constraint=constraint))
    if constraint == "clamp":
        assert layer.iota.max() > 1  # so that clamping shows
    agrees(layer, paper(constraint), data(*shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation(shape):
    layer = shaken(BatchChannelNorm(6)).eval()
    agrees(layer, paper(running=(layer.running_mean, layer.running_var)), data(*shape))


def test_running_statistics_are_batch_norms():
    ours, theirs = BatchChannelNorm(6, momentum=0.3).double(), nn.BatchNorm2d(6, momentum=0.3).double()
    for seed in range(3):
        ours(data(5, 6, 7, 3, seed=seed)), theirs(data(5, 6, 7, 3, seed=seed))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("training", [True, False])
def test_ends(training):
    layer = BatchChannelNorm(6).double().train(training)
    x = data(5, 6, 7, 3)
    assert torch.equal(layer.iota, torch.ones(6))
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(6).double().train(training)(x))
    nn.init.zeros_(layer.iota)
    torch.testing.assert_close(layer(x), nn.functional.group_norm(x, 1))


def test_evaluation_does_not_depend_on_the_batch_size():
    layer = shaken(BatchChannelNorm(6)).eval()
    x = data(6, 6, 5, 5)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]), rtol=1e-12, atol=1e-12)
    assert layer(data(1, 6, 1, 1)).isfinite().all()  # published: division by zero


def test_deepcopy_after_a_step_and_every_parameter_has_a_gradient():
    layer = BatchChannelNorm(6).double()
    (layer(data(5, 6, 7, 3).requires_grad_() * 2) * data(5, 6, 7, 3, seed=1)).sum().backward()
    twin = copy.deepcopy(layer)
    assert not twin.running_mean.requires_grad
    for name, p in layer.named_parameters():
        assert p.grad.abs().min() > 0, name
    assert sum(p.numel() for p in layer.parameters()) == 3 * 6


def test_momentum_takes_effect():
    x = data(5, 6, 7, 3)
    slow, fast = BatchChannelNorm(6, momentum=0.1).double(), BatchChannelNorm(6, momentum=0.9).double()
    slow(x), fast(x)
    torch.testing.assert_close(fast.running_mean, 9 * slow.running_mean)


def test_sigmoid_starts_near_one_and_unknown_constraint_is_refused():
    layer = BatchChannelNorm(6, constraint="sigmoid")
    assert 0.997 < layer.mixture().min() < 0.998
    assert not layer.preserves_eval
    with pytest.raises(ValueError, match="'tanh'"):
        BatchChannelNorm(6, constraint="tanh")


def paper_of_tokens(constraint=None, running=None, eps=1e-5):
    """The equation on tokens (N, ..., C), with the layer-normalized input of each token."""

    def reference(x, p):
        b = list(range(x.dim() - 1))
        mean, var = running or (x.mean(b), x.var(b, correction=0))
        iota = MIX[constraint](p["iota"])
        mixed = iota * (x - mean) / torch.sqrt(var + eps) + (1 - iota) * nn.functional.layer_norm(x, x.shape[-1:])
        return p["weight"] * mixed + p["bias"]

    return reference


@pytest.mark.parametrize("constraint", [None, "clamp", "sigmoid"])
@pytest.mark.parametrize("shape", [(5, 6), (5, 7, 6), (3, 2, 5, 6)])
def test_equation_of_tokens(shape, constraint):
    layer = shaken(BatchChannelNorm(6, constraint=constraint, per_token=True, channel_dim=-1))
    agrees(layer, paper_of_tokens(constraint), data(*shape))
    agrees(layer.eval(), paper_of_tokens(constraint, (layer.running_mean, layer.running_var)), data(*shape))


def test_correction_of_tokens_is_that_of_the_batch_statistics():
    layer = shaken(BatchChannelNorm(6, correction=1, per_token=True, channel_dim=-1)).eval()
    x = data(5, 7, 6)
    agrees(layer, paper_of_tokens(running=(layer.running_mean, layer.running_var * 35 / 34)), x)


def test_ends_of_tokens_are_torchs_layers():
    layer, x = BatchChannelNorm(6, per_token=True, channel_dim=-1).double(), data(5, 7, 6)
    torch.testing.assert_close(layer(x), nn.BatchNorm1d(6).double()(x.movedim(-1, 1)).movedim(1, -1))
    assert layer.plain(dims=3) is None
    nn.init.zeros_(layer.iota)
    torch.testing.assert_close(layer(x), nn.LayerNorm(6).double()(x), rtol=1e-10, atol=1e-10)
    plain = layer.plain(dims=3)
    assert type(plain) is nn.LayerNorm
    assert plain.bias is layer.bias
    assert layer.choice(0.9).norm == ""
    assert "torch.nn.LayerNorm" in layer.choice(0.9).why
    nn.init.constant_(layer.iota, 0.5)
    assert "each token" in layer.why_not_plain(dims=3)


def test_tokens_are_refused_on_maps():
    with pytest.raises(ValueError, match="channel_dim=-1"):
        BatchChannelNorm(6, per_token=True)

"""The conformance suite over sn and bcn with ``per_token=True``, on maps whose positions are the tokens."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

import lightning_norm
from lightning_norm import BatchChannelNorm, SwitchableNorm
from lightning_norm.testing import checks
from lightning_norm.testing.kit import C, distance, noise, step
from lightning_norm.testing.numerics import SLACK


class OfMaps:
    """Mixin: the suite's inputs have their channels on axis 1, and those of tokens are on the last."""

    def __init__(self, num_features, *, channel_dim=1, **options):
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim must be 1 or -1, got {channel_dim!r}.")
        super().__init__(num_features, channel_dim=-1, per_token=True, **options)
        self.moved = channel_dim == 1

    def forward(self, input, activation="none", residual=None, mask=None):
        if not self.moved or not isinstance(input, Tensor):
            return super().forward(input, activation, residual, mask)
        residual = None if residual is None else residual.movedim(1, -1)
        return super().forward(input.movedim(1, -1), activation, residual, mask).movedim(-1, 1)


class SwitchableTokens(OfMaps, SwitchableNorm):
    """sn."""


class BatchChannelTokens(OfMaps, BatchChannelNorm):
    """bcn."""


LAYERS = {"sn": SwitchableTokens, "bcn": BatchChannelTokens}
OF_THE_CLASS = ("wrong_dtype", "wrong_arguments", "paper_and_docs", "extra_parameters", "shows_itself")
"""Checks that run on the layer itself: no map goes through it, or its name counts."""

LEFT_OUT = {
    "saves_only_the_input": "autograd keeps several tensors of the size of x",
    "empty_batch": "messages name the shape of the tokens; see below",
    "wrong_shape": "likewise",
    "leaf_of_fx": "the moved axis is a node of the graph; see below",
    "chosen_and_with_its_activation": "the moved axis is a view of what the layer returns, and not that itself",
    "choice_is_what_it_computes": "builds the plain layer for maps; the paper tests look at the choice",
}
NOT_FOR = {
    "sn": {"as_precise_as_torch": "at mean 0 it rounds as nn.LayerNorm does, 1.6 times nn.BatchNorm2d; see below"},
    "bcn": {"eval_uses_input_stats": "in evaluation a token sees itself alone, and not the far ones that are moved"},
}


def _cases():
    for key, name in ((key, name) for key in LAYERS for name in checks()):
        if name not in LEFT_OUT and name not in NOT_FOR[key]:
            marks = [pytest.mark.slow] if name == "compiled_equals_eager" else []
            yield pytest.param(key, name, marks=marks)


@pytest.mark.parametrize(("key", "name"), list(_cases()))
def test_conformance(key, name):
    cls = LAYERS[key]
    itself = functools.partial(cls.__mro__[2], per_token=True, channel_dim=-1)
    checks()[name](itself if name in OF_THE_CLASS else cls)


@pytest.fixture(params=["sn", "bcn"])
def layer(request):
    layer = LAYERS[request.param].__mro__[2](6, per_token=True, channel_dim=-1)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return layer


def test_empty_batch(layer):
    x = torch.randn(0, 4, 6, requires_grad=True)
    assert layer(x).shape == (0, 4, 6)
    assert layer.num_batches_tracked == 1
    assert torch.equal(layer.running_mean, torch.zeros(6))
    layer(x).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())
    assert layer.eval()(x).shape == (0, 4, 6)


def test_wrong_shape(layer):
    with pytest.raises(ValueError, match="num_features=6"):
        layer(torch.randn(4, 6, 5))


def test_leaf_of_fx(layer):
    model = nn.Sequential(layer).eval()
    traced, x = torch.fx.symbolic_trace(model), torch.randn(3, 4, 6)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("key", LAYERS)
def test_as_precise_as_torchs_layer_norm(key):
    dy = noise(4, 60, C, seed=7)
    for ratio, slack in SLACK.items():
        errors = []
        for layer in (LAYERS[key](C, channel_dim=-1), nn.LayerNorm(C)):
            wide, x = copy.deepcopy(layer).double(), noise(4, 60, C) + ratio
            got, exact = (step(f, x.to(t), dy.to(t)) for f, t in ((layer, torch.float32), (wide, torch.float64)))
            errors.append((distance(got.y, exact.y), distance(got.dx, exact.dx)))
        for ours, torchs in zip(*errors, strict=True):
            assert ours <= slack * torchs, (ratio, errors)


def test_swap_of_a_transformer_and_back_to_torchs_layer():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)).eval()
    x = torch.randn(3, 4, 6)
    before = model(x)
    arguments = {"choices": ("ln",), "per_token": True}
    lightning_norm.swap(model, "sn", source="LayerNorm", norm_args=arguments)
    torch.testing.assert_close(model(x), before)
    report = lightning_norm.harden(model, x)
    assert "torch.nn.LayerNorm" in report.undecided["1"]
    plain = lightning_norm.to_plain(model, x)
    plain = plain if isinstance(plain, nn.Module) else model
    assert type(plain[1]) is nn.LayerNorm
    torch.testing.assert_close(plain(x), before)


@pytest.mark.parametrize("key", LAYERS)
def test_swap_of_maps_is_refused(key):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))
    with pytest.raises(ValueError, match="source='LayerNorm'"):
        lightning_norm.swap(model, key, norm_args={"per_token": True})
    assert type(model[1]) is nn.BatchNorm2d


def test_a_token_does_not_see_the_others(layer):
    layer.eval()
    if isinstance(layer, SwitchableNorm):
        nn.init.constant_(layer.mean_weight[:1].detach(), -1e4)  # without "in"
        nn.init.constant_(layer.var_weight[:1].detach(), -1e4)
    x = torch.randn(3, 4, 6)
    other = x.clone()
    other[:, 1:] += 5
    torch.testing.assert_close(layer(x)[:, 0], layer(other)[:, 0])


def test_the_kernels_are_left(layer):
    assert layer.fused_spec(None) is None
    layer.backend = "triton"
    with pytest.raises(RuntimeError, match="backend='auto'"):
        layer(torch.randn(3, 4, 6))

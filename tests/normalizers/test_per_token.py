"""The conformance suite over sn and bcn with ``per_token=True``, on maps whose positions are the tokens."""

import functools

import pytest
import torch
from torch import Tensor, nn

from lightning_norm import BatchChannelNorm, SwitchableNorm
from lightning_norm.testing import checks


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
    "choice_is_what_it_computes": "builds the plain layer for maps; the paper tests look at the choice",
}
NOT_FOR_BCN = {"eval_uses_input_stats": "in evaluation a token sees itself alone, and not the far ones that it moves"}


def _cases():
    for key, name in ((key, name) for key in LAYERS for name in checks()):
        if name not in LEFT_OUT and not (key == "bcn" and name in NOT_FOR_BCN):
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


@pytest.mark.parametrize("training", [True, False])
def test_compiled(layer, training):
    layer.train(training)
    x, dy = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    results = []
    for compiled in (False, True):
        a = x.clone().requires_grad_()
        if compiled:
            layer.compile()
        y = layer(a)
        results.append((y, *torch.autograd.grad(y, [a, *layer.parameters()], dy)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


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

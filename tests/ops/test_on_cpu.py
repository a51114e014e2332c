"""The short ways of the CPU compute what the algebra does: values, gradients of both orders, running statistics."""

import copy

import pytest
import torch

from lightning_norm import create
from lightning_norm.bench.contenders import saved_for_backward

LAYERS = {
    "bn": {},
    "bn of all batches": {"momentum": None},
    "bn without affine": {"affine": False},
    "gn": {"num_groups": 2},
    "gn of few": {"num_groups": 4, "affine": False},
    "in": {},
    "in without affine": {"affine": False},
    "ln": {},
    "sn": {},
    "sn without affine": {"affine": False},
    "sn of two": {"choices": ("bn", "ln")},
    "sn of one": {"choices": ("bn",)},
    "sn with clipped gradients": {"clip_grad": 0.1},
    "bcn": {},
    "bcn without affine": {"affine": False},
    "bcn by a sigmoid": {"constraint": "sigmoid"},
    "brn": {},
    "dbn": {},
    "dbn without affine": {"affine": False},
    "dbn with a gradient through the blend": {"stat_grad": "batch"},
    "bnet": {},
    "rbn": {},
    "rbn as published": {"gate_init": "paper", "rectify": ("scale",)},
    "rbn without affine": {"affine": False, "rectify": ("center",)},
    "ubn": {},
    "ubn with a threshold": {"threshold": 0.5},
    "ubn whose batches are condensed": {"threshold": -1.0, "min_updates": 0},
    "ibn": {},
    "frn": {},
    "frn with a learned eps": {"learn_eps": True},
}
NEED_POSITIONS = ("in", "in without affine", "ibn", "frn", "frn with a learned eps")
INPUTS = {
    "images": ((4, 8, 5, 5), 1),
    "channels-last": ((4, 8, 5, 5), 1),
    "flat": ((32, 8), 1),
    "tokens": ((4, 7, 8), -1),
    "large": ((4, 8, 160, 160), 1),  # in parts
}


def layer_of(name, channel_dim, dtype):
    torch.manual_seed(0)
    layer = create(name.split()[0], 8, channel_dim=channel_dim, **LAYERS[name])
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer.to(dtype)


def results(layer, x, dy, twice=False):
    """Output, gradients, and, if ``twice``, gradients of these; then the buffers."""
    layer(0.7 * x.roll(1, -1))  # running statistics that are not those of this batch
    x, dy = x.clone().requires_grad_(), dy.clone().requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], dy, create_graph=twice)
    found = [y, *gradients]
    if twice:
        total = sum((g * g.detach().cos()).sum() for g in gradients)
        found += torch.autograd.grad(total, [x, dy], allow_unused=True)
    return [t.detach().double() for t in (*found, *layer.buffers()) if t is not None]


@pytest.mark.parametrize("mean", [0.0, 1500.0])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_same_as_the_algebra(name, kind, mean):
    shape, channel_dim = INPUTS[kind]
    if name in NEED_POSITIONS and kind == "flat":
        pytest.skip("needs positions")
    x, dy = torch.randn(shape) * 1.5 + mean, torch.randn(shape)
    if kind == "channels-last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    layers = [layer_of(name, channel_dim, dtype) for dtype in (torch.float32, torch.float32, torch.float64)]
    layers[1].backend = layers[2].backend = "eager"
    inputs = ((x, dy), (x, dy), (x.double(), dy.double()))
    found = [results(layer, *given) for layer, given in zip(layers, inputs, strict=True)]
    for short, written, exact in zip(*found, strict=True):
        # What cancels, such as a gradient that is nearly 0, has few digits either way. So have the gradients of weights
        # of mixtures, sums over all of x: about 3e-5 with either.
        tolerance = 3e-6 if short.shape == x.shape else 3e-5
        assert (short - exact).norm() <= 4 * (written - exact).norm() + tolerance * exact.norm() + 1e-6


@pytest.mark.parametrize("kind", [*INPUTS, "1 x 1"])
@pytest.mark.parametrize("name", LAYERS)
def test_an_output_may_be_changed_in_place(name, kind):
    shape, channel_dim = {**INPUTS, "1 x 1": ((4, 8, 1, 1), 1)}[kind]
    if name in NEED_POSITIONS and kind in ("flat", "1 x 1"):
        pytest.skip("needs positions")
    layer, x = layer_of(name, channel_dim, torch.float32), torch.randn(shape)
    if kind == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    found = []
    for inplace in (True, False):
        given = x.clone().requires_grad_()
        fresh = copy.deepcopy(layer)  # running statistics move
        y = torch.nn.functional.relu(fresh(given), inplace=inplace)
        found.append((y, *torch.autograd.grad(y.square().sum(), [given, *fresh.parameters()])))
    for changed, new in zip(*found, strict=True):
        assert torch.equal(changed, new)


@pytest.mark.parametrize("kind", ["images", "flat", "tokens"])
@pytest.mark.parametrize("name", LAYERS)
def test_same_second_derivatives_as_the_algebra(name, kind):
    shape, channel_dim = INPUTS[kind]
    if name in NEED_POSITIONS and kind == "flat":
        pytest.skip("needs positions")
    x, dy = torch.randn(shape, dtype=torch.float64) + 1, torch.randn(shape, dtype=torch.float64)
    short = layer_of(name, channel_dim, torch.float64)
    written = copy.deepcopy(short)
    written.backend = "eager"
    for actual, expected in zip(results(short, x, dy, True), results(written, x, dy, True), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["images", "flat"])
@pytest.mark.parametrize("name", LAYERS)
def test_parameters_and_buffers_may_have_strides(name, kind):
    if name in NEED_POSITIONS and kind == "flat":
        pytest.skip("needs positions")
    shape, channel_dim = INPUTS[kind]
    layer = layer_of(name, channel_dim, torch.float64)
    with_strides = copy.deepcopy(layer)
    for tensors in (with_strides._parameters, with_strides._buffers):
        for key, t in tensors.items():
            if t is not None and t.dim() == 1:
                other = torch.stack([t.detach(), torch.full_like(t, 7)], 1)[:, 0]
                tensors[key] = torch.nn.Parameter(other) if isinstance(t, torch.nn.Parameter) else other
    x, dy = torch.randn(2, *shape, dtype=torch.float64)
    for got, want in zip(results(with_strides, x, dy), results(layer, x, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["images", "flat"])
@pytest.mark.parametrize("name", ["bn", "sn", "bcn", "brn", "dbn", "rbn"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_what_is_not_finite_moves_nothing(name, bad, kind):
    layer = layer_of(name, 1, torch.float32)
    shape = INPUTS[kind][0]
    layer(torch.randn(shape))
    before = {name: b.clone() for name, b in layer.named_buffers()}
    x = torch.randn(shape)
    x.view(-1)[0] = bad
    layer(x)
    assert [name for name, b in layer.named_buffers() if not torch.equal(b, before[name])] == ["skipped_updates"]


@pytest.mark.parametrize("name", ["bn", "sn", "bcn", "dbn", "brn", "rbn", "ubn", "gn"])
def test_flat_inputs_keep_x_and_few_numbers(name):
    x = torch.randn(128, 64, requires_grad=True)
    assert saved_for_backward(create(name, 64), x) <= 1.2


@pytest.mark.parametrize("kind", ["images", "channels-last"])
@pytest.mark.parametrize("name", ["bn", "gn", "in", "ln", "sn"])
def test_inputs_without_a_gradient(name, kind):
    """torch 2.11 ends the process in GroupNorm's backward pass for channels-last ones whose gradient is not asked."""
    layer = layer_of(name, 1, torch.float32)
    x = torch.randn(INPUTS[kind][0], generator=torch.Generator().manual_seed(1))
    x = x.to(memory_format=torch.channels_last) if kind == "channels-last" else x
    weight, bias = layer.weight, layer.bias
    for lacking in ("none", "weight", "bias"):
        layer.weight, layer.bias = None if lacking == "weight" else weight, None if lacking == "bias" else bias
        with_gradient, wanted = x.detach().requires_grad_(), list(layer.parameters())
        got, want = (torch.autograd.grad(layer(t).square().sum(), wanted) for t in (x, with_gradient))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_activation_may_write_to_the_output():
    for name in LAYERS:
        for shape, channel_dim in ((4, 8, 5, 5), 1), ((4, 7, 8), -1):
            y = torch.relu_(layer_of(name, channel_dim, torch.float32)(torch.randn(shape, requires_grad=True)))
            y.sum().backward()


def test_subclass_with_an_algebra_of_its_own_goes_its_own_way():
    from lightning_norm import BatchNorm

    class Shifted(BatchNorm):
        def algebra(self, m):
            affine = super().algebra(m)
            return type(affine)(affine.center + 1, affine.scale, affine.shift)

    x = torch.randn(4, 8, 5, 5)
    assert not torch.allclose(Shifted(8)(x), BatchNorm(8)(x))

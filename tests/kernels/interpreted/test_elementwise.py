"""Functions of each element on the kernels against plain PyTorch in float64."""

import numpy as np
import pytest
import torch

import lightning_norm
from lightning_norm.kernels.elementwise import launch
from lightning_norm.kernels.grid import FEW
from lightning_norm.testing.kit import features, noise, step
from tests.kernels.interpreted import test_layers, test_recorded
from tests.kernels.interpreted.test_layers import count_launches

KEYS = ("dyt", "derf")
LAST = torch.channels_last


def pair(key, channels=6, **arguments):
    return test_recorded.pair(key, arguments, channels)


def compare(ours, exact, x, dy, tolerance=2e-6):
    """Compare a step with that in float64. What is summed over all of x is held to what its terms amount to."""
    wide = step(exact, x.double(), dy.double())
    du = wide.dx / exact.alpha.detach()
    terms = {"alpha": (du * x.double()).norm(), "offset": du.norm()}
    ratios = {name: float(terms[name] / wide.grads[name].abs()) for name in terms if name in wide.grads}
    test_layers.compare(ours, exact, x, dy, tolerance, **{n: tolerance * max(1, ratio) for n, ratio in ratios.items()})


def check(key, shape, last=False, tolerance=2e-6, **arguments):
    ours, exact = pair(key, shape[arguments.get("channel_dim", 1)], **arguments)
    x, dy = features(*shape), noise(*shape, seed=7)
    if last:
        x, dy = (t.contiguous(memory_format=LAST) for t in (x, dy))
    compare(ours, exact, x, dy, tolerance)
    assert ours(x).stride() == x.stride()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((4, 6, 5, 3), False),
        ((4, 6, 4, 4), False),
        ((4, 6, 5, 4), True),
        ((3, 72, 5, 7), True),
        ((5, 6), False),
        ((1, 6), False),
        ((300, 6), False),
        ((5, 6, 7), False),
        ((3, 6, 2, 5, 3), False),
        ((2, 3, 70, 61), False),
        ((2, 3, 70, 61), True),
    ],
    ids=str,
)
def test_shapes(key, shape, last):
    check(key, shape, last)


@pytest.mark.parametrize("key", KEYS)
def test_tokens(key):
    check(key, (3, 11, 40), channel_dim=-1)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("arguments", [{"affine": False}, {"bias": False}], ids=str)
def test_parameters(key, arguments):
    check(key, (4, 6, 5, 3), **arguments)


@pytest.mark.parametrize(("shape", "last"), [((9, 6, 5, 3), False), ((2, 3, 70, 61), False), ((9, 70, 6, 5), True)])
def test_programs_that_take_several_tiles(shape, last, monkeypatch):
    """Several samples, or several tiles of the lines, with tails in each."""
    monkeypatch.setattr(launch, "BUSY", 1)
    check("derf", shape, last)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("last", [False, True])
def test_activation_and_residual(key, activation, last):
    ours, exact = pair(key)
    x, r, dy = features(4, 6, 5, 4), noise(4, 6, 5, 4, seed=9), noise(4, 6, 5, 4, seed=7)
    if last:
        x, r, dy = (t.contiguous(memory_format=LAST) for t in (x, r, dy))
    for residual in (r, None):
        results = []
        for layer, wide in ((ours, torch.float32), (exact, torch.float64)):
            given = [t.to(wide).requires_grad_() for t in (x, residual) if t is not None]
            y = layer(given[0], activation, *given[1:])
            results.append([y.detach(), *torch.autograd.grad(y, [*given, *layer.parameters()], dy.to(wide))])
        for a, b in zip(*results, strict=True):
            # Sums of hundreds of products may nearly cancel: none is held to less than one of them.
            assert (a.double() - b).norm() <= 2e-6 * max(1.0, float(b.norm()))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(key, dtype):
    ours, exact = pair(key)
    compare(ours, exact, features(4, 6, 5, 4).to(dtype), noise(4, 6, 5, 4, seed=7).to(dtype), 2.0**-7)
    # Whole layers in half as well: the kernels read its parameters as they are.
    ours, exact = (layer.to(dtype).to(wide) for layer, wide in zip(pair(key), (dtype, torch.float64), strict=True))
    exact.backend = "eager"
    compare(ours, exact, features(4, 6, 5, 4).to(dtype), noise(4, 6, 5, 4, seed=7).to(dtype), 2.0**-7)


@pytest.mark.parametrize("key", KEYS)
def test_each_value_is_rounded_well(key):
    """Near 0, where 1 - exp(-2u) would lose digits; at the seam of two formulas; far out, and beyond all numbers."""
    layer = lightning_norm.create(key, 1, affine=False, alpha_init=1.0)
    layer.backend = "triton"
    size = torch.logspace(-30, 2, 4000)
    x = torch.cat([size, -size, torch.linspace(0.6, 0.65, 300), torch.tensor([0.0, -0.0])]).view(-1, 1)
    x.requires_grad_()
    y = layer(x)
    f = torch.tanh if key == "dyt" else torch.erf
    wide = x.detach().double().requires_grad_()
    torch.testing.assert_close(y.double(), f(wide), rtol=4e-7, atol=0)
    (dx,), (exact,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(f(wide).sum(), wide)
    # Where the slope itself is smaller than its last digits beside 1, PyTorch's would be 0.
    torch.testing.assert_close(dx.double(), exact, rtol=4e-6, atol=2e-16)
    odd = torch.tensor([[float("inf")], [-float("inf")], [float("nan")], [3.0]])
    with np.errstate(invalid="ignore"):
        assert layer(odd).flatten().tolist()[:2] == [1.0, -1.0]
        assert layer(odd).isnan().flatten().tolist() == [False, False, True, False]


@pytest.mark.parametrize("key", KEYS)
def test_launches(key, monkeypatch):
    ours, _ = pair(key)
    x = features(4, 6, 5, 3).requires_grad_()
    launched = count_launches(monkeypatch)
    y = ours(x)
    assert launched == ["apply_elementwise"]
    launched.clear()
    torch.autograd.grad(y, [x, *ours.parameters()], noise(4, 6, 5, 3, seed=7))
    assert launched == ["combine_elementwise", "join_elementwise"]


def test_only_x_is_kept():
    ours, _ = pair("dyt")
    x, saved = features(4, 6, 16, 16).requires_grad_(), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        ours(x)
    assert sum(t.numel() for t in saved.values()) < 1.01 * x.numel()


@pytest.mark.parametrize("frozen", [("alpha",), ("weight", "bias"), ("alpha", "offset", "weight", "bias")], ids=str)
def test_frozen_parameters(frozen):
    ours, exact = pair("derf")
    for layer in (ours, exact):
        for name in frozen:
            getattr(layer, name).requires_grad_(False)
    compare(ours, exact, features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7))


def test_no_gradient_of_x():
    ours, exact = pair("dyt")
    x, dy = features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7)
    got = torch.autograd.grad(ours(x), [*ours.parameters()], dy)
    want = torch.autograd.grad(exact(x.double()), [*exact.parameters()], dy.double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_batches_of_gradients(activation):
    """They come as one tensor with an axis more, which no kernel reads."""
    ours, exact = pair("derf")
    x, r, dy = features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=9), noise(2, 4, 6, 5, 3, seed=7)
    results = []
    for layer, wide in ((ours, torch.float32), (exact, torch.float64)):
        given = [t.to(wide).requires_grad_() for t in (x, r)]
        inputs = [*given, *layer.parameters()]
        y = layer(given[0], activation, given[1])
        results.append(torch.autograd.grad(y, inputs, dy.to(wide), is_grads_batched=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_a_subclass_keeps_its_own_function(monkeypatch):
    class Half(lightning_norm.DynamicTanh):
        @staticmethod
        def function(u):
            return torch.tanh(u) / 2

        @staticmethod
        def slope(u, f):
            return (1 - (2 * f).square()) / 2

    layer, launched, x = Half(6), count_launches(monkeypatch), features(4, 6, 5, 3)
    layer.backend = "triton"
    torch.testing.assert_close(layer(x), lightning_norm.DynamicTanh(6)(x) / 2)
    assert not launched


def test_a_graph_fuses_plain_pytorch():
    ours, _ = pair("dyt")
    x = features(4, 6, 5, 4)
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), ours(x))


@pytest.mark.parametrize("size", [1, 49, 196, 3136, 200_000])
@pytest.mark.parametrize("channels", [3, 64, 2048])
@pytest.mark.parametrize("samples", [1, 8, 1000])
@pytest.mark.parametrize("last", [False, True])
def test_parts_are_joined_in_four_steps(size, channels, samples, last):
    for vector in (4, 8):
        tiles = launch.tiles_like(samples, channels, size, last, vector).shared_out()
        for number in (tiles.parts * tiles.fold, tiles.parts * tiles.blocks):
            assert number <= FEW * launch.join_tile(number)[0]

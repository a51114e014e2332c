"""Encoder-decoders of statistics on the kernels against the readable algebra in float64."""

import copy
import math
import sys
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

import lightning_norm
from lightning_norm.kernels.encoder_decoder import launch
from lightning_norm.ops import backend
from lightning_norm.ops.fused import encoder_decoder
from lightning_norm.ops.fused.operators import to_numbers
from lightning_norm.ops.layout import layout_of
from lightning_norm.testing.kit import REGISTRY, features, noise, step
from tests.kernels.interpreted.test_layers import compare, count_launches, exports, keeps_nan_out, pair, rounded_once
from tests.kernels.interpreted.test_per_channel import same_buffers

ops = torch.ops.lightning_norm
SLOW = pytest.mark.slow
PLAIN = {"dropout": 0.0}
TRAINED = [
    ("asr", {}),
    ("asr", {"affine": False, "rescale_gate": False, "std_ratio": 1}),
    ("afn", {**PLAIN, "momentum": None, "affine": False, "rescale_ratio": 2}),
]
TRAINED_AT_LENGTH = [
    ("asr", {"gate_init": -math.inf}),
    ("afn", PLAIN),
    ("afn", {**PLAIN, "track_running_stats": False, "gate_init": 2.0}),
]
EVALUATED = [("asr", {}), ("afn", {}), ("afn", {"track_running_stats": False})]
FORWARD, BACKWARD = ["encode", "decode", "apply_flat"], ["sums_rows", "vjp_affine", "vjp_decode", "vjp_encode", "combine_flat"]  # noqa: E501  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def twin(key, channels, **arguments):
    """A layer on the kernels and the same in float64 on plain PyTorch, with gates that are open."""
    layer = lightning_norm.create(key, channels, gate_init=0.5, rescale_init=0.7, **arguments)
    exact = copy.deepcopy(layer).double()
    layer.backend, exact.backend = "triton", "eager"
    return layer, exact


@pytest.mark.parametrize(
    ("key", "arguments"), [*TRAINED, *(pytest.param(*case, marks=SLOW) for case in TRAINED_AT_LENGTH)], ids=str
)
def test_training(key, arguments, monkeypatch):
    ours, exact = pair(key, arguments)
    launched = count_launches(monkeypatch)
    for i in range(2):
        compare(ours, exact, features(4, 6, 5, 3) + 0.1 * i, noise(4, 6, 5, 3, seed=7 + i), 5e-6)
        same_buffers(ours, exact)
    assert launched == 2 * ["moments_rows", *FORWARD, *BACKWARD]


@pytest.mark.parametrize(("key", "arguments"), EVALUATED, ids=str)
def test_evaluation(key, arguments, monkeypatch):
    """In evaluation nothing is dropped, and afn's statistics do not depend on x."""
    ours, exact = pair(key, arguments, train=False)
    launched = count_launches(monkeypatch)
    compare(ours, exact, features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7), 5e-6)
    moments = ["moments_rows"] if key == "asr" or "track_running_stats" in arguments else []
    assert launched == [*moments, *FORWARD, *BACKWARD]


@triton.jit
def draw(out, seed, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.rand(seed, i), mask=i < 12)


def test_dropout(monkeypatch):
    """The kernels draw what is dropped, from a seed of torch's, the same in both directions."""
    ours, exact = pair("afn", {"dropout": 0.4, "gate_init": 1.0, "std_ratio": 1})
    drawn, launched = torch.zeros(2, 6), count_launches(monkeypatch)
    torch.manual_seed(3)
    draw[(1,)](drawn, int(torch.randint(1 << 31, (), device="cpu")), BLOCK=16)
    assert 0 < (drawn < 0.4).sum() < 12
    monkeypatch.setattr(torch, "rand_like", lambda t: drawn.to(t))
    launched.clear()
    torch.manual_seed(3)
    x = features(4, 6, 5, 3)
    compare(ours, exact, x, noise(4, 6, 5, 3, seed=7), 5e-6)
    assert launched == ["moments_rows", *FORWARD, *BACKWARD]
    first, second = ours(x), ours(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    ours(x)
    assert torch.equal(ours(x), first)
    ours.dropout = exact.dropout = 1.0
    exact.load_state_dict(ours.state_dict())
    compare(ours, exact, x, noise(4, 6, 5, 3, seed=7), 5e-6)


@pytest.mark.parametrize(
    ("key", "gate"),
    [("asr", -math.inf), ("afn", -3.0), *(pytest.param(*c, marks=SLOW) for c in (("asr", -3.0), ("afn", -math.inf)))],
)
def test_large_offsets(key, gate):
    arguments = {"gate_init": gate, **(PLAIN if key == "afn" else {})}
    # The gradient of a gate is one number, in which the terms of all samples cancel: it has fewer digits.
    compare(
        *pair(key, arguments, offset=1000.0), features(4, 6, 5, 3) + 1000, noise(4, 6, 5, 3, seed=7), 5e-6,
        lambda_sigma=5e-6 if math.isinf(gate) else 3e-5,
    )  # fmt: skip


@pytest.mark.parametrize("key", ["asr", pytest.param("afn", marks=SLOW)])
def test_kinks(key):
    """Units and a sigma just where their ReLU bends, a d held at sqrt(eps); d just there depends on torch's version."""
    ours, exact = pair(key, {"eps": 0.25, "gate_init": -1.0, **(PLAIN if key == "afn" else {})})
    x = features(4, 6, 5, 3)
    x[:, 4], x[:, 5] = 0.01 * x[:, 4], 3.0
    for layer in (ours, exact):
        with torch.no_grad():
            for name in ("std_encoder", "rescale_encoder"):
                getattr(layer, f"{name}_weight")[0] = getattr(layer, f"{name}_bias")[0] = 0
            layer.sigma_decoder_weight[1:] = 0
            layer.sigma_decoder_bias[1:] = torch.tensor([0, -9, 9, -9, 0.6])
    compare(ours, exact, x, noise(4, 6, 5, 3, seed=7), 5e-6)
    reached = step(ours, x, noise(4, 6, 5, 3, seed=7)).grads["sigma_decoder_bias"] != 0
    assert reached.tolist()[1:] == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("key", "last"),
    [("asr", False), ("afn", True), *(pytest.param(*c, marks=SLOW) for c in (("asr", True), ("afn", False)))],
)
def test_parts_are_joined_inside(key, last):
    """A map in pieces, and columns in pieces."""
    shape = (2, 5, 16, 4) if last else (2, 1, 70, 61)
    ours, exact = twin(key, shape[1], **(PLAIN if key == "afn" else {}))
    form = torch.channels_last if last else torch.contiguous_format
    x, dy = (
        t.contiguous(memory_format=form) for t in (features(2, 6, *shape[2:])[:, : shape[1]], noise(*shape, seed=7))
    )
    compare(ours, exact, x, dy, 2e-5)
    assert ours(x).is_contiguous(memory_format=form)


@pytest.mark.parametrize(
    ("key", "n", "channels", "arguments"),
    [
        ("asr", 33, 40, {"rescale_ratio": 2}),
        ("afn", 17, 130, {**PLAIN, "std_ratio": 4}),
        ("asr", 3, 1, {}),
        pytest.param("asr", 40, 150, {}, marks=SLOW),
        pytest.param("afn", 40, 150, {**PLAIN, "rescale_ratio": 1}, marks=SLOW),
        pytest.param("afn", 2, 600, PLAIN, marks=SLOW),
        pytest.param("asr", 1, 70, {}, marks=SLOW),
    ],
    ids=str,
)
def test_many_channels_and_samples(key, n, channels, arguments):
    """More than one block of samples, channels and hidden units, and channels summed in spans."""
    ours, exact = twin(key, channels, **arguments)
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (features(n, channels, 2, 2), noise(n, channels, 2, 2, seed=7)))  # noqa: E501  # fmt: skip
    compare(ours, exact, x, dy, 2e-5)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=SLOW), torch.bfloat16])
def test_half(dtype):
    """The input, or the whole layer."""
    ours, exact = pair("asr", {})
    compare(ours, exact, features(4, 6, 5, 3).to(dtype), noise(4, 6, 5, 3, seed=7).to(dtype), 2.0**-7)
    ours, exact = pair("afn", PLAIN)
    ours.to(dtype)
    exact.load_state_dict(ours.state_dict())
    compare(ours, exact, features(4, 6, 5, 3).to(dtype), noise(4, 6, 5, 3, seed=7).to(dtype), 2.0**-6)


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(*pair("asr", {}), features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7), 5e-6)


def test_activation_and_residual_are_in_the_same_launches(monkeypatch):
    ours, exact = pair("afn", PLAIN)
    x, r, dy = features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=9), noise(4, 6, 5, 3, seed=7)
    launched, results = count_launches(monkeypatch), []
    for layer, dtype in ((ours, torch.float32), (exact, torch.float64)):
        a, b = (t.to(dtype).requires_grad_() for t in (x, r))
        y = layer(a, activation="silu", residual=b)
        results.append((y, *torch.autograd.grad(y, (a, b, *layer.parameters()), dy.to(dtype))))
    assert launched == ["moments_rows", *FORWARD, *BACKWARD]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_frozen_parameters_and_inputs():
    """Only the gradients that are asked for, with the rest of the layer as it is."""
    ours, exact = pair("asr", {})
    grads = []
    for layer, dtype in ((ours, torch.float32), (exact, torch.float64)):
        layer.requires_grad_(False)
        layer.mu_decoder_weight.requires_grad_()
        layer(features(4, 6, 5, 3).to(dtype)).square().sum().backward()
        grads.append(layer.mu_decoder_weight.grad)
        assert layer.lambda_mu.grad is None
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-5, atol=1e-5)


def test_nan_does_not_reach_the_running_statistics():
    keeps_nan_out(pair("afn", PLAIN)[0])


def test_nan_stays_in_its_sample():
    ours, _ = pair("asr", {})
    x = features(4, 6, 5, 3)
    x[1, 2, 3, 1] = float("nan")
    bad = ours(x).isnan()
    assert bad[1].all()
    assert not bad[[0, 2, 3]].any()


def test_a_subclass_that_drops_otherwise_is_not_given_the_recipe():
    class Whole(lightning_norm.AdaptiveFusionNorm):
        key = ""

        def drop_statistics(self, statistics):
            return statistics * 2

    ours, _ = pair("afn", PLAIN)
    layer = Whole(6, **PLAIN)
    layer.load_state_dict(ours.state_dict())
    layer.backend = "triton"
    x = features(4, 6, 5, 3)
    assert (layer(x) - ours(x)).abs().max() > 1e-3


def arguments_of(name, last):
    x = features(4, 6, 4, 5).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    spec = pair("afn", {})[0].fused_spec(layout_of(x, 6))
    gates, linears = ([t.detach() for t in tensors] for tensors in (spec.gates, spec.linears))
    weight, bias = spec.weight.detach(), spec.bias.detach()
    noise, seed = (torch.rand(2, 6), 0) if name == "encoder_decoder_affine" else (None, 9)
    dropout = (noise, spec.drop_prob, seed)
    flags = spec.flags if name == "encoder_decoder_affine_and_track" else replace(spec.flags, frozen=False, track=0)
    rest = (1, to_numbers(flags), spec.eps)
    running = tuple(None if t is None else t.clone() for t in spec.running)
    forward = (x, linears, gates, weight, bias, *dropout, *running, *rest)
    if name != "encoder_decoder_gradients":
        return forward
    stats = ops.encoder_decoder_affine(*forward)
    more = (linears, gates, weight, *dropout, torch.rand_like(x), *rest)
    return (torch.rand_like(x), x, *stats, *more, "relu", True)


@pytest.mark.parametrize("last", [False, pytest.param(True, marks=SLOW)], ids=["rows", "channels last"])
@pytest.mark.parametrize("name", encoder_decoder.SCHEMAS)
def test_opcheck(name, last, monkeypatch):
    monkeypatch.undo()  # opcheck compares two runs: torch.empty as it is
    torch.library.opcheck(getattr(ops, name).default, arguments_of(name, last))


@pytest.mark.parametrize("key", ["afn", pytest.param("asr", marks=SLOW)])
def test_compile_deepcopy_and_checkpoint(key):
    ours, _ = pair(key, {})
    plain = copy.deepcopy(ours)
    plain.backend = "eager"
    x, dy = features(4, 6, 5, 3).requires_grad_(), noise(4, 6, 5, 3, seed=7)
    results = []
    for f in (torch.compile(ours, fullgraph=True, backend="aot_eager"), plain):
        torch.manual_seed(3)  # a graph draws as plain PyTorch does
        results.append(torch.autograd.grad(f(x), (x, *(plain if f is plain else ours).parameters()), dy))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    same_buffers(ours, plain)
    torch.manual_seed(5)
    want = torch.autograd.grad(ours(x), x, dy)[0]
    torch.manual_seed(5)
    again = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)
    torch.manual_seed(6)
    assert torch.equal(torch.autograd.grad(again, x, dy)[0], want)


@pytest.mark.parametrize("key", [pytest.param("afn", marks=SLOW), "asr"])
def test_export(key):
    exports(pair(key, {}, train=False)[0], "encoder_decoder_affine")


def test_second_derivatives_name_the_way_out():
    ours, _ = pair("asr", {})
    x = features(4, 6, 5, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="backend='eager'"):
        torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "key"),
    [
        ("as_precise_as_torch", "asr"),
        *((check, "afn") for check in ("formats_agree", "tokens_agree", "small_inputs", "expanded_gradient")),
    ],
)
def test_conformance(check, key, monkeypatch):
    """Checks of the conformance kit that a backend could fail."""
    monkeypatch.setattr(
        sys.modules["lightning_norm.ops.normalize"],
        "on_kernels",
        lambda x, layout, *_, **__: backend.obstacle(x, layout) is None,
    )
    monkeypatch.setattr(InterpreterBuilder, "create_fma", rounded_once)
    REGISTRY[check](lambda c, **more: lightning_norm.create(key, c, **(PLAIN if key == "afn" else {}), **more))


@pytest.mark.parametrize(("n", "c"), [(1, 2048), (64, 2048), (64, 64), (256, 512)])
def test_tiles(n, c):
    """Enough programs at every size, whole tiles in a span, and all channels in the spans."""
    t = launch.tiles_of(n, c, (c // 2, c // 16), 32, 32, 32)
    assert t.span % t.c == 0
    assert t.span * t.spans >= c
    assert t.spans == 1 or t.spans * t.across * sum(t.units) < 2 * launch.BUSY
    assert t.across * t.r >= n

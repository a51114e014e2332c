"""Normalization fused into the depthwise convolution, on the kernels against the composed passes in float64."""

import copy

import pytest
import torch

import lightning_norm
from lightning_norm.kernels.depthwise import launch
from lightning_norm.testing.kit import features, noise
from tests.kernels.interpreted.test_layers import compare, count_launches

LAST = torch.channels_last
FORMS = {"rows": torch.contiguous_format, "channels last": LAST}


def pair(channels=6, train=True, offset=0.0, **arguments):
    """A layer on the kernels and its twin in float64, with taps of which no two are alike."""
    layer = lightning_norm.create("bnet", channels, **arguments)
    with torch.no_grad():
        layer.kernel.copy_(noise(*layer.kernel.shape, seed=3))
        if layer.bias is not None:
            layer.bias.copy_(noise(channels, seed=4))
        if layer.has_running_stats:
            layer.running_mean.add_(noise(channels, seed=5) + offset)
            layer.running_var.add_(noise(channels, seed=6).abs())
        for name in ("mean_weight", "var_weight"):
            if getattr(layer, name, None) is not None:
                getattr(layer, name).copy_(noise(3, seed=8))
    layer.train(train)
    exact = copy.deepcopy(layer).double()
    layer.backend, exact.backend = "triton", "eager"
    return layer, exact


def check(shape, form="rows", tolerance=4e-6, offset=0.0, **arguments):
    ours, exact = pair(shape[1], offset=offset, **arguments)
    x, dy = features(*shape) + offset, noise(*shape, seed=7)
    if len(shape) == 4:
        x, dy = (t.contiguous(memory_format=FORMS[form]) for t in (x, dy))
    compare(ours, exact, x, dy, tolerance)
    assert ours(x).stride() == x.stride()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("k", "form"),
    [
        (3, "rows"),
        pytest.param(3, "channels last", marks=SLOW),
        pytest.param(5, "rows", marks=SLOW),
        (5, "channels last"),
        pytest.param(7, "rows", marks=SLOW),
        pytest.param(7, "channels last", marks=SLOW),
    ],
)
def test_kernel_sizes(k, form):
    """Maps narrower than the kernel: every border is met, from both sides at once."""
    check((2, 5, 6, 5), form, kernel_size=k)


@pytest.mark.parametrize(
    ("train", "form"),
    [
        pytest.param(True, "rows", marks=SLOW),
        (True, "channels last"),
        (False, "rows"),
        pytest.param(False, "channels last", marks=SLOW),
    ],
)
def test_modes(train, form):
    check((3, 8, 7, 7), form, train=train, affine=train)


@pytest.mark.parametrize(
    ("statistics", "form", "train"),
    [
        ("in", "rows", True),
        ("in", "channels last", False),
        ("sn", "channels last", True),
        pytest.param("sn", "rows", False, marks=SLOW),
        pytest.param("in", "channels last", True, marks=SLOW),
    ],
)
def test_behind_other_statistics(statistics, form, train):
    """One row of statistics per sample and channel; in evaluation as well."""
    check((3, 6, 6, 5), form, train=train, statistics=statistics)


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((2, 1, 40, 41), "rows"),
        pytest.param((37, 3, 2, 2), "rows", marks=SLOW),
        pytest.param((2, 72, 5, 7), "channels last", marks=SLOW),
        ((1, 3, 40, 9), "channels last"),
    ],
    ids=str,
)
def test_pieces(shape, form):
    """Pieces of a map, groups of samples, blocks of channels: with tails in each."""
    check(shape, form, 2e-5)


def test_samples_of_one_program(monkeypatch):
    """A program that takes several groups of samples, the last of which are not there."""
    monkeypatch.setattr(launch, "BUSY", 1)
    check((5, 3, 2, 2), "channels last")
    monkeypatch.setattr(launch, "TILE", 64)
    check((5, 2, 5, 5), "rows")
    monkeypatch.setattr(launch, "NEAR", 32)
    check((2, 1, 4, 5), "channels last", kernel_size=5)  # few positions at once, so several pieces


def test_one_axis():
    check((3, 5, 11), spatial_dims=1)
    ours, exact = pair(5, spatial_dims=1, channel_dim=-1)
    compare(ours, exact, features(3, 11, 5), noise(3, 11, 5, seed=7), 4e-6)


@pytest.mark.parametrize("form", ["rows", pytest.param("channels last", marks=SLOW)])
def test_large_offsets(form):
    check((2, 3, 6, 5), form, offset=1000.0)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=SLOW)])
def test_half(dtype):
    ours, exact = pair()
    compare(ours, exact, features(4, 6, 5, 4).to(dtype), noise(4, 6, 5, 4, seed=7).to(dtype), 2.0**-7)


def test_what_the_kernels_do_not_know_runs_composed(monkeypatch):
    launched = count_launches(monkeypatch)
    check((2, 3, 4, 4, 4), spatial_dims=3, kernel_size=1)
    check((2, 3, 11, 9), kernel_size=9)
    assert not [name for name in launched if name.startswith("depthwise")]


def test_launches(monkeypatch):
    ours, _ = pair()
    x, launched = features(4, 6, 5, 3).requires_grad_(), count_launches(monkeypatch)
    y = ours(x)
    assert launched == ["moments_rows", "pool", "mix", "depthwise_apply"]
    launched.clear()
    torch.autograd.grad(y, [x, *ours.parameters()], noise(4, 6, 5, 3, seed=7))
    assert launched == ["depthwise_sums", "join_taps", "vjp_pool", "vjp_mix", "depthwise_combine"]


def test_only_x_is_kept():
    ours, _ = pair()
    x, saved = features(4, 6, 16, 16).requires_grad_(), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        ours(x)
    assert sum(t.numel() for t in saved.values()) < 1.2 * x.numel()


def test_nan_gets_through():
    ours, _ = pair()
    x = features(4, 6, 5, 3)
    x[1, 2, 0, 0] = float("nan")
    y = ours.eval()(x).isnan()
    assert y.sum() == y[1, 2].sum() == 4  # a corner has four neighbours, itself included


@pytest.mark.parametrize("form", [pytest.param("rows", marks=SLOW), "channels last"])
def test_compile(form):
    ours, _ = pair()
    plain = copy.deepcopy(ours)
    x, dy = (t.contiguous(memory_format=FORMS[form]) for t in (features(4, 6, 5, 4), noise(4, 6, 5, 4, seed=7)))
    x.requires_grad_()
    got, want = (
        torch.autograd.grad(f(x), (x, *layer.parameters()), dy)
        for f, layer in ((torch.compile(ours, fullgraph=True, backend="aot_eager"), ours), (plain, plain))
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_export():
    ours, _ = pair(train=False)
    x = features(4, 6, 5, 4)
    program = torch.export.export(torch.nn.Sequential(ours), (x,))
    assert "lightning_norm.apply_depthwise.default" in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(x), ours(x))

"""Kernels that own their channels: one launch per direction, against the readable algebra in float64."""

import copy

import numpy as np
import pytest
import torch

import lightning_norm
from lightning_norm.kernels import grid, launcher
from lightning_norm.kernels.owner.launch import HELD, owner_of
from lightning_norm.normalizers.context.assignment import assign, context_layers
from lightning_norm.testing.kit import features, noise
from tests.kernels.interpreted.test_layers import compare as compare_with_float64
from tests.kernels.interpreted.test_layers import count_launches

CONTEXTS = {"context": "ids", "min_count": 60, "num_contexts": 3}
LAYERS = [
    ("bn", {}),
    ("bn", {"affine": False, "momentum": None}),
    ("bn", {"track_running_stats": False}),
    ("in", {}),
    ("rbn", {}),
    ("rbn", {"rectify": ["center"], "gate_init": "paper", "affine": False, "momentum": None}),
    ("ubn", {}),
    ("dbn", {}),
    ("dbn", {"stat_grad": "renorm", "eval_momentum": 0.1}),
    ("dbn", {"average": "var", "power": 2.001}),
    ("brn", {"r_max": 1.1, "d_max": 0.5}),
    ("cn", CONTEXTS),
    ("cn", {**CONTEXTS, "momentum": None}),
]
FEW = [("bn", {}), ("in", {}), ("rbn", {}), ("dbn", {}), ("cn", CONTEXTS)]
KERNELS = {"own_mixture", "own_channels"}
SHAPES = [
    ((5, 6, 7, 7), torch.contiguous_format),
    ((3, 7, 5, 3), torch.contiguous_format),
    ((4, 16, 14, 14), torch.contiguous_format),
    ((5, 24, 7, 7), torch.channels_last),
    ((3, 7, 5, 3), torch.channels_last),
    ((2, 1, 1, 9), torch.contiguous_format),
    ((6, 40, 1, 1), torch.contiguous_format),
    ((33, 18), torch.contiguous_format),
    ((3, 5, 11), torch.contiguous_format),
    ((2, 3, 3, 3, 5), torch.channels_last_3d),
]


@pytest.fixture(autouse=True)
def _switch_on(monkeypatch):
    """The switch is read where launches are recorded."""
    monkeypatch.setattr(grid, "OWNER", True)
    monkeypatch.setattr(launcher, "_plans", {})


def pair(key, arguments, channels, samples, offset=0.0):
    layer = lightning_norm.create(key, channels, **arguments)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.add_(0.2 * noise(*p.shape, seed=300 + i))
        for i, name in enumerate(layer.running_names if layer.track_running_stats else ()):
            buffer = layer._buffers[name]
            buffer.add_(noise(*buffer.shape, seed=5 + i).abs() + offset * (i == 0))
    exact = copy.deepcopy(layer).double()
    layer.backend, exact.backend = "triton", "eager"
    for each in (layer, exact) if key == "cn" else ():
        assign(context_layers(each), torch.arange(samples) % 3 % 2)
    return layer, exact


def compare(ours, exact, x, dy, tolerance=3e-6):
    assert compare_with_float64(ours, exact, x, dy, tolerance).y.stride() == x.stride()


@pytest.mark.parametrize(("key", "arguments"), LAYERS, ids=str)
def test_one_launch_per_direction(key, arguments, monkeypatch):
    """Two batches, of which the second meets moved statistics."""
    ours, exact = pair(key, arguments, 6, 4)
    launched = count_launches(monkeypatch)
    for i in range(2):
        x = features(4, 6, 5, 3) + 0.1 * i
        compare(ours, exact, x, noise(4, 6, 5, 3, seed=7 + i))
    kernel = "own_mixture" if key in ("bn", "in") else "own_channels"
    assert launched == [kernel, f"{kernel}_vjp"] * 2


@pytest.mark.parametrize(("shape", "order"), SHAPES, ids=str)
@pytest.mark.parametrize(("key", "arguments"), FEW, ids=str)
def test_shapes_and_layouts(key, arguments, shape, order, monkeypatch):
    # A map of one position: what centering learns from cancels, with four launches as with one.
    tolerance = 4e-5 if key == "rbn" and np.prod(shape[2:]) == 1 else 1e-5
    if key == "in" and np.prod(shape[2:]) == 1:
        pytest.skip("an instance of one element has no statistics")
    ours, exact = pair(key, arguments, shape[1], shape[0])
    launched = count_launches(monkeypatch)
    x = features(*shape).contiguous(memory_format=order)
    compare(ours, exact, x, noise(*shape, seed=7), tolerance)
    assert len(launched) == 2, launched


@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key", ["bn", "rbn"])
def test_half(key, dtype, last):
    ours, exact = pair(key, {}, 16, 4)
    x = features(4, 16, 7, 7).to(dtype)
    compare(ours, exact, x.contiguous(memory_format=torch.channels_last) if last else x, noise(4, 16, 7, 7).to(dtype), 2.0**-7)  # noqa: E501  # fmt: skip


@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels last"])
@pytest.mark.parametrize(("key", "arguments"), FEW, ids=str)
def test_large_offsets(key, arguments, last):
    """The gates see offsets of 1000 as they are, so arguments of a sigmoid are rounded by 1e-5."""
    ours, exact = pair(key, arguments, 6, 4, offset=1000.0)
    x = features(4, 6, 5, 3) + 1000
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    compare(ours, exact, x, noise(4, 6, 5, 3, seed=7), 2e-5 if key == "rbn" else 4e-6)


@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels last"])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("key", ["bn", "rbn"])
def test_activation_and_residual(key, activation, last):
    ours, exact = pair(key, {}, 6, 4)
    order = torch.channels_last if last else torch.contiguous_format
    x, r = (t.contiguous(memory_format=order) for t in (features(4, 6, 7, 7), noise(4, 6, 7, 7, seed=9)))
    results = []
    for layer, dtype in ((ours, torch.float32), (exact, torch.float64)):
        a, b = (t.to(dtype).requires_grad_() for t in (x, r))
        y = layer(a, activation=activation, residual=b)
        results.append((y, *torch.autograd.grad(y, (a, b, layer.weight), noise(4, 6, 7, 7, seed=7).to(dtype))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(("key", "arguments"), [("bn", {}), ("rbn", {}), ("dbn", {}), ("cn", CONTEXTS)], ids=str)
def test_a_nan_in_one_channel_moves_none(key, arguments):
    """Programs that own other channels learn of it from the last one."""
    ours, _ = pair(key, arguments, 40, 4)
    x = features(4, 40, 5, 3)
    ours(x)
    before = {k: v.clone() for k, v in ours.named_buffers()}
    x[1, 2, 3, 1] = float("nan")
    assert ours(x).isnan().any()
    for name, value in ours.named_buffers():
        if name == "skipped_updates":
            assert value == before[name] + 1
        elif name != "gap":
            assert torch.equal(value, before[name]), name
    x[1, 2, 3, 1] = 0.0
    ours(x)
    assert ours.skipped_updates == before["skipped_updates"] + 1
    assert not torch.equal(ours.get_buffer(ours.running_names[0]), before[ours.running_names[0]])


def test_the_parameters_gradients_alone():
    ours, exact = pair("rbn", {}, 6, 4)
    x, dy = features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7)
    got = torch.autograd.grad(ours(x), list(ours.parameters()), dy)
    want = torch.autograd.grad(exact(x.double()), list(exact.parameters()), dy.double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("key", ["bn", "dbn"])
def test_flat_inputs_as_one_sample(key, monkeypatch):
    ours, exact = pair(key, {}, 70, 100)
    launched = count_launches(monkeypatch)
    compare(ours, exact, features(100, 70), noise(100, 70, seed=7), 1e-5)
    assert len(launched) == 2


def test_what_looks_across_channels_or_is_large_is_not_taken(monkeypatch):
    for key, arguments in (("sn", {}), ("bcn", {}), ("ubn", {"threshold": 0.5}), ("cn", {"context": "gate"})):
        ours, _ = pair(key, arguments, 6, 4)
        launched = count_launches(monkeypatch)
        ours(features(4, 6, 5, 3))
        assert not KERNELS & set(launched), key
    x = torch.empty(HELD, 6, 1, 1, device="meta")
    assert owner_of(x, 1) is None
    assert owner_of(torch.empty(4, 6, 56, 56, device="meta"), 1) is None
    monkeypatch.setattr(grid, "OWNER", False)
    assert owner_of(torch.empty(4, 6, 7, 7, device="meta"), 1) is None


def test_resnets_small_maps_are_taken():
    for channels, size, programs in ((512, 7, 128), (2048, 7, 256), (1024, 14, 512)):
        owner = owner_of(torch.empty(64, channels, size, size, dtype=torch.bfloat16, device="meta"), 1)
        assert owner is not None
        assert owner.programs == programs
        assert owner.align == 8
    last = torch.empty(64, 2048, 7, 7, dtype=torch.bfloat16, device="meta").contiguous(
        memory_format=torch.channels_last
    )
    assert owner_of(last, 1).programs == 128

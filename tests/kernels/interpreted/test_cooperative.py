"""Mixtures in one launch per direction: the same numbers as from the launches that its phases stand for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_norm
from lightning_norm.kernels import grid, launcher
from lightning_norm.kernels.cooperative import launch as cooperative
from lightning_norm.kernels.mixture.flags import MixtureFlags
from lightning_norm.testing.kit import features, noise
from tests.kernels.interpreted.test_layers import compare, count_launches, pair

ROOT = Path(__file__).parent.parent.parent.parent
SLOW = pytest.mark.slow

LAYERS = [
    ("sn", {}),
    ("sn", {"choices": ("in", "bn")}),
    ("bcn", {}),
    ("ln", {}),
    ("gn", {"num_groups": 3}),
    ("bn", {"momentum": None}),
    ("in", {"affine": False}),
    ("frn", {}),
]
SHAPES = [
    ((4, 6, 7, 7), torch.contiguous_format),
    ((3, 6, 5, 3), torch.channels_last),
    ((2, 72, 6, 6), torch.channels_last),
    ((5, 12, 14, 14), torch.contiguous_format),
    ((3, 6, 11), torch.contiguous_format),
    ((2, 3, 64, 64), torch.contiguous_format),
    ((33, 18), torch.contiguous_format),
]


def step(key, arguments, x, dy, activation="none", residual=None):
    """Return everything that a step leaves: y, gradients and buffers."""
    layer = lightning_norm.create(key, x.shape[1], **arguments)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.add_(0.2 * noise(*p.shape, seed=300 + i))
    layer.backend = "triton"
    inputs = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, residual) if t is not None]  # noqa: E501  # fmt: skip
    y = layer(inputs[0], activation=activation, residual=inputs[1] if residual is not None else None)
    gradients = torch.autograd.grad(y, [*inputs, *layer.parameters()], dy)
    return [y, *gradients, *(b for b in layer.buffers() if b is not None)]


def check(monkeypatch, *case):
    """Compare what the launches of four kernels leave with what those of one do."""
    results = []
    for on in (False, True):
        monkeypatch.setattr(grid, "COOPERATIVE", on)
        monkeypatch.setattr(launcher, "_plans", {})
        launched = count_launches(monkeypatch)
        results.append(step(*case))
    assert launched == ["cooperative_mixture"] * 4 + ["cooperative_mixture_vjp"] * 4
    for apart, together in zip(*results, strict=True):
        assert torch.equal(apart, together)


FEW = [("sn", {}), ("gn", {"num_groups": 3})]
CASES = [
    pytest.param(key, arguments, *shape, marks=[] if (key, arguments) in FEW and len(shape[0]) == 4 else SLOW)
    for key, arguments in LAYERS
    for shape in (SHAPES if (key, arguments) in FEW else SHAPES[:: len(SHAPES) - 1])
    if len(shape[0]) > 2 or key not in ("sn", "in", "frn")  # an instance of one element has no statistics
]


@pytest.mark.parametrize(("key", "arguments", "shape", "order"), CASES, ids=str)
def test_bit_for_bit(key, arguments, shape, order, monkeypatch):
    """Three programs, so that each takes many jobs of each phase."""
    monkeypatch.setattr(cooperative, "BUSY", 6)
    monkeypatch.setattr(cooperative, "RESIDENT", 1)
    x = features(*shape).contiguous(memory_format=order)
    check(monkeypatch, key, arguments, x, noise(*shape, seed=7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels last"])
def test_half_with_an_ending(dtype, last, monkeypatch):
    order = torch.channels_last if last else torch.contiguous_format
    x, dy, residual = (noise(4, 16, 7, 7, seed=i).to(dtype).contiguous(memory_format=order) for i in (7, 8, 9))
    check(monkeypatch, "sn", {}, x, dy, "relu", residual)


def test_large_offsets(monkeypatch):
    """Against float64, which the launches of four kernels are compared with elsewhere."""
    monkeypatch.setattr(grid, "COOPERATIVE", True)
    monkeypatch.setattr(launcher, "_plans", {})
    for key in ("sn", "bcn", "gn"):
        ours, exact = pair(key, {"num_groups": 3} if key == "gn" else {}, offset=1000.0)
        compare(ours, exact, features(4, 6, 5, 3) + 1000, noise(4, 6, 5, 3, seed=7), 4e-6)


def test_what_is_taken(monkeypatch):
    flags = MixtureFlags.of(("in", "ln", "bn"), weighted=True)
    x = torch.empty(64, 2048, 7, 7, dtype=torch.bfloat16, device="meta")
    assert cooperative.grid_for(x, 1, flags) is None  # off
    monkeypatch.setattr(grid, "COOPERATIVE", True)
    assert cooperative.grid_for(x, 1, flags) is not None
    # Larger than the cache, in more parts than are read one by one, and without statistics of x.
    assert cooperative.grid_for(torch.empty(64, 256, 56, 56, device="meta"), 1, flags) is None
    assert cooperative.grid_for(torch.empty(1, 3, 1024, 1024, device="meta"), 1, flags) is None
    assert cooperative.grid_for(x, 1, MixtureFlags.of(("bn",), frozen=True)) is None


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="programs are processes that share memory")
@pytest.mark.parametrize("key", ["sn", "bcn"])
def test_programs_that_run_at_once(key):
    """They meet: without the waiting, values are wrong."""
    command = [sys.executable, "-m", "tests.kernels.interpreted.side_by_side", key]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("the same [3, 3, 2, 2]")

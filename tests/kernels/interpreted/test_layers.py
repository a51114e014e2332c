"""Whole layers on the kernels against the readable algebra in float64, and how many launches they take."""

import copy
import sys

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

import lightning_norm
from lightning_norm import Affine, BatchNorm, SwitchableNorm, normalize
from lightning_norm.layers.running_stats import close_window, open_window
from lightning_norm.ops import backend
from lightning_norm.ops.fused import operators
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.layout import layout_of
from lightning_norm.testing import gradients
from lightning_norm.testing.kit import REGISTRY, features, noise, statistics, step

LISTED = [
    ("bn", {}),
    ("bn", {"affine": False, "momentum": None}),
    ("in", {}),
    ("ln", {}),
    ("gn", {"num_groups": 3}),
    ("sn", {}),
    ("sn", {"choices": ("bn", "gn"), "num_groups": 2, "correction": 1}),
    ("sn", {"choices": ("ln", "in"), "affine": False}),
    ("sn", {"sparse": True, "radius": 0.3}),
    ("bcn", {}),
    ("bcn", {"constraint": "clamp", "affine": False}),
    ("frn", {}),
    ("frn", {"tlu": False, "affine": False}),
]


def is_mixture(cls):
    """Whether a class describes itself as a mixture, and nothing follows its normalization."""
    layer = cls(6, **cls.test_arguments)
    described = isinstance(layer.fused_spec(layout_of(features(4, 6, 5, 3), 6)), MixtureSpec)
    return described and layer.depthwise_conv() is None


OTHERS = [key for key, cls in lightning_norm.normalizers().items() if key not in dict(LISTED) and is_mixture(cls)]
RECIPES = [*LISTED, *((key, lightning_norm.normalizers()[key].test_arguments) for key in OTHERS)]
"""The arguments that matter to the kernels, and every further layer of this family with the arguments of its tests."""


def pair(key, arguments, train=True, offset=0.0):
    """A layer on the kernels and the same in float64 on plain PyTorch, everything moved from its start."""
    layer = lightning_norm.create(key, 6, **arguments)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.add_(0.2 * noise(*p.shape, seed=300 + i))
        if layer.track_running_stats:
            layer.running_mean.add_(noise(6, seed=5) + offset)
            layer.running_var.add_(noise(6, seed=6).abs())
    layer.train(train)
    ours, exact = layer, copy.deepcopy(layer).double()
    ours.backend, exact.backend = "triton", "eager"
    return ours, exact


def compare(ours, exact, x, dy, tolerance=2e-6, **others):
    """Compare a step with that in float64; ``others`` are tolerances of single names. Return the step."""
    a, b = step(ours, x, dy), step(exact, x.double(), dy.double())
    got = {"y": a.y, "dx": a.dx, **a.grads, **statistics(ours)}
    want = {"y": b.y, "dx": b.dx, **b.grads, **statistics(exact)}
    assert got.keys() == want.keys()
    for name, t in want.items():
        error = (got[name].double() - t.double()).norm() / t.double().norm().clamp_min(0.1)
        assert error < others.get(name, tolerance), f"{name}: {error:.1e}"
    return a


@pytest.mark.parametrize("key", ["bn", "sn", "bcn"])
def test_statistics_of_several_batches_are_gathered_on_the_kernels_too(key):
    """In a window of gradient accumulation, and in a recalibration."""
    ours, exact = pair(key, {})
    x = features(6, 6, 5, 3)
    for layer, part in ((ours, x), (exact, x.double())):
        open_window(layer)
        for batch in part.split([4, 2]):
            layer(batch)
        assert layer.num_batches_tracked == 0
        close_window(layer)
        layer._accumulator = None
    compare(ours, exact, x, noise(6, 6, 5, 3, seed=7))
    mean = x.mean((0, 2, 3))
    lightning_norm.recalibrate(ours, x.split([4, 2]))
    torch.testing.assert_close(ours.running_mean, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("key", "arguments"), RECIPES, ids=str)
def test_recipe_equals_algebra(key, arguments, train):
    compare(*pair(key, arguments, train), features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7))


@pytest.mark.parametrize(("key", "offset"), [("sn", 1000.0), ("bcn", 1000.0), ("bn", 1000.0)])
def test_large_offsets(key, offset):
    compare(*pair(key, {}, offset=offset), features(4, 6, 5, 3) + offset, noise(4, 6, 5, 3, seed=7))


@pytest.mark.parametrize("key", ["sn", "bcn", "frn"])
def test_channels_last(key):
    x = features(4, 6, 5, 4).contiguous(memory_format=torch.channels_last)
    ours, exact = pair(key, {})
    compare(ours, exact, x, noise(4, 6, 5, 4, seed=7))
    assert ours(x).is_contiguous(memory_format=torch.channels_last)


def test_parts_are_joined_inside():
    x, dy = features(2, 6, 70, 61)[:, :1].contiguous(), noise(2, 1, 70, 61, seed=7)
    layer = SwitchableNorm(1)
    exact = copy.deepcopy(layer).double()
    layer.backend = "triton"
    compare(layer, exact, x, dy, 2e-5)  # 4270 products that nearly cancel


def test_many_channels_and_samples():
    """More than one block in each direction of (N, C)."""
    x, dy = features(40, 70), noise(40, 70, seed=7)
    layer = lightning_norm.create("bcn", 70)
    torch.nn.init.uniform_(layer.iota)
    exact = copy.deepcopy(layer).double()
    layer.backend = "triton"
    compare(layer, exact, x, dy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key", ["sn", "frn"])
def test_half(key, dtype):
    ours, exact = pair(key, {})
    compare(ours, exact, features(4, 6, 5, 3).to(dtype), noise(4, 6, 5, 3, seed=7).to(dtype), 2.0**-7)


def test_autocast():
    ours, exact = pair("sn", {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(ours, exact, features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7))


def keeps_nan_out(layer):
    """A NaN reaches y and not the running statistics."""
    x = features(4, 6, 5, 3)
    layer(x)
    before = statistics(layer)
    x[1, 2, 3, 1] = float("inf")
    with np.errstate(invalid="ignore"):
        assert layer(x).isnan().any()
    after = statistics(layer)
    assert after.pop("skipped_updates") == before.pop("skipped_updates") + 1
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_nan_does_not_reach_the_running_statistics():
    layer = BatchNorm(6)
    layer.backend = "triton"
    keeps_nan_out(layer)


def exports(layer, operator):
    """The layer is exported for batches of every size, as an operator."""
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(torch.nn.Sequential(layer), (features(5, 6, 7, 3),), dynamic_shapes=shapes)
    assert f"lightning_norm.{operator}.default" in {str(node.target) for node in program.graph.nodes}
    x = features(3, 6, 7, 3)
    torch.testing.assert_close(program.module()(x), layer(x))


def count_launches(monkeypatch):
    launched, real = [], InterpretedFunction.run

    def run(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return launched


@pytest.mark.parametrize(("key", "forward"), [("bn", 4), ("in", 3), ("ln", 4), ("sn", 4), ("bcn", 4), ("frn", 3)])
def test_launches(key, forward, monkeypatch):
    """At most 4 kernels forward and 5 backward, running statistics and every gradient included, and nothing else."""
    layer = lightning_norm.create(key, 6)
    layer.backend = "triton"
    x = features(4, 6, 5, 3).requires_grad_()
    launched = count_launches(monkeypatch)
    y = layer(x)
    assert len(launched) == forward, launched
    launched.clear()
    torch.autograd.grad(y, [x, *layer.parameters()], noise(4, 6, 5, 3, seed=7))
    assert launched == ["sums_rows", "vjp_pool", "vjp_mix", "combine_flat"]


def test_a_layers_activation_and_residual_are_in_the_same_launches(monkeypatch):
    layer = lightning_norm.create("sn", 6)
    layer.backend = "triton"
    exact = copy.deepcopy(layer).double()
    exact.backend = "eager"
    x, r = features(4, 6, 5, 3).requires_grad_(), noise(4, 6, 5, 3, seed=9).requires_grad_()
    launched = count_launches(monkeypatch)
    y = layer(x, activation="relu", residual=r)
    got = torch.autograd.grad(y, (x, r), noise(4, 6, 5, 3, seed=7))
    assert len(launched) == 8, launched
    want = exact(x.double(), "relu", r.double())
    wanted = torch.autograd.grad(want, (x, r), noise(4, 6, 5, 3, seed=7).double())
    for a, b in zip((y, *got), (want, *wanted), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels last"])
def test_what_follows_a_threshold(last, monkeypatch):
    """In plain PyTorch behind the kernels: the residual is added to max(y, tau)."""
    ours, exact = pair("frn", {})
    order = torch.channels_last if last else torch.contiguous_format
    x, r = (t.contiguous(memory_format=order).requires_grad_() for t in (features(4, 6, 5, 3), noise(4, 6, 5, 3)))
    launched = count_launches(monkeypatch)
    y, want = ours(x, "relu", r), exact(x.double(), "relu", r.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=2e-6)
    assert 0.1 < (y == 0).float().mean() < 0.9
    for layer, result in ((ours, y), (exact, want)):
        dy = noise(4, 6, 5, 3, seed=7).to(result.dtype)
        grads = torch.autograd.grad(result, (x, r, layer.weight, layer.bias, layer.tau), dy)
        if layer is ours:
            got = grads
    assert len(launched) == 7, launched
    for a, b in zip(got, grads, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=5e-6)


def test_launches_in_evaluation(monkeypatch):
    layer = BatchNorm(6).eval()
    layer.backend = "triton"
    launched = count_launches(monkeypatch)
    layer(features(4, 6, 5, 3))
    assert launched == ["mix", "apply_flat"]


@pytest.mark.parametrize("activation", ["relu", "silu", "none"])
@pytest.mark.parametrize("known", [True, False], ids=["fused_spec", "algebra"])
def test_activation_and_residual(activation, known):
    x, r, dy = features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=9), noise(4, 6, 5, 3, seed=7)
    layer = BatchNorm(6)
    results = []
    for name, dtype in (("triton", torch.float32), ("eager", torch.float64)):
        a, b = (t.to(dtype).requires_grad_() for t in (x, r))
        how = {"fused_spec": layer.fused_spec} if known and name == "triton" else {}
        y = normalize(a, layer.algebra, backend=name, activation=activation, residual=b, **how)
        results.append((y, *torch.autograd.grad(y, (a, b), dy.to(dtype))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)


def test_a_users_algebra_runs_on_the_passes():
    def f(x, g, name):
        return normalize(x, lambda m: Affine(m.mean, g * (m.over_batch().var + m.var).rsqrt(), g), backend=name)

    results = []
    for name, dtype in (("triton", torch.float32), ("eager", torch.float64)):
        x = (features(4, 6, 5, 3) + 1000).to(dtype).requires_grad_()
        g = noise(6, seed=3).to(dtype).requires_grad_()
        y = f(x, g, name)
        results.append((y, *torch.autograd.grad(y, (x, g), noise(4, 6, 5, 3, seed=7).to(dtype))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)


class Halved(BatchNorm):
    """Changes the equations and says nothing to the kernels."""

    key = ""

    def algebra(self, m):
        a = super().algebra(m)
        return Affine(a.center, a.scale / 2, a.shift)


def test_a_subclass_with_other_equations_is_not_given_the_recipe():
    x = features(4, 6, 5, 3)
    layer = Halved(6)
    layer.backend = "triton"
    torch.testing.assert_close(layer(x), BatchNorm(6)(x) / 2)


def test_second_derivatives_name_the_way_out():
    layer = BatchNorm(6)
    layer.backend = "triton"
    x = features(4, 6, 5, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="backend='eager'"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    assert "second derivative" in operators.DOUBLE


def test_checkpointing_and_deepcopy():
    layer = copy.deepcopy(pair("sn", {})[0])
    x = features(4, 6, 5, 3).requires_grad_()
    plain = torch.autograd.grad(layer(x).square().sum(), x)[0]
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], plain)


ON_KERNELS = [(key, {}) for key in lightning_norm.normalizers() if key != "gn"]
ON_KERNELS += [("gn", {"num_groups": 3}), ("ubn", {"threshold": 0.1, "min_updates": 1, "max_skip": 1})]


@pytest.mark.parametrize(("key", "options"), ON_KERNELS, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_activation_checkpointing(key, options, monkeypatch):
    options = {**lightning_norm.normalizers()[key].test_arguments, **options}

    def make(c, **more):
        layer = lightning_norm.create(key, c, **options, **more)
        layer.backend = "triton"
        return layer

    REGISTRY["activation_checkpointing"](make)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("check", "key"),
    [
        ("as_precise_as_torch", "bn"),
        ("as_precise_as_torch", "sn"),
        pytest.param("as_precise_as_torch", "bcn", marks=SLOW),
        pytest.param("gradient_of_weight_as_precise_as_torchs", "bn", marks=SLOW),
        pytest.param("gradient_of_weight_as_precise_as_torchs", "sn", marks=SLOW),
        pytest.param("gradient_of_weight_as_precise_as_torchs", "bcn", marks=SLOW),
        *(pytest.param(c, "sn", marks=SLOW) for c in ("formats_agree", "tokens_agree", "small_inputs", "half_inputs")),
        *(pytest.param(c, "sn", marks=SLOW) for c in ("inplace_after", "expanded_gradient", "saves_only_the_input")),
    ],
)
def test_conformance(check, key, monkeypatch):
    """Checks of the conformance kit that a backend could fail; float64 inputs go the plain way there."""
    monkeypatch.setattr(
        sys.modules["lightning_norm.ops.normalize"],
        "on_kernels",
        lambda x, layout, *_, **__: backend.obstacle(x, layout) is None,
    )
    monkeypatch.setattr(InterpreterBuilder, "create_fma", rounded_once)
    monkeypatch.setattr(gradients, "FEW", 8)  # all that the kernels keep lies in one piece of memory
    REGISTRY[check](lambda c, **more: lightning_norm.create(key, c, **more))


def rounded_once(self, x, y, z):
    """A fused multiply-add as the hardware does it; the interpreter rounds the product as well."""
    exact = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

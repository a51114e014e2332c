"""Equations in which each channel stands alone, on the kernels against the readable algebra in float64."""

import copy
from dataclasses import replace

import pytest
import torch

import lightning_norm
from lightning_norm.normalizers.context.assignment import assign, context_layers
from lightning_norm.ops.fused import per_channel
from lightning_norm.ops.fused.operators import to_numbers
from lightning_norm.ops.layout import layout_of
from lightning_norm.testing.kit import features, noise
from tests.kernels.interpreted.test_layers import compare, count_launches, exports

ops = torch.ops.lightning_norm
TWO = torch.tensor([[0.7, 0.3], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
SLOW = pytest.mark.slow
TRAINED = [
    ("rbn", {}),
    ("ubn", {"threshold": -0.5, "min_updates": 0}),
    ("ubn", {"threshold": -0.5, "min_updates": 0, "condensed_grad": "renorm"}),
    ("dbn", {}),
    ("dbn", {"stat_grad": "renorm", "eval_momentum": 0.1}),
    ("dbn", {"train_stats": "batch", "init": "zero_one", "average": "var"}),
    ("brn", {"r_max": 1.1, "d_max": 0.5}),
    ("cn", {"context": "ids", "min_count": 60, "momentum": None, "num_contexts": 5}),
]
TRAINED_AT_LENGTH = [
    ("rbn", {"rectify": ["center"], "gate_init": "paper", "affine": False, "momentum": None}),
    ("ubn", {}),
    ("ubn", {"rectify": ["affine"], "track_running_stats": False}),
    ("ubn", {"threshold": 0.9, "min_updates": 0}),
    ("ubn", {"threshold": -0.5, "min_updates": 0, "mode": "gate"}),
    ("dbn", {"average": "var", "power": 2.001}),
    ("dbn", {"stat_grad": "none", "affine": False}),
    ("dbn", {"track_running_stats": False}),
    ("dbn", {"stat_grad": "renorm", "average": "var", "init": "zero_one"}),
    ("dbn", {"train_stats": "batch", "stat_grad": "none", "power": 1.0}),
    ("dbn", {"train_stats": "batch", "init": "zero_one", "average": "var", "eval_momentum": 0.3}),
    ("brn", {"average": "var", "momentum": None}),
    ("brn", {"track_running_stats": False, "affine": False}),
    ("cn", {"context": "ids"}),
    ("cn", {"context": "ids", "num_contexts": 2, "affine": False, "track_running_stats": False}),
]
EVALUATED = [
    ("rbn", {}),
    ("ubn", {"threshold": 0.5}),
    ("dbn", {}),
    ("dbn", {"average": "var", "affine": False}),
    ("dbn", {"eval_momentum": 0.1, "train_stats": "batch"}),
    ("brn", {}),
]


def pair(key, arguments, train=True, offset=0.0, channels=6):
    """A layer on the kernels and its twin in float64, moved from their start; the second batch meets moved buffers."""
    layer = lightning_norm.create(key, channels, **arguments)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.add_(0.2 * noise(*p.shape, seed=300 + i))
        for i, name in enumerate(layer.running_names if layer.track_running_stats else ()):
            buffer = layer._buffers[name]
            buffer.add_(noise(*buffer.shape, seed=5 + i).abs() + offset * (i == 0))
    layer.train(train)
    exact = copy.deepcopy(layer).double()
    layer.backend, exact.backend = "triton", "eager"
    for each in (layer, exact) if key == "cn" else ():
        contexts = TWO if arguments.get("num_contexts") == 2 else torch.tensor([0, 1, 2, 1])
        assign(context_layers(each), contexts)
    return layer, exact


def same_buffers(ours, exact, tolerance=1e-6):
    for name, value in exact.named_buffers():
        torch.testing.assert_close(
            ours.get_buffer(name).double(), value.double(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize(
    ("key", "arguments"), [*TRAINED, *(pytest.param(*case, marks=SLOW) for case in TRAINED_AT_LENGTH)], ids=str
)
def test_training(key, arguments, monkeypatch):
    ours, exact = pair(key, arguments)
    launched = count_launches(monkeypatch)
    for i in range(2):
        compare(ours, exact, features(4, 6, 5, 3) + 0.1 * i, noise(4, 6, 5, 3, seed=7 + i))
        same_buffers(ours, exact)
    assert {"channels_of", "channels_vjp"} <= set(launched)
    if "threshold" in arguments:
        assert exact.condensation != 0


@pytest.mark.parametrize(("key", "arguments"), EVALUATED, ids=str)
def test_evaluation(key, arguments, monkeypatch):
    ours, exact = pair(key, arguments, train=False)
    launched = count_launches(monkeypatch)
    compare(ours, exact, features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7))
    assert "channels_of" in launched


@pytest.mark.parametrize("key", ["rbn", "ubn", "dbn", "cn"])
def test_launches(key, monkeypatch):
    ours, _ = pair(key, {"context": "ids"} if key == "cn" else {})
    x, launched = features(4, 6, 5, 3).requires_grad_(), count_launches(monkeypatch)
    y = ours(x)
    algebra = ["channels_of", "commit"] if key == "dbn" else ["survey", "channels_of"]
    assert launched == ["moments_rows", *algebra, "apply_flat"]
    launched.clear()
    torch.autograd.grad(y, [x, *ours.parameters()], noise(4, 6, 5, 3, seed=7))
    assert launched == ["sums_rows", "channels_vjp", "combine_flat"]


@pytest.mark.parametrize("key", ["rbn", *(pytest.param(k, marks=SLOW) for k in ("dbn", "cn"))])
def test_large_offsets(key):
    """The gates see offsets of 1000 as they are, so arguments of a sigmoid are rounded by 1e-5."""
    ours, exact = pair(key, {"context": "ids"} if key == "cn" else {}, offset=1000.0)
    compare(ours, exact, features(4, 6, 5, 3) + 1000, noise(4, 6, 5, 3, seed=7), 2e-5 if key == "rbn" else 4e-6)


def test_channels_last_and_parts():
    """More samples and channels than a block, and pieces of columns that are joined inside."""
    last = torch.channels_last
    layer = lightning_norm.create("rbn", 24)
    torch.nn.init.uniform_(layer.scale_weight)
    exact = copy.deepcopy(layer).double()
    layer.backend = "triton"
    x, dy = (t.contiguous(memory_format=last) for t in (features(2, 24, 16, 4), noise(2, 24, 16, 4, seed=7)))
    compare(layer, exact, x, dy, 1e-5)
    wide = lightning_norm.create("dbn", 18)
    exact = copy.deepcopy(wide).double()
    wide.backend = "triton"
    compare(wide, exact, features(33, 18), noise(33, 18, seed=7))


@pytest.mark.parametrize("key", ["rbn", "dbn", "cn"])
def test_nan_does_not_reach_the_buffers(key):
    ours, _ = pair(key, {"context": "ids"} if key == "cn" else {})
    x = features(4, 6, 5, 3)
    ours(x)
    before = {k: v.clone() for k, v in ours.named_buffers()}
    x[1, 2, 3, 1] = float("nan")
    assert ours(x).isnan().any()
    for name, value in ours.named_buffers():
        if name == "skipped_updates":
            assert value == before[name] + 1
        elif name not in ("condensation", "gap"):
            assert torch.equal(value, before[name]), name


def test_a_nan_among_the_parameters_stays_in_its_channel():
    layer = lightning_norm.create("rbn", 6)
    layer.backend = "triton"
    with torch.no_grad():
        layer.center_weight[2] = float("nan")
    layer(features(4, 6, 5, 3))
    assert layer.running_mean.isfinite().all()
    assert layer.running_var.isfinite().all()
    assert layer.running_var[2] == 1
    assert layer.running_var[3] != 1


def test_recalibration_is_not_on_the_recipe():
    """A pool takes the statistics of each batch, which a kernel would keep to itself."""
    layers = [lightning_norm.create("bn", 6) for _ in range(2)]
    batches = [features(4, 6, 5, 3) + 3, features(4, 6, 5, 3) - 1]
    for layer, backend in zip(layers, ("triton", "eager"), strict=True):
        layer.backend = backend
        lightning_norm.recalibrate(torch.nn.Sequential(layer), batches)
    torch.testing.assert_close(layers[0].running_mean, layers[1].running_mean)
    torch.testing.assert_close(layers[0].running_var, layers[1].running_var)
    assert layers[1].running_var.min() > 4  # batches four apart


def test_a_subclass_with_another_gate_is_not_given_the_recipe():
    class Ungated(lightning_norm.RepresentativeBatchNorm):
        key = ""

        def _gain(self, k, k_s):
            return None

    layer = Ungated(6)
    layer.backend = "triton"
    with torch.no_grad():
        layer.scale_weight.fill_(3.0)
    x = features(4, 6, 5, 3)
    torch.testing.assert_close(layer(x), lightning_norm.BatchNorm(6)(x))


def detached(t):
    return t if t is None else t.detach()


def arguments_of(name, layer, x):
    """What a layer hands to an operator."""
    spec = layer.fused_spec(layout_of(x, 6))
    parameters = (detached(spec.weight), detached(spec.bias), [detached(t) for t in spec.gates], spec.responsibilities)
    counters = (*spec.counters, *(None,) * (4 - len(spec.counters)))
    buffers = (
        *(t if t is None else t.clone() for t in (*spec.running, *counters)),
        spec.rate,
        spec.threshold,
        spec.limit,
    )
    numbers, flags = to_numbers(spec.numbers), to_numbers(spec.flags)
    still = to_numbers(replace(spec.flags, condensed=0, track=0))
    if name == "per_channel_affine_and_track":
        return (x, *parameters, *buffers, 1, flags, numbers, "")
    if name == "per_channel_affine":
        return (x, *parameters, *buffers, 1, still, numbers, "")
    stats = ops.per_channel_affine(x, *parameters, *buffers, 1, still, numbers, "")
    return (torch.rand_like(x), x, *stats, *parameters, torch.rand_like(x), 1, still, numbers, "relu", True, "")


@pytest.mark.parametrize("last", [False, pytest.param(True, marks=SLOW)], ids=["rows", "channels last"])
@pytest.mark.parametrize("name", per_channel.SCHEMAS)
def test_opcheck(name, last, monkeypatch):
    monkeypatch.undo()  # opcheck compares two runs: torch.empty as it is
    x = features(4, 6, 4, 5).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    layer = lightning_norm.create("ubn", 6, threshold=0.1, min_updates=0)
    torch.library.opcheck(getattr(ops, name).default, arguments_of(name, layer, x))


def test_compile_and_checkpoint():
    ours, _ = pair("rbn", {})
    plain = copy.deepcopy(ours)
    x, dy = features(4, 6, 5, 3).requires_grad_(), noise(4, 6, 5, 3, seed=7)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    (got,), (want,) = (torch.autograd.grad(f(x), x, dy) for f in (compiled, plain))
    torch.testing.assert_close(got, want)
    same_buffers(ours, plain)
    again = torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, x, dy)[0], want)


def test_export():
    exports(pair("rbn", {}, train=False)[0], "per_channel_affine")

"""cn on the kernels against the readable algebra in float64: evaluation, the factor of the shares, the learned gate."""

import copy

import pytest
import torch

import lightning_norm
from lightning_norm.kernels.grid import grid_of
from lightning_norm.normalizers.context.assignment import assign, context_layers
from lightning_norm.ops.fused import per_channel
from lightning_norm.testing.kit import features, noise
from tests.kernels.interpreted.test_layers import compare, count_launches
from tests.kernels.interpreted.test_per_channel import arguments_of, pair, same_buffers

ops = torch.ops.lightning_norm
SLOW = pytest.mark.slow
GATE = {"context": "gate"}
IDS = {"context": "ids"}
EVALUATED = [
    IDS,
    {**IDS, "prior_scale": True, "num_contexts": 5},
    GATE,
    *(
        pytest.param(case, marks=SLOW)
        for case in (
            {**IDS, "affine": False, "prior_scale": True},
            {**IDS, "num_contexts": 2, "missing": "posterior"},
            {**IDS, "track_running_stats": False, "prior_scale": True},
            {**GATE, "prior_scale": True, "affine": False},
            {**GATE, "track_running_stats": False},
        )
    ),
]
TRAINED = [
    {**IDS, "prior_scale": True, "min_count": 60},
    {**GATE, "prior_scale": True, "min_count": 40},
    *(
        pytest.param(case, marks=SLOW)
        for case in (
            {**IDS, "prior_scale": True, "affine": False, "track_running_stats": False},
            GATE,
            {**GATE, "momentum": None, "num_contexts": 2, "affine": False},
            {**GATE, "num_contexts": 5, "track_running_stats": False, "min_count": 100},
            {**GATE, "num_contexts": 1},
        )
    ),
]


def contexts(arguments, train, offset=0.0):
    """The pair of layers, the last context without any statistics yet, and uneven shares."""
    ours, exact = pair("cn", arguments, train, offset)
    for layer in (ours, exact) if ours.track_running_stats else ():
        layer.running_mean[-1] = 0
        layer.running_var[-1] = 1
        layer.prior.copy_(torch.arange(1.0, 1 + len(layer.prior)) / len(layer.prior))
    return ours, exact


@pytest.mark.parametrize("arguments", EVALUATED, ids=str)
def test_evaluation(arguments, monkeypatch):
    ours, exact = contexts(arguments, train=False)
    launched = count_launches(monkeypatch)
    compare(ours, exact, features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7))
    same_buffers(ours, exact)
    assert "channels_of" in launched


@pytest.mark.parametrize(
    "arguments",
    [IDS, *(pytest.param({**IDS, **more}, marks=SLOW) for more in ({"prior_scale": True}, {"affine": False}))],
    ids=str,
)
@pytest.mark.parametrize("track", [True, False], ids=["running", "of the batch"])
def test_evaluation_without_contexts(arguments, track, monkeypatch):
    """One map for all samples: pooled statistics, weight and bias averaged by share."""
    ours, exact = contexts({**arguments, "track_running_stats": track}, train=False)
    for layer in (ours, exact):
        assign(context_layers(layer))
    launched = count_launches(monkeypatch)
    compare(ours, exact, features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7))
    assert "channels_of" in launched


def test_contexts_that_are_all_new():
    """Nothing was trained: every context has the statistics of a new layer, and its share counts."""
    layer = lightning_norm.create("cn", 6, **IDS, prior_scale=True).eval()
    exact = copy.deepcopy(layer).double()
    layer.backend = "triton"
    for each in (layer, exact):
        assign(context_layers(each), torch.tensor([0, 1, 2, 1]))
    compare(layer, exact, features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7))


@pytest.mark.parametrize("arguments", TRAINED, ids=str)
def test_training(arguments, monkeypatch):
    ours, exact = contexts(arguments, train=True)
    launched = count_launches(monkeypatch)
    for i in range(2):
        compare(ours, exact, features(4, 6, 5, 3) + 0.1 * i, noise(4, 6, 5, 3, seed=7 + i), 4e-6)
        same_buffers(ours, exact)
    assert {"channels_of", "channels_vjp"} <= set(launched)


def test_large_offsets():
    ours, exact = contexts(IDS, train=False, offset=1000.0)
    for layer in (ours, exact):
        layer.running_mean[-1] = 1001
    compare(ours, exact, features(4, 6, 5, 3) + 1000, noise(4, 6, 5, 3, seed=7), 4e-6)


@pytest.mark.parametrize("samples", [pytest.param(33, marks=SLOW), 5])
def test_gate_over_blocks_and_parts(samples):
    """More channels, and samples, than a block, channels last, in pieces that are joined inside.

    The contexts differ by weight and bias: where they are alike, the gradient of the gate is what rounding leaves.
    """
    layer = lightning_norm.create("cn", 20, **GATE, min_count=1000)
    for i, p in enumerate(layer.parameters()):
        p.data.copy_(noise(*p.shape, seed=30 + i))
    exact = copy.deepcopy(layer).double()
    layer.backend = "triton"
    shape = (samples, 20, 8, 4) if samples == 33 else (samples, 20, 16, 4)
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (features(*shape), noise(*shape, seed=7)))
    assert grid_of(x, 1).parts > 1
    compare(layer, exact, x, dy, 1e-5)
    same_buffers(layer, exact, 1e-5)


EVAL = ["survey", "channels_of", "apply_flat"]
SMALL = ["gate_logits_vjp", "gate_vjp"]


@pytest.mark.parametrize(
    ("arguments", "train", "forward", "more"),
    [
        ({**GATE, "prior_scale": True}, True, ["moments_rows", *EVAL], SMALL),
        (GATE, False, ["moments_rows", *EVAL], SMALL),
        ({**IDS, "prior_scale": True}, True, ["moments_rows", *EVAL], []),
        (IDS, False, EVAL, []),
    ],
    ids=["gate", "gate, evaluation", "prior_scale", "evaluation"],
)
def test_launches(arguments, train, forward, more, monkeypatch):
    """At most 4 kernels forward and 5 backward, running statistics and every gradient included."""
    ours, _ = contexts(arguments, train)
    x, launched = features(4, 6, 5, 3).requires_grad_(), count_launches(monkeypatch)
    y = ours(x)
    assert launched == forward
    launched.clear()
    torch.autograd.grad(y, [x, *ours.parameters()], noise(4, 6, 5, 3, seed=7))
    assert launched == ["sums_rows", "channels_vjp", *more, "combine_flat"]


@SLOW
def test_compile_and_export():
    ours, _ = contexts(GATE, train=True)
    plain = copy.deepcopy(ours)
    x, dy = features(4, 6, 5, 3).requires_grad_(), noise(4, 6, 5, 3, seed=7)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(x), [x, *f.parameters()], dy) for f in (compiled, plain))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    same_buffers(ours, plain)
    plain.eval()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(torch.nn.Sequential(plain), (features(5, 6, 7, 3),), dynamic_shapes=shapes)
    x = features(3, 6, 7, 3)
    torch.testing.assert_close(program.module()(x), plain(x))


def test_nan_reaches_no_buffer():
    ours, exact = contexts(GATE, train=True)
    x = features(4, 6, 5, 3)
    x[1, 2, 3, 1] = float("nan")
    before = ours.running_mean.clone()
    got, want = ours(x), exact(x.double())
    assert got.isnan().any()
    assert torch.equal(got.isnan(), want.isnan())
    same_buffers(ours, exact)
    assert torch.equal(ours.running_mean, before)
    assert ours.skipped_updates == 1


class Sharp(lightning_norm.ContextNorm):
    """Has a gate of its own."""

    def gate(self, m):
        return super().gate(m).square()


def test_a_gate_of_ones_own_runs_as_written(monkeypatch):
    layer = Sharp(6, **GATE)
    exact = copy.deepcopy(layer).double()
    layer.backend, launched = "triton", count_launches(monkeypatch)
    compare(layer, exact, features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7))
    assert "channels_of" not in launched


def test_what_stays_in_pytorch(monkeypatch):
    """The posterior, contexts with a gradient, and more of them than a program holds."""
    launched = count_launches(monkeypatch)
    for arguments, train in (({**IDS, "missing": "posterior"}, True), ({**GATE, "num_contexts": 17}, True)):
        ours, exact = contexts(arguments, train)
        compare(ours, exact, features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7))
    layer, _ = contexts({**IDS, "missing": "posterior"}, train=False)
    assign(context_layers(layer))
    layer(features(4, 6, 5, 3))
    layer, _ = contexts(IDS, train=True)
    assign(context_layers(layer), torch.rand(4, 3).softmax(1))
    layer.contexts.responsibilities.requires_grad_()
    layer(features(4, 6, 5, 3)).sum().backward()
    assert layer.contexts.responsibilities.grad is not None
    assert "channels_of" not in launched


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW) for n in per_channel.SCHEMAS])
@pytest.mark.parametrize("arguments", [{**GATE, "prior_scale": True}, IDS], ids=["gate", "ids"])
def test_opcheck(name, arguments, monkeypatch):
    monkeypatch.undo()  # opcheck compares two runs: torch.empty as it is
    ours, _ = contexts(arguments, train=name != "per_channel_affine")
    torch.library.opcheck(getattr(ops, name).default, arguments_of(name, ours, features(4, 6, 4, 5)))

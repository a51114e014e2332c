"""A graph per shape, shared by like layers, and never a silent fall-back."""

import copy

import numpy
import pytest
import torch

import lightning_norm
from lightning_norm import Affine, BatchNorm, CompileWarning, MomentNorm, SwitchableNorm
from lightning_norm.ops import compiled


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Count from nothing, and let torch count what it really compiles."""
    monkeypatch.setattr(compiled, "_graphs", {})
    monkeypatch.setattr(compiled, "_shapes", type(compiled._shapes)())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def no_inductor(monkeypatch):
    """Trace as always and run the graph as it is: what is counted here happens before code is generated."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: real(f, backend="eager", **kw))


def compiled_layer(cls=BatchNorm, **arguments):
    layer = cls(6, **arguments)
    layer.compile()
    return layer


def traced():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("cls", [BatchNorm, SwitchableNorm])
def test_many_shapes_never_fall_back(cls):
    layer, eager = compiled_layer(cls), cls(6)
    for size in range(2, 2 + compiled.MANY_SHAPES):
        x = torch.randn(3, 6, size)
        torch.testing.assert_close(layer(x), eager(x))
    assert compiled.graphs() == traced() == compiled.MANY_SHAPES > torch._dynamo.config.recompile_limit
    with pytest.warns(CompileWarning, match=f"more than {compiled.MANY_SHAPES} input shapes"):
        layer(torch.randn(3, 6, 101))
    for size in (*range(102, 110), 2, 3):  # one more graph for all the rest, and no second warning
        x = torch.randn(3, 6, size)
        torch.testing.assert_close(layer(x), eager(x))
    assert compiled.graphs() == traced() == compiled.MANY_SHAPES + 1
    assert not torch._dynamo.utils.counters["graph_break"]


class Gain(MomentNorm):
    """A user's normalizer whose plain attribute torch guards on."""

    def __init__(self, num_features, gain, **options):
        super().__init__(num_features, **options)
        self.gain = gain

    def algebra(self, m):
        affine = self.standardize(m.mean, m.var)
        return Affine(affine.center, affine.scale * self.gain, affine.shift)


@pytest.mark.usefixtures("no_inductor")
def test_a_users_plain_attributes_never_meet_the_limit():
    x = torch.randn(3, 6, 5)
    for gain in range(1, 13):
        layer = compiled_layer(Gain, gain=float(gain))
        torch.testing.assert_close(layer(x), Gain(6, float(gain))(x))
    assert compiled.graphs() == traced() == 12


@pytest.mark.usefixtures("no_inductor")
def test_what_the_key_forgets_begins_again():
    """A list is not in the key: the ninth variant of one code object hits torch's limit and gets a new one."""
    x = torch.randn(3, 6, 5)
    for gain in range(1, 13):
        layer = compiled_layer(Gain, gain=1.0)
        layer.gains = [float(gain)]
        layer.algebra = lambda m, layer=layer: Gain.algebra(layer, m).__class__(
            m.mean, (m.var + 1e-5).rsqrt() * layer.gains[0]
        )
        torch.testing.assert_close(layer(x).std(), torch.tensor(float(gain)), rtol=0.2, atol=0)


@pytest.mark.usefixtures("no_inductor")
def test_layers_that_agree_share_a_graph():
    x = torch.randn(3, 6, 5)
    for layer in (compiled_layer(), compiled_layer(), compiled_layer(momentum=0.5)):
        layer(x)
    assert compiled.graphs() == traced() == 1
    compiled_layer(eps=0.1)(x)
    compiled_layer(SwitchableNorm)(x)
    compiled_layer(SwitchableNorm, choices=("in", "ln"))(x)
    assert compiled.graphs() == traced() == 4


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("key", ["bn", "gn", "ln", "dbn", "brn"])
def test_atens_channels_last_kernels_outrun_graphs(key):
    """In training on the CPU; contiguous maps, other normalizers and evaluation have their graph."""
    layer = lightning_norm.create(key, 6, **({"num_groups": 3} if key == "gn" else {}))
    eager = copy.deepcopy(layer)
    layer.compile()
    x = torch.randn(3, 6, 5, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(last, "relu", last), eager(last, "relu", last))
    assert compiled.graphs() == 0
    torch.testing.assert_close(layer(x), eager(x))
    assert compiled.graphs() == 1
    layer.eval()(last)
    other = SwitchableNorm(6)
    other.compile()
    other(last)
    assert compiled.graphs() == 3


@pytest.mark.parametrize("wrong", [[1.0], numpy.zeros((3, 6, 5, 4))], ids=["list", "array"])
def test_what_is_no_tensor_is_refused_as_without_a_graph(wrong):
    for layer in (BatchNorm(6), compiled_layer(BatchNorm)):
        with pytest.raises(TypeError, match="BatchNorm"):
            layer(wrong)


@pytest.mark.usefixtures("no_inductor")
def test_what_separates_graphs():
    layer = compiled_layer(SwitchableNorm)
    x = torch.randn(3, 6, 5, 4)
    for passed in (x, x.double(), x.contiguous(memory_format=torch.channels_last), x.clone().requires_grad_()):
        layer(passed)
    layer.eval()(x)
    with torch.no_grad():
        layer(x)
    assert compiled.graphs() == traced() == 6


@pytest.mark.usefixtures("no_inductor")
def test_scheduled_values_recompile_nothing():
    x = torch.randn(3, 6, 5)
    for cls, arguments, name in ((BatchNorm, {}, "momentum"), (SwitchableNorm, {"sparse": True}, "radius")):
        layer, eager = compiled_layer(cls, **arguments), cls(6, **arguments)
        layer(x), eager(x)
        known = traced()
        for value in (0.2, 0.5, 0.9, 1.0):
            setattr(layer, name, value)
            setattr(eager, name, value)
            torch.testing.assert_close(layer(x), eager(x))
            torch.testing.assert_close(layer.running_mean, eager.running_mean)
            assert compiled.GRAPH_KEY in vars(layer)  # nor does it cost a look at all attributes
        assert traced() == known


@pytest.mark.usefixtures("no_inductor")
def test_a_scheduled_value_that_appears_is_another_kind():
    x = torch.randn(3, 6, 5)
    layer, eager = compiled_layer(momentum=None), BatchNorm(6, momentum=None)
    for momentum in (None, 0.3, None):
        layer.momentum = eager.momentum = momentum
        for _ in range(2):
            layer(x), eager(x)
        torch.testing.assert_close(layer.running_mean, eager.running_mean)
    assert compiled.graphs() == traced() == 2


def test_inductor_at_large_means():
    """The compiled graph is as precise as eager: no farther from float64 than nn.BatchNorm2d at mean/std = 1000."""
    layer, torchs = compiled_layer(), torch.nn.BatchNorm2d(6)
    x, dy = torch.randn(5, 6, 13, 11) + 1000, torch.randn(5, 6, 13, 11)
    errors = []
    for f in (layer, torchs):
        exact = torch.nn.BatchNorm2d(6).double()
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        y, z = f(a), exact(b)
        (dx,), (dz,) = torch.autograd.grad(y, a, dy), torch.autograd.grad(z, b, dy.double())
        errors.append([(u - v).norm() / v.norm() for u, v in ((y, z), (dx, dz))])
    assert errors[0][0] <= errors[1][0]
    assert errors[0][1] <= errors[1][1]


@pytest.mark.usefixtures("no_inductor")
def test_observers_hear_of_each_compilation():
    heard = []
    end = compiled.on_compile(heard.append)
    layer = compiled_layer()
    layer(torch.randn(3, 6, 5)), layer(torch.randn(3, 6, 5)), layer(torch.randn(3, 6, 7))
    end()
    layer(torch.randn(3, 6, 9))
    assert heard == ["BatchNorm (3, 6, 5)", "BatchNorm (3, 6, 7)"]


def test_arguments_that_torch_does_not_take_are_refused():
    with pytest.raises(TypeError, match="takes .*dynamic.*, got 'dynamics'"):
        BatchNorm(6).compile(dynamics=True)


def test_layers_with_other_arguments_of_torchs_share_no_graph():
    x, before = torch.randn(3, 6, 5), compiled.graphs()
    for options in ({}, {"dynamic": False}, {"dynamic": False}):
        layer = BatchNorm(6)
        layer.compile(backend="eager", **options)
        layer(x)
    assert compiled.graphs() == before + 2


def test_a_snapshot_keeps_every_digit():
    narrow, wide, count = torch.rand(3), torch.rand(2, dtype=torch.float64), torch.tensor(5)
    torch._dynamo.reset()
    got = torch.compile(compiled.snapshot, backend="eager", fullgraph=True)(narrow, wide, count)
    for a, b in zip(got, (narrow, wide, count), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)

"""The operators under torch.library's checks, torch.compile and torch.export."""

import copy
from dataclasses import replace

import pytest
import torch

import lightning_norm
from lightning_norm import Affine, normalize
from lightning_norm.kernels.mixture.flags import MixtureFlags
from lightning_norm.ops import backend
from lightning_norm.ops.fused import apply_depthwise, mixture, operators
from lightning_norm.ops.fused.operators import to_numbers
from lightning_norm.ops.layout import layout_of
from lightning_norm.testing.kit import features, noise, same_step, statistics, step

ops = torch.ops.lightning_norm
LAST = torch.channels_last
FORMS = {
    "rows": lambda: features(2, 3, 4, 5),
    "channels last": lambda: features(2, 3, 4, 5).contiguous(memory_format=LAST),
    "ambiguous": lambda: features(1, 1, 1, 1).contiguous(memory_format=LAST),
}
SN = MixtureFlags.of(("in", "ln", "bn"), weighted=True, softmax=True, track=1)
BN = MixtureFlags.of(("bn",))


def sample_inputs(x):
    """A set of arguments for every operator."""
    n, c = x.shape[:2]
    affine, three, kernel = torch.rand(3, n, c), torch.rand(3), torch.rand(c, 1, 3, 3)
    parameters = (torch.rand(c), torch.rand(c), three, three.clone())
    buffers = torch.zeros(c), torch.ones(c), torch.tensor(0), torch.tensor(0), torch.tensor(0.1)
    still, moving, of_bn = (to_numbers(flags) for flags in (replace(SN, track=0), SN, BN))
    sn = ops.mixture_affine(x, *parameters, *buffers, 1, still, 1e-5, "")
    bn = ops.mixture_affine(x, *[None] * 9, 1, of_bn, 1e-5, "")
    g = (torch.rand_like(x), x, *sn, parameters[0], three, three.clone(), None, None)
    return {
        "moments": (x, 1),
        "sums": (torch.rand_like(x), x, affine, 1),
        "apply": (x, affine, 1, "relu", torch.rand_like(x)),
        "combine": (torch.rand_like(x), x, affine, torch.rand(2, n, c), 1),
        "mixture_affine": (x, *parameters, *buffers, 1, still, 1e-5, ""),
        "mixture_affine_and_track": (x, *parameters, *buffers, 1, moving, 1e-5, ""),
        "mixture_gradients": (*g, torch.rand_like(x), 1, moving, 1e-5, "relu", True, ""),
        "apply_depthwise": (x, affine, kernel, torch.rand(c)),
        "apply_depthwise_gradients": (torch.rand_like(x), x, *bn, kernel, None, None, of_bn, 1e-5, True, ""),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*operators.SCHEMAS, *mixture.SCHEMAS, *apply_depthwise.SCHEMAS])
def test_opcheck(name, form, monkeypatch):
    monkeypatch.undo()  # opcheck compares two runs: torch.empty as it is
    arguments = sample_inputs(FORMS[form]())[name]
    torch.library.opcheck(getattr(ops, name).default, arguments)


def on_triton(key, **arguments):
    layer = lightning_norm.create(key, 6, **arguments)
    layer.backend = "triton"
    return layer


# Of (N, C) the kernels read a batch as one sample where no sample has statistics of its own.
@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (16, 6)], ids=str)
@pytest.mark.parametrize("key", ["bn", "sn", "brn", "dbn", "rbn", "ubn"])
def test_compile(key, shape):
    torch.compiler.reset()  # more layers than it compiles one function for
    layer = on_triton(key)
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = features(*shape), noise(*shape, seed=7)
    same_step(step(compiled, x, dy), _renamed(step(plain, x, dy)), 1e-7, "compiled")
    for name, value in statistics(plain).items():
        torch.testing.assert_close(layer._buffers[name], value)


def _renamed(got):
    return type(got)(got.y, got.dx, {f"_orig_mod.{k}": v for k, v in got.grads.items()})


def test_compile_with_inductor():
    layer = on_triton("sn")
    plain = copy.deepcopy(layer)
    layer.compile()
    x, dy = features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7)
    same_step(step(layer, x, dy), step(plain, x, dy), 1e-6, "compiled")
    torch.testing.assert_close(layer.running_var, plain.running_var)


@pytest.mark.parametrize("key", ["bn", "sn", "rbn"])
def test_a_transparent_graph(key, monkeypatch):
    """Of the passes over x only those that sum are operators: y and dx are what a compiler fuses with what follows."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def note(gm, inputs):
        schemas = [getattr(n.target, "_schema", None) for n in gm.graph.nodes]
        graphs.append({s.name for s in schemas if s is not None and s.name.startswith("lightning_norm")})
        return make_boxed_func(gm.forward)

    monkeypatch.setattr(backend, "IN_GRAPHS", "transparent")
    torch.compiler.reset()
    layer = on_triton(key)
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=note))
    x, dy = features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7)
    same_step(step(compiled, x, dy), _renamed(step(plain, x, dy)), 1e-6, "compiled")
    for name, value in statistics(plain).items():
        torch.testing.assert_close(layer._buffers[name], value)
    assert graphs == [{"lightning_norm::moments"}, {"lightning_norm::sums"}]


def test_a_graph_without_kernels(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the kernels were asked for")

    layer = lightning_norm.create("bn", 6)
    plain = copy.deepcopy(layer)
    x, dy = features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7)
    want = _renamed(step(plain, x, dy))
    monkeypatch.setattr(backend, "IN_GRAPHS", "plain")
    monkeypatch.setattr("lightning_norm.ops.normalize.on_kernels", refuse)
    torch.compiler.reset()
    same_step(step(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, dy), want, 1e-6, "compiled")


def test_compile_a_users_algebra():
    def f(x, g):
        return normalize(x, lambda m: Affine(m.mean, g * (m.over_batch().var + m.var).rsqrt()), backend="triton")

    x, g = features(4, 6, 5, 3).requires_grad_(), noise(6).requires_grad_()
    dy = noise(4, 6, 5, 3, seed=7)
    got, want = (h(x, g) for h in (torch.compile(f, fullgraph=True, backend="aot_eager"), f))
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(y, (x, g), dy) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("key", ["bn", "sn"])
def test_export(key):
    layer = on_triton(key).eval()
    network = torch.nn.Sequential(layer)
    program = torch.export.export(network, (features(5, 6, 7, 3),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    names = {str(node.target) for node in program.graph.nodes}
    assert {"lightning_norm.mixture_affine.default", "lightning_norm.apply.default"} <= names
    for n in (2, 7):
        x = features(n, 6, 7, 3)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_backend_of_an_input():
    x = features(4, 6, 5, 3)
    layout = layout_of(x, 6)
    assert backend.on_kernels(x, layout, "triton")
    assert not backend.on_kernels(x, layout, "auto")  # never on the CPU by itself
    assert not backend.on_kernels(x, layout, "eager")
    for wrong, why in ((x.double(), "float64"), (x[:, :, ::2], "strides"), (x[:0], "empty")):
        with pytest.raises(RuntimeError, match=why):
            backend.on_kernels(wrong, layout_of(wrong, 6), "triton")

"""The operators under torch.library's checks, torch.compile and torch.export."""

import copy

import pytest
import torch

import lightning_norm
from lightning_norm import Affine, normalize
from lightning_norm.ops import backend
from lightning_norm.ops.fused import operators
from lightning_norm.ops.layout import layout_of
from lightning_norm.testing.kit import features, noise, same_step, statistics, step

ops = torch.ops.lightning_norm
LAST = torch.channels_last
FORMS = {
    "rows": lambda: features(2, 3, 4, 5),
    "channels last": lambda: features(2, 3, 4, 5).contiguous(memory_format=LAST),
    "ambiguous": lambda: features(1, 1, 1, 1).contiguous(memory_format=LAST),
}
PLAN = [1, 0, 1, 2, 3, 1, 0, 0, 1, 1, 0]  # sn in training


def sample_inputs(x):
    """A set of arguments for every operator."""
    n, c = x.shape[:2]
    coef, three = torch.rand(3, n, c), torch.rand(3)
    held = (torch.rand(c), torch.rand(c), three, three.clone())
    buffers = torch.zeros(c), torch.ones(c), torch.tensor(0), torch.tensor(0), torch.tensor(0.1)
    stats = ops.coefficients(x, *held, *buffers, 1, [*PLAN[:8], 0, *PLAN[9:]], 1e-5, "")
    g = (torch.rand_like(x), x, *stats, held[0], three, three.clone(), None, None)
    of_bn, kernel = [1, -1, -1, 0, 0, 0, 0, 0, 0, 1, 0], torch.rand(c, 1, 3, 3)
    bn = ops.coefficients(x, *[None] * 9, 1, of_bn, 1e-5, "")
    return {
        "recover": (x, coef, kernel, torch.rand(c)),
        "recover_gradients": (torch.rand_like(x), x, *bn, kernel, None, None, of_bn, 1e-5, True, ""),
        "moments": (x, 1),
        "sums": (torch.rand_like(x), x, coef, 1),
        "apply": (x, coef, 1, "relu", torch.rand_like(x)),
        "combine": (torch.rand_like(x), x, coef, torch.rand(2, n, c), 1),
        "coefficients": (x, *held, *buffers, 1, [*PLAN[:8], 0, *PLAN[9:]], 1e-5, ""),
        "coefficients_and_track": (x, *held, *buffers, 1, PLAN, 1e-5, ""),
        "gradients": (*g, torch.rand_like(x), 1, PLAN, 1e-5, "relu", True, ""),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", operators.SCHEMAS)
def test_opcheck(name, form, monkeypatch):
    monkeypatch.undo()  # opcheck compares two runs: torch.empty as it is
    arguments = sample_inputs(FORMS[form]())[name]
    torch.library.opcheck(getattr(ops, name).default, arguments)


def on_triton(key, **arguments):
    layer = lightning_norm.create(key, 6, **arguments)
    layer.backend = "triton"
    return layer


@pytest.mark.parametrize("key", ["bn", "sn"])
def test_compile(key):
    layer = on_triton(key)
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7)
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
    assert {"lightning_norm.coefficients.default", "lightning_norm.apply.default"} <= names
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

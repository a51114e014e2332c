"""normalize() for algebras no normalizer of the package has: every route through the two autograd nodes."""

import pytest
import torch

from lightning_norm import Affine, BatchNorm, Moments, normalize

F64 = torch.float64


def whole(x, algebra):
    """The same on the whole tensor, by plain autograd."""
    dims = tuple(range(2, x.dim()))
    mean = x.mean(dims) if dims else x
    var = x.var(dims, unbiased=False) if dims else torch.zeros_like(x)
    n, c = x.shape[:2]
    fields = algebra(Moments(mean, var, x[0, 0].numel())).fields(n, c)
    center, scale, shift = (t.expand(n, c).reshape(n, c, *[1] * (x.dim() - 2)) for t in fields)
    return scale * (x - center) + shift


ALGEBRAS = {
    "identity": lambda m: Affine(torch.zeros_like(m.mean), torch.ones_like(m.mean)),
    "center only": lambda m: Affine(m.mean, torch.ones_like(m.mean)),
    "variance only": lambda m: Affine(torch.zeros_like(m.mean), (m.var + 0.1).rsqrt()),
    "shift only": lambda m: Affine(torch.zeros_like(m.mean), torch.ones_like(m.mean), m.mean.sin() + m.var),
    "constants": lambda m: Affine(torch.full((1, 1), 2.0, dtype=F64), torch.full((1, 1), 3.0, dtype=F64)),
    "everything": lambda m: Affine(m.mean * m.var, m.over_batch().var * m.mean, m.over_channels().mean.cos()),
    "detached": lambda m: Affine(m.mean.detach(), (m.var.detach() + 0.1).rsqrt()),
    "one channel's mean": lambda m: Affine(m.mean[:, :1], (m.var[:1] + 0.1).rsqrt()),
}


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 5, 3)])
@pytest.mark.parametrize("name", ALGEBRAS)
def test_equals_the_whole_tensor(name, shape):
    algebra = ALGEBRAS[name]
    x, dy = torch.randn(shape, dtype=F64), torch.randn(shape, dtype=F64)
    results = []
    for f in (normalize, whole):
        a = x.clone().requires_grad_()
        y = f(a, algebra)
        results.append((y, torch.autograd.grad(y, a, dy)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", sorted(ALGEBRAS.keys() - {"detached"}))  # finite differences see through a detach
def test_double_backward(name):
    x = torch.randn(3, 2, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: normalize(x, ALGEBRAS[name]), x)
    assert torch.autograd.gradgradcheck(lambda x: normalize(x, ALGEBRAS[name]), x)


def test_double_backward_through_parameters():
    x = torch.randn(3, 2, 4, dtype=F64, requires_grad=True)
    gamma = torch.randn(2, dtype=F64, requires_grad=True)

    def f(x, gamma):
        return normalize(x, lambda m: Affine(m.mean, gamma * (m.var + 0.1).rsqrt(), gamma.square()))

    assert torch.autograd.gradcheck(f, (x, gamma))
    assert torch.autograd.gradgradcheck(f, (x, gamma))


def test_input_without_gradient():
    gamma = torch.randn(6, dtype=F64, requires_grad=True)
    x, dy = torch.randn(4, 6, 5, dtype=F64), torch.randn(4, 6, 5, dtype=F64)
    grads = [
        torch.autograd.grad(f(x, lambda m: Affine(m.mean, gamma * (m.var + 0.1).rsqrt())), gamma, dy)[0]
        for f in (normalize, whole)
    ]
    torch.testing.assert_close(grads[0], grads[1])


def test_moments_used_beside_the_output():
    """A loss on the moments themselves (a regularizer) reaches x, alone and together with the output."""
    dy = torch.randn(4, 6, 5, dtype=F64)
    for both in (False, True):
        grads = []
        for f in (normalize, whole):
            x = torch.randn(4, 6, 5, dtype=F64, generator=torch.Generator().manual_seed(3)).requires_grad_()
            met = []
            y = f(x, lambda m, met=met: (met.append(m), Affine(m.mean, (m.var + 0.1).rsqrt()))[1])
            loss = (met[0].mean.sin() * met[0].var).sum() + ((y * dy).sum() if both else 0)
            grads += torch.autograd.grad(loss, x)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-11)


def test_given_moments_are_used_and_x_is_read_as_it_is():
    x = torch.randn(4, 6, 5, dtype=F64, requires_grad=True)
    constant = Moments(torch.full((1, 6), 2.0, dtype=F64), torch.full((1, 6), 4.0, dtype=F64), 1)
    y = normalize(x, lambda m: Affine(m.mean, m.var.rsqrt()), moments=constant)
    torch.testing.assert_close(y, (x - 2) / 2)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy / 2)


@pytest.mark.parametrize("layout", [1, -1])
def test_layout(layout):
    x = torch.randn(4, 6, 5, dtype=F64)
    y = normalize(x if layout == 1 else x.mT, lambda m: Affine(m.mean, (m.var + 1e-5).rsqrt()), layout=layout)
    torch.testing.assert_close(y if layout == 1 else y.mT, torch.nn.functional.instance_norm(x))


def test_an_affine_of_a_wrong_shape_is_refused_with_the_shapes():
    with pytest.raises(ValueError, match=r"scale of shape \(5,\).*\(N, C\) = \(4, 6\)"):
        normalize(torch.randn(4, 6, 5), lambda m: Affine(m.mean, torch.ones(5)))


def test_wrong_inputs():
    with pytest.raises(TypeError, match="int64"):
        normalize(torch.ones(4, 6, 5).long(), ALGEBRAS["identity"])
    with pytest.raises(ValueError, match="1 dimension:"):
        normalize(torch.ones(4), ALGEBRAS["identity"])


def test_leaves_no_view_behind():
    """The output is no view and shares no memory with x, so that in-place layers may follow."""
    for dtype in (torch.float32, F64):
        x = torch.randn(4, 6, 5, 3, dtype=dtype, requires_grad=True)
        y = normalize(x, ALGEBRAS["identity"] if dtype == F64 else lambda m: Affine(m.mean * 0, m.var * 0 + 1))
        assert y._base is None
        assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offset", [0.0, 50.0])  # both sides of the fast path
def test_precision_of_apply(dtype, offset):
    x = (torch.randn(5, 6, 9, 7) + offset).to(dtype)
    y = normalize(x, lambda m: Affine(m.mean, (m.var + 1e-5).rsqrt()))
    exact = normalize(x.double(), lambda m: Affine(m.mean, (m.var + 1e-5).rsqrt()))
    assert y.dtype == dtype
    assert (y.double() - exact).norm() / exact.norm() < torch.finfo(dtype).eps  # one rounding is eps / 2


def test_autocast_does_not_reach_the_algebra():
    dtypes = []

    def algebra(m):
        dtypes.append((m.mean.float() @ torch.eye(6)).dtype)
        return Affine(m.mean, (m.var + 1e-5).rsqrt())

    with torch.autocast("cpu", dtype=torch.bfloat16):
        normalize(torch.randn(4, 6, 5), algebra)
        normalize(torch.randn(4, 6, 5).bfloat16(), algebra)
    assert dtypes == [torch.float32, torch.float32]


def test_a_tensor_in_the_place_of_the_activation_is_told_in_one_line():
    """As where code hands a mask or a gate to a layer by position."""
    with pytest.raises(ValueError, match=r"activation must be one of .*, got a Tensor\.$"):
        BatchNorm(6)(torch.randn(4, 6, 3), torch.zeros(4, 1, 3))

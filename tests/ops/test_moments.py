import pytest
import torch

from lightning_norm import Affine, Moments
from lightning_norm.ops import eager
from lightning_norm.ops.layout import layout_of

F64 = torch.float64


def moments_of(x):
    layout = layout_of(x, x.shape[1])
    return Moments(*eager.moments(x, layout), layout.size)


def close(m, mean, var, count):
    torch.testing.assert_close(m.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m.var, var, rtol=1e-12, atol=1e-12)
    assert float(m.count if isinstance(m.count, int) else m.count.flatten()[0]) == count


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7), (5, 6, 7, 3), (3, 6, 2, 5, 3)])
def test_moments(shape):
    x = torch.randn(shape, dtype=F64) + 3
    flat = x.reshape(*shape[:2], -1)
    m = moments_of(x)
    close(m, flat.mean(2), flat.var(2, unbiased=False), flat.shape[2])
    assert m.var.min() >= 0


def test_over_channels_is_the_whole_sample():
    x = torch.randn(5, 6, 7, 3, dtype=F64) + torch.randn(5, 6, 1, 1, dtype=F64)
    flat = x.flatten(1)
    close(moments_of(x).over_channels(), flat.mean(1, True), flat.var(1, unbiased=False, keepdim=True), 6 * 21)


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_over_groups(groups):
    x = torch.randn(5, 6, 7, 3, dtype=F64) + torch.randn(5, 6, 1, 1, dtype=F64)
    flat = x.reshape(5, groups, -1)
    mean, var = (t.repeat_interleave(6 // groups, 1) for t in (flat.mean(2), flat.var(2, unbiased=False)))
    close(moments_of(x).over_channels(groups), mean, var, 6 // groups * 21)


@pytest.mark.parametrize("groups", [4, 5, 7])
def test_groups_must_divide(groups):
    with pytest.raises(ValueError, match=rf"6 channels into {groups} groups.*\[1, 2, 3, 6\]"):
        moments_of(torch.randn(2, 6, 3)).over_channels(groups)


def test_over_batch_is_the_whole_batch():
    x = torch.randn(5, 6, 7, 3, dtype=F64) + torch.randn(5, 6, 1, 1, dtype=F64)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    close(moments_of(x).over_batch(), mean[None], var[None], 5 * 21)


def test_hard_weights_are_subsets():
    x = torch.randn(7, 6, 4, 3, dtype=F64) + torch.randn(7, 6, 1, 1, dtype=F64)
    ids = torch.tensor([0, 1, 0, 2, 1, 0, 2])
    m = moments_of(x).over_batch(torch.nn.functional.one_hot(ids, 3).to(F64))
    parts = [x[ids == k] for k in range(3)]
    torch.testing.assert_close(m.mean, torch.stack([p.mean((0, 2, 3)) for p in parts]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m.var, torch.stack([p.var((0, 2, 3), unbiased=False) for p in parts]))
    assert m.count.flatten().tolist() == [36, 24, 24]


def test_soft_weights_count_each_element_by_its_weight():
    x = torch.randn(7, 6, 4, dtype=F64) + torch.randn(7, 6, 1, dtype=F64)
    weights = torch.rand(7, 3, dtype=F64)
    m = moments_of(x).over_batch(weights)
    for k in range(3):
        w = weights[:, k].reshape(7, 1, 1).expand(7, 1, 4)
        mean = (w * x).sum((0, 2)) / w.sum()
        var = (w * (x - mean[:, None]) ** 2).sum((0, 2)) / w.sum()
        torch.testing.assert_close(m.mean[k], mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(m.var[k], var, rtol=1e-12, atol=1e-12)


def test_a_set_without_samples_is_finite_and_counts_nothing():
    weights = torch.zeros(4, 2, dtype=F64)
    weights[:, 0] = 1
    m = moments_of(torch.randn(4, 6, 3, dtype=F64)).over_batch(weights)
    assert m.mean.isfinite().all()
    assert m.var.isfinite().all()
    assert m.count.flatten().tolist() == [12, 0]


def test_weights_have_gradients():
    x, weights = torch.randn(4, 2, 3, dtype=F64), torch.rand(4, 3, dtype=F64).requires_grad_()
    m = moments_of(x)
    pooled = lambda w: [getattr(m.over_batch(w), name) for name in ("mean", "var")]  # noqa: E731
    assert torch.autograd.gradcheck(lambda w: torch.cat(pooled(w)), weights)


@pytest.mark.parametrize("ratio", [1e3, 1e4, 1e6])
def test_pooling_never_cancels(ratio):
    """E[x^2] - E[x]^2 in float64 loses ratio^2 * 1e-16, 1e-4 of the variance at 1e6; total variance loses nothing."""
    x = torch.randn(5, 6, 7, 3, dtype=F64)
    for m, still in ((moments_of(x + ratio), moments_of(x)),):
        for pooled, expected in ((m.over_batch(), still.over_batch()), (m.over_channels(), still.over_channels())):
            torch.testing.assert_close(
                pooled.var, expected.var, rtol=1e-9, atol=0
            )  # the sum x + ratio itself is rounded


def test_float32_inputs_have_float64_means():
    x = torch.randn(5, 6, 23, 21) + 1000
    exact = x.double()
    m = moments_of(x)
    assert m.mean.dtype == F64
    torch.testing.assert_close(m.mean, exact.mean((2, 3)), rtol=1e-9, atol=0)
    torch.testing.assert_close(m.var, exact.var((2, 3), unbiased=False), rtol=1e-6, atol=0, check_dtype=False)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"center": torch.zeros(4)}, "center"),
        ({"scale": torch.zeros(3, 5)}, "scale"),
        ({"shift": torch.zeros(2, 5)}, "shift"),
        ({"scale": torch.zeros(3, 5, 1)}, "scale"),
        ({"center": torch.zeros(5, 3)}, "center"),
    ],
)
def test_affine_of_a_wrong_shape_is_refused(fields, name):
    passed = {"center": torch.zeros(3, 5), "scale": torch.ones(1, 5), "shift": torch.zeros(5), **fields}
    if name == "scale" and fields["scale"].shape == (3, 5):
        passed["scale"] = torch.zeros(3, 4)
    shape = tuple(passed[name].shape)
    with pytest.raises(ValueError, match=rf"{name} of shape .*\(N, C\) = \(3, 5\)") as error:
        Affine(**passed).fields(3, 5)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 1), (1, 5), (3, 1), (3, 5)])
def test_affine_broadcasts(shape):
    for t in Affine(torch.ones(3, 5), torch.full(shape, 2.0), None).fields(3, 5):
        assert t.dim() == 2
        assert t.expand(3, 5).shape == (3, 5)

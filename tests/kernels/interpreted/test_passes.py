"""Every pass against float64: sizes that are no powers of two, both layouts, parts, large offsets, half inputs, NaN."""

import pytest
import torch
import triton
import triton.language as tl

import lightning_norm
from lightning_norm.kernels import trial
from lightning_norm.kernels.depthwise.flags import Compiled, Shape
from lightning_norm.kernels.depthwise.forward import tile_lanes
from lightning_norm.kernels.passes import launch
from lightning_norm.kernels.passes.forward import row_span
from lightning_norm.ops import eager
from lightning_norm.ops.layout import layout_of
from lightning_norm.ops.moments import Affine
from lightning_norm.ops.normalize import normalize

LAST = torch.channels_last
TOLERANCE = {torch.float32: 3e-7, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
"""Of elementwise results: a few float32 roundings, half an ulp of float16; the interpreter truncates to bfloat16."""

# shape, memory format or channel axis, what it is there for: (align, fold, more than one tile or part)
CASES = [
    ((3, 5, 7, 7), 1),  # 735 elements: nothing is aligned, masked tails everywhere
    ((4, 8, 7, 7), 1),  # rows of 49 begin between vectors
    ((2, 4, 14, 14), 1),
    ((1, 2, 70, 61), 1),  # two parts of 4270
    ((1, 1, 3, 2041), 1),  # three tiles, one part too short to split
    ((5, 6), 1),
    ((3, 4, 9), 1),
    ((2, 3, 2, 3, 5), 1),
    ((3, 5, 7, 7), LAST),
    ((2, 3, 12, 12), LAST),  # 16 positions folded into channels
    ((2, 72, 5, 7), LAST),  # two blocks of channels
    ((1, 64, 14, 14), LAST),  # parts
    ((2, 9, 24), -1),
    ((2, 5, 4, 6), -1),
    ((1, 4096, 2, 1), LAST),
    pytest.param((1, 4096, 3, 1), 1, marks=pytest.mark.slow),
]


def inputs(shape, form, dtype=torch.float32, offset=0.0):
    x = (torch.randn(shape) + offset).to(dtype)
    dy, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    if form is LAST:
        x, dy, residual = (t.contiguous(memory_format=LAST) for t in (x, dy, residual))
    return x, dy, residual, layout_of(x, shape[1 if form is LAST else form], 1 if form is LAST else form)


def apart(got, exact):
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-12))


def check_all(x, dy, residual, layout, activation, with_residual):
    tolerance = TOLERANCE[x.dtype]
    wide, residual = x.double(), residual if with_residual else None
    mean, var = wide.mean(layout.reduced), wide.var(layout.reduced, correction=0)
    if layout.size == 1:
        mean, var = wide.reshape(layout.n, layout.c), torch.zeros(layout.n, layout.c).double()
    hi, lo, got = launch.moments(x, layout.channel_dim)
    assert ((hi - mean).abs() <= 6e-8 * mean.abs() + 3e-7 * var.sqrt()).all()
    assert (hi.double() + lo - mean).abs().max() <= 3e-7 * var.sqrt().max()  # however large the mean
    torch.testing.assert_close(got.double(), var, rtol=1e-6, atol=1e-12)

    affine = torch.stack([hi, torch.randn_like(hi), torch.randn_like(hi)])
    pivot, scale, offset = (layout.broadcast_to_input(t.double()) for t in affine)
    z = scale * (wide - pivot) + offset
    z = z if residual is None else z + residual.double()
    z.requires_grad_()
    exact = {"none": lambda t: t * 1, "relu": torch.relu, "silu": torch.nn.functional.silu}[activation](z)
    y = launch.apply(x, affine, layout.channel_dim, activation, residual)
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    assert apart(y, exact.detach()) < tolerance

    (g,) = torch.autograd.grad(exact, z, dy.double())
    sums = launch.sums(dy, x, affine, layout.channel_dim, activation, residual)
    for a, b in zip(sums, (g, g * (wide - pivot)), strict=True):
        total = b.sum(layout.reduced) if layout.reduced else b
        size = b.abs().sum(layout.reduced) if layout.reduced else b.abs()
        assert ((a.double() - total).abs() <= 3e-7 * size + 1e-9).all()

    dx_affine = torch.randn(2, *hi.shape)
    constant, slope = (layout.broadcast_to_input(t.double()) for t in dx_affine)
    dx, dresidual = launch.combine(dy, x, affine, dx_affine, layout.channel_dim, activation, residual)
    assert (dx.dtype, dx.stride()) == (x.dtype, x.stride())
    assert apart(dx, scale * g + constant + slope * (wide - pivot)) < tolerance
    if residual is not None:
        assert apart(dresidual, g) < tolerance
    if activation == "none" and residual is None:
        assert apart(launch.combine(dy, x, affine, None, layout.channel_dim)[0], scale * g) < tolerance


@pytest.mark.parametrize(("shape", "form"), CASES, ids=str)
def test_passes(shape, form):
    check_all(*inputs(shape, form), "none", False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "form"), [((2, 8, 7, 7), 1), ((1, 64, 5, 7), LAST)], ids=str)
def test_half(shape, form, dtype):
    check_all(*inputs(shape, form, dtype), "none", False)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(("shape", "form"), [((2, 4, 7, 7), 1), ((2, 6, 3, 5), LAST), ((1, 1, 3, 700), 1)], ids=str)
def test_activation_and_residual(shape, form, activation):
    check_all(*inputs(shape, form), activation, True)
    check_all(*inputs(shape, form), activation, False)


@pytest.mark.parametrize("offset", [100.0, 1000.0])
@pytest.mark.parametrize(("shape", "form"), [((2, 4, 7, 7), 1), ((1, 1, 70, 61), 1), ((1, 64, 14, 14), LAST)], ids=str)
def test_large_offsets(shape, form, offset):
    check_all(*inputs(shape, form, offset=offset), "none", False)


def test_a_first_tile_far_from_the_rest():
    """Zeros and then 1000 + noise: the pivot is no good, and the variance still has five digits."""
    x = torch.cat([torch.zeros(1, 1, 2048), 1000 + torch.randn(1, 1, 2000)], 2)
    hi, lo, var = launch.moments(x, 1)
    wide = x.double()
    torch.testing.assert_close(hi.double() + lo, wide.mean(2), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), wide.var(2, correction=0), rtol=1e-5, atol=0)


def test_equals_the_oracle():
    """The kernels and the plain passes, on the same numbers."""
    x, dy, _, layout = inputs((3, 5, 7, 7), 1)
    mean, var = eager.moments(x, layout)
    hi, lo, got = launch.moments(x, 1)
    torch.testing.assert_close(hi.double() + lo, mean.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got, var)
    scale, shift = torch.randn_like(hi), torch.randn_like(hi)
    y = launch.apply(x, torch.stack([hi, scale, shift]), 1)
    torch.testing.assert_close(y, eager.apply(x, hi, scale, shift, layout))
    torch.testing.assert_close(
        tuple(launch.sums(dy, x, hi[None], 1)), eager.reduce(dy, x, hi, layout), rtol=1e-5, atol=1e-5
    )


def test_every_output_is_written():
    """torch.empty holds NaN in these tests: nothing may be left of it, and NaN in x must get through."""
    x, dy, _, _ = inputs((3, 5, 7, 7), 1)
    assert torch.empty(3).isnan().all()
    x[1, 2, 3, 4] = float("nan")
    stats = launch.moments(x, 1)
    assert stats[:, 1, 2].isnan().all()
    assert stats.isnan().sum() == 3
    affine = torch.ones(3, 3, 5)
    assert launch.apply(x, affine, 1, "relu").isnan().sum() == 1
    assert launch.sums(dy, x, affine, 1).isnan().sum() == 1


def test_gradients_in_another_layout():
    """Expanded, transposed and channels_last gradients give what a dense one gives."""
    x, _, _, _ = inputs((2, 4, 6, 5), 1)
    affine = torch.randn(3, 2, 4)
    dy = torch.randn(2, 4, 6, 5)
    expected = launch.sums(dy, x, affine, 1), launch.combine(dy, x, affine, None, 1)[0]
    other = dy.contiguous(memory_format=LAST)
    assert torch.equal(launch.sums(other, x, affine, 1), expected[0])
    assert torch.equal(launch.combine(other, x, affine, None, 1)[0], expected[1])
    one = torch.ones(()).expand(2, 4, 6, 5)
    assert torch.equal(launch.sums(one, x, affine, 1)[0], torch.full((2, 4), 30.0))


@pytest.mark.parametrize("algebra", ["of instances", "of a layer"])
def test_a_gradient_in_another_layout_is_copied_once(algebra):
    """Two passes read it, each of which would make a copy of its own."""
    x = torch.randn(2, 4, 6, 5, requires_grad=True)
    if algebra == "of instances":
        y = normalize(x, lambda m: Affine(m.mean, (m.var + 1e-5).rsqrt()), backend="triton")
    else:
        layer = lightning_norm.create("sn", 4)
        layer.backend = "triton"
        y = layer(x)
    dy = torch.randn(2, 6, 5, 4).movedim(-1, 1)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    # Without acc_events torch 2.11 warns that the events of earlier cycles are gone.
    with torch.profiler.profile(activities=cpu, record_shapes=True, acc_events=True) as profile:
        y.backward(dy)
    copies = [e for e in profile.events() if e.name == "aten::copy_" and e.input_shapes[0] == list(x.shape)]
    assert len(copies) == 1


@triton.jit
def offsets(out, row, sample, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Where the row kernels and the convolution's tiles would read, far into a tensor that nobody allocates."""
    size = tl.cast(size, tl.int32)
    lane = tl.arange(0, ROWS)
    row, piece, units = tl.cast(row, tl.int64), size, tl.cast(1 << 40, tl.int64)
    span = row_span(row, size, piece, tl.program_id(0), units, 8, ROWS)
    tl.store(out + lane, span[0] + span[2])
    shape = Shape(tl.cast(1 << 20, tl.int32), tl.cast(64, tl.int32), size, 7, 7)
    place = tile_lanes(tl.cast(sample, tl.int32), 0, 0, size, shape, Compiled(1, True, 3, 3, 9, ROWS, BLOCK))
    tl.store(out + ROWS + lane[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], place.origin + place.lane)


def test_offsets_beyond_32_bits():
    out = torch.zeros(4 + 4 * 8, dtype=torch.int64)
    offsets[(1,)](out, (1 << 33) // 49, 3 << 18, 49, ROWS=4, BLOCK=8)
    rows = ((1 << 33) // 49 + torch.arange(4)) * 49
    assert torch.equal(out[:4], rows)
    assert torch.equal(out[4:].view(4, 8), (3 << 18) * 49 * 64 + torch.arange(4)[:, None] * 64 + torch.arange(8))
    assert out.min() > 1 << 31


def test_row_of_every_element():
    """The multiplication that replaces a division, over all it is used for."""
    for size in [*range(1, 70), 196, 784, 1023, 1024, 2047]:
        t = torch.arange(launch.TILE + size)
        assert torch.equal((t * 4 * launch.magic(size)) >> 32, t // size)
        assert launch.magic(size) < 1 << 31


def test_the_launch_for_trial():
    trial.launch(torch.device("cpu"))

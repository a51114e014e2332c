"""Tensors of more than 2^31 elements: memory that nobody touches but at both ends, and the programs of both ends."""

import itertools

import pytest
import torch
from triton.runtime import interpreter

from lightning_norm.kernels.arguments import DxAffine, affine_in
from lightning_norm.kernels.depthwise import backward as depthwise_backward
from lightning_norm.kernels.depthwise import forward as depthwise_forward
from lightning_norm.kernels.depthwise import launch as depthwise_launch
from lightning_norm.kernels.elementwise import backward as elementwise_backward
from lightning_norm.kernels.elementwise import launch as elementwise_launch
from lightning_norm.kernels.grid import TILE, cdiv, grid_of
from lightning_norm.kernels.passes import backward, forward, launch
from lightning_norm.kernels.per_channel import condensation

BEYOND = (1 << 31) + 4096
FEW, ENDS = 64, 2
"""Grids longer than ``FEW`` run their first and last ``ENDS`` programs along that axis; loops are shorter than that."""


@pytest.fixture(autouse=True)
def _both_ends_only(monkeypatch):
    monkeypatch.undo()  # torch.empty as it is: filling fresh memory would touch it
    for module in (
        condensation,
        forward,
        backward,
        depthwise_forward,
        depthwise_backward,
        elementwise_backward,
    ):  # loops of a kernel are not its grid
        monkeypatch.setattr(module, "range", range, raising=False)
    monkeypatch.setattr(interpreter, "range", ends, raising=False)
    restore = interpreter.GridExecutor._restore_args_dev
    assert callable(restore)
    # on a CPU it copies each storage onto itself
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)


def ends(*args):
    programs = range(*args)
    return programs if len(programs) <= FEW else itertools.chain(programs[:ENDS], programs[-ENDS:])


def huge(shape, last=False, filled=1 << 17):
    """A bfloat16 tensor of random numbers at both ends, and of zeros that take no memory in between."""
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, memory_format=form)
    assert x.numel() > 1 << 31
    flat = x.as_strided((x.numel(),), (1,))
    for part in (flat[:filled], flat[-filled:]):
        part.copy_(torch.randn(filled))
    return x


def numbers(k, n, c):
    """(k, N, C) of random numbers."""
    return torch.randn(k, n, c)


def compare(got, wanted, start, tolerance=2.0**-7):
    """Compare what was written, at least the very end, with what should be there."""
    written = got != 0
    assert written.reshape(-1)[0 if start else -1], "the end was not written"
    assert written.sum() >= min(1000, got.numel())
    error = (got.double() - wanted)[written].norm() / wanted[written].norm()
    assert error < tolerance


def shapes():
    for size in (49, 1030, 3001):  # many rows to a tile; each element finds its row; two rows at most
        yield pytest.param((cdiv(BEYOND, 8 * size), 8, size, 1), False, id=f"rows of {size}")
    yield pytest.param((cdiv(BEYOND, 64 * 49), 64, 7, 7), True, id="columns")
    yield pytest.param((cdiv(BEYOND, 3 * 1024), 3, 32, 32), True, id="columns, folded")


@pytest.mark.parametrize(("shape", "last"), list(shapes()))
def test_passes(shape, last):
    n, c = shape[:2]
    x, dy = huge(shape, last), huge(shape, last)
    grid = grid_of(x, 1)
    assert grid.columns == last
    affine, dx_affine = numbers(3, n, c), numbers(2, n, c)
    hi, lo, var = launch.moments(x, 1)
    total, dot = launch.sums(dy, x, affine, 1)
    y = launch.apply(x, affine, 1)
    dx, _ = launch.combine(dy, x, affine, dx_affine, 1)
    for i in (0, n - 1):
        wide, g = x[i].double(), dy[i].double()
        k, a, b = affine[:, i, :, None, None].double().unbind(0)
        e, s = dx_affine[:, i, :, None, None].double().unbind(0)
        u = wide - k
        channels = slice(None) if last else slice(0, 1) if i == 0 else slice(c - 1, c)
        for got, want in (
            (hi[i].double() + lo[i], wide.mean((1, 2))),
            (var[i], wide.var((1, 2), correction=0)),
            (total[i], g.sum((1, 2))),
            (dot[i], (g * u).sum((1, 2))),
        ):
            torch.testing.assert_close(got[channels].double(), want[channels], rtol=1e-4, atol=1e-3)
        compare(y[i], a * u + b, i == 0)
        compare(dx[i], a * g + e + s * u, i == 0)


def test_condensation():
    """The sum over samples of x / norm, squared and summed over the positions of a program."""
    n, length = 3, cdiv(BEYOND, 2 * TILE) * TILE  # the last sample begins beyond
    x = torch.empty(n, length, dtype=torch.bfloat16)
    assert x.numel() > 1 << 31
    for i, part in itertools.product(range(n), (slice(0, 4 * TILE), slice(-4 * TILE, None))):
        x[i, part] = torch.randn(4 * TILE).bfloat16()
    inverse, jobs = torch.rand(n), cdiv(length, TILE)
    sums = torch.zeros(jobs)
    condensation.directions[(jobs,)](x, inverse, sums, n, length // 8, ALIGN=8, BLOCK=TILE, num_warps=4)
    for job in (0, 1, jobs - 2, jobs - 1):
        block = x[:, job * TILE : (job + 1) * TILE].double()
        torch.testing.assert_close(sums[job].double(), (inverse.double() @ block).square().sum(), rtol=1e-4, atol=0)


class Nothing:
    """In place of a kernel."""

    def __getitem__(self, grid):
        return lambda *a, **k: None


@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels last"])
def test_convolution(last, monkeypatch):
    n, c, h, w = shape = (cdiv(BEYOND, 64 << 12), 64, 64, 64)
    x, dy = (huge(shape, last, c * h * w) for _ in range(2))
    affine, dx_affine, kernel, bias = numbers(3, n, c), numbers(2, n, c), torch.randn(c, 1, 3, 3), torch.randn(c)
    convolve = torch.nn.functional.conv2d
    y = depthwise_launch.apply_depthwise(x, affine, kernel, bias)
    s, dx = depthwise_launch.stencil_of(x, 9), torch.empty_like(x)
    depthwise_backward.depthwise_combine[s.grid](
        dy,
        x,
        dx,
        kernel,
        affine_in(affine),
        DxAffine(*dx_affine),
        *s.shape,
        PLAIN=False,
        num_warps=4,
        FLAGS=s.compiled(kernel),
    )
    monkeypatch.setattr(depthwise_launch, "BUSY", 1 << 20)  # one sample to a program, and short pieces
    monkeypatch.setattr(depthwise_launch, "join_taps", Nothing())
    (total, dot), s, _, _ = depthwise_launch.sum_parts(dy, x, affine, kernel)
    total, dot = (t.view(s.pieces, n, c) for t in (total, dot))
    assert s.repeat == 1
    for i, channel in ((0, 0), (n - 1, c - 1)):
        wide, g = x[i : i + 1].double(), dy[i : i + 1].double()
        k, a, b = affine[:, i, :, None, None].double().unbind(0)
        e, slope = dx_affine[:, i, :, None, None].double().unbind(0)
        u = wide - k
        compare(y[i], convolve(a * u + b, kernel.double(), bias.double(), padding=1, groups=c)[0], i == 0)
        back = torch.nn.functional.conv_transpose2d(g, kernel.double(), padding=1, groups=c)
        compare(dx[i], (a * back + e + slope * u)[0], i == 0)
        # what dy at the positions of a piece sends back through the taps, in the map alone
        piece = slice(0, s.piece) if i == 0 else slice((s.pieces - 1) * s.piece, None)
        omega = convolve(torch.ones_like(wide), kernel.double(), padding=1, groups=c)
        around = convolve(u, kernel.double(), padding=1, groups=c)
        for got, factor in ((total, omega), (dot, around)):
            want = (g * factor).flatten(2)[0, channel, piece].sum()
            torch.testing.assert_close(got[0 if i == 0 else -1, i, channel].double(), want, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("shape", "last"), list(shapes()))
def test_functions_of_each_element(shape, last, monkeypatch):
    n, c = shape[:2]
    x, dy = huge(shape, last), huge(shape, last)
    weight, bias, alpha = torch.randn(c), torch.randn(c), torch.tensor([0.7])
    monkeypatch.setattr(elementwise_launch, "BUSY", 1 << 20)  # few tiles to a program
    monkeypatch.setattr(elementwise_launch, "join_elementwise", Nothing())
    y = elementwise_launch.normalize(x, None, (weight, bias, alpha, None), 1, "tanh", "none")
    dx, _, _ = elementwise_launch.gradients(dy, x, None, (weight, bias, alpha, None), 1, "tanh", "none", True)
    gamma, beta = (t[:, None, None].double() for t in (weight, bias))
    for i in (0, n - 1):
        f = (0.7 * x[i].double()).tanh()
        compare(y[i], gamma * f + beta, i == 0)
        compare(dx[i], 0.7 * gamma * dy[i].double() * (1 - f.square()), i == 0)

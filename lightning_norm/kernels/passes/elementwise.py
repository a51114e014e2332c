"""Device code: one read of x (and dy) that writes a tensor like it.

*Flat*: x is (rows, size), a row per (sample, channel), and a program takes BLOCK elements wherever rows begin, so every
load and store is of 16 bytes. Where rows are longer than BLOCK it meets two of them at most and selects; otherwise each
element finds its row by a multiplication (``magic``), and the coefficients come from the cache. *Columns*: x is
(samples, size, channels), a program takes ROWS x BLOCK of one sample.

Both run from the end of x to its start: the pass before went the other way, and what it read last is still in the L2.
"""

import triton
import triton.language as tl


@triton.jit
def activation(z, ACT: tl.constexpr):
    """0: nothing, 1: ReLU, 2: SiLU. NaN stays NaN."""
    if ACT == 1:
        z = tl.where(z <= 0.0, 0.0, z)
    if ACT == 2:
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def activation_grad(g, z, ACT: tl.constexpr):
    """The gradient before the activation, from that behind it; the mask is rebuilt from z."""
    if ACT == 1:
        g = tl.where(z <= 0.0, 0.0, g)
    if ACT == 2:
        s = 1.0 / (1.0 + tl.exp(-z))
        g = g * (s * (1.0 + z * (1.0 - s)))
    return g


@triton.jit
def flat_lanes(units, size, magic, ALIGN: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """A program's origin, lanes, mask, first row, and each lane's row counted from it (a Boolean where WIDE)."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    origin = pid.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    left = tl.minimum(units - origin // ALIGN, BLOCK).to(tl.int32) * ALIGN
    row = origin // size
    t = (origin - row * size).to(tl.int32) + lane
    if WIDE:
        which = t >= size
    else:
        which = tl.umulhi((t * 4).to(tl.uint32), magic.to(tl.uint32)).to(tl.int32)
    return origin, lane, lane < left, row, which


@triton.jit
def of_row(coefficient, row, rows, which, keep, WIDE: tl.constexpr):
    """A coefficient of each lane's row."""
    if WIDE:
        value = tl.where(which, tl.load(coefficient + tl.minimum(row + 1, rows - 1)), tl.load(coefficient + row))
    else:
        value = tl.load(coefficient + row + which, mask=keep, other=0.0)
    return value


@triton.jit
def apply_flat(
    x, residual, y, pivot, scale, offset, rows, size, units, magic, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Y = act(scale * (x - pivot) + offset + residual)."""
    rows, size, units = tl.cast(rows, tl.int64), tl.cast(size, tl.int32), tl.cast(units, tl.int64)
    origin, lane, keep, row, which = flat_lanes(units, size, tl.cast(magic, tl.int32), ALIGN, BLOCK, WIDE)
    u = tl.load(x + origin + lane, mask=keep, other=0.0).to(tl.float32) - of_row(pivot, row, rows, which, keep, WIDE)
    z = tl.fma(of_row(scale, row, rows, which, keep, WIDE), u, of_row(offset, row, rows, which, keep, WIDE))
    if RESIDUAL:
        z += tl.load(residual + origin + lane, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + origin + lane, activation(z, ACT).to(y.dtype.element_ty), mask=keep)


@triton.jit
def combine_flat(
    dy, x, residual, dx, dresidual, pivot, scale, offset, constant, slope, rows, size, units, magic,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """Dx = scale * g + constant + slope * (x - pivot), or scale * g alone if PLAIN; g is dy before the activation."""
    rows, size, units = tl.cast(rows, tl.int64), tl.cast(size, tl.int32), tl.cast(units, tl.int64)
    origin, lane, keep, row, which = flat_lanes(units, size, tl.cast(magic, tl.int32), ALIGN, BLOCK, WIDE)
    g = tl.load(dy + origin + lane, mask=keep, other=0.0).to(tl.float32)
    a = of_row(scale, row, rows, which, keep, WIDE)
    u = g
    if ACT != 0 or not PLAIN:
        u = tl.load(x + origin + lane, mask=keep, other=0.0).to(tl.float32) - of_row(pivot, row, rows, which, keep, WIDE)  # noqa: E501  # fmt: skip
    if ACT != 0:
        z = tl.fma(a, u, of_row(offset, row, rows, which, keep, WIDE))
        if RESIDUAL:
            z += tl.load(residual + origin + lane, mask=keep, other=0.0).to(tl.float32)
        g = activation_grad(g, z, ACT)
    if RESIDUAL:
        tl.store(dresidual + origin + lane, g.to(dresidual.dtype.element_ty), mask=keep)
    d = a * g
    if not PLAIN:
        d = tl.fma(a, g, tl.fma(of_row(slope, row, rows, which, keep, WIDE), u, of_row(constant, row, rows, which, keep, WIDE)))  # noqa: E501  # fmt: skip
    tl.store(dx + origin + lane, d.to(dx.dtype.element_ty), mask=keep)


@triton.jit
def column_lanes(
    size, units, blocks, true_channels, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """A program's origin, lanes, mask, and the (N, C) index of each of its channels with its mask."""
    job = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    n = job // blocks
    begin = (job % blocks).to(tl.int32) * ROWS
    channels = units * ALIGN
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, ROWS)
    at = n * channels + c
    if FOLD > 1:
        at = n * true_channels + c % true_channels
    keep = (s[:, None] < size - begin) & (c[None, :] < channels)
    return (n * size + begin) * channels, s[:, None] * channels + c[None, :], keep, at, c < channels


@triton.jit
def apply_columns(
    x, residual, y, pivot, scale, offset, size, units, blocks, true_channels, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, FOLD: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Y = act(scale * (x - pivot) + offset + residual)."""
    size, units = tl.cast(size, tl.int32), tl.cast(units, tl.int32)
    origin, lane, keep, at, own = column_lanes(size, units, blocks, true_channels, ALIGN, ROWS, BLOCK, FOLD)
    k, a = tl.load(pivot + at, mask=own, other=0.0)[None, :], tl.load(scale + at, mask=own, other=0.0)[None, :]
    b = tl.load(offset + at, mask=own, other=0.0)[None, :]
    z = tl.fma(a, tl.load(x + origin + lane, mask=keep, other=0.0).to(tl.float32) - k, b)
    if RESIDUAL:
        z += tl.load(residual + origin + lane, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + origin + lane, activation(z, ACT).to(y.dtype.element_ty), mask=keep)


@triton.jit
def combine_columns(
    dy, x, residual, dx, dresidual, pivot, scale, offset, constant, slope, size, units, blocks, true_channels,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Dx = scale * g + constant + slope * (x - pivot), or scale * g alone if PLAIN; g is dy before the activation."""
    size, units = tl.cast(size, tl.int32), tl.cast(units, tl.int32)
    origin, lane, keep, at, own = column_lanes(size, units, blocks, true_channels, ALIGN, ROWS, BLOCK, FOLD)
    g = tl.load(dy + origin + lane, mask=keep, other=0.0).to(tl.float32)
    a = tl.load(scale + at, mask=own, other=0.0)[None, :]
    u = g
    if ACT != 0 or not PLAIN:
        k = tl.load(pivot + at, mask=own, other=0.0)[None, :]
        u = tl.load(x + origin + lane, mask=keep, other=0.0).to(tl.float32) - k
    if ACT != 0:
        z = tl.fma(a, u, tl.load(offset + at, mask=own, other=0.0)[None, :])
        if RESIDUAL:
            z += tl.load(residual + origin + lane, mask=keep, other=0.0).to(tl.float32)
        g = activation_grad(g, z, ACT)
    if RESIDUAL:
        tl.store(dresidual + origin + lane, g.to(dresidual.dtype.element_ty), mask=keep)
    d = a * g
    if not PLAIN:
        e = tl.load(constant + at, mask=own, other=0.0)[None, :]
        d = tl.fma(a, g, tl.fma(tl.load(slope + at, mask=own, other=0.0)[None, :], u, e))
    tl.store(dx + origin + lane, d.to(dx.dtype.element_ty), mask=keep)

"""BACKWARD."""

import triton
import triton.language as tl

from lightning_norm.kernels.passes.forward import column_lanes, flat_lanes, of_row, row_span


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
def products(dy, x, residual, at, loaded, keep, pivot, scale, offset, ACT: tl.constexpr, RESIDUAL: tl.constexpr):
    """One tile's g and g * (x - pivot), 0 outside ``keep``."""
    g = tl.load(dy + at, mask=loaded, other=0.0).to(tl.float32)
    u = tl.load(x + at, mask=loaded, other=0.0).to(tl.float32) - pivot
    if ACT != 0:
        z = tl.fma(scale, u, offset)
        if RESIDUAL:
            z += tl.load(residual + at, mask=loaded, other=0.0).to(tl.float32)
        g = activation_grad(g, z, ACT)
    return tl.where(keep, g, 0.0), tl.where(keep, g * u, 0.0)


@triton.jit
def sums_rows(
    dy, x, residual, pivot, scale, offset, total, dot, rows, size, units, piece,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g * (x - pivot) over each piece of each row; g is dy before the activation."""
    rows, size, units, piece = tl.cast(rows, tl.int64), tl.cast(size, tl.int32), tl.cast(units, tl.int64), tl.cast(piece, tl.int32)  # noqa: E501  # fmt: skip
    row, p = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1)
    r = tl.arange(0, ROWS)
    inside = row + r < rows
    origin, base, start, end, stop = row_span(row, size, piece, p, units, ALIGN, ROWS)
    x += origin
    dy += origin
    if RESIDUAL:
        residual += origin
    k = tl.load(pivot + row + r, mask=inside, other=0.0)[:, None]
    a, b = k, k
    if ACT != 0:
        a = tl.load(scale + row + r, mask=inside, other=0.0)[:, None]
        b = tl.load(offset + row + r, mask=inside, other=0.0)[:, None]
    lane = base[:, None] + tl.arange(0, BLOCK)[None, :]
    keep = (lane >= start[:, None]) & (lane < end[:, None])
    g, gu = products(dy, x, residual, lane, lane < stop[:, None], keep, k, a, b, ACT, RESIDUAL)
    if LOOP:
        for first in range(BLOCK, piece + ALIGN - 1, BLOCK):
            at = lane + first
            h, hu = products(dy, x, residual, at, at < stop[:, None], at < end[:, None], k, a, b, ACT, RESIDUAL)
            g += h
            gu += hu
    tl.store(total + p * rows + row + r, tl.sum(g, 1), mask=inside)
    tl.store(dot + p * rows + row + r, tl.sum(gu, 1), mask=inside)


@triton.jit
def sums_columns(
    dy, x, residual, pivot, scale, offset, total, dot, size, units, piece, pieces, true_channels,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g * (x - pivot) over each piece of each column; g is dy before the activation."""
    size, units, piece = tl.cast(size, tl.int32), tl.cast(units, tl.int32), tl.cast(piece, tl.int32)
    job = tl.program_id(0).to(tl.int64)
    begin = (job % pieces).to(tl.int32) * piece
    count = tl.minimum(piece, size - begin)
    channels = units * ALIGN
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, ROWS)
    origin = (job // pieces * size + begin) * channels
    at = job // pieces * channels + c
    if FOLD > 1:
        at = job // pieces * true_channels + c % true_channels
    x += origin
    dy += origin
    if RESIDUAL:
        residual += origin
    k = tl.load(pivot + at, mask=c < channels, other=0.0)[None, :]
    a, b = k, k
    if ACT != 0:
        a = tl.load(scale + at, mask=c < channels, other=0.0)[None, :]
        b = tl.load(offset + at, mask=c < channels, other=0.0)[None, :]
    lane = s[:, None] * channels + c[None, :]
    keep = (s[:, None] < count) & (c[None, :] < channels)
    g, gu = products(dy, x, residual, lane, keep, keep, k, a, b, ACT, RESIDUAL)
    for first in range(ROWS, count, ROWS):
        x += ROWS * channels.to(tl.int64)
        dy += ROWS * channels.to(tl.int64)
        if RESIDUAL:
            residual += ROWS * channels.to(tl.int64)
        keep = (s[:, None] < count - first) & (c[None, :] < channels)
        h, hu = products(dy, x, residual, lane, keep, keep, k, a, b, ACT, RESIDUAL)
        g += h
        gu += hu
    tl.store(total + job * channels + c, tl.sum(g, 0), mask=c < channels)
    tl.store(dot + job * channels + c, tl.sum(gu, 0), mask=c < channels)


@triton.jit
def read_sum(t, at, keep, pieces, stride, MERGE: tl.constexpr):
    """A sum, its pieces added up."""
    total = tl.load(t + at, mask=keep, other=0.0)
    if MERGE:
        for p in range(1, pieces):
            total += tl.load(t + at + p * stride, mask=keep, other=0.0)
    return total


@triton.jit
def join_sums(total, dot, out, number, channels, pieces, sample_stride, stride, BLOCK: tl.constexpr):
    """Join the pieces into ``out``, (2, samples * channels)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = i < number
    at = i // channels * sample_stride + i % channels
    tl.store(out + i, read_sum(total, at, keep, pieces, stride, True), mask=keep)
    tl.store(out + number + i, read_sum(dot, at, keep, pieces, stride, True), mask=keep)


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
def combine_columns(
    dy, x, residual, dx, dresidual, pivot, scale, offset, constant, slope, size, units, blocks, true_channels,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Dx = scale * g + constant + slope * (x - pivot), or scale * g alone if PLAIN; g is dy before the activation."""
    size, units = tl.cast(size, tl.int32), tl.cast(units, tl.int32)
    origin, lane, keep, at, channel_mask = column_lanes(size, units, blocks, true_channels, ALIGN, ROWS, BLOCK, FOLD)
    g = tl.load(dy + origin + lane, mask=keep, other=0.0).to(tl.float32)
    a = tl.load(scale + at, mask=channel_mask, other=0.0)[None, :]
    u = g
    if ACT != 0 or not PLAIN:
        k = tl.load(pivot + at, mask=channel_mask, other=0.0)[None, :]
        u = tl.load(x + origin + lane, mask=keep, other=0.0).to(tl.float32) - k
    if ACT != 0:
        z = tl.fma(a, u, tl.load(offset + at, mask=channel_mask, other=0.0)[None, :])
        if RESIDUAL:
            z += tl.load(residual + origin + lane, mask=keep, other=0.0).to(tl.float32)
        g = activation_grad(g, z, ACT)
    if RESIDUAL:
        tl.store(dresidual + origin + lane, g.to(dresidual.dtype.element_ty), mask=keep)
    d = a * g
    if not PLAIN:
        e = tl.load(constant + at, mask=channel_mask, other=0.0)[None, :]
        d = tl.fma(a, g, tl.fma(tl.load(slope + at, mask=channel_mask, other=0.0)[None, :], u, e))
    tl.store(dx + origin + lane, d.to(dx.dtype.element_ty), mask=keep)

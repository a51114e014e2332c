"""Device code: one read of x (and dy) that leaves a few numbers per (sample, channel).

Two shapes. *Rows*: x is (rows, size), a row per (sample, channel), contiguous. *Columns*: x is (samples, size,
channels), channels contiguous. Each program leaves the numbers of one piece of its rows or columns; whoever reads them
joins the pieces, always in the same order: no atomics.

Rows begin anywhere (49 half numbers are 98 bytes), and a load of 16 bytes must not. So a tile begins at the last
multiple of ALIGN elements before its row, and what belongs to the neighbours is dropped after the load.

Sums are taken around a pivot, the mean of the program's first tile: exact two-pass for a row of one tile.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.passes.elementwise import activation_grad


@triton.jit
def row_span(row, size, piece, p, units, ALIGN: tl.constexpr, ROWS: tl.constexpr):
    """Where a program's rows lie: (origin, int64 scalar) and, counted from it, base, start, end, and end of loading."""
    first = row * size + p * piece.to(tl.int64)
    unit = first // ALIGN
    shift = (first - unit * ALIGN).to(tl.int32)
    start = shift + tl.arange(0, ROWS) * size
    end = start + tl.minimum(piece, size - p * piece)
    left = tl.minimum(units - unit, 1 << 26).to(tl.int32)  # units in the tensor, so that nothing behind it is read
    base = start // ALIGN * ALIGN
    stop = tl.minimum((end + ALIGN - 1) // ALIGN, left) * ALIGN
    return unit * ALIGN, base, start, end, stop


@triton.jit
def moments_rows(
    x, hi, lo, var, rows, size, units, piece, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    """Mean, as hi + lo, and biased variance of each piece of each row, (pieces, rows) each."""
    rows, size, units, piece = tl.cast(rows, tl.int64), tl.cast(size, tl.int32), tl.cast(units, tl.int64), tl.cast(piece, tl.int32)  # noqa: E501  # fmt: skip
    row, p = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1)
    origin, base, start, end, stop = row_span(row, size, piece, p, units, ALIGN, ROWS)
    x += origin
    lane = base[:, None] + tl.arange(0, BLOCK)[None, :]
    keep = (lane >= start[:, None]) & (lane < end[:, None])
    v = tl.load(x + lane, mask=lane < stop[:, None], other=0.0).to(tl.float32)
    seen = tl.minimum(base + BLOCK, end) - start
    pivot = tl.sum(tl.where(keep, v, 0.0), 1) / seen.to(tl.float32)
    total = tl.where(keep, v - pivot[:, None], 0.0)
    square = total * total
    if LOOP:
        for first in range(BLOCK, piece + ALIGN - 1, BLOCK):
            at = lane + first
            v = tl.load(x + at, mask=at < stop[:, None], other=0.0).to(tl.float32)
            u = tl.where(at < end[:, None], v - pivot[:, None], 0.0)
            total += u
            square += u * u
    leave_moments(
        hi, lo, var, p * rows + row + tl.arange(0, ROWS), row + tl.arange(0, ROWS) < rows,
        pivot, tl.sum(total, 1), tl.sum(square, 1), (end - start).to(tl.float32),
    )  # fmt: skip


@triton.jit
def moments_columns(
    x, hi, lo, var, size, units, piece, pieces, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Mean, as hi + lo, and biased variance of each piece of each column, (samples, pieces, channels) each."""
    size, units, piece = tl.cast(size, tl.int32), tl.cast(units, tl.int32), tl.cast(piece, tl.int32)
    job = tl.program_id(0).to(tl.int64)
    begin = (job % pieces).to(tl.int32) * piece
    count = tl.minimum(piece, size - begin)
    channels = units * ALIGN
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, ROWS)
    x += (job // pieces * size + begin) * channels
    lane = s[:, None] * channels + c[None, :]
    keep = (s[:, None] < count) & (c[None, :] < channels)
    v = tl.load(x + lane, mask=keep, other=0.0).to(tl.float32)
    pivot = tl.sum(v, 0) / tl.minimum(count, ROWS).to(tl.float32)
    total = tl.where(keep, v - pivot[None, :], 0.0)
    square = total * total
    for first in range(ROWS, count, ROWS):
        x += ROWS * channels.to(tl.int64)
        keep = (s[:, None] < count - first) & (c[None, :] < channels)
        v = tl.load(x + lane, mask=keep, other=0.0).to(tl.float32)
        u = tl.where(keep, v - pivot[None, :], 0.0)
        total += u
        square += u * u
    leave_moments(
        hi, lo, var, job * channels + c, c < channels, pivot, tl.sum(total, 0), tl.sum(square, 0), count.to(tl.float32)
    )


@triton.jit
def leave_moments(hi, lo, var, at, keep, pivot, total, square, count):
    """Store mean = hi + lo, hi being the mean rounded to float32, and the variance; NaN stays NaN."""
    rest = tl.div_rn(total, count)
    m2 = square - total * rest
    rounded = pivot + rest
    tl.store(hi + at, rounded, mask=keep)
    tl.store(lo + at, rest - (rounded - pivot), mask=keep)
    tl.store(var + at, tl.div_rn(tl.where(m2 < 0.0, 0.0, m2), count), mask=keep)


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
def read_moments(hi, lo, var, at, keep, pieces, stride, piece, size, fold, MERGE: tl.constexpr):
    """Mean, as hi + lo, and biased variance, the pieces joined by the law of total variance."""
    k = tl.load(hi + at, mask=keep, other=0.0)
    d = tl.load(lo + at, mask=keep, other=0.0)
    v = tl.load(var + at, mask=keep, other=0.0)
    if MERGE:
        share = tl.cast(1.0, tl.float32) / (size * fold)
        n = tl.minimum(piece, size).to(tl.float32)
        mean = d * (n * share)
        for p in range(1, pieces):
            n = tl.minimum(piece, size - p // fold * piece).to(tl.float32)
            e = tl.load(hi + at + p * stride, mask=keep, other=0.0) - k
            mean += (e + tl.load(lo + at + p * stride, mask=keep, other=0.0)) * (n * share)
        n = tl.minimum(piece, size).to(tl.float32)
        v = (v + (d - mean) * (d - mean)) * (n * share)
        for p in range(1, pieces):
            n = tl.minimum(piece, size - p // fold * piece).to(tl.float32)
            e = tl.load(hi + at + p * stride, mask=keep, other=0.0) - k
            e = e + tl.load(lo + at + p * stride, mask=keep, other=0.0) - mean
            v += (tl.load(var + at + p * stride, mask=keep, other=0.0) + e * e) * (n * share)
        rounded = k + mean
        d = mean - (rounded - k)
        k = rounded
    return k, d, v


@triton.jit
def read_sum(t, at, keep, pieces, stride, MERGE: tl.constexpr):
    """A sum, its pieces added up."""
    total = tl.load(t + at, mask=keep, other=0.0)
    if MERGE:
        for p in range(1, pieces):
            total += tl.load(t + at + p * stride, mask=keep, other=0.0)
    return total


@triton.jit
def join_moments(
    hi, lo, var, out, number, channels, pieces, sample_stride, stride, piece, size, fold, BLOCK: tl.constexpr
):
    """Join the pieces into ``out``, (3, samples * channels): hi, lo, variance."""
    piece, size, fold = tl.cast(piece, tl.int32), tl.cast(size, tl.int32), tl.cast(fold, tl.int32)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = i < number
    at = i // channels * sample_stride + i % channels
    k, d, v = read_moments(hi, lo, var, at, keep, pieces, stride, piece, size, fold, True)
    tl.store(out + i, k, mask=keep)
    tl.store(out + number + i, d, mask=keep)
    tl.store(out + 2 * tl.cast(number, tl.int64) + i, v, mask=keep)


@triton.jit
def join_sums(total, dot, out, number, channels, pieces, sample_stride, stride, BLOCK: tl.constexpr):
    """Join the pieces into ``out``, (2, samples * channels)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = i < number
    at = i // channels * sample_stride + i % channels
    tl.store(out + i, read_sum(total, at, keep, pieces, stride, True), mask=keep)
    tl.store(out + number + i, read_sum(dot, at, keep, pieces, stride, True), mask=keep)

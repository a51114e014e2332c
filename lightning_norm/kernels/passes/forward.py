"""Device code: the two forward passes over x. *Moments* reads x once, *apply* reads it again and writes y.

x is read in one of two orders. *Rows*: x is (rows, size), a contiguous row per (sample, channel). *Columns*: x is
(samples, size, channels), channels contiguous. What is per (sample, channel) is (N, C) and contiguous in both.

Moments, one number per (sample, channel) or per piece of it: a long row or column is cut into pieces, one program
reduces each, and whoever reads the numbers joins the pieces, always in the same order. So no atomics, and the same
result in every run. Sums are taken around a pivot, the mean of the program's first tile, so float32 loses nothing at a
large mean; for a row of one tile that is the exact two-pass formula.

Apply in rows runs *flat*: a program takes BLOCK elements wherever rows begin, so that every load and store is of 16
bytes. It runs from the end of x to its start: moments went the other way, and what it read last is still in the cache.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Affine, Layout, Moments


@triton.jit
def zeros(rows: tl.constexpr, block: tl.constexpr):
    """Return a tile of zeros; fields of a constant are no shape for Triton 3.6, where they are arguments."""
    return tl.zeros((rows, block), tl.float32)


@triton.jit
def row_span(row, size, piece, p, units, ALIGN: tl.constexpr, ROWS: tl.constexpr):
    """Return where a program's rows lie.

    Rows begin anywhere (49 half numbers are 98 bytes), and a load of 16 bytes must not. So each row's tile begins at
    the last multiple of ALIGN elements before it, and what belongs to the neighbour is masked after the load.

    Returns the origin (an int64 scalar) and, counted from it in int32 for each row: where loading begins, where the row
    begins and ends, and where loading ends.
    """
    # 64 bits for the program's origin alone: all that is counted from it fits 32.
    first = row * size + p * piece.to(tl.int64)
    # Without a sign a division by a power of two is one instruction.
    unit = (first.to(tl.uint64) // ALIGN).to(tl.int64)
    shift = (first - unit * ALIGN).to(tl.int32)
    start = shift + tl.arange(0, ROWS) * size
    end = start + tl.minimum(piece, size - p * piece)
    # Units that the tensor still has, so that nothing behind its end is read.
    left = tl.minimum(units - unit, 1 << 26).to(tl.int32) * ALIGN
    base = (start.to(tl.uint32) // ALIGN * ALIGN).to(tl.int32)
    stop = tl.minimum(((end + (ALIGN - 1)).to(tl.uint32) // ALIGN * ALIGN).to(tl.int32), left)
    return unit * ALIGN, base, start, end, stop


@triton.jit(do_not_specialize=["rows", "size", "units", "piece"])
def moments_rows(
    x, out: Moments, rows, size, units, piece, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    AVERAGE: tl.constexpr,
):  # fmt: skip
    """Mean, as hi + lo, and biased variance of each piece of each row: (pieces, rows) each.

    mean = k + sum(u) / S and var = (sum u^2 - (sum u)^2 / S) / S with u = x - k. A program takes ROWS rows of one
    piece, BLOCK elements of each at a time; the grid is (blocks of rows, pieces). AVERAGE: the pivot k is one.
    """
    # A size of 1 arrives as a constant, which has no dtype of its own.
    rows, size, units, piece = tl.cast(rows, tl.int64), tl.cast(size, tl.int32), tl.cast(units, tl.int64), tl.cast(piece, tl.int32)  # noqa: E501  # fmt: skip
    # One block of rows, and one piece of each.
    row, p = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1)
    origin, base, start, end, stop = row_span(row, size, piece, p, units, ALIGN, ROWS)
    x += origin
    lane = base[:, None] + tl.arange(0, BLOCK)[None, :]
    # One comparison for both ends: without a sign what lies before the row is behind it as well.
    count = tl.minimum(piece, size - p * piece)
    keep = ((base - start)[:, None] + tl.arange(0, BLOCK)[None, :]).to(tl.uint32) < count.to(tl.uint32)
    v = tl.load(x + lane, mask=lane < stop[:, None], other=0.0).to(tl.float32)
    # The pivot: the first element, which takes no sum, or the mean of the first tile. An element may be sqrt(S)
    # deviations away from the mean, and then digits cancel: those of half precision have fewer than are lost.
    if AVERAGE:
        first_count = tl.minimum(base + BLOCK, end) - start
        pivot = tl.sum(tl.where(keep, v, 0.0), 1) / first_count.to(tl.float32)
    else:
        pivot = tl.load(x + start, mask=start < stop, other=0.0).to(tl.float32)
    total = tl.where(keep, v - pivot[:, None], 0.0)
    square = total * total
    # The rest of a long piece, around the same pivot.
    for first in range(BLOCK, piece + ALIGN - 1, BLOCK):
        at = lane + first
        v = tl.load(x + at, mask=at < stop[:, None], other=0.0).to(tl.float32)
        u = tl.where(at < end[:, None], v - pivot[:, None], 0.0)
        total += u
        square += u * u
    r = row + tl.arange(0, ROWS)
    store_moments(out, p * rows + r, r < rows, pivot, tl.sum(total, 1), tl.sum(square, 1), count)


@triton.jit(do_not_specialize=["size", "units", "piece"])
def moments_columns(
    x, out: Moments, size, units, piece, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    AVERAGE: tl.constexpr,
):  # fmt: skip
    """Mean, as hi + lo, and biased variance of each piece of each column: (samples, pieces, channels) each.

    As ``moments_rows``; a program takes BLOCK channels of one piece of one sample, ROWS positions at a time. The grid
    is (samples, blocks of channels, pieces).
    """
    # Which sample and which piece of it: an axis of the grid each, for a division would take longer than a tile.
    n, p = tl.program_id(0).to(tl.int64), tl.program_id(2)
    begin = p * piece
    count = tl.minimum(piece, size - begin)
    channels = units * ALIGN
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, ROWS)
    x += (n * size + begin) * channels
    lane = s[:, None] * channels + c[None, :]
    keep = (s[:, None] < count) & (c[None, :] < channels)
    v = tl.load(x + lane, mask=keep, other=0.0).to(tl.float32)
    # The pivot: the first position or the mean of the first ROWS, as in rows.
    if AVERAGE:
        pivot = tl.sum(v, 0) / tl.minimum(count, ROWS).to(tl.float32)
    else:
        pivot = tl.load(x + c, mask=c < channels, other=0.0).to(tl.float32)
    total = tl.where(keep, v - pivot[None, :], 0.0)
    square = total * total
    # The rest of the piece: the pointer moves, the offsets within a tile stay in 32 bits.
    for first in range(ROWS, count, ROWS):
        x += ROWS * channels.to(tl.int64)
        keep = (s[:, None] < count - first) & (c[None, :] < channels)
        v = tl.load(x + lane, mask=keep, other=0.0).to(tl.float32)
        u = tl.where(keep, v - pivot[None, :], 0.0)
        total += u
        square += u * u
    at = (n * tl.num_programs(2) + p) * channels + c
    store_moments(out, at, c < channels, pivot, tl.sum(total, 0), tl.sum(square, 0), count)


@triton.jit
def store_moments(out, at, keep, pivot, total, square, count):
    """Store mean = hi + lo, hi being the mean rounded to float32, and the variance.

    ``total`` and ``square`` are the sums of u and u^2, u = x - pivot, over ``count`` elements, the same for all.
    """
    # One division in each program, and not two for each number.
    inverse = tl.cast(1.0, tl.float32) / count.to(tl.float32)
    rest = total * inverse
    # sum (u - rest)^2 = sum u^2 - rest * sum u: u is small, so little cancels.
    m2 = square - total * rest
    # lo is what rounding pivot + rest to float32 has left, exactly, whichever of the two is larger.
    rounded = pivot + rest
    moved = rounded - pivot
    tl.store(out.hi + at, rounded, mask=keep)
    tl.store(out.lo + at, (pivot - (rounded - moved)) + (rest - moved), mask=keep)
    # Rounding may leave a variance slightly below 0, and a NaN stays.
    tl.store(out.var + at, tl.maximum(m2, 0.0, propagate_nan=tl.PropagateNan.ALL) * inverse, mask=keep)


@triton.jit
def layout_of(pieces, sample_stride, stride, piece, size, fold):
    """Return a ``Layout`` of a kernel's integers; one that is 1 may be a constant, which has no dtype of its own."""
    return Layout(
        pieces, sample_stride, stride, tl.cast(piece, tl.int32), tl.cast(size, tl.int32), tl.cast(fold, tl.int32)
    )


@triton.jit
def read_moments(parts, at, keep, layout, MERGE: tl.constexpr):
    """Read mean, as hi + lo, and biased variance, joining the pieces by the law of total variance where MERGE.

    var = sum_p n_p / S (var_p + (mean_p - mean)^2), n_p being the elements of piece p.
    """
    hi, lo, var = parts
    pieces, _, stride, piece, size, fold = layout
    # The first piece, which is the only one without MERGE.
    k = tl.load(hi + at, mask=keep, other=0.0)
    d = tl.load(lo + at, mask=keep, other=0.0)
    v = tl.load(var + at, mask=keep, other=0.0)
    if MERGE:
        # The mean first, as a difference from the first piece's hi. All pieces but the last have ``piece`` elements.
        inverse_size = tl.cast(1.0, tl.float32) / (size * fold)
        n = tl.minimum(piece, size).to(tl.float32)
        mean = d * (n * inverse_size)
        for p in range(1, pieces):
            n = tl.minimum(piece, size - p // fold * piece).to(tl.float32)
            e = tl.load(hi + at + p * stride, mask=keep, other=0.0) - k
            mean += (e + tl.load(lo + at + p * stride, mask=keep, other=0.0)) * (n * inverse_size)
        n = tl.minimum(piece, size).to(tl.float32)
        # Then what each piece's mean is away from it.
        v = (v + (d - mean) * (d - mean)) * (n * inverse_size)
        for p in range(1, pieces):
            n = tl.minimum(piece, size - p // fold * piece).to(tl.float32)
            e = tl.load(hi + at + p * stride, mask=keep, other=0.0) - k
            e = e + tl.load(lo + at + p * stride, mask=keep, other=0.0) - mean
            v += (tl.load(var + at + p * stride, mask=keep, other=0.0) + e * e) * (n * inverse_size)
        # Again as hi and what rounding it has left.
        rounded = k + mean
        d = mean - (rounded - k)
        k = rounded
    return k, d, v


@triton.jit(do_not_specialize=["pieces", "piece", "size", "fold"])
def join_moments(
    parts: Moments, out: Moments, number, channels, pieces, sample_stride, stride, piece, size, fold,
    P_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the pieces: hi, lo and variance, (samples * channels) each. As ``read_moments``, but in tiles.

    P_BLOCK pieces of BLOCK numbers at once, so that a hundred pieces are not a hundred waits for the memory.
    """
    layout = layout_of(pieces, sample_stride, stride, piece, size, fold)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = i < number
    at = i // channels * sample_stride + i % channels
    # Means are counted from that of the first piece.
    k = tl.load(parts.hi + at, mask=keep, other=0.0)[None, :]
    inverse_size = tl.cast(1.0, tl.float32) / (layout.size * layout.fold)
    lane = tl.arange(0, P_BLOCK)[:, None]
    mean = tl.zeros((P_BLOCK, BLOCK), tl.float32)
    for first in range(0, pieces, P_BLOCK):
        e, count, _, inside = piece_of(parts, at, keep, first + lane, layout, k)
        mean += tl.where(inside, e * (count * inverse_size), 0.0)
    d = tl.sum(mean, 0)[None, :]
    # Then what each piece's mean is away from it.
    variance = tl.zeros((P_BLOCK, BLOCK), tl.float32)
    for first in range(0, pieces, P_BLOCK):
        e, count, v, inside = piece_of(parts, at, keep, first + lane, layout, k)
        variance += tl.where(inside, (v + (e - d) * (e - d)) * (count * inverse_size), 0.0)
    # Again as hi and what rounding it has left.
    rounded = k + d
    at = i[None, :]
    keep = keep[None, :]
    tl.store(out.hi + at, rounded, mask=keep)
    tl.store(out.lo + at, d - (rounded - k), mask=keep)
    tl.store(out.var + at, tl.sum(variance, 0)[None, :], mask=keep)


@triton.jit
def piece_of(parts, at, keep, p, layout, k):
    """Return the means of some pieces, counted from k, their elements, their variances, and which of them there are."""
    inside = (p < layout.pieces) & keep[None, :]
    count = tl.minimum(layout.piece, layout.size - p // layout.fold * layout.piece).to(tl.float32)
    spot = at[None, :] + p.to(tl.int64) * layout.stride
    e = tl.load(parts.hi + spot, mask=inside, other=0.0) - k + tl.load(parts.lo + spot, mask=inside, other=0.0)
    return e, count, tl.load(parts.var + spot, mask=inside, other=0.0), inside


@triton.jit
def activation(z, ACT: tl.constexpr):
    """Apply the activation: 0 is none, 1 ReLU, 2 SiLU. The comparison is written so that NaN stays NaN."""
    if ACT == 1:
        z = tl.where(z <= 0.0, 0.0, z)
    if ACT == 2:
        # z sigmoid(z); exp overflows to infinity for a very negative z, and the quotient is then 0, as it should be.
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def store_result(z, residual, y, at, keep, ACT: tl.constexpr, RESIDUAL: tl.constexpr):
    """Write y = act(z + residual)."""
    if RESIDUAL:
        z += tl.load(residual + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + at, activation(z, ACT).to(y.dtype.element_ty), mask=keep)


@triton.jit
def flat_lanes(units, size, magic, ALIGN: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Return a program's origin, lanes, mask, first row, and each lane's row counted from that.

    WIDE: rows are longer than BLOCK, so that a program meets two of them at most, and the last result is a Boolean.
    Otherwise a lane finds its row by one multiplication in place of a division, see ``launch.magic``.
    """
    # From the end to the start: what the pass before read last is still in the cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    origin = pid.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    # What is left of x behind the origin, in whole vectors.
    # Position within the first row, and on into the rows behind it.
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
    """Return each lane's coefficient, one per row of x."""
    if WIDE:
        # Two scalar loads and a selection. The next row may lie behind the last one.
        value = tl.where(which, tl.load(coefficient + tl.minimum(row + 1, rows - 1)), tl.load(coefficient + row))
    else:
        value = tl.load(coefficient + row + which, mask=keep, other=0.0)
    return value


@triton.jit
def column_lanes(
    size, units, blocks, true_channels, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """Return a program's origin, lanes and mask, and the (N, C) index of each of its channels with its mask.

    FOLD neighbouring positions are taken for channels where channels are few, so that vectors stay aligned: then
    channel c of the tile is channel c % true_channels of x.
    """
    # From the end to the start, as ``flat_lanes``. Divided in 32 bits: in 64 it would take as long as the tile.
    job = tl.num_programs(0) - 1 - tl.program_id(0)
    sample = job // blocks
    n = sample.to(tl.int64)
    begin = (job - sample * blocks) * ROWS
    channels = units * ALIGN
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, ROWS)
    at = n * channels + c
    if FOLD > 1:
        at = n * true_channels + c % true_channels
    keep = (s[:, None] < size - begin) & (c[None, :] < channels)
    return (n * size + begin) * channels, s[:, None] * channels + c[None, :], keep, at, c < channels


@triton.jit(do_not_specialize=["rows", "size", "units", "magic"])
def apply_flat(
    x, residual, y, affine: Affine, rows, size, units, magic, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y = act(scale * (x - pivot) + offset + residual) for x in rows.

    Each of ``affine`` is (rows,). A program takes BLOCK elements; the grid is (blocks,).
    """
    rows, size, units = tl.cast(rows, tl.int64), tl.cast(size, tl.int32), tl.cast(units, tl.int64)
    origin, lane, keep, row, which = flat_lanes(units, size, tl.cast(magic, tl.int32), ALIGN, BLOCK, WIDE)
    # The pivot is subtracted first, exactly where x is near it; then one rounding in the multiply-add.
    u = tl.load(x + origin + lane, mask=keep, other=0.0).to(tl.float32)
    u -= of_row(affine.pivot, row, rows, which, keep, WIDE)
    a, b = of_row(affine.scale, row, rows, which, keep, WIDE), of_row(affine.offset, row, rows, which, keep, WIDE)
    z = tl.fma(a, u, b)
    store_result(z, residual + origin, y + origin, lane, keep, ACT, RESIDUAL)


@triton.jit(do_not_specialize=["size", "units", "blocks"])
def apply_columns(
    x, residual, y, affine: Affine, size, units, blocks, true_channels, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, FOLD: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y = act(scale * (x - pivot) + offset + residual) for x in columns.

    A program takes ROWS x BLOCK of one sample; the grid is (samples * blocks of rows, blocks of channels).
    """
    size, units = tl.cast(size, tl.int32), tl.cast(units, tl.int32)
    origin, lane, keep, at, channel_mask = column_lanes(size, units, blocks, true_channels, ALIGN, ROWS, BLOCK, FOLD)
    # One coefficient per channel, for all rows of the tile.
    k = tl.load(affine.pivot + at, mask=channel_mask, other=0.0)[None, :]
    a = tl.load(affine.scale + at, mask=channel_mask, other=0.0)[None, :]
    b = tl.load(affine.offset + at, mask=channel_mask, other=0.0)[None, :]
    z = tl.fma(a, tl.load(x + origin + lane, mask=keep, other=0.0).to(tl.float32) - k, b)
    store_result(z, residual + origin, y + origin, lane, keep, ACT, RESIDUAL)

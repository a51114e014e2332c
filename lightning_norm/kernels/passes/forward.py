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
def place(AT, axis: tl.constexpr):
    """Return a program's place on an axis of the grid; in a kernel that calls another, where that one is to be."""
    if AT is None:
        i_at = tl.program_id(axis)
    else:
        i_at = AT[axis]
    return i_at


@triton.jit
def zeros(rows: tl.constexpr, block: tl.constexpr):
    """Return a tile of zeros; fields of a constant are no shape for Triton 3.6, where they are arguments."""
    return tl.zeros((rows, block), tl.float32)


@triton.jit
def row_span(row, size, piece, i_p, units, ALIGN: tl.constexpr, ROWS: tl.constexpr):
    """Return where a program's rows lie.

    Rows begin anywhere (49 half numbers are 98 bytes), and a load of 16 bytes must not. So each row's tile begins at
    the last multiple of ALIGN elements before it, and what belongs to the neighbour is masked after the load.

    Returns the origin (an int64 scalar) and, counted from it in int32 for each row: where loading begins, where the row
    begins and ends, and where loading ends.
    """
    # 64 bits for the program's origin alone: all that is counted from it fits 32.
    first = row * size + i_p * piece.to(tl.int64)
    # Without a sign a division by a power of two is one instruction.
    unit = (first.to(tl.uint64) // ALIGN).to(tl.int64)
    shift = (first - unit * ALIGN).to(tl.int32)
    o_start = shift + tl.arange(0, ROWS) * size  # [ROWS]
    o_end = o_start + tl.minimum(piece, size - i_p * piece)
    # Units that the tensor still has, so that nothing behind its end is read.
    left = tl.minimum(units - unit, 1 << 26).to(tl.int32) * ALIGN
    o_base = (o_start.to(tl.uint32) // ALIGN * ALIGN).to(tl.int32)
    o_stop = tl.minimum(((o_end + (ALIGN - 1)).to(tl.uint32) // ALIGN * ALIGN).to(tl.int32), left)
    return unit * ALIGN, o_base, o_start, o_end, o_stop


@triton.jit(do_not_specialize=["rows", "size", "units", "piece"])
def moments_rows(
    x, out: Moments, rows, size, units, piece, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    AVERAGE: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """Mean, as hi + lo, and biased variance of each piece of each row: (pieces, rows) each.

    mean = k + sum(u) / S and var = (sum u^2 - (sum u)^2 / S) / S with u = x - k. A program takes ROWS rows of one
    piece, BLOCK elements of each at a time; the grid is (blocks of rows, pieces). AVERAGE: the pivot k is one.
    """
    # A size of 1 arrives as a constant, which has no dtype of its own.
    rows, size, units, piece = tl.cast(rows, tl.int64), tl.cast(size, tl.int32), tl.cast(units, tl.int64), tl.cast(piece, tl.int32)  # noqa: E501  # fmt: skip
    # One block of rows, and one piece of each.
    row, i_p = place(AT, 0).to(tl.int64) * ROWS, place(AT, 1)
    origin, o_base, o_start, o_end, o_stop = row_span(row, size, piece, i_p, units, ALIGN, ROWS)
    x += origin
    o_x = o_base[:, None] + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
    # One comparison for both ends: without a sign what lies before the row is behind it as well.
    count = tl.minimum(piece, size - i_p * piece)
    m_x = ((o_base - o_start)[:, None] + tl.arange(0, BLOCK)[None, :]).to(tl.uint32) < count.to(tl.uint32)
    b_x = tl.load(x + o_x, mask=o_x < o_stop[:, None], other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    # The pivot: the first element, which takes no sum, or the mean of the first tile. An element may be sqrt(S)
    # deviations away from the mean, and then digits cancel: those of half precision have fewer than are lost.
    if AVERAGE:
        b_count = tl.minimum(o_base + BLOCK, o_end) - o_start
        b_pivot = tl.sum(tl.where(m_x, b_x, 0.0), 1) / b_count.to(tl.float32)  # [ROWS]
    else:
        b_pivot = tl.load(x + o_start, mask=o_start < o_stop, other=0.0).to(tl.float32)
    b_total = tl.where(m_x, b_x - b_pivot[:, None], 0.0)  # [ROWS, BLOCK]
    b_square = b_total * b_total
    # The rest of a long piece, around the same pivot.
    for first in range(BLOCK, piece + ALIGN - 1, BLOCK):
        o_at = o_x + first
        b_x = tl.load(x + o_at, mask=o_at < o_stop[:, None], other=0.0).to(tl.float32)
        b_u = tl.where(o_at < o_end[:, None], b_x - b_pivot[:, None], 0.0)
        b_total += b_u
        b_square += b_u * b_u
    o_r = row + tl.arange(0, ROWS)
    store_moments(out, i_p * rows + o_r, o_r < rows, b_pivot, tl.sum(b_total, 1), tl.sum(b_square, 1), count)


@triton.jit(do_not_specialize=["size", "units", "piece"])
def moments_columns(
    x, out: Moments, size, units, piece, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    AVERAGE: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """Mean, as hi + lo, and biased variance of each piece of each column: (samples, pieces, channels) each.

    As ``moments_rows``; a program takes BLOCK channels of one piece of one sample, ROWS positions at a time. The grid
    is (samples, blocks of channels, pieces).
    """
    # Which sample and which piece of it: an axis of the grid each, for a division would take longer than a tile.
    i_n, i_p, pieces = place(AT, 0).to(tl.int64), place(AT, 2), pieces_of(AT)
    begin = i_p * piece
    count = tl.minimum(piece, size - begin)
    channels = units * ALIGN
    o_c = place(AT, 1) * BLOCK + tl.arange(0, BLOCK)
    o_s = tl.arange(0, ROWS)
    x += (i_n * size + begin) * channels
    o_x = o_s[:, None] * channels + o_c[None, :]  # [ROWS, BLOCK]
    m_x = (o_s[:, None] < count) & (o_c[None, :] < channels)
    b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    # The pivot: the first position or the mean of the first ROWS, as in rows.
    if AVERAGE:
        b_pivot = tl.sum(b_x, 0) / tl.minimum(count, ROWS).to(tl.float32)  # [BLOCK]
    else:
        b_pivot = tl.load(x + o_c, mask=o_c < channels, other=0.0).to(tl.float32)
    b_total = tl.where(m_x, b_x - b_pivot[None, :], 0.0)  # [ROWS, BLOCK]
    b_square = b_total * b_total
    # The rest of the piece: the pointer moves, the offsets within a tile stay in 32 bits.
    for first in range(ROWS, count, ROWS):
        x += ROWS * channels.to(tl.int64)
        m_x = (o_s[:, None] < count - first) & (o_c[None, :] < channels)
        b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_u = tl.where(m_x, b_x - b_pivot[None, :], 0.0)
        b_total += b_u
        b_square += b_u * b_u
    o_out = (i_n * pieces + i_p) * channels + o_c  # [BLOCK]
    store_moments(out, o_out, o_c < channels, b_pivot, tl.sum(b_total, 0), tl.sum(b_square, 0), count)


@triton.jit
def store_moments(out, o_at, m_at, b_pivot, b_total, b_square, count):
    """Store mean = hi + lo, hi being the mean rounded to float32, and the variance.

    ``b_total`` and ``b_square`` are the sums of u and u^2, u = x - pivot, over ``count`` elements, the same for all.
    """
    # One division in each program, and not two for each number.
    inverse = tl.cast(1.0, tl.float32) / count.to(tl.float32)
    b_rest = b_total * inverse
    # sum (u - rest)^2 = sum u^2 - rest * sum u: u is small, so little cancels.
    b_m2 = b_square - b_total * b_rest
    # lo is what rounding pivot + rest to float32 has left, exactly, whichever of the two is larger.
    b_rounded = b_pivot + b_rest
    b_moved = b_rounded - b_pivot
    tl.store(out.hi + o_at, b_rounded, mask=m_at)
    tl.store(out.lo + o_at, (b_pivot - (b_rounded - b_moved)) + (b_rest - b_moved), mask=m_at)
    # Rounding may leave a variance slightly below 0, and a NaN stays.
    tl.store(out.var + o_at, tl.maximum(b_m2, 0.0, propagate_nan=tl.PropagateNan.ALL) * inverse, mask=m_at)


@triton.jit
def layout_of(pieces, sample_stride, stride, piece, size, fold):
    """Return a ``Layout`` of a kernel's integers; one that is 1 may be a constant, which has no dtype of its own."""
    return Layout(
        pieces, sample_stride, stride, tl.cast(piece, tl.int32), tl.cast(size, tl.int32), tl.cast(fold, tl.int32)
    )


@triton.jit
def read_moments(parts, o_nc, m_nc, layout, MERGE: tl.constexpr):
    """Read mean, as hi + lo, and biased variance, joining the pieces by the law of total variance where MERGE.

    var = sum_p n_p / S (var_p + (mean_p - mean)^2), n_p being the elements of piece p.
    """
    hi, lo, var = parts
    pieces, _, stride, piece, size, fold = layout
    # The first piece, which is the only one without MERGE.
    b_k = tl.load(hi + o_nc, mask=m_nc, other=0.0)
    b_d = tl.load(lo + o_nc, mask=m_nc, other=0.0)
    b_v = tl.load(var + o_nc, mask=m_nc, other=0.0)
    if MERGE:
        # The mean first, as a difference from the first piece's hi. All pieces but the last have ``piece`` elements.
        inverse_size = tl.cast(1.0, tl.float32) / (size * fold)
        n = tl.minimum(piece, size).to(tl.float32)
        b_mean = b_d * (n * inverse_size)
        for i_p in range(1, pieces):
            n = tl.minimum(piece, size - i_p // fold * piece).to(tl.float32)
            b_e = tl.load(hi + o_nc + i_p * stride, mask=m_nc, other=0.0) - b_k
            b_mean += (b_e + tl.load(lo + o_nc + i_p * stride, mask=m_nc, other=0.0)) * (n * inverse_size)
        n = tl.minimum(piece, size).to(tl.float32)
        # Then what each piece's mean is away from it.
        b_v = (b_v + (b_d - b_mean) * (b_d - b_mean)) * (n * inverse_size)
        for i_p in range(1, pieces):
            n = tl.minimum(piece, size - i_p // fold * piece).to(tl.float32)
            b_e = tl.load(hi + o_nc + i_p * stride, mask=m_nc, other=0.0) - b_k
            b_e = b_e + tl.load(lo + o_nc + i_p * stride, mask=m_nc, other=0.0) - b_mean
            b_v += (tl.load(var + o_nc + i_p * stride, mask=m_nc, other=0.0) + b_e * b_e) * (n * inverse_size)
        # Again as hi and what rounding it has left.
        b_rounded = b_k + b_mean
        b_d = b_mean - (b_rounded - b_k)
        b_k = b_rounded
    return b_k, b_d, b_v


@triton.jit(do_not_specialize=["pieces", "piece", "size", "fold"])
def join_moments(
    parts: Moments, out: Moments, number, channels, pieces, sample_stride, stride, piece, size, fold,
    P_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the pieces: hi, lo and variance, (samples * channels) each. As ``read_moments``, but in tiles.

    P_BLOCK pieces of BLOCK numbers at once, so that a hundred pieces are not a hundred waits for the memory.
    """
    layout = layout_of(pieces, sample_stride, stride, piece, size, fold)
    o_nc = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_nc = o_nc < number
    o_at = o_nc // channels * sample_stride + o_nc % channels
    # Means are counted from that of the first piece.
    b_k = tl.load(parts.hi + o_at, mask=m_nc, other=0.0)[None, :]  # [1, BLOCK]
    inverse_size = tl.cast(1.0, tl.float32) / (layout.size * layout.fold)
    o_lane = tl.arange(0, P_BLOCK)[:, None]  # [P_BLOCK, 1]
    b_mean = tl.zeros((P_BLOCK, BLOCK), tl.float32)
    for first in range(0, pieces, P_BLOCK):
        b_e, b_count, _, m_p = piece_of(parts, o_at, m_nc, first + o_lane, layout, b_k)
        b_mean += tl.where(m_p, b_e * (b_count * inverse_size), 0.0)
    b_d = tl.sum(b_mean, 0)[None, :]  # [1, BLOCK]
    # Then what each piece's mean is away from it.
    b_var = tl.zeros((P_BLOCK, BLOCK), tl.float32)
    for first in range(0, pieces, P_BLOCK):
        b_e, b_count, b_v, m_p = piece_of(parts, o_at, m_nc, first + o_lane, layout, b_k)
        b_var += tl.where(m_p, (b_v + (b_e - b_d) * (b_e - b_d)) * (b_count * inverse_size), 0.0)
    # Again as hi and what rounding it has left.
    b_rounded = b_k + b_d
    o_at = o_nc[None, :]
    m_nc = m_nc[None, :]
    tl.store(out.hi + o_at, b_rounded, mask=m_nc)
    tl.store(out.lo + o_at, b_d - (b_rounded - b_k), mask=m_nc)
    tl.store(out.var + o_at, tl.sum(b_var, 0)[None, :], mask=m_nc)


@triton.jit
def piece_of(parts, o_at, m_at, o_p, layout, b_k):
    """Return the means of some pieces, counted from k, their elements, their variances, and which of them there are."""
    m_p = (o_p < layout.pieces) & m_at[None, :]  # [P_BLOCK, BLOCK]
    b_count = tl.minimum(layout.piece, layout.size - o_p // layout.fold * layout.piece).to(tl.float32)  # [P_BLOCK, 1]
    o_spot = o_at[None, :] + o_p.to(tl.int64) * layout.stride
    b_e = tl.load(parts.hi + o_spot, mask=m_p, other=0.0) - b_k + tl.load(parts.lo + o_spot, mask=m_p, other=0.0)
    return b_e, b_count, tl.load(parts.var + o_spot, mask=m_p, other=0.0), m_p


@triton.jit
def activation(b_z, ACT: tl.constexpr):
    """Apply the activation: 0 is none, 1 and 3 ReLU, 2 SiLU. The comparison is written so that NaN stays NaN."""
    if ACT == 1 or ACT == 3:
        b_z = tl.where(b_z <= 0.0, 0.0, b_z)
    if ACT == 2:
        # z sigmoid(z); exp overflows to infinity for a very negative z, and the quotient is then 0, as it should be.
        b_z = b_z / (1.0 + tl.exp(-b_z))
    return b_z


@triton.jit
def store_result(b_z, b_floor, residual, y, o_x, m_x, ACT: tl.constexpr, RESIDUAL: tl.constexpr):
    """Write y = act(z + residual), or y = relu(z) + floor for the threshold, which is activation 3."""
    if RESIDUAL:
        b_z += tl.load(residual + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_y = activation(b_z, ACT)
    if ACT == 3:
        b_y += b_floor
    tl.store(y + o_x, b_y.to(y.dtype.element_ty), mask=m_x)


@triton.jit
def pieces_of(AT):
    """Return the pieces of a column, of which each is a program on the third axis of the grid."""
    if AT is None:
        pieces = tl.num_programs(2)
    else:
        pieces = AT[3]
    return pieces


@triton.jit
def place_from_end(AT):
    """Return a program's place on the first axis of the grid, the last program being at 0."""
    if AT is None:
        i_at = tl.num_programs(0) - 1 - tl.program_id(0)
    else:
        i_at = AT[0]
    return i_at


@triton.jit
def flat_lanes(units, size, magic, ALIGN: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, AT):
    """Return a program's origin, lanes, mask, first row, and each lane's row counted from that.

    WIDE: rows are longer than BLOCK, so that a program meets two of them at most, and the last result is a Boolean.
    Otherwise a lane finds its row by one multiplication in place of a division, see ``launch.magic``.
    """
    # From the end to the start: what the pass before read last is still in the cache.
    i_block = place_from_end(AT)
    origin = i_block.to(tl.int64) * BLOCK
    o_x = tl.arange(0, BLOCK)
    # What is left of x behind the origin, in whole vectors.
    # Position within the first row, and on into the rows behind it.
    left = tl.minimum(units - origin // ALIGN, BLOCK).to(tl.int32) * ALIGN
    row = origin // size
    o_t = (origin - row * size).to(tl.int32) + o_x  # [BLOCK]
    if WIDE:
        o_row = o_t >= size
    else:
        o_row = tl.umulhi((o_t * 4).to(tl.uint32), magic.to(tl.uint32)).to(tl.int32)
    return origin, o_x, o_x < left, row, o_row


@triton.jit
def of_row(coefficient, row, rows, o_row, m_x, WIDE: tl.constexpr):
    """Return each lane's coefficient, one per row of x."""
    if WIDE:
        # Two scalar loads and a selection. The next row may lie behind the last one.
        b_value = tl.where(o_row, tl.load(coefficient + tl.minimum(row + 1, rows - 1)), tl.load(coefficient + row))
    else:
        b_value = tl.load(coefficient + row + o_row, mask=m_x, other=0.0)
    return b_value


@triton.jit
def column_lanes(
    size, units, blocks, true_channels, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FOLD: tl.constexpr, AT,
):  # fmt: skip
    """Return a program's origin, lanes and mask, and the (N, C) index of each of its channels with its mask.

    FOLD neighbouring positions are taken for channels where channels are few, so that vectors stay aligned: then
    channel c of the tile is channel c % true_channels of x.
    """
    # From the end to the start, as ``flat_lanes``. Divided in 32 bits: in 64 it would take as long as the tile.
    i_job = place_from_end(AT)
    i_sample = i_job // blocks
    i_n = i_sample.to(tl.int64)
    begin = (i_job - i_sample * blocks) * ROWS
    channels = units * ALIGN
    o_c = place(AT, 1) * BLOCK + tl.arange(0, BLOCK)
    o_s = tl.arange(0, ROWS)
    o_nc = i_n * channels + o_c  # [BLOCK]
    if FOLD > 1:
        o_nc = i_n * true_channels + o_c % true_channels
    m_x = (o_s[:, None] < size - begin) & (o_c[None, :] < channels)  # [ROWS, BLOCK]
    return (i_n * size + begin) * channels, o_s[:, None] * channels + o_c[None, :], m_x, o_nc, o_c < channels


@triton.jit(do_not_specialize=["rows", "size", "units", "magic"])
def apply_flat(
    x, residual, y, affine: Affine, rows, size, units, magic, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """y = act(scale * (x - pivot) + offset + residual) for x in rows.

    Each of ``affine`` is (rows,). A program takes BLOCK elements; the grid is (blocks,).
    """
    rows, size, units = tl.cast(rows, tl.int64), tl.cast(size, tl.int32), tl.cast(units, tl.int64)
    origin, o_x, m_x, row, o_row = flat_lanes(units, size, tl.cast(magic, tl.int32), ALIGN, BLOCK, WIDE, AT)
    # The pivot is subtracted first, exactly where x is near it; then one rounding in the multiply-add.
    b_u = tl.load(x + origin + o_x, mask=m_x, other=0.0).to(tl.float32)  # [BLOCK]
    b_u -= of_row(affine.pivot, row, rows, o_row, m_x, WIDE)
    b_scale = of_row(affine.scale, row, rows, o_row, m_x, WIDE)
    b_offset = of_row(affine.offset, row, rows, o_row, m_x, WIDE)
    b_z, b_floor = tl.fma(b_scale, b_u, b_offset), b_offset
    if ACT == 3:
        b_floor = of_row(affine.floor, row, rows, o_row, m_x, WIDE)
    store_result(b_z, b_floor, residual + origin, y + origin, o_x, m_x, ACT, RESIDUAL)


@triton.jit(do_not_specialize=["size", "units", "blocks"])
def apply_columns(
    x, residual, y, affine: Affine, size, units, blocks, true_channels, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, FOLD: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """y = act(scale * (x - pivot) + offset + residual) for x in columns.

    A program takes ROWS x BLOCK of one sample; the grid is (samples * blocks of rows, blocks of channels).
    """
    size, units = tl.cast(size, tl.int32), tl.cast(units, tl.int32)
    origin, o_x, m_x, o_nc, m_nc = column_lanes(size, units, blocks, true_channels, ALIGN, ROWS, BLOCK, FOLD, AT)
    # One coefficient per channel, for all rows of the tile.
    b_pivot = tl.load(affine.pivot + o_nc, mask=m_nc, other=0.0)[None, :]  # [1, BLOCK]
    b_scale = tl.load(affine.scale + o_nc, mask=m_nc, other=0.0)[None, :]
    b_offset = tl.load(affine.offset + o_nc, mask=m_nc, other=0.0)[None, :]
    b_z = tl.fma(b_scale, tl.load(x + origin + o_x, mask=m_x, other=0.0).to(tl.float32) - b_pivot, b_offset)
    b_floor = b_offset
    if ACT == 3:
        b_floor = tl.load(affine.floor + o_nc, mask=m_nc, other=0.0)[None, :]
    store_result(b_z, b_floor, residual + origin, y + origin, o_x, m_x, ACT, RESIDUAL)

"""Device code: the backward passes of ``forward``. Equations and letters as there.

``depthwise_sums`` reads dy and x once and leaves all sums, ``join_taps`` adds up what it leaves for the taps, and
``depthwise_combine`` writes dx.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Affine, DxAffine, Sums
from lightning_norm.kernels.depthwise.forward import neighbour, shape_of, tap, tile_lanes, tile_start
from lightning_norm.kernels.passes.backward import added
from lightning_norm.kernels.passes.forward import zeros


@triton.jit
def depthwise_sums(
    dy, x, kernel, affine: Affine, sums: Sums, taps, samples, units, size, height, width, blocks, piece, repeat,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Sums of dx^ and dx^ (x - pivot), (pieces, N, C), and of each tap's gradient and of dy, (parts, taps + 1, C).

    A program takes one piece of the map, of ``repeat`` groups of samples; once for each group of taps. The grid is
    (chunks of samples * blocks of channels, pieces).
    """
    shape = shape_of(samples, units, size, height, width)
    LAST: tl.constexpr = FLAGS.last
    GROUP: tl.constexpr = FLAGS.group
    TAPS: tl.constexpr = FLAGS.kh * FLAGS.kw
    i_job, i_p = tl.program_id(0), tl.program_id(1)
    i_chunk = i_job // blocks
    channel = i_job % blocks * FLAGS.block if LAST else i_job % blocks
    # The last piece of a map may be shorter.
    end = tl.minimum(shape.size, (i_p + 1) * piece)
    channels = shape.units * FLAGS.align if LAST else shape.units
    # Where this piece's sums, and this program's gradients of taps, are stored.
    pair = tl.cast(i_p, tl.int64) * shape.samples * channels
    o_c = channel + tl.arange(0, FLAGS.block if LAST else 1)[None, :]
    p_out = taps + tl.cast(i_chunk * tl.num_programs(1) + i_p, tl.int64) * (TAPS + 1) * channels + o_c
    b_zero = zeros(FLAGS.rows, FLAGS.block)
    # dy and x are read again for each group of taps, from the cache then: a piece is chosen small enough.
    for group in range(0, TAPS // GROUP):
        # One accumulator per tap, by name: device code has no arrays of tiles.
        b_a0, b_a1, b_a2, b_a3, b_a4 = b_zero, b_zero, b_zero, b_zero, b_zero
        b_a5, b_a6, b_a7, b_a8, b_of_dy = b_zero, b_zero, b_zero, b_zero, b_zero
        for again in range(0, repeat):
            sample = (i_chunk * repeat + again) * (1 if LAST else FLAGS.rows)
            # The two sums belong to a sample, so they begin anew with each.
            b_g0, b_g1 = b_zero, b_zero
            for first in range(i_p * piece, end, FLAGS.rows if LAST else FLAGS.block):
                at = tile_lanes(sample, channel, first, end, shape, FLAGS)
                # Statistics change with the sample, and with LAST with the channel.
                b_k = tl.load(affine.pivot + at.at, mask=at.mask, other=0.0)
                b_a = tl.load(affine.scale + at.at, mask=at.mask, other=0.0)
                b_o = tl.load(affine.offset + at.at, mask=at.mask, other=0.0)
                b_g = tl.load(dy + at.origin + at.lane, mask=at.keep, other=0.0).to(tl.float32)  # [rows, block]
                for s in tl.static_range(GROUP):
                    m_ok, away = neighbour(at, group, s, 1, shape, FLAGS)
                    m_ok = at.keep & m_ok
                    b_w = tap(kernel, at, group, s, FLAGS)
                    b_u = tl.load(x + at.origin + at.lane + away * at.step, mask=m_ok, other=0.0).to(tl.float32) - b_k
                    # h is dy where the neighbour lies in the map; then times x^(p + t).
                    b_h = tl.where(m_ok, b_g, 0.0)
                    b_g0 += b_w * b_h
                    b_g1 += b_w * b_h * b_u
                    b_h *= b_a * b_u + b_o
                    # Resolved when the kernel is compiled: s is a constant.
                    if s == 0:
                        b_a0 += b_h
                    if s == 1:
                        b_a1 += b_h
                    if s == 2:
                        b_a2 += b_h
                    if s == 3:
                        b_a3 += b_h
                    if s == 4:
                        b_a4 += b_h
                    if s == 5:
                        b_a5 += b_h
                    if s == 6:
                        b_a6 += b_h
                    if s == 7:
                        b_a7 += b_h
                    if s == 8:
                        b_a8 += b_h
                b_of_dy += b_g
            # Where the sample's sums go, whatever position came last.
            to = tile_lanes(sample, channel, 0, end, shape, FLAGS)
            add_to(sums.total + pair + to.at, tl.sum(b_g0, 0 if LAST else 1, keep_dims=True), to.mask, group)
            add_to(sums.dot + pair + to.at, tl.sum(b_g1, 0 if LAST else 1, keep_dims=True), to.mask, group)
        # Each tap's accumulator, summed over the tile.
        store_tap(p_out + group * GROUP * channels, b_a0, 0, o_c < channels, channels, LAST, GROUP)
        store_tap(p_out + group * GROUP * channels, b_a1, 1, o_c < channels, channels, LAST, GROUP)
        store_tap(p_out + group * GROUP * channels, b_a2, 2, o_c < channels, channels, LAST, GROUP)
        store_tap(p_out + group * GROUP * channels, b_a3, 3, o_c < channels, channels, LAST, GROUP)
        store_tap(p_out + group * GROUP * channels, b_a4, 4, o_c < channels, channels, LAST, GROUP)
        store_tap(p_out + group * GROUP * channels, b_a5, 5, o_c < channels, channels, LAST, GROUP)
        store_tap(p_out + group * GROUP * channels, b_a6, 6, o_c < channels, channels, LAST, GROUP)
        store_tap(p_out + group * GROUP * channels, b_a7, 7, o_c < channels, channels, LAST, GROUP)
        store_tap(p_out + group * GROUP * channels, b_a8, 8, o_c < channels, channels, LAST, GROUP)
        store_tap(p_out + TAPS * channels, b_of_dy, 0, o_c < channels, channels, LAST, 1)


@triton.jit
def add_to(p_out, b_value, m_out, group):
    """Store a value in the first group of taps, and add it to what is there in the others."""
    tl.store(p_out, b_value + tl.load(p_out, mask=m_out & (group > 0), other=0.0), mask=m_out)
    # The next group of taps reads what this one wrote, in threads that may be others.
    tl.debug_barrier()


@triton.jit
def store_tap(p_out, b_t, s: tl.constexpr, m_c, channels, LAST: tl.constexpr, GROUP: tl.constexpr):
    """Store a tile's sum over its positions, and over its samples where they are in it, as the row of tap ``s``."""
    if s < GROUP:
        # keep_dims, so that one address serves both orders of the tile.
        b_total = tl.sum(b_t, 0, keep_dims=True)
        if not LAST:
            b_total = tl.sum(b_total, 1, keep_dims=True)
        tl.store(p_out + s * channels, b_total, mask=m_c)


@triton.jit(do_not_specialize=["parts"])
def join_taps(
    taps, dkernel, dbias, number, channels, parts, T: tl.constexpr, P_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):
    """Add up the parts of the gradients of kernel, (C, T), and bias, (C,); ``number`` is C * (T + 1)."""
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < number
    b_total = added(taps, o_i, m_i, parts, number, P_BLOCK, BLOCK)  # [BLOCK]
    # Parts are stored by tap and the gradient by channel; the last row is the bias's.
    o_t = o_i // channels
    o_c = o_i - o_t * channels
    tl.store(dkernel + o_c * T + o_t, b_total, mask=m_i & (o_t < T))
    tl.store(dbias + o_c, b_total, mask=m_i & (o_t == T))


@triton.jit(do_not_specialize=["samples", "units", "size", "height", "width", "blocks"])
def depthwise_combine(
    dy, x, dx, kernel, affine: Affine, dx_affine: DxAffine, samples, units, size, height, width, blocks,
    PLAIN: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """dx = scale * g + constant + slope * (x - pivot), PLAIN: scale * g alone; g = sum_t w_t dy(p - t).

    Grid, tiles and coefficients as ``depthwise_apply``.
    """
    GROUP: tl.constexpr = FLAGS.group
    shape = shape_of(samples, units, size, height, width)
    sample, channel, first = tile_start(shape.units, blocks, FLAGS)
    at = tile_lanes(sample, channel, first, shape.size, shape, FLAGS)
    b_g = zeros(FLAGS.rows, FLAGS.block)
    # The transposed convolution of dy: the same taps, from the other side.
    for group in range(0, FLAGS.kh * FLAGS.kw // GROUP):
        for s in tl.static_range(GROUP):
            m_ok, away = neighbour(at, group, s, -1, shape, FLAGS)
            b_w = tap(kernel, at, group, s, FLAGS)
            b_g += b_w * (
                tl.load(dy + at.origin + at.lane + away * at.step, mask=at.keep & m_ok, other=0.0).to(tl.float32)
            )
    # Scale is constant over the map of a channel, so it stays outside the sum over taps.
    b_dx = tl.load(affine.scale + at.at, mask=at.mask, other=0.0) * b_g
    if not PLAIN:
        # x is read only where the statistics depend on it; running ones are constants.
        b_k = tl.load(affine.pivot + at.at, mask=at.mask, other=0.0)
        b_u = tl.load(x + at.origin + at.lane, mask=at.keep, other=0.0).to(tl.float32) - b_k
        b_constant = tl.load(dx_affine.constant + at.at, mask=at.mask, other=0.0)
        b_dx += tl.load(dx_affine.slope + at.at, mask=at.mask, other=0.0) * b_u + b_constant
    tl.store(dx + at.origin + at.lane, b_dx.to(dx.dtype.element_ty), mask=at.keep)

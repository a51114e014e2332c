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
    job, p = tl.program_id(0), tl.program_id(1)
    chunk = job // blocks
    channel = job % blocks * FLAGS.block if LAST else job % blocks
    # The last piece of a map may be shorter.
    end = tl.minimum(shape.size, (p + 1) * piece)
    channels = shape.units * FLAGS.align if LAST else shape.units
    # Where this piece's sums, and this program's gradients of taps, are stored.
    pair = tl.cast(p, tl.int64) * shape.samples * channels
    c_out = channel + tl.arange(0, FLAGS.block if LAST else 1)[None, :]
    out = taps + tl.cast(chunk * tl.num_programs(1) + p, tl.int64) * (TAPS + 1) * channels + c_out
    zero = zeros(FLAGS.rows, FLAGS.block)
    # dy and x are read again for each group of taps, from the cache then: a piece is chosen small enough.
    for group in range(0, TAPS // GROUP):
        # One accumulator per tap, by name: device code has no arrays of tiles.
        a0, a1, a2, a3, a4, a5, a6, a7, a8, of_dy = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
        for again in range(0, repeat):
            sample = (chunk * repeat + again) * (1 if LAST else FLAGS.rows)
            # The two sums belong to a sample, so they begin anew with each.
            g0, g1 = zero, zero
            for first in range(p * piece, end, FLAGS.rows if LAST else FLAGS.block):
                at = tile_lanes(sample, channel, first, end, shape, FLAGS)
                # Statistics change with the sample, and with LAST with the channel.
                k = tl.load(affine.pivot + at.at, mask=at.mask, other=0.0)
                a = tl.load(affine.scale + at.at, mask=at.mask, other=0.0)
                o = tl.load(affine.offset + at.at, mask=at.mask, other=0.0)
                g = tl.load(dy + at.origin + at.lane, mask=at.keep, other=0.0).to(tl.float32)
                for s in tl.static_range(GROUP):
                    ok, away = neighbour(at, group, s, 1, shape, FLAGS)
                    ok = at.keep & ok
                    w = tap(kernel, at, group, s, FLAGS)
                    u = tl.load(x + at.origin + at.lane + away * at.step, mask=ok, other=0.0).to(tl.float32) - k
                    # h is dy where the neighbour lies in the map; then times x^(p + t).
                    h = tl.where(ok, g, 0.0)
                    g0 += w * h
                    g1 += w * h * u
                    h *= a * u + o
                    # Resolved when the kernel is compiled: s is a constant.
                    if s == 0:
                        a0 += h
                    if s == 1:
                        a1 += h
                    if s == 2:
                        a2 += h
                    if s == 3:
                        a3 += h
                    if s == 4:
                        a4 += h
                    if s == 5:
                        a5 += h
                    if s == 6:
                        a6 += h
                    if s == 7:
                        a7 += h
                    if s == 8:
                        a8 += h
                of_dy += g
            # Where the sample's sums go, whatever position came last.
            to = tile_lanes(sample, channel, 0, end, shape, FLAGS)
            add_to(sums.total + pair + to.at, tl.sum(g0, 0 if LAST else 1, keep_dims=True), to.mask, group)
            add_to(sums.dot + pair + to.at, tl.sum(g1, 0 if LAST else 1, keep_dims=True), to.mask, group)
        # Each tap's accumulator, summed over the tile.
        store_tap(out + group * GROUP * channels, a0, 0, c_out < channels, channels, LAST, GROUP)
        store_tap(out + group * GROUP * channels, a1, 1, c_out < channels, channels, LAST, GROUP)
        store_tap(out + group * GROUP * channels, a2, 2, c_out < channels, channels, LAST, GROUP)
        store_tap(out + group * GROUP * channels, a3, 3, c_out < channels, channels, LAST, GROUP)
        store_tap(out + group * GROUP * channels, a4, 4, c_out < channels, channels, LAST, GROUP)
        store_tap(out + group * GROUP * channels, a5, 5, c_out < channels, channels, LAST, GROUP)
        store_tap(out + group * GROUP * channels, a6, 6, c_out < channels, channels, LAST, GROUP)
        store_tap(out + group * GROUP * channels, a7, 7, c_out < channels, channels, LAST, GROUP)
        store_tap(out + group * GROUP * channels, a8, 8, c_out < channels, channels, LAST, GROUP)
        store_tap(out + TAPS * channels, of_dy, 0, c_out < channels, channels, LAST, 1)


@triton.jit
def add_to(at, value, keep, group):
    """Store a value in the first group of taps, and add it to what is there in the others."""
    tl.store(at, value + tl.load(at, mask=keep & (group > 0), other=0.0), mask=keep)
    # The next group of taps reads what this one wrote, in threads that may be others.
    tl.debug_barrier()


@triton.jit
def store_tap(out, t, s: tl.constexpr, keep, channels, LAST: tl.constexpr, GROUP: tl.constexpr):
    """Store a tile's sum over its positions, and over its samples where they are in it, as the row of tap ``s``."""
    if s < GROUP:
        # keep_dims, so that one address serves both orders of the tile.
        total = tl.sum(t, 0, keep_dims=True)
        if not LAST:
            total = tl.sum(total, 1, keep_dims=True)
        tl.store(out + s * channels, total, mask=keep)


@triton.jit(do_not_specialize=["parts"])
def join_taps(
    taps, dkernel, dbias, number, channels, parts, T: tl.constexpr, P_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):
    """Add up the parts of the gradients of kernel, (C, T), and bias, (C,); ``number`` is C * (T + 1)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < number
    total = added(taps, i, keep, parts, number, P_BLOCK, BLOCK)
    # Parts are stored by tap and the gradient by channel; the last row is the bias's.
    t = i // channels
    c = i - t * channels
    tl.store(dkernel + c * T + t, total, mask=keep & (t < T))
    tl.store(dbias + c, total, mask=keep & (t == T))


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
    g = zeros(FLAGS.rows, FLAGS.block)
    # The transposed convolution of dy: the same taps, from the other side.
    for group in range(0, FLAGS.kh * FLAGS.kw // GROUP):
        for s in tl.static_range(GROUP):
            ok, away = neighbour(at, group, s, -1, shape, FLAGS)
            w = tap(kernel, at, group, s, FLAGS)
            g += w * tl.load(dy + at.origin + at.lane + away * at.step, mask=at.keep & ok, other=0.0).to(tl.float32)
    # Scale is constant over the map of a channel, so it stays outside the sum over taps.
    d = tl.load(affine.scale + at.at, mask=at.mask, other=0.0) * g
    if not PLAIN:
        # x is read only where the statistics depend on it; running ones are constants.
        k = tl.load(affine.pivot + at.at, mask=at.mask, other=0.0)
        u = tl.load(x + at.origin + at.lane, mask=at.keep, other=0.0).to(tl.float32) - k
        e = tl.load(dx_affine.constant + at.at, mask=at.mask, other=0.0)
        d += tl.load(dx_affine.slope + at.at, mask=at.mask, other=0.0) * u + e
    tl.store(dx + at.origin + at.lane, d.to(dx.dtype.element_ty), mask=at.keep)

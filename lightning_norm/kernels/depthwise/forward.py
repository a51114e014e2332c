"""Device code: normalization and a depthwise convolution of the result, in one pass over x.

With x^ = a u + o, u = x - k, and y = b + sum_t w_t x^(p + t) over the taps t whose neighbour p + t lies in the map:

    y = a sum_t w_t u(p + t) + o omega(p) + b, where omega(p) is the sum of w_t over such t, so borders are exact
    dw_t = sum_p dy(p) x^(p + t), db = sum_p dy(p)
    sum dx^ = sum_p dy(p) omega(p), sum dx^ u = sum_p dy(p) sum_t w_t u(p + t)

So one read of dy and x leaves all that the adjoint of the equations needs, and dx = a g + constant + slope u with
g = sum_t w_t dy(p - t) takes one more. x^ is never stored. Neighbours come from the cache.

A tile is (samples of one channel, positions), or with LAST, channels contiguous, (positions, channels of one sample).
Taps are taken in groups: all nine of 3 x 3, or one row of a larger kernel, so that few of them wait in registers.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Affine
from lightning_norm.kernels.depthwise.flags import Lanes, Shape
from lightning_norm.kernels.passes.forward import zeros


@triton.jit
def shape_of(samples, units, size, height, width):
    """Return a ``Shape`` of a kernel's integers; one that is 1 may be a constant, which has no dtype of its own."""
    return Shape(tl.cast(samples, tl.int32), tl.cast(units, tl.int32), tl.cast(size, tl.int32), height, width)


@triton.jit
def tile_lanes(sample, channel, first, end, shape, FLAGS: tl.constexpr):
    """Return ``Lanes``: positions by channels of one sample, or samples by positions of one channel."""
    size, channels = shape.size, shape.units * FLAGS.align if FLAGS.last else shape.units
    if FLAGS.last:
        o_p = (first + tl.arange(0, FLAGS.rows))[:, None]
        o_c = (channel + tl.arange(0, FLAGS.block))[None, :]
        m_nc = (o_c < channels) & (sample < shape.samples)
        o_nc, step = sample * channels + o_c, channels
        origin, o_x = tl.cast(sample, tl.int64) * size * channels, o_p * channels + o_c
    else:
        o_p = (first + tl.arange(0, FLAGS.block))[None, :]
        o_n = (sample + tl.arange(0, FLAGS.rows))[:, None]
        o_c = channel + o_n * 0
        m_nc = o_n < shape.samples
        o_nc, step = o_n * channels + channel, 1
        origin, o_x = tl.cast(channel, tl.int64) * 0, o_nc.to(tl.int64) * size + o_p
    # Row and column, to see which neighbours lie in the map.
    o_i = o_p // shape.width
    return Lanes(origin, o_x, (o_p < end) & m_nc, o_i, o_p - o_i * shape.width, o_c, o_nc, m_nc, step)


@triton.jit
def neighbour(at, group, s: tl.constexpr, sign: tl.constexpr, shape, FLAGS: tl.constexpr):
    """Return whether the neighbour at tap ``s`` of a group lies in the map, and how many positions away it is.

    ``sign`` is 1 for the convolution and -1 for its transpose.
    """
    # The row of the tap depends on the group, a run-time number; its column is known when the kernel is compiled.
    di = sign * (group * (FLAGS.group // FLAGS.kw) + s // FLAGS.kw - FLAGS.kh // 2)
    dj: tl.constexpr = sign * (s % FLAGS.kw - FLAGS.kw // 2)
    o_i, o_j = at.i + di, at.j + dj
    return (o_i >= 0) & (o_i < shape.height) & (o_j >= 0) & (o_j < shape.width), di * shape.width + dj


@triton.jit
def tap(kernel, at, group, s: tl.constexpr, FLAGS: tl.constexpr):
    """Return the weight of tap ``s`` of a group."""
    taps = FLAGS.kh * FLAGS.kw
    return tl.load(kernel + at.c * taps + group * FLAGS.group + s, mask=at.mask, other=0.0).to(tl.float32)


@triton.jit
def tile_start(units, blocks, FLAGS: tl.constexpr):
    """Return first sample, channel and position of a program that takes one tile."""
    # The first axis may be long, and CUDA limits the second to 65 535.
    i_job, i_tile = tl.program_id(0), tl.program_id(1)
    if FLAGS.last:
        sample, channel, first = i_job // blocks, i_tile * FLAGS.block, i_job % blocks * FLAGS.rows
    else:
        sample, channel, first = i_job // units * FLAGS.rows, i_job % units, i_tile * FLAGS.block
    return sample, channel, first


@triton.jit(do_not_specialize=["samples", "units", "size", "height", "width", "blocks"])
def depthwise_apply(
    x, y, kernel, bias, affine: Affine, samples, units, size, height, width, blocks, BIAS: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """y = bias + the convolution of scale * (x - pivot) + offset.

    kernel is (C, taps), bias (C,), pivot, scale and offset (N, C). A program takes one tile, see ``Stencil.grid``.
    """
    GROUP: tl.constexpr = FLAGS.group
    shape = shape_of(samples, units, size, height, width)
    sample, channel, first = tile_start(shape.units, blocks, FLAGS)
    at = tile_lanes(sample, channel, first, shape.size, shape, FLAGS)
    p_x, p_y = x + at.origin + at.lane, y + at.origin + at.lane
    b_k = tl.load(affine.pivot + at.at, mask=at.mask, other=0.0)
    # Summed in float32, whatever x is: k * k numbers of half precision would lose digits.
    b_v = zeros(FLAGS.rows, FLAGS.block)
    b_omega = b_v
    # Scale and offset stay outside the sum over taps: two multiplications per element, however many taps.
    for group in range(0, FLAGS.kh * FLAGS.kw // GROUP):
        for s in tl.static_range(GROUP):
            # Outside the map x^ is zero, not u: the mask also keeps omega exact.
            m_ok, away = neighbour(at, group, s, 1, shape, FLAGS)
            b_w = tap(kernel, at, group, s, FLAGS)
            b_u = tl.load(p_x + away * at.step, mask=at.keep & m_ok, other=0.0).to(tl.float32) - b_k
            b_v += b_w * tl.where(m_ok, b_u, 0.0)
            b_omega += tl.where(m_ok, b_w, 0.0)
    # omega carries the offset: at the border fewer taps see it.
    b_z = tl.load(affine.scale + at.at, mask=at.mask, other=0.0) * b_v
    b_z += tl.load(affine.offset + at.at, mask=at.mask, other=0.0) * b_omega
    if BIAS:
        b_z += tl.load(bias + at.c, mask=at.mask, other=0.0).to(tl.float32)
    tl.store(p_y, b_z.to(y.dtype.element_ty), mask=at.keep)

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
        p = (first + tl.arange(0, FLAGS.rows))[:, None]
        c = (channel + tl.arange(0, FLAGS.block))[None, :]
        mask = (c < channels) & (sample < shape.samples)
        at, step = sample * channels + c, channels
        origin, lane = tl.cast(sample, tl.int64) * size * channels, p * channels + c
    else:
        p = (first + tl.arange(0, FLAGS.block))[None, :]
        n = (sample + tl.arange(0, FLAGS.rows))[:, None]
        c = channel + n * 0
        mask = n < shape.samples
        at, step = n * channels + channel, 1
        origin, lane = tl.cast(channel, tl.int64) * 0, at.to(tl.int64) * size + p
    # Row and column, to see which neighbours lie in the map.
    i = p // shape.width
    return Lanes(origin, lane, (p < end) & mask, i, p - i * shape.width, c, at, mask, step)


@triton.jit
def neighbour(at, group, s: tl.constexpr, sign: tl.constexpr, shape, FLAGS: tl.constexpr):
    """Return whether the neighbour at tap ``s`` of a group lies in the map, and how many positions away it is.

    ``sign`` is 1 for the convolution and -1 for its transpose.
    """
    # The row of the tap depends on the group, a run-time number; its column is known when the kernel is compiled.
    di = sign * (group * (FLAGS.group // FLAGS.kw) + s // FLAGS.kw - FLAGS.kh // 2)
    dj: tl.constexpr = sign * (s % FLAGS.kw - FLAGS.kw // 2)
    i, j = at.i + di, at.j + dj
    return (i >= 0) & (i < shape.height) & (j >= 0) & (j < shape.width), di * shape.width + dj


@triton.jit
def tap(kernel, at, group, s: tl.constexpr, FLAGS: tl.constexpr):
    """Return the weight of tap ``s`` of a group."""
    taps = FLAGS.kh * FLAGS.kw
    return tl.load(kernel + at.c * taps + group * FLAGS.group + s, mask=at.mask, other=0.0).to(tl.float32)


@triton.jit
def tile_start(units, blocks, FLAGS: tl.constexpr):
    """Return first sample, channel and position of a program that takes one tile."""
    # The first axis may be long, and CUDA limits the second to 65 535.
    job, tile = tl.program_id(0), tl.program_id(1)
    if FLAGS.last:
        sample, channel, first = job // blocks, tile * FLAGS.block, job % blocks * FLAGS.rows
    else:
        sample, channel, first = job // units * FLAGS.rows, job % units, tile * FLAGS.block
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
    k = tl.load(affine.pivot + at.at, mask=at.mask, other=0.0)
    # Summed in float32, whatever x is: k * k numbers of half precision would lose digits.
    v = zeros(FLAGS.rows, FLAGS.block)
    omega = v
    # Scale and offset stay outside the sum over taps: two multiplications per element, however many taps.
    for group in range(0, FLAGS.kh * FLAGS.kw // GROUP):
        for s in tl.static_range(GROUP):
            # Outside the map x^ is zero, not u: the mask also keeps omega exact.
            ok, away = neighbour(at, group, s, 1, shape, FLAGS)
            w = tap(kernel, at, group, s, FLAGS)
            u = tl.load(p_x + away * at.step, mask=at.keep & ok, other=0.0).to(tl.float32) - k
            v += w * tl.where(ok, u, 0.0)
            omega += tl.where(ok, w, 0.0)
    # omega carries the offset: at the border fewer taps see it.
    z = tl.load(affine.scale + at.at, mask=at.mask, other=0.0) * v
    z += tl.load(affine.offset + at.at, mask=at.mask, other=0.0) * omega
    if BIAS:
        z += tl.load(bias + at.c, mask=at.mask, other=0.0).to(tl.float32)
    tl.store(p_y, z.to(y.dtype.element_ty), mask=at.keep)

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


@triton.jit
def tile_lanes(
    sample, channel, first, end, samples, units, size, width, ALIGN: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return where a tile lies.

    In order: origin, offsets from it and their mask; row and column in the map; the channels, the (N, C) index of each
    statistic and its mask; and the number of channels.
    """
    # Positions by channels of one sample, or samples by positions of one channel.
    channels = units * ALIGN if LAST else units
    if LAST:
        p = (first + tl.arange(0, ROWS))[:, None]
        c = (channel + tl.arange(0, BLOCK))[None, :]
        stat_mask = (c < channels) & (sample < samples)
        at = sample * channels + c
        origin, offset = tl.cast(sample, tl.int64) * size * channels, p * channels + c
    else:
        p = (first + tl.arange(0, BLOCK))[None, :]
        n = (sample + tl.arange(0, ROWS))[:, None]
        c = channel + n * 0
        stat_mask = n < samples
        at = n * channels + channel
        origin, offset = tl.cast(channel, tl.int64) * 0, at.to(tl.int64) * size + p
    # Row and column, to see which neighbours lie in the map.
    i = p // width
    return origin, offset, (p < end) & stat_mask, i, p - i * width, c, at, stat_mask, channels


@triton.jit
def neighbour(
    i, j, group, s: tl.constexpr, sign: tl.constexpr, height, width, KH: tl.constexpr, KW: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Return whether the neighbour at tap ``s`` of a group lies in the map, and how many positions away it is.

    ``sign`` is 1 for the convolution and -1 for its transpose.
    """
    # The row of the tap depends on the group, a run-time number; its column is known when the kernel is compiled.
    di = sign * (group * (GROUP // KW) + s // KW - KH // 2)
    dj: tl.constexpr = sign * (s % KW - KW // 2)
    return (i + di >= 0) & (i + di < height) & (j + dj >= 0) & (j + dj < width), di * width + dj


@triton.jit
def tile_start(units, blocks, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return first sample, channel and position of a program that takes one tile."""
    # The first axis may be long, and CUDA limits the second to 65 535.
    job, tile = tl.program_id(0), tl.program_id(1)
    if LAST:
        sample, channel, first = job // blocks, tile * BLOCK, job % blocks * ROWS
    else:
        sample, channel, first = job // units * ROWS, job % units, tile * BLOCK
    return sample, channel, first


@triton.jit(do_not_specialize=["samples", "units", "size", "height", "width", "blocks"])
def depthwise_apply(
    x, y, kernel, bias, pivot, scale, offset, samples, units, size, height, width, blocks, ALIGN: tl.constexpr,
    LAST: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = bias + the convolution of scale * (x - pivot) + offset.

    kernel is (C, KH * KW), bias (C,), pivot, scale and offset (N, C). A program takes one tile, see ``Stencil.grid``.
    """
    samples, units, size = tl.cast(samples, tl.int32), tl.cast(units, tl.int32), tl.cast(size, tl.int32)
    sample, channel, first = tile_start(units, blocks, LAST, ROWS, BLOCK)
    origin, lane, keep, i, j, c, at, stat_mask, channels = tile_lanes(sample, channel, first, size, samples, units, size, width, ALIGN, LAST, ROWS, BLOCK)  # noqa: E501  # fmt: skip
    # Elements between two neighbouring positions.
    step = channels if LAST else 1
    k = tl.load(pivot + at, mask=stat_mask, other=0.0)
    # Summed in float32, whatever x is: k * k numbers of half precision would lose digits.
    v = tl.zeros((ROWS, BLOCK), tl.float32)
    omega = v
    # Scale and offset stay outside the sum over taps: two multiplications per element, however many taps.
    for group in range(0, KH * KW // GROUP):
        for s in tl.static_range(GROUP):
            # Outside the map x^ is zero, not u: the mask also keeps omega exact.
            ok, away = neighbour(i, j, group, s, 1, height, width, KH, KW, GROUP)
            w = tl.load(kernel + c * (KH * KW) + group * GROUP + s, mask=stat_mask, other=0.0).to(tl.float32)
            u = tl.load(x + origin + lane + away * step, mask=keep & ok, other=0.0).to(tl.float32) - k
            v += w * tl.where(ok, u, 0.0)
            omega += tl.where(ok, w, 0.0)
    # omega carries the offset: at the border fewer taps see it.
    z = tl.load(scale + at, mask=stat_mask, other=0.0) * v + tl.load(offset + at, mask=stat_mask, other=0.0) * omega
    if BIAS:
        z += tl.load(bias + c, mask=stat_mask, other=0.0).to(tl.float32)
    tl.store(y + origin + lane, z.to(y.dtype.element_ty), mask=keep)

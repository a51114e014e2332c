"""Device code: normalization and a depthwise convolution of the result, in one pass over x.

With x^ = a u + o, u = x - k, and y = b + sum_t w_t x^(p + t) over the taps t whose neighbour p + t lies in the map:

    y = a sum_t w_t u(p + t) + o omega(p) + b, omega(p) = sum of w_t over such t: borders are exact
    dw_t = sum_p dy(p) x^(p + t), db = sum_p dy(p)
    sum dx^ = sum_p dy(p) omega(p), sum dx^ u = sum_p dy(p) sum_t w_t u(p + t)

So one read of dy and x leaves all that the equations' adjoint needs, and dx = a g + constant + slope u with
g = sum_t w_t dy(p - t) takes one more. Neighbours come from the cache.

A tile is (samples of one channel, positions), or with LAST (positions, channels of one sample). Taps are taken in
groups: all nine of 3 x 3, or one row of a larger kernel, so that few of them wait in registers.
"""

import triton
import triton.language as tl


@triton.jit
def spot(
    sample, channel, first, end, samples, units, size, width, ALIGN: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where a tile lies: origin, offsets, mask; row and column in the map; channels, (N, C) indices, their mask."""
    channels = units * ALIGN if LAST else units
    if LAST:
        p = (first + tl.arange(0, ROWS))[:, None]
        c = (channel + tl.arange(0, BLOCK))[None, :]
        held = (c < channels) & (sample < samples)
        at = sample * channels + c
        origin, offset = tl.cast(sample, tl.int64) * size * channels, p * channels + c
    else:
        p = (first + tl.arange(0, BLOCK))[None, :]
        n = (sample + tl.arange(0, ROWS))[:, None]
        c = channel + n * 0
        held = n < samples
        at = n * channels + channel
        origin, offset = tl.cast(channel, tl.int64) * 0, at.to(tl.int64) * size + p
    i = p // width
    return origin, offset, (p < end) & held, i, p - i * width, c, at, held, channels


@triton.jit
def neighbour(
    i, j, group, s: tl.constexpr, sign: tl.constexpr, height, width, KH: tl.constexpr, KW: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Whether the neighbour at a group's tap lies in the map, and how many positions away it is."""
    di = sign * (group * (GROUP // KW) + s // KW - KH // 2)
    dj: tl.constexpr = sign * (s % KW - KW // 2)
    return (i + di >= 0) & (i + di < height) & (j + dj >= 0) & (j + dj < width), di * width + dj


@triton.jit
def place(units, blocks, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """First sample, channel and position of a program that takes one tile."""
    job, tile = tl.program_id(0), tl.program_id(1)
    if LAST:
        sample, channel, first = job // blocks, tile * BLOCK, job % blocks * ROWS
    else:
        sample, channel, first = job // units * ROWS, job % units, tile * BLOCK
    return sample, channel, first


@triton.jit
def recover_apply(
    x, y, kernel, bias, pivot, scale, offset, samples, units, size, height, width, blocks, ALIGN: tl.constexpr,
    LAST: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Y = bias + the convolution of scale * (x - pivot) + offset."""
    samples, units, size = tl.cast(samples, tl.int32), tl.cast(units, tl.int32), tl.cast(size, tl.int32)
    sample, channel, first = place(units, blocks, LAST, ROWS, BLOCK)
    origin, lane, keep, i, j, c, at, held, channels = spot(sample, channel, first, size, samples, units, size, width, ALIGN, LAST, ROWS, BLOCK)  # noqa: E501  # fmt: skip
    step = channels if LAST else 1
    k = tl.load(pivot + at, mask=held, other=0.0)
    v = tl.zeros((ROWS, BLOCK), tl.float32)
    omega = v
    for group in range(0, KH * KW // GROUP):
        for s in tl.static_range(GROUP):
            ok, away = neighbour(i, j, group, s, 1, height, width, KH, KW, GROUP)
            w = tl.load(kernel + c * (KH * KW) + group * GROUP + s, mask=held, other=0.0).to(tl.float32)
            u = tl.load(x + origin + lane + away * step, mask=keep & ok, other=0.0).to(tl.float32) - k
            v += w * tl.where(ok, u, 0.0)
            omega += tl.where(ok, w, 0.0)
    z = tl.load(scale + at, mask=held, other=0.0) * v + tl.load(offset + at, mask=held, other=0.0) * omega
    if BIAS:
        z += tl.load(bias + c, mask=held, other=0.0).to(tl.float32)
    tl.store(y + origin + lane, z.to(y.dtype.element_ty), mask=keep)


@triton.jit
def recover_sums(
    dy, x, kernel, pivot, scale, offset, total, dot, taps, samples, units, size, height, width, blocks, piece, repeat,
    ALIGN: tl.constexpr, LAST: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of dx^ and dx^ (x - pivot), (pieces, N, C), and of each tap's gradient and of dy, (parts, taps + 1, C).

    A program takes one piece of the map, of ``repeat`` groups of samples; once for each group of taps.
    """
    samples, units, size = tl.cast(samples, tl.int32), tl.cast(units, tl.int32), tl.cast(size, tl.int32)
    job, p = tl.program_id(0), tl.program_id(1)
    chunk = job // blocks
    channel = job % blocks * BLOCK if LAST else job % blocks
    end = tl.minimum(size, (p + 1) * piece)
    channels = units * ALIGN if LAST else units
    step = channels if LAST else 1
    pair = tl.cast(p, tl.int64) * samples * channels
    own = channel + tl.arange(0, BLOCK if LAST else 1)[None, :]
    out = taps + tl.cast(chunk * tl.num_programs(1) + p, tl.int64) * (KH * KW + 1) * channels + own
    zero = tl.zeros((ROWS, BLOCK), tl.float32)
    for group in range(0, KH * KW // GROUP):
        a0, a1, a2, a3, a4, a5, a6, a7, a8, of_dy = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
        for again in range(0, repeat):
            sample = (chunk * repeat + again) * (1 if LAST else ROWS)
            g0, g1 = zero, zero
            for first in range(p * piece, end, ROWS if LAST else BLOCK):
                origin, lane, keep, i, j, c, at, held, _ = spot(sample, channel, first, end, samples, units, size, width, ALIGN, LAST, ROWS, BLOCK)  # noqa: E501  # fmt: skip
                k = tl.load(pivot + at, mask=held, other=0.0)
                a, o = tl.load(scale + at, mask=held, other=0.0), tl.load(offset + at, mask=held, other=0.0)
                g = tl.load(dy + origin + lane, mask=keep, other=0.0).to(tl.float32)
                for s in tl.static_range(GROUP):
                    ok, away = neighbour(i, j, group, s, 1, height, width, KH, KW, GROUP)
                    ok = keep & ok
                    w = tl.load(kernel + c * (KH * KW) + group * GROUP + s, mask=held, other=0.0).to(tl.float32)
                    u = tl.load(x + origin + lane + away * step, mask=ok, other=0.0).to(tl.float32) - k
                    h = tl.where(ok, g, 0.0)
                    g0 += w * h
                    g1 += w * h * u
                    h *= a * u + o
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
            origin, lane, keep, i, j, c, at, held, _ = spot(sample, channel, 0, end, samples, units, size, width, ALIGN, LAST, ROWS, BLOCK)  # noqa: E501  # fmt: skip
            add(total + pair + at, tl.sum(g0, 0 if LAST else 1, keep_dims=True), held, group)
            add(dot + pair + at, tl.sum(g1, 0 if LAST else 1, keep_dims=True), held, group)
        leave(out + group * GROUP * channels, a0, 0, own < channels, channels, LAST, GROUP)
        leave(out + group * GROUP * channels, a1, 1, own < channels, channels, LAST, GROUP)
        leave(out + group * GROUP * channels, a2, 2, own < channels, channels, LAST, GROUP)
        leave(out + group * GROUP * channels, a3, 3, own < channels, channels, LAST, GROUP)
        leave(out + group * GROUP * channels, a4, 4, own < channels, channels, LAST, GROUP)
        leave(out + group * GROUP * channels, a5, 5, own < channels, channels, LAST, GROUP)
        leave(out + group * GROUP * channels, a6, 6, own < channels, channels, LAST, GROUP)
        leave(out + group * GROUP * channels, a7, 7, own < channels, channels, LAST, GROUP)
        leave(out + group * GROUP * channels, a8, 8, own < channels, channels, LAST, GROUP)
        leave(out + KH * KW * channels, of_dy, 0, own < channels, channels, LAST, 1)


@triton.jit
def add(at, value, keep, group):
    """Store a value in the first group of taps, and add it to what is there in the others."""
    tl.store(at, value + tl.load(at, mask=keep & (group > 0), other=0.0), mask=keep)
    tl.debug_barrier()


@triton.jit
def leave(out, t, s: tl.constexpr, keep, channels, LAST: tl.constexpr, GROUP: tl.constexpr):
    """Store a tile's sum over its positions, and over its samples where they are in it, as the row of tap ``s``."""
    if s < GROUP:
        total = tl.sum(t, 0, keep_dims=True)
        if not LAST:
            total = tl.sum(total, 1, keep_dims=True)
        tl.store(out + s * channels, total, mask=keep)


@triton.jit
def join_taps(taps, dkernel, dbias, number, channels, parts, T: tl.constexpr, BLOCK: tl.constexpr):
    """Add the parts of the gradients of kernel, (C, T), and bias, (C,); ``number`` is C * (T + 1)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < number
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, parts):
        total += tl.load(taps + tl.cast(part, tl.int64) * number + i, mask=keep, other=0.0)
    t = i // channels
    c = i - t * channels
    tl.store(dkernel + c * T + t, total, mask=keep & (t < T))
    tl.store(dbias + c, total, mask=keep & (t == T))


@triton.jit
def recover_combine(
    dy, x, dx, kernel, pivot, scale, constant, slope, samples, units, size, height, width, blocks,
    ALIGN: tl.constexpr, LAST: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, GROUP: tl.constexpr,
    PLAIN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dx = scale * g + constant + slope * (x - pivot), or scale * g alone if PLAIN; g = sum_t w_t dy(p - t)."""
    samples, units, size = tl.cast(samples, tl.int32), tl.cast(units, tl.int32), tl.cast(size, tl.int32)
    sample, channel, first = place(units, blocks, LAST, ROWS, BLOCK)
    origin, lane, keep, i, j, c, at, held, channels = spot(sample, channel, first, size, samples, units, size, width, ALIGN, LAST, ROWS, BLOCK)  # noqa: E501  # fmt: skip
    step = channels if LAST else 1
    g = tl.zeros((ROWS, BLOCK), tl.float32)
    for group in range(0, KH * KW // GROUP):
        for s in tl.static_range(GROUP):
            ok, away = neighbour(i, j, group, s, -1, height, width, KH, KW, GROUP)
            w = tl.load(kernel + c * (KH * KW) + group * GROUP + s, mask=held, other=0.0).to(tl.float32)
            g += w * tl.load(dy + origin + lane + away * step, mask=keep & ok, other=0.0).to(tl.float32)
    d = tl.load(scale + at, mask=held, other=0.0) * g
    if not PLAIN:
        u = tl.load(x + origin + lane, mask=keep, other=0.0).to(tl.float32) - tl.load(pivot + at, mask=held, other=0.0)
        d += tl.load(slope + at, mask=held, other=0.0) * u + tl.load(constant + at, mask=held, other=0.0)
    tl.store(dx + origin + lane, d.to(dx.dtype.element_ty), mask=keep)

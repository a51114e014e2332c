"""Device code: normalization and a depthwise convolution of the result, in one pass over x.

With x^ = a u + o, u = x - k, and y = b + sum_t w_t x^(p + t) over the taps t whose neighbour p + t lies in the map:

    y = a sum_t w_t u(p + t) + o omega(p) + b, omega(p) = sum of w_t over such t: borders are exact
    dw_t = sum_p dy(p) x^(p + t), db = sum_p dy(p)
    sum dx^ = sum_p dy(p) omega(p), sum dx^ u = sum_p dy(p) sum_t w_t u(p + t)

So one read of dy and x leaves all that the equations' adjoint needs, and dx = a g + constant + slope u with
g = sum_t w_t dy(p - t) takes one more. Neighbours come from the cache.

A tile is (samples of one channel, positions), or with LAST (positions, channels of one sample).
"""

import triton
import triton.language as tl


@triton.jit
def spot(
    sample, channel, first, end, samples, units, size, width, ALIGN: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where a tile lies: offsets, mask, row and column in the map, channels, (N, C) indices, and the mask of both."""
    channels = units * ALIGN if LAST else units
    if LAST:
        p = (first + tl.arange(0, ROWS))[:, None]
        c = (channel + tl.arange(0, BLOCK))[None, :]
        held = c < channels
        at = sample * channels + c
        offset = sample.to(tl.int64) * size * channels + p * channels + c
        keep = (p < end) & held
    else:
        p = (first + tl.arange(0, BLOCK))[None, :]
        n = (sample + tl.arange(0, ROWS))[:, None]
        c = channel + n * 0
        held = n < samples
        at = n * channels + channel
        offset = at.to(tl.int64) * size + p
        keep = (p < end) & held
    i = p // width
    return offset, keep, i, p - i * width, c, at, held, channels


@triton.jit
def neighbour(i, j, t: tl.constexpr, sign: tl.constexpr, height, width, KH: tl.constexpr, KW: tl.constexpr):
    """Whether a tap's neighbour lies in the map, and how many positions away it is."""
    di: tl.constexpr = sign * (t // KW - KH // 2)
    dj: tl.constexpr = sign * (t % KW - KW // 2)
    return (i + di >= 0) & (i + di < height) & (j + dj >= 0) & (j + dj < width), di * width + dj


@triton.jit
def recover_apply(
    x, y, kernel, bias, pivot, scale, offset, samples, units, size, height, width, blocks, ALIGN: tl.constexpr,
    LAST: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Y = bias + the convolution of scale * (x - pivot) + offset."""
    samples, units, size = tl.cast(samples, tl.int32), tl.cast(units, tl.int32), tl.cast(size, tl.int32)
    job, tile = tl.program_id(0), tl.program_id(1)
    if LAST:
        sample, channel, first = job // blocks, tile * BLOCK, job % blocks * ROWS
    else:
        sample, channel, first = job // units * ROWS, job % units, tile * BLOCK
    where, keep, i, j, c, at, held, channels = spot(sample, channel, first, size, samples, units, size, width, ALIGN, LAST, ROWS, BLOCK)  # noqa: E501  # fmt: skip
    step = channels if LAST else 1
    k = tl.load(pivot + at, mask=held, other=0.0)
    a, o = tl.load(scale + at, mask=held, other=0.0), tl.load(offset + at, mask=held, other=0.0)
    v = tl.zeros((ROWS, BLOCK), tl.float32)
    omega = v
    for t in tl.static_range(KH * KW):
        ok, away = neighbour(i, j, t, 1, height, width, KH, KW)
        w = tl.load(kernel + c * (KH * KW) + t, mask=held, other=0.0).to(tl.float32)
        u = tl.load(x + where + away * step, mask=keep & ok, other=0.0).to(tl.float32) - k
        v = tl.fma(w + v * 0.0, tl.where(ok, u, 0.0), v)
        omega += tl.where(ok, w, 0.0)
    z = a * v + o * omega
    if BIAS:
        z += tl.load(bias + c, mask=held, other=0.0).to(tl.float32)
    tl.store(y + where, z.to(y.dtype.element_ty), mask=keep)


@triton.jit
def recover_sums(
    dy, x, kernel, pivot, scale, offset, total, dot, taps, samples, units, size, height, width, blocks, piece, repeat,
    ALIGN: tl.constexpr, LAST: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of dx^ and dx^ (x - pivot), (pieces, N, C), and of each tap's gradient and of dy, (parts, C, taps + 1).

    A program takes one piece of the map, of ``repeat`` groups of samples.
    """
    samples, units, size = tl.cast(samples, tl.int32), tl.cast(units, tl.int32), tl.cast(size, tl.int32)
    job, p = tl.program_id(0), tl.program_id(1)
    chunk = job // blocks
    channel = job % blocks * BLOCK if LAST else job % blocks
    end = tl.minimum(size, (p + 1) * piece)
    q = tl.arange(0, TAPS)[:, None]
    found = tl.zeros((TAPS, BLOCK if LAST else 1), tl.float32)
    channels = units * ALIGN if LAST else units
    pair = p.to(tl.int64) * samples * channels
    for again in range(0, repeat):
        sample = (chunk * repeat + again) * (1 if LAST else ROWS)
        if sample < samples:
            g0 = tl.zeros((ROWS, BLOCK), tl.float32)
            g1 = g0
            for first in range(p * piece, end, ROWS if LAST else BLOCK):
                where, keep, i, j, c, at, held, _ = spot(sample, channel, first, end, samples, units, size, width, ALIGN, LAST, ROWS, BLOCK)  # noqa: E501  # fmt: skip
                step = channels if LAST else 1
                k = tl.load(pivot + at, mask=held, other=0.0)
                a, o = tl.load(scale + at, mask=held, other=0.0), tl.load(offset + at, mask=held, other=0.0)
                g = tl.load(dy + where, mask=keep, other=0.0).to(tl.float32)
                v = tl.zeros((ROWS, BLOCK), tl.float32)
                omega = v
                for t in tl.static_range(KH * KW):
                    ok, away = neighbour(i, j, t, 1, height, width, KH, KW)
                    w = tl.load(kernel + c * (KH * KW) + t, mask=held, other=0.0).to(tl.float32)
                    u = tl.load(x + where + away * step, mask=keep & ok, other=0.0).to(tl.float32) - k
                    u = tl.where(keep & ok, u, 0.0)
                    v = tl.fma(w + v * 0.0, u, v)
                    omega += tl.where(ok, w, 0.0)
                    found += tl.where(q == t, collected(g * tl.where(keep & ok, a * u + o, 0.0), LAST), 0.0)
                found += tl.where(q == KH * KW, collected(g, LAST), 0.0)
                g0 += g * omega
                g1 += g * v
            where, keep, i, j, c, at, held, _ = spot(sample, channel, 0, end, samples, units, size, width, ALIGN, LAST, ROWS, BLOCK)  # noqa: E501  # fmt: skip
            tl.store(total + pair + at, tl.sum(g0, 0 if LAST else 1, keep_dims=True), mask=held)
            tl.store(dot + pair + at, tl.sum(g1, 0 if LAST else 1, keep_dims=True), mask=held)
    c = channel + tl.arange(0, BLOCK if LAST else 1)[None, :]
    part = (chunk * tl.num_programs(1) + p).to(tl.int64) * channels + c
    tl.store(taps + part * (KH * KW + 1) + q, found, mask=(q < KH * KW + 1) & (c < channels))


@triton.jit
def collected(t, LAST: tl.constexpr):
    """A tile's sum over its positions, and over its samples where they are in it, with two axes."""
    total = tl.sum(t, 0, keep_dims=True)
    if not LAST:
        total = tl.sum(total, 1, keep_dims=True)
    return total


@triton.jit
def join_taps(taps, dkernel, dbias, number, parts, T: tl.constexpr, BLOCK: tl.constexpr):
    """Add the parts of the gradients of kernel, (C, T), and bias, (C,); ``number`` is C * (T + 1)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < number
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, parts):
        total += tl.load(taps + tl.cast(part, tl.int64) * number + i, mask=keep, other=0.0)
    c = i // (T + 1)
    t = i - c * (T + 1)
    tl.store(dkernel + c * T + t, total, mask=keep & (t < T))
    tl.store(dbias + c, total, mask=keep & (t == T))


@triton.jit
def recover_combine(
    dy, x, dx, kernel, pivot, scale, constant, slope, samples, units, size, height, width, blocks,
    ALIGN: tl.constexpr, LAST: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PLAIN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dx = scale * g + constant + slope * (x - pivot), or scale * g alone if PLAIN; g = sum_t w_t dy(p - t)."""
    samples, units, size = tl.cast(samples, tl.int32), tl.cast(units, tl.int32), tl.cast(size, tl.int32)
    job, tile = tl.program_id(0), tl.program_id(1)
    if LAST:
        sample, channel, first = job // blocks, tile * BLOCK, job % blocks * ROWS
    else:
        sample, channel, first = job // units * ROWS, job % units, tile * BLOCK
    where, keep, i, j, c, at, held, channels = spot(sample, channel, first, size, samples, units, size, width, ALIGN, LAST, ROWS, BLOCK)  # noqa: E501  # fmt: skip
    step = channels if LAST else 1
    g = tl.zeros((ROWS, BLOCK), tl.float32)
    for t in tl.static_range(KH * KW):
        ok, away = neighbour(i, j, t, -1, height, width, KH, KW)
        w = tl.load(kernel + c * (KH * KW) + t, mask=held, other=0.0).to(tl.float32)
        g = tl.fma(w + g * 0.0, tl.load(dy + where + away * step, mask=keep & ok, other=0.0).to(tl.float32), g)
    d = tl.load(scale + at, mask=held, other=0.0) * g
    if not PLAIN:
        u = tl.load(x + where, mask=keep, other=0.0).to(tl.float32) - tl.load(pivot + at, mask=held, other=0.0)
        e, s = tl.load(constant + at, mask=held, other=0.0), tl.load(slope + at, mask=held, other=0.0)
        d += tl.fma(s + u * 0.0, u, e + u * 0.0)
    tl.store(dx + where, d.to(dx.dtype.element_ty), mask=keep)

"""Device code: y = act(gamma f(alpha x + s) + beta + residual) in one pass over x, f being tanh or erf.

x is (samples, lines, width), each line contiguous. In rows a line is a map of one channel; with ``last``, where
channels are contiguous, it is a position with all its channels, and the whole batch is one sample. A tile is some lines
by BLOCK elements of each, and ``align`` divides the width, so that every vector lies within a line.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.elementwise.flags import Learned, Shape
from lightning_norm.kernels.passes.forward import store_result


@triton.jit
def tanh(u):
    """Return tanh, rounded as well near 0 as elsewhere; neither Triton nor its interpreter has one."""
    # exp of what is never positive does not overflow; where it is near 1, the difference would lose digits.
    e = tl.exp(-2.0 * tl.abs(u))
    far = (1.0 - e) / (1.0 + e)
    # Below 0.625 a polynomial in u^2, fitted for the least relative error: 1.5 units of 2^-24.
    w = u * u
    p = tl.fma(w, tl.fma(w, -0.006104947999119759, 0.021003641188144684), -0.05385249853134155)
    p = tl.fma(w, tl.fma(w, p, 0.13332782685756683), -0.333333283662796)
    return tl.where(tl.abs(u) < 0.625, tl.fma(u * w, p, u), tl.where(u < 0.0, -far, far))


@triton.jit
def value(u, ERF: tl.constexpr):
    """Return f."""
    return tl.erf(u) if ERF else tanh(u)


@triton.jit
def shape_of(samples, lines, units, piece, pieces, repeat):
    """Return a ``Shape`` of a kernel's integers."""
    # All positions of a batch may be more than 32 bits hold.
    return Shape(samples, tl.cast(lines, tl.int64), tl.cast(units, tl.int32), piece, pieces, repeat)


@triton.jit
def learned_at(learned, block, channels, shape, FLAGS: tl.constexpr):
    """Return gamma and beta of a tile's channels, alpha, s, the channels and their mask."""
    if FLAGS.last:
        i = (block * FLAGS.block + tl.arange(0, FLAGS.block))[None, :]
        inside = i < shape.units * FLAGS.align
    else:
        i = (block * FLAGS.rows + tl.arange(0, FLAGS.rows))[:, None]
        inside = i < shape.lines.to(tl.int32)
    c = i % channels if FLAGS.fold > 1 else i
    # What the layer does not have leaves y as it is.
    gamma, beta, s = tl.full(i.shape, 1.0, tl.float32), tl.full(i.shape, 0.0, tl.float32), 0.0
    if FLAGS.weight:
        gamma = tl.load(learned.weight + c, mask=inside, other=0.0).to(tl.float32)
    if FLAGS.bias:
        beta = tl.load(learned.bias + c, mask=inside, other=0.0).to(tl.float32)
    if FLAGS.offset:
        s = tl.load(learned.offset).to(tl.float32)
    return gamma, beta, tl.load(learned.alpha).to(tl.float32), s, i, inside


@triton.jit
def tile_at(part, block, again, first, shape, FLAGS: tl.constexpr):
    """Return a tile's origin, its offsets from there, and their mask.

    A part is a piece of the lines; or in rows, a piece of each line, in ``repeat`` samples. ``first`` counts in it
    lines, or units of ALIGN elements; ``again`` counts samples.
    """
    width = shape.units * FLAGS.align
    r, e = tl.arange(0, FLAGS.rows)[:, None], tl.arange(0, FLAGS.block)[None, :]
    # Origins in 64 bits, for all of x; offsets from there in 32, for a tile.
    if FLAGS.last:
        begin = tl.cast(part, tl.int64) * shape.piece + first
        e += block * FLAGS.block
        lines = tl.minimum(shape.lines - begin, shape.piece - first)
        origin, keep = begin * width, (r < lines.to(tl.int32)) & (e < width)
    else:
        sample, begin = part // shape.pieces * shape.repeat + again, part % shape.pieces * shape.piece + first
        # Counted in units and multiplied last, so that the compiler sees where vectors begin and end.
        origin = ((sample * shape.lines + block * FLAGS.rows) * shape.units + begin) * FLAGS.align
        left = tl.minimum(shape.units - begin, shape.piece - first) * FLAGS.align
        lines = tl.where(sample < shape.samples, shape.lines.to(tl.int32) - block * FLAGS.rows, 0)
        keep = (r < lines) & (e < left)
    return origin, r * width + e, keep


@triton.jit(do_not_specialize=["samples", "lines", "units", "piece", "pieces", "blocks"])
def apply_elementwise(
    x, residual, y, learned: Learned, samples, lines, units, channels, piece, pieces, blocks, FLAGS: tl.constexpr,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y = act(gamma f(alpha x + s) + beta + residual); a program takes one tile, the grid is (parts * blocks,)."""
    shape = shape_of(samples, lines, units, piece, pieces, 1)
    part, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    gamma, beta, alpha, s, _, _ = learned_at(learned, block, channels, shape, FLAGS)
    origin, lane, keep = tile_at(part, block, 0, 0, shape, FLAGS)
    u = tl.fma(tl.load(x + origin + lane, mask=keep, other=0.0).to(tl.float32), alpha, s)
    z = tl.fma(gamma, value(u, FLAGS.erf), beta)
    store_result(z, residual + origin, y + origin, lane, keep, ACT, RESIDUAL)

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
def tanh(b_u):
    """Return tanh, rounded as well near 0 as elsewhere; neither Triton nor its interpreter has one."""
    # exp of what is never positive does not overflow; where it is near 1, the difference would lose digits.
    b_e = tl.exp(-2.0 * tl.abs(b_u))
    b_far = (1.0 - b_e) / (1.0 + b_e)
    # Below 0.625 a polynomial in u^2, fitted for the least relative error: 1.5 units of 2^-24.
    b_w = b_u * b_u
    b_p = tl.fma(b_w, tl.fma(b_w, -0.006104947999119759, 0.021003641188144684), -0.05385249853134155)
    b_p = tl.fma(b_w, tl.fma(b_w, b_p, 0.13332782685756683), -0.333333283662796)
    return tl.where(tl.abs(b_u) < 0.625, tl.fma(b_u * b_w, b_p, b_u), tl.where(b_u < 0.0, -b_far, b_far))


@triton.jit
def value(b_u, ERF: tl.constexpr):
    """Return f."""
    return tl.erf(b_u) if ERF else tanh(b_u)


@triton.jit
def shape_of(samples, lines, units, piece, pieces, repeat):
    """Return a ``Shape`` of a kernel's integers."""
    # All positions of a batch may be more than 32 bits hold.
    return Shape(samples, tl.cast(lines, tl.int64), tl.cast(units, tl.int32), piece, pieces, repeat)


@triton.jit
def learned_at(learned, i_block, channels, shape, FLAGS: tl.constexpr):
    """Return gamma and beta of a tile's channels, alpha, s, the channels and their mask."""
    if FLAGS.last:
        o_i = (i_block * FLAGS.block + tl.arange(0, FLAGS.block))[None, :]
        m_i = o_i < shape.units * FLAGS.align
    else:
        o_i = (i_block * FLAGS.rows + tl.arange(0, FLAGS.rows))[:, None]
        m_i = o_i < shape.lines.to(tl.int32)
    o_c = o_i % channels if FLAGS.fold > 1 else o_i
    # What the layer does not have leaves y as it is.
    b_gamma, b_beta, s = tl.full(o_i.shape, 1.0, tl.float32), tl.full(o_i.shape, 0.0, tl.float32), 0.0
    if FLAGS.weight:
        b_gamma = tl.load(learned.weight + o_c, mask=m_i, other=0.0).to(tl.float32)
    if FLAGS.bias:
        b_beta = tl.load(learned.bias + o_c, mask=m_i, other=0.0).to(tl.float32)
    if FLAGS.offset:
        s = tl.load(learned.offset).to(tl.float32)
    return b_gamma, b_beta, tl.load(learned.alpha).to(tl.float32), s, o_i, m_i


@triton.jit
def tile_at(i_part, i_block, again, first, shape, FLAGS: tl.constexpr):
    """Return a tile's origin, its offsets from there, and their mask.

    A part is a piece of the lines; or in rows, a piece of each line, in ``repeat`` samples. ``first`` counts in it
    lines, or units of ALIGN elements; ``again`` counts samples.
    """
    width = shape.units * FLAGS.align
    o_r, o_e = tl.arange(0, FLAGS.rows)[:, None], tl.arange(0, FLAGS.block)[None, :]
    # Origins in 64 bits, for all of x; offsets from there in 32, for a tile.
    if FLAGS.last:
        begin = tl.cast(i_part, tl.int64) * shape.piece + first
        o_e += i_block * FLAGS.block
        lines = tl.minimum(shape.lines - begin, shape.piece - first)
        origin, m_x = begin * width, (o_r < lines.to(tl.int32)) & (o_e < width)
    else:
        sample, begin = i_part // shape.pieces * shape.repeat + again, i_part % shape.pieces * shape.piece + first
        # Counted in units and multiplied last, so that the compiler sees where vectors begin and end.
        origin = ((sample * shape.lines + i_block * FLAGS.rows) * shape.units + begin) * FLAGS.align
        left = tl.minimum(shape.units - begin, shape.piece - first) * FLAGS.align
        lines = tl.where(sample < shape.samples, shape.lines.to(tl.int32) - i_block * FLAGS.rows, 0)
        m_x = (o_r < lines) & (o_e < left)
    return origin, o_r * width + o_e, m_x


@triton.jit(do_not_specialize=["samples", "lines", "units", "piece", "pieces", "blocks"])
def apply_elementwise(
    x, residual, y, learned: Learned, samples, lines, units, channels, piece, pieces, blocks, FLAGS: tl.constexpr,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y = act(gamma f(alpha x + s) + beta + residual); a program takes one tile, the grid is (parts * blocks,)."""
    shape = shape_of(samples, lines, units, piece, pieces, 1)
    i_part, i_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b_gamma, b_beta, alpha, s, _, _ = learned_at(learned, i_block, channels, shape, FLAGS)
    origin, o_x, m_x = tile_at(i_part, i_block, 0, 0, shape, FLAGS)
    b_u = tl.fma(tl.load(x + origin + o_x, mask=m_x, other=0.0).to(tl.float32), alpha, s)
    b_z = tl.fma(b_gamma, value(b_u, FLAGS.erf), b_beta)
    store_result(b_z, b_z, residual + origin, y + origin, o_x, m_x, ACT, RESIDUAL)

"""Device code: the gradients of ``forward``, by one pass over dy and x. Tiles and letters as there.

With u = alpha x + s, g = dy before the activation and h = g f'(u):

    dx = alpha gamma h, dgamma = sum g f(u), dbeta = sum g, dalpha = sum gamma h x, ds = sum gamma h

A program leaves its sums over each of its channels and over all it has, and ``join_elementwise`` adds them up in an
order that is the same in every run.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Maps
from lightning_norm.kernels.elementwise.flags import Learned
from lightning_norm.kernels.elementwise.forward import learned_at, shape_of, tile_at, value
from lightning_norm.kernels.passes.backward import added, before_activation
from lightning_norm.kernels.passes.forward import zeros


@triton.jit
def slope(b_u, ERF: tl.constexpr):
    """Return the derivative of f."""
    if ERF:
        b_d = 1.1283791670955126 * tl.exp(-b_u * b_u)  # 2 / sqrt(pi)
    else:
        # 1 - tanh^2 without the difference, which would lose digits.
        b_e = tl.exp(-2.0 * tl.abs(b_u))
        b_d = 4.0 * b_e / ((1.0 + b_e) * (1.0 + b_e))
    return b_d


@triton.jit(do_not_specialize=["samples", "lines", "units", "piece", "pieces", "blocks", "repeat", "parts"])
def combine_elementwise(
    maps: Maps, learned: Learned, sums, totals, samples, lines, units, channels, piece, pieces, blocks, repeat, parts,
    FLAGS: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, NEED: tl.constexpr,
):  # fmt: skip
    """dx, g for the residual, and sums of g f and g, (2, parts, channels), of gamma h x and gamma h, (2, programs).

    A program takes a block of one part, tile by tile; the grid is (parts * blocks,).
    """
    shape = shape_of(samples, lines, units, piece, pieces, repeat)
    i_job = tl.program_id(0)
    # Programs that run at the same time read neighbouring channels of one part.
    i_part, i_block = i_job // blocks, i_job % blocks
    b_gamma, b_beta, alpha, s, o_i, m_i = learned_at(learned, i_block, channels, shape, FLAGS)
    # A tile for each sum: added up across threads once, behind the loop.
    b_zero = zeros(FLAGS.rows, FLAGS.block)
    b_gf, b_g, b_hx, b_h = b_zero, b_zero, b_zero, b_zero
    for again in range(0, repeat):
        for first in range(0, piece, FLAGS.rows if FLAGS.last else FLAGS.block // FLAGS.align):
            origin, o_x, m_x = tile_at(i_part, i_block, again, first, shape, FLAGS)
            b_x = tl.load(maps.x + origin + o_x, mask=m_x, other=0.0).to(tl.float32)  # [rows, block]
            b_d = tl.load(maps.dy + origin + o_x, mask=m_x, other=0.0).to(tl.float32)
            b_u = tl.fma(b_x, alpha, s)
            b_f = value(b_u, FLAGS.erf)
            # What went into the activation is computed again, for nothing but x was kept.
            if ACT != 0:
                b_d = before_activation(
                    b_d, tl.fma(b_gamma, b_f, b_beta), maps.residual + origin, o_x, m_x, ACT, RESIDUAL
                )
            # The residual was added behind f, so its gradient is that before the activation.
            if RESIDUAL:
                p_out = maps.dresidual + origin + o_x
                tl.store(p_out, b_d.to(maps.dresidual.dtype.element_ty), mask=m_x)
            b_gf += b_d * b_f
            b_g += b_d
            # Outside the mask dy is 0, and with it every product.
            b_d *= slope(b_u, FLAGS.erf)
            b_hx += b_d * b_x
            b_h += b_d
            # dx depends on no sum, unlike that of a normalization: it is written in the same pass.
            if NEED:
                tl.store(maps.dx + origin + o_x, (alpha * b_gamma * b_d).to(maps.dx.dtype.element_ty), mask=m_x)
    # Over the lines where channels are contiguous, else along them.
    axis: tl.constexpr = 0 if FLAGS.last else 1
    number = units * FLAGS.align if FLAGS.last else lines
    p_out = sums + tl.cast(i_part, tl.int64) * number + o_i
    tl.store(p_out, tl.sum(b_gf, axis, keep_dims=True), mask=m_i)
    tl.store(p_out + tl.cast(parts, tl.int64) * number, tl.sum(b_g, axis, keep_dims=True), mask=m_i)
    # gamma is the same for all that a channel has summed up; that of a channel that is not there is 0.
    b_gamma = tl.where(m_i, b_gamma, 0.0)
    tl.store(totals + i_job, tl.sum(b_gamma * tl.sum(b_hx, axis, keep_dims=True)))
    tl.store(totals + tl.num_programs(0) + i_job, tl.sum(b_gamma * tl.sum(b_h, axis, keep_dims=True)))


@triton.jit(do_not_specialize=["parts", "programs"])
def join_elementwise(
    sums, totals, out, channels, parts, programs, P_BLOCK: tl.constexpr, BLOCK: tl.constexpr, T_BLOCK: tl.constexpr
):
    """Gradients of gamma and beta, (C,), and of alpha and s, behind each other; the last program takes these two."""
    if tl.program_id(0) < tl.num_programs(0) - 1:
        o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        # gamma's gradient and beta's lie behind each other in ``out``, and so do their parts.
        o_at = (o_i // channels).to(tl.int64) * parts * channels + o_i % channels
        b_of_channels = added(sums, o_at, o_i < 2 * channels, parts, channels, P_BLOCK, BLOCK)
        tl.store(out + o_i, b_of_channels, mask=o_i < 2 * channels)
    else:
        o_which = tl.arange(0, 2)
        b_of_all = added(totals, o_which.to(tl.int64) * programs, o_which < 2, programs, 1, T_BLOCK, 2)
        tl.store(out + 2 * channels + o_which, b_of_all)

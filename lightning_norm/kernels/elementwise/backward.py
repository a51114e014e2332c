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
def slope(u, ERF: tl.constexpr):
    """Return the derivative of f."""
    if ERF:
        d = 1.1283791670955126 * tl.exp(-u * u)  # 2 / sqrt(pi)
    else:
        # 1 - tanh^2 without the difference, which would lose digits.
        e = tl.exp(-2.0 * tl.abs(u))
        d = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return d


@triton.jit(do_not_specialize=["samples", "lines", "units", "piece", "pieces", "blocks", "repeat", "parts"])
def combine_elementwise(
    maps: Maps, learned: Learned, sums, totals, samples, lines, units, channels, piece, pieces, blocks, repeat, parts,
    FLAGS: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, NEED: tl.constexpr,
):  # fmt: skip
    """dx, g for the residual, and sums of g f and g, (2, parts, channels), of gamma h x and gamma h, (2, programs).

    A program takes a block of one part, tile by tile; the grid is (parts * blocks,).
    """
    shape = shape_of(samples, lines, units, piece, pieces, repeat)
    job = tl.program_id(0)
    # Programs that run at the same time read neighbouring channels of one part.
    part, block = job // blocks, job % blocks
    gamma, beta, alpha, s, i, inside = learned_at(learned, block, channels, shape, FLAGS)
    # A tile for each sum: added up across threads once, behind the loop.
    zero = zeros(FLAGS.rows, FLAGS.block)
    gf, g, hx, h = zero, zero, zero, zero
    for again in range(0, repeat):
        for first in range(0, piece, FLAGS.rows if FLAGS.last else FLAGS.block // FLAGS.align):
            origin, lane, keep = tile_at(part, block, again, first, shape, FLAGS)
            v = tl.load(maps.x + origin + lane, mask=keep, other=0.0).to(tl.float32)
            d = tl.load(maps.dy + origin + lane, mask=keep, other=0.0).to(tl.float32)
            u = tl.fma(v, alpha, s)
            f = value(u, FLAGS.erf)
            # What went into the activation is computed again, for nothing but x was kept.
            if ACT != 0:
                d = before_activation(d, tl.fma(gamma, f, beta), maps.residual + origin, lane, keep, ACT, RESIDUAL)
            # The residual was added behind f, so its gradient is that before the activation.
            if RESIDUAL:
                to = maps.dresidual + origin + lane
                tl.store(to, d.to(maps.dresidual.dtype.element_ty), mask=keep)
            gf += d * f
            g += d
            # Outside the mask dy is 0, and with it every product.
            d *= slope(u, FLAGS.erf)
            hx += d * v
            h += d
            # dx depends on no sum, unlike that of a normalization: it is written in the same pass.
            if NEED:
                tl.store(maps.dx + origin + lane, (alpha * gamma * d).to(maps.dx.dtype.element_ty), mask=keep)
    # Over the lines where channels are contiguous, else along them.
    axis: tl.constexpr = 0 if FLAGS.last else 1
    number = units * FLAGS.align if FLAGS.last else lines
    to = sums + tl.cast(part, tl.int64) * number + i
    tl.store(to, tl.sum(gf, axis, keep_dims=True), mask=inside)
    tl.store(to + tl.cast(parts, tl.int64) * number, tl.sum(g, axis, keep_dims=True), mask=inside)
    # gamma is the same for all that a channel has summed up; that of a channel that is not there is 0.
    gamma = tl.where(inside, gamma, 0.0)
    tl.store(totals + job, tl.sum(gamma * tl.sum(hx, axis, keep_dims=True)))
    tl.store(totals + tl.num_programs(0) + job, tl.sum(gamma * tl.sum(h, axis, keep_dims=True)))


@triton.jit(do_not_specialize=["parts", "programs"])
def join_elementwise(
    sums, totals, out, channels, parts, programs, P_BLOCK: tl.constexpr, BLOCK: tl.constexpr, T_BLOCK: tl.constexpr
):
    """Gradients of gamma and beta, (C,), and of alpha and s, behind each other; the last program takes these two."""
    if tl.program_id(0) < tl.num_programs(0) - 1:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        # gamma's gradient and beta's lie behind each other in ``out``, and so do their parts.
        at = (i // channels).to(tl.int64) * parts * channels + i % channels
        of_channels = added(sums, at, i < 2 * channels, parts, channels, P_BLOCK, BLOCK)
        tl.store(out + i, of_channels, mask=i < 2 * channels)
    else:
        which = tl.arange(0, 2)
        of_all = added(totals, which.to(tl.int64) * programs, which < 2, programs, 1, T_BLOCK, 2)
        tl.store(out + 2 * channels + which, of_all)

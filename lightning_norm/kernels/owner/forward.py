"""Device code: moments, equations and y in one launch. ``backward`` does the same for the gradients.

A program owns a few channels of all samples. Its part of x is small enough to stay near it, so that memory is read once
though the program reads twice: for the moments, and to write y. In between it calls the very device functions of the
families, on its own channels, and what they hand on through memory it has written itself: a barrier among its threads
is all that must stand between.

Tiles are (N, C, S): samples, channels and positions. Where channels are contiguous (COLUMNS), one tile serves for
reading and writing. Otherwise a map begins anywhere, and is loaded from the last multiple of ALIGN elements before it;
y is then written flat, over all maps of the program in a sample, which begin at a multiple of FLAT elements.

Running statistics move in all channels or in none, and that is known when every program is done. So each draws a
ticket, and the last one moves them. The tickets are the upper half of the counter ``skipped``, which the last program
clears: no launch has to prepare them. Results do not depend on which program was the last.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Layout, Moments
from lightning_norm.kernels.mixture import flags as mixture
from lightning_norm.kernels.mixture.forward import mix_at, per_channel, pool_columns, track
from lightning_norm.kernels.owner.flags import Shape
from lightning_norm.kernels.passes.forward import store_moments, store_result
from lightning_norm.kernels.per_channel import flags as channelwise
from lightning_norm.kernels.per_channel.forward import channels_of, masses
from lightning_norm.kernels.per_channel.running_stats import commit, move, survey_running

BLOCK: tl.constexpr = tl.constexpr(512)
"""Numbers that the last program takes at once."""


@triton.jit
def maps_at(o_n, o_c, shape, TILE: tl.constexpr):
    """Return where the elements of some maps lie, which lanes may be loaded, and which of them belong to the maps.

    Also the (n, c) index of each map and which of them there are. ``units`` is what ALIGN elements make the channels
    of, or all of x without COLUMNS.
    """
    # An integer that is 1 arrives as a constant, which has no dtype.
    size, units = tl.cast(shape.size, tl.int32), tl.cast(shape.units, tl.int32)
    samples, channels, ALIGN = shape.samples, shape.channels, TILE.align
    o_nc = o_n[:, None] * channels + o_c[None, :]  # [N, C]
    o_s = tl.arange(0, TILE.s)[None, None, :]  # [1, 1, S]
    if TILE.columns:
        # Neighbouring channels lie together: a tile's lanes are whole vectors of them, at every position.
        row = units * ALIGN
        m_nc = (o_n[:, None] < samples) & (o_c[None, :] < row)
        o_x = (o_n[:, None, None] * size + o_s) * row + o_c[None, :, None]  # [N, C, S]
        m_x = m_nc[:, :, None] & (o_s < size)  # [N, C, S]
        m_loaded = m_x
    else:
        m_nc = (o_n[:, None] < samples) & (o_c[None, :] < channels)
        # A map may begin between two vectors: the lanes in front of it are loaded, and not kept.
        o_start = (o_nc * size)[:, :, None]  # [N, C, 1]
        o_x = o_start // ALIGN * ALIGN + o_s
        o_stop = tl.minimum((o_start + size + ALIGN - 1) // ALIGN, units) * ALIGN
        m_x = m_nc[:, :, None] & (o_x >= o_start) & (o_x < o_start + size)
        m_loaded = m_nc[:, :, None] & (o_x < o_stop)
    return o_x, m_loaded, m_x, o_nc, m_nc


@triton.jit
def places_at(o_n, o_c, shape, TILE: tl.constexpr):
    """Return where the program's elements of some samples lie and which there are, and the same of their coefficients.

    The coefficients, one per (n, c), have a shape that is broadcast to that of the elements.
    """
    if TILE.columns:
        o_x, m_loaded, m_x, o_nc, m_nc = maps_at(o_n, o_c, shape, TILE)
        o_at, m_at = o_nc[:, :, None], m_nc[:, :, None]
    else:
        size, magic, channels = tl.cast(shape.size, tl.int32), tl.cast(shape.magic, tl.int32), shape.channels
        first, FLAT = tl.program_id(0) * TILE.c, TILE.flat
        # Whole vectors: a sample's maps, and those of a program, are multiples of FLAT elements.
        o_origin = (o_n * (channels * size // FLAT) + first * size // FLAT) * FLAT  # [N]
        o_t = tl.arange(0, TILE.f)[None, :]  # [1, F]
        width = tl.minimum(channels - first, TILE.c) * size // FLAT * FLAT
        o_x, m_x = o_origin[:, None] + o_t, (o_n[:, None] < shape.samples) & (o_t < width)
        # A division by a multiplication, as in ``flat_lanes``.
        o_which = tl.umulhi((o_t * 4).to(tl.uint32), magic.to(tl.uint32)).to(tl.int32)
        o_at, m_at = o_n[:, None] * channels + first + o_which, m_x
    return o_x, m_x, o_at, m_at


@triton.jit
def measure(x, out, shape, TILE: tl.constexpr):
    """Write the moments (N, C) of the program's channels; return how many of its maps have a NaN or an infinity."""
    N: tl.constexpr = TILE.n_read
    C: tl.constexpr = TILE.c
    o_c = tl.program_id(0) * C + tl.arange(0, C)
    b_bad = tl.zeros((N, C), tl.int32)
    count = tl.cast(shape.size, tl.float32)
    for begin in range(0, shape.samples, N):
        o_n = begin + tl.arange(0, N)
        o_x, m_loaded, m_x, o_nc, m_nc = maps_at(o_n, o_c, shape, TILE)
        b_x = tl.load(x + o_x, mask=m_loaded, other=0.0).to(tl.float32)  # [N, C, S]
        # The whole map is here: the exact formula, around its own mean.
        b_pivot = tl.sum(tl.where(m_x, b_x, 0.0), 2) / count  # [N, C]
        b_u = tl.where(m_x, b_x - b_pivot[:, :, None], 0.0)
        b_square = tl.sum(b_u * b_u, 2)  # [N, C]
        store_moments(out, o_nc, m_nc, b_pivot, tl.sum(b_u, 2), b_square, count + b_pivot * 0.0)
        # Written so that a NaN, for which every comparison is false, counts as bad.
        b_bad += tl.where(m_nc & ~(tl.abs(b_pivot + b_square) < float("inf")), 1, 0)
    return tl.sum(tl.sum(b_bad, 1), 0)


@triton.jit
def write(x, residual, y, affine, shape, ACT: tl.constexpr, RESIDUAL: tl.constexpr, TILE: tl.constexpr):
    """y = act(scale * (x - pivot) + offset + residual) for the program's channels."""
    number = shape.samples * shape.channels
    o_c = tl.program_id(0) * TILE.c + tl.arange(0, TILE.c)
    for begin in range(0, shape.samples, TILE.n_write):
        o_x, m_x, o_nc, m_nc = places_at(begin + tl.arange(0, TILE.n_write), o_c, shape, TILE)
        # The second reading of x, which finds it in the cache.
        b_u = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32) - tl.load(affine + o_nc, mask=m_nc, other=0.0)
        b_scale = tl.load(affine + number + o_nc, mask=m_nc, other=0.0)
        b_z = tl.fma(b_scale + b_u * 0.0, b_u, tl.load(affine + 2 * number + o_nc, mask=m_nc, other=0.0) + b_u * 0.0)
        store_result(b_z, b_z, residual, y, o_x, m_x, ACT, RESIDUAL)


@triton.jit
def is_last(skipped):
    """Return whether all other programs have drawn their tickets, and with them stored what they leave."""
    tl.debug_barrier()  # every thread has stored its part
    before = tl.atomic_add(skipped, 1 << 32, sem="acq_rel")
    last = (before >> 32) == tl.num_programs(0) - 1
    # Nobody draws a ticket any more: what was counted before is put back.
    if last:
        tl.store(skipped, before & 0xFFFFFFFF)
        tl.debug_barrier()  # the counter is a count again, for all threads
    return last


@triton.jit
def own_mixture(
    x, residual, y, parameters: mixture.Parameters, running: mixture.Running, stats: mixture.MixtureStatistics, samples,
    channels, size, units, magic, eps, factor, unbias, FLAGS: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Normalize by the statistics of the batch, or else of each instance. The grid is (blocks of channels,)."""
    number, i_c = samples * channels, tl.program_id(0)
    shape = Shape(samples, channels, size, units, magic)
    # The mean is the pivot of the coefficients, and stored once.
    parts = Moments(stats.affine, stats.moments, stats.moments + number)
    measure(x, parts, shape, TILE)
    tl.debug_barrier()
    layout = Layout(1, channels, number, 1, 1, 1)
    if FLAGS.at_bn >= 0:
        pool_columns(i_c, parts, stats.batch, samples, channels, layout, factor, False, TILE.n, TILE.c)
        tl.debug_barrier()
    of_all = mixture.Shape(samples, number, channels, samples, channels)
    o_c = (i_c * TILE.c + tl.arange(0, TILE.c))[None, :]  # [1, C]
    for begin in range(0, samples, TILE.n):
        o_n = (begin + tl.arange(0, TILE.n))[:, None]  # [N, 1]
        m_nc = (o_n < samples) & (o_c < channels)  # [N, C]
        mix_at(
            parts, stats, parameters, running, o_n + o_c * 0, o_c + o_n * 0, m_nc, of_all, layout, eps, factor, FLAGS
        )
    tl.debug_barrier()
    write(x, residual, y, stats.affine, shape, ACT, RESIDUAL, TILE)
    # Two conditions, for both sides of an ``and`` may be compiled.
    if FLAGS.track != 0:  # noqa: SIM102
        if is_last(running.skipped):
            track(stats.batch, running, channels, tl.cast(unbias, tl.float32), FLAGS.track, BLOCK)


@triton.jit
def own_channels(
    x, residual, y, learned: channelwise.Learned, state: channelwise.State, rates: channelwise.Rates,
    out: channelwise.PerChannelStatistics, samples, channels, contexts, size, units, magic,
    numbers: channelwise.Numbers, FLAGS: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Normalize by the equations of the per-channel family. The grid is (blocks of channels,)."""
    number, stats = samples * channels, out.stats
    shape = Shape(samples, channels, size, units, magic)
    parts = Moments(out.affine, out.moments, out.moments + number)
    bad = measure(x, parts, shape, TILE)
    tl.debug_barrier()
    channels_of(
        parts, learned, state, rates, out, out.affine, samples, number, channels, contexts, 1, 1, channels, number,
        size, size, 1, numbers, FLAGS, TILE,
    )  # fmt: skip
    tl.debug_barrier()
    write(x, residual, y, out.affine, shape, ACT, RESIDUAL, TILE)
    # All channels move or none does, so whether this program saw a NaN goes to the last one.
    if FLAGS.moves:
        tl.store(out.survey_out + 2 + 3 * contexts + tl.program_id(0), bad.to(tl.float32))
        if is_last(state.skipped):
            of_all = channelwise.Shape(samples, number, channels, contexts)
            move_all(learned, state, rates.rate, out, of_all, size, numbers.least, FLAGS, TILE.n, TILE.k)
    if FLAGS.blend != 0:  # noqa: SIM102
        if is_last(state.skipped):
            commit(stats, state, rates, channels, numbers, FLAGS, BLOCK)


@triton.jit
def move_all(
    learned, state, rate, out, shape, size, least, FLAGS: tl.constexpr, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr
):
    """Move the running statistics of all channels, as every program of ``channels_of`` does for its own."""
    survey_out, channels, contexts = out.survey_out, shape.channels, shape.contexts
    survey_running(state, survey_out, channels, contexts, 0, 0, FLAGS, K_BLOCK, BLOCK // K_BLOCK)
    tl.debug_barrier()
    o_k = tl.arange(0, K_BLOCK)
    i_program, rows = tl.program_id(0), contexts * channels
    # Elements behind each statistic, for the unbiased variance.
    whole = tl.cast(size, tl.int32)
    b_count = tl.cast(shape.samples, tl.float32) * whole
    b_mass = masses(learned.responsibilities, shape, FLAGS, N_BLOCK, K_BLOCK)  # [K_BLOCK]
    if FLAGS.contexts:
        b_alone = b_mass * whole
        b_count = (b_alone + tl.maximum(1.0 - b_alone / tl.cast(least, tl.float32), 0.0) * (b_count - b_alone))[:, None]
    for begin in range(0, channels, BLOCK // K_BLOCK):
        o_c = begin + tl.arange(0, BLOCK // K_BLOCK)
        m_c = o_c < channels
        m_kc = (o_k[:, None] < contexts) & m_c[None, :]
        o_kc = o_k[:, None] * channels + o_c[None, :]
        b_f = 1.0 + per_channel(learned.center_weight, o_c, m_c, 0.0, FLAGS.center)
        b_target = b_f[None, :] * tl.load(out.stats + o_kc, mask=m_kc, other=0.0)
        b_var = tl.load(out.stats + 3 * rows + o_kc, mask=m_kc, other=0.0)
        # Each program left how many of its maps are not finite, where ``survey`` leaves that of each sample.
        move(
            b_target, b_var * (b_count / tl.maximum(b_count - 1.0, 1.0)), b_mass / tl.maximum(shape.samples, 1),
            i_program < 0, True, state, rate, survey_out, out.pooled, o_kc, m_kc, begin + i_program * 0 == 0,
            tl.num_programs(0), channels, contexts, FLAGS, K_BLOCK, 256,
        )  # fmt: skip

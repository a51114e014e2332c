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

from lightning_norm.kernels.mixture.forward import mix_at, per_channel, pool_columns, track
from lightning_norm.kernels.passes.forward import activation, store_moments
from lightning_norm.kernels.per_channel.forward import channels_of, masses
from lightning_norm.kernels.per_channel.running_stats import commit, move, survey_running

BLOCK: tl.constexpr = tl.constexpr(512)
"""Numbers that the last program takes at once."""


@triton.jit
def maps_at(
    n, c, samples, channels, size, units, ALIGN: tl.constexpr, COLUMNS: tl.constexpr, S_BLOCK: tl.constexpr
):  # fmt: skip
    """Return where the elements of some maps lie, which lanes may be loaded, and which of them belong to the maps.

    Also the (n, c) index of each map and which of them there are. ``units`` is what ALIGN elements make the channels
    of, or all of x without COLUMNS.
    """
    # An integer that is 1 arrives as a constant, which has no dtype.
    size, units = tl.cast(size, tl.int32), tl.cast(units, tl.int32)
    i = n[:, None] * channels + c[None, :]
    s = tl.arange(0, S_BLOCK)[None, None, :]
    if COLUMNS:
        row = units * ALIGN
        inside = (n[:, None] < samples) & (c[None, :] < row)
        lane = (n[:, None, None] * size + s) * row + c[None, :, None]
        keep = inside[:, :, None] & (s < size)
        loaded = keep
    else:
        inside = (n[:, None] < samples) & (c[None, :] < channels)
        start = (i * size)[:, :, None]
        lane = start // ALIGN * ALIGN + s
        stop = tl.minimum((start + size + ALIGN - 1) // ALIGN, units) * ALIGN
        keep = inside[:, :, None] & (lane >= start) & (lane < start + size)
        loaded = inside[:, :, None] & (lane < stop)
    return lane, loaded, keep, i, inside


@triton.jit
def places_at(
    n, c, samples, channels, size, units, magic, ALIGN: tl.constexpr, FLAT: tl.constexpr, COLUMNS: tl.constexpr,
    C_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr, F_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return where the program's elements of some samples lie and which there are, and the same of their coefficients.

    The coefficients, one per (n, c), have a shape that is broadcast to that of the elements.
    """
    if COLUMNS:
        lane, loaded, keep, i, inside = maps_at(n, c, samples, channels, size, units, ALIGN, COLUMNS, S_BLOCK)
        at, exists = i[:, :, None], inside[:, :, None]
    else:
        size, magic = tl.cast(size, tl.int32), tl.cast(magic, tl.int32)
        first = tl.program_id(0) * C_BLOCK
        # Whole vectors: a sample's maps, and those of a program, are multiples of FLAT elements.
        origin = (n * (channels * size // FLAT) + first * size // FLAT) * FLAT
        t = tl.arange(0, F_BLOCK)[None, :]
        width = tl.minimum(channels - first, C_BLOCK) * size // FLAT * FLAT
        lane, keep = origin[:, None] + t, (n[:, None] < samples) & (t < width)
        # A division by a multiplication, as in ``flat_lanes``.
        which = tl.umulhi((t * 4).to(tl.uint32), magic.to(tl.uint32)).to(tl.int32)
        at, exists = n[:, None] * channels + first + which, keep
    return lane, keep, at, exists


@triton.jit
def measure(
    x, hi, lo, var, samples, channels, size, units, ALIGN: tl.constexpr, COLUMNS: tl.constexpr, N_TILE: tl.constexpr,
    C_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the moments (N, C) of the program's channels; return how many of its maps have a NaN or an infinity."""
    c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    bad = tl.zeros((N_TILE, C_BLOCK), tl.int32)
    count = tl.cast(size, tl.float32)
    for begin in range(0, samples, N_TILE):
        n = begin + tl.arange(0, N_TILE)
        lane, loaded, keep, i, inside = maps_at(n, c, samples, channels, size, units, ALIGN, COLUMNS, S_BLOCK)
        v = tl.load(x + lane, mask=loaded, other=0.0).to(tl.float32)
        # The whole map is here: the exact formula, around its own mean.
        pivot = tl.sum(tl.where(keep, v, 0.0), 2) / count
        u = tl.where(keep, v - pivot[:, :, None], 0.0)
        square = tl.sum(u * u, 2)
        store_moments(hi, lo, var, i, inside, pivot, tl.sum(u, 2), square, count + pivot * 0.0)
        # Written so that a NaN, for which every comparison is false, counts as bad.
        bad += tl.where(inside & ~(tl.abs(pivot + square) < float("inf")), 1, 0)
    return tl.sum(tl.sum(bad, 1), 0)


@triton.jit
def write(
    x, residual, y, affine, samples, channels, size, units, magic, ALIGN: tl.constexpr, FLAT: tl.constexpr,
    COLUMNS: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, W_TILE: tl.constexpr, C_BLOCK: tl.constexpr,
    S_BLOCK: tl.constexpr, F_BLOCK: tl.constexpr,
):  # fmt: skip
    """y = act(scale * (x - pivot) + offset + residual) for the program's channels."""
    number = samples * channels
    c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    for begin in range(0, samples, W_TILE):
        n = begin + tl.arange(0, W_TILE)
        lane, keep, at, exists = places_at(
            n, c, samples, channels, size, units, magic, ALIGN, FLAT, COLUMNS, C_BLOCK, S_BLOCK, F_BLOCK
        )
        u = tl.load(x + lane, mask=keep, other=0.0).to(tl.float32) - tl.load(affine + at, mask=exists, other=0.0)
        a = tl.load(affine + number + at, mask=exists, other=0.0)
        z = tl.fma(a + u * 0.0, u, tl.load(affine + 2 * number + at, mask=exists, other=0.0) + u * 0.0)
        if RESIDUAL:
            z += tl.load(residual + lane, mask=keep, other=0.0).to(tl.float32)
        tl.store(y + lane, activation(z, ACT).to(y.dtype.element_ty), mask=keep)


@triton.jit
def is_last(skipped):
    """Return whether all other programs have drawn their tickets, and with them stored what they leave."""
    tl.debug_barrier()  # every thread has stored its part
    before = tl.atomic_add(skipped, 1 << 32, sem="acq_rel")
    last = (before >> 32) == tl.num_programs(0) - 1
    if last:
        tl.store(skipped, before & 0xFFFFFFFF)
        tl.debug_barrier()  # the counter is a count again, for all threads
    return last


@triton.jit
def own_mixture(
    x, residual, y, weight, bias, running_mean, running_var, tracked, skipped, momentum, moments, batch, affine,
    samples, channels, size, units, magic, eps, factor, unbias, BN: tl.constexpr, TRACK: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, ALIGN: tl.constexpr,
    FLAT: tl.constexpr, COLUMNS: tl.constexpr, N_TILE: tl.constexpr, W_TILE: tl.constexpr, N_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr, F_BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalize by the statistics of the batch (BN), or else of each instance. The grid is (blocks of channels,)."""
    number = samples * channels
    # The mean is the pivot of the coefficients, and stored once.
    hi, lo, var = affine, moments, moments + number
    measure(x, hi, lo, var, samples, channels, size, units, ALIGN, COLUMNS, N_TILE, C_BLOCK, S_BLOCK)
    tl.debug_barrier()
    pid = tl.program_id(0)
    if BN:
        pool_columns(
            pid, hi, lo, var, batch, samples, channels, 1, channels, number, 1, 1, 1, factor, False, N_BLOCK, C_BLOCK
        )
        tl.debug_barrier()
    c = (pid * C_BLOCK + tl.arange(0, C_BLOCK))[None, :]
    for begin in range(0, samples, N_BLOCK):
        n = (begin + tl.arange(0, N_BLOCK))[:, None]
        mix_at(
            hi, lo, var, batch, affine, weight, bias, affine, affine, running_mean, running_var, moments, affine,
            n + c * 0, c + n * 0, (n < samples) & (c < channels), number, channels, samples, channels, 1, channels,
            number, 1, 1, 1, eps, factor, True, False, -1 if BN else 0, -1, 0 if BN else -1, 0, False, False, False,
            WEIGHT, BIAS,
        )  # fmt: skip
    tl.debug_barrier()
    write(
        x, residual, y, affine, samples, channels, size, units, magic, ALIGN, FLAT, COLUMNS, ACT, RESIDUAL, W_TILE,
        C_BLOCK, S_BLOCK, F_BLOCK,
    )  # fmt: skip
    # Two conditions, for both sides of an ``and`` may be compiled.
    if TRACK != 0:  # noqa: SIM102
        if is_last(skipped):
            track(
                batch, running_mean, running_var, tracked, skipped, momentum, channels, tl.cast(unbias, tl.float32),
                TRACK, BLOCK,
            )  # fmt: skip


@triton.jit
def own_channels(
    x, residual, y, responsibilities, weight, bias, center_weight, scale_weight, scale_bias, affine_weight, affine_bias,
    running_mean, running_var, tracked, skipped, counter, gap, average_mean, average_var, rate, threshold, limit,
    survey_out, moments, stats, affine, samples, channels, contexts, size, units, magic, eps, inner, least, power,
    unit_scale, unit_affine, BLEND: tl.constexpr, STD: tl.constexpr, COPY: tl.constexpr, POWER: tl.constexpr,
    AVERAGES: tl.constexpr, DETACH: tl.constexpr, MOVE: tl.constexpr, CONTEXTS: tl.constexpr, CENTER: tl.constexpr,
    SCALE: tl.constexpr, AFFINE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr, COLUMNS: tl.constexpr, N_TILE: tl.constexpr,
    W_TILE: tl.constexpr, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr,
    F_BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalize by the equations of the per-channel family. The grid is (blocks of channels,).

    ``counter`` holds the number of updates with BLEND and the priors with CONTEXTS.
    """
    number = samples * channels
    hi, lo, var = affine, moments, moments + number
    bad = measure(x, hi, lo, var, samples, channels, size, units, ALIGN, COLUMNS, N_TILE, C_BLOCK, S_BLOCK)
    tl.debug_barrier()
    channels_of(
        hi, lo, var, responsibilities, weight, bias, center_weight, scale_weight, scale_bias, affine_weight,
        affine_bias, running_mean, running_var, tracked, skipped, counter, counter, affine,
        affine, affine, affine, rate, threshold, limit, affine, affine, affine, affine, moments, stats, affine, samples,
        number, channels, contexts, contexts, 1, 1, channels, number, size, size, 1, eps, inner, least, power,
        unit_scale, unit_affine, True, False, False, BLEND, STD, COPY, POWER, DETACH, 0, 0, CONTEXTS, False, False,
        CENTER, SCALE, AFFINE, False, WEIGHT, BIAS, N_BLOCK, K_BLOCK, C_BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    write(
        x, residual, y, affine, samples, channels, size, units, magic, ALIGN, FLAT, COLUMNS, ACT, RESIDUAL, W_TILE,
        C_BLOCK, S_BLOCK, F_BLOCK,
    )  # fmt: skip
    if MOVE != 0:
        tl.store(survey_out + 2 + 3 * contexts + tl.program_id(0), bad.to(tl.float32))
        if is_last(skipped):
            move_all(
                responsibilities, center_weight, running_mean, running_var, tracked, skipped, counter, rate, survey_out,
                stats, samples, channels, contexts, size, least, MOVE, CONTEXTS, CENTER, N_BLOCK, K_BLOCK,
            )  # fmt: skip
    if BLEND != 0:  # noqa: SIM102
        if is_last(skipped):
            commit(
                stats, running_mean, running_var, tracked, skipped, counter, gap, average_mean, average_var, rate,
                threshold, channels, eps, inner, power, STD, COPY, POWER, AVERAGES, False, BLOCK,
            )  # fmt: skip


@triton.jit
def move_all(
    responsibilities, center_weight, running_mean, running_var, tracked, skipped, prior, rate, survey_out, stats,
    samples, channels, contexts, size, least, MOVE: tl.constexpr, CONTEXTS: tl.constexpr, CENTER: tl.constexpr,
    N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the running statistics of all channels, as every program of ``channels_of`` does for its own."""
    survey_running(
        running_mean, running_var, tracked, tracked, prior, survey_out, channels, contexts, 0, 0, False, True, CONTEXTS,
        CONTEXTS, K_BLOCK, BLOCK // K_BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    q = tl.arange(0, K_BLOCK)
    pid, rows = tl.program_id(0), contexts * channels
    # Elements behind each statistic, for the unbiased variance.
    whole = tl.cast(size, tl.int32)
    count = tl.cast(samples, tl.float32) * whole
    mass = tl.zeros((K_BLOCK,), tl.float32)
    if CONTEXTS:
        mass = masses(responsibilities, contexts, samples, contexts, N_BLOCK, K_BLOCK)
        alone = mass * whole
        count = (alone + tl.maximum(1.0 - alone / tl.cast(least, tl.float32), 0.0) * (count - alone))[:, None]
    for begin in range(0, channels, BLOCK // K_BLOCK):
        c = begin + tl.arange(0, BLOCK // K_BLOCK)
        inside = c < channels
        kc_mask = (q[:, None] < contexts) & inside[None, :]
        at = q[:, None] * channels + c[None, :]
        f = 1.0 + per_channel(center_weight, c, inside, 0.0, CENTER)
        target = f[None, :] * tl.load(stats + at, mask=kc_mask, other=0.0)
        variance = tl.load(stats + 3 * rows + at, mask=kc_mask, other=0.0)
        # Each program left how many of its maps are not finite, where ``survey`` leaves that of each sample.
        move(
            target, variance * (count / tl.maximum(count - 1.0, 1.0)), mass / tl.maximum(samples, 1), pid < 0,
            running_mean, running_var, tracked, skipped, prior, rate, survey_out, stats, True, at, kc_mask,
            begin + pid * 0 == 0, tl.num_programs(0), channels, contexts, CONTEXTS, MOVE == 2, False, K_BLOCK, 256,
        )  # fmt: skip

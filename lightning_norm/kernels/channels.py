"""Device code: equations in which each channel stands alone, in one launch; ``channels_vjp`` holds their adjoint.

One family. Statistics of the batch, or of K contexts in it, per channel; running ones may be mixed in (diminishing
batch normalization) or stand in for them (a condensed batch, evaluation). Then a sample's own mean may strengthen or
weaken it before (centering) and gate it after (scaling, affine):

    V = sum_n a_n (var_n + f^2 (mean_n - mean_B)^2), f = 1 + center_weight
    z = f mean_n - U, U = f mean_B + delta, r = 1 / sqrt(V + eps)
    y = gamma g1(r z) g2(mean_n) r (x - mean_n + z) + beta, summed over contexts by the shares of a sample

A program holds all samples of a few channels, so nothing is handed from one program to another; whether all channels
are finite, and so the running statistics may move, is seen by ``commit`` afterwards.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.algebra import per_channel
from lightning_norm.kernels.reductions import read_moments

TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def masses(shares, samples, contexts, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr):
    """Samples in each context, (K,)."""
    q = tl.arange(0, K_BLOCK)
    mass = tl.zeros((N_BLOCK, K_BLOCK), tl.float32)
    for begin in range(0, samples, N_BLOCK):
        n = begin + tl.arange(0, N_BLOCK)
        inside = (n[:, None] < samples) & (q[None, :] < contexts)
        mass += tl.load(shares + n[:, None] * contexts + q[None, :], mask=inside, other=0.0)
    return tl.sum(mass, 0)


@triton.jit
def weights_at(shares, mass, n, samples, contexts, size, least, CONTEXTS: tl.constexpr, K_BLOCK: tl.constexpr):
    """A sample's share in each context, and its weight in that context's statistics, (N, K, 1) each.

    A context of fewer than ``least`` elements is drawn towards all samples.
    """
    q = tl.arange(0, K_BLOCK)
    inside = (n[:, None] < samples) & (q[None, :] < contexts)
    if CONTEXTS:
        g = tl.load(shares + n[:, None] * contexts + q[None, :], mask=inside, other=0.0)
        part = tl.maximum(1.0 - mass * size / tl.cast(least, tl.float32), 0.0)[None, :]
        a = (1.0 - part) * g / tl.maximum(mass, TINY)[None, :] + part / samples
    else:
        g = tl.where(inside, 1.0, 0.0)
        a = g / samples
    return g[:, :, None], tl.where(inside, a, 0.0)[:, :, None]


@triton.jit
def gate(w, b, k, unit):
    """The sigmoid of w * k + b and that in units of its starting value."""
    s = 1.0 / (1.0 + tl.exp(-(w * k + b)))
    return s, s * tl.cast(unit, tl.float32)


@triton.jit
def new_weight(running_mean, updates, rate, channels, power, POWER: tl.constexpr, BLOCK: tl.constexpr):
    """Alpha and number of this batch: 1 for the first, 2 where statistics were moved in."""
    steps = tl.load(updates) + 1
    if steps == 1:
        moved = tl.zeros((BLOCK,), tl.int32)
        for begin in range(0, channels, BLOCK):
            c = begin + tl.arange(0, BLOCK)
            moved += tl.where(tl.load(running_mean + c, mask=c < channels, other=0.0) != 0.0, 1, 0)
        steps += (tl.sum(moved, 0) > 0).to(tl.int64)
    if POWER:
        alpha = tl.exp(-tl.cast(power, tl.float32) * tl.log(steps.to(tl.float32)))
    else:
        alpha = tl.load(rate).to(tl.float32)
    return tl.where(steps == 1, 1.0, alpha), steps


@triton.jit
def channels_of(
    hi, lo, var, shares, weight, bias, center_weight, scale_weight, scale_bias, affine_weight, affine_bias,
    running_mean, running_spread, updates, rate, condensed, own, stats, coef, samples, number, channels, contexts,
    pieces, sample_stride, stride, piece, size, fold, eps, least, power, unit_scale, unit_affine,
    OWN: tl.constexpr, MERGE: tl.constexpr, FROZEN: tl.constexpr, BLEND: tl.constexpr, STD: tl.constexpr,
    POWER: tl.constexpr, DETACH: tl.constexpr, CHOOSE: tl.constexpr, CONTEXTS: tl.constexpr, CENTER: tl.constexpr,
    SCALE: tl.constexpr, AFFINE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Pivot, scale and offset (3, N * C), and ``stats`` (9, K, C).

    Their rows: mean as hi and lo, variance between samples, variance, delta, r, share of the batch in what was
    used, and what the running mean and spread move towards.
    """
    piece, size, fold = tl.cast(piece, tl.int32), tl.cast(size, tl.int32), tl.cast(fold, tl.int32)
    eps, whole = tl.cast(eps, tl.float32), size * fold
    c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    inside = c < channels
    q = tl.arange(0, K_BLOCK)
    kept = (q[:, None] < contexts) & inside[None, :]
    at = q[:, None] * channels + c[None, :]
    first = tl.load((hi if OWN else running_mean) + c, mask=inside, other=0.0).to(tl.float32)
    w_m = per_channel(center_weight, c, inside, 0.0, CENTER)
    f = 1.0 + w_m
    mass = tl.zeros((K_BLOCK,), tl.float32)
    if CONTEXTS:
        mass = masses(shares, samples, contexts, N_BLOCK, K_BLOCK)
    mean = tl.zeros((K_BLOCK, C_BLOCK), tl.float32)
    within, between = mean, mean
    if not FROZEN:
        total = tl.zeros((N_BLOCK, K_BLOCK, C_BLOCK), tl.float32)
        for begin in range(0, samples, N_BLOCK):
            n = begin + tl.arange(0, N_BLOCK)
            keep = (n[:, None] < samples) & inside[None, :]
            k, d, v = read_moments(hi, lo, var, n[:, None].to(tl.int64) * sample_stride + c[None, :], keep, pieces, stride, piece, size, fold, MERGE)  # noqa: E501  # fmt: skip
            g, a = weights_at(shares, mass, n, samples, contexts, whole, least, CONTEXTS, K_BLOCK)
            total += a * tl.where(keep, k - first[None, :] + d, 0.0)[:, None, :]
        mean = tl.sum(total, 0)
        inner = tl.zeros((N_BLOCK, K_BLOCK, C_BLOCK), tl.float32)
        outer = inner
        for begin in range(0, samples, N_BLOCK):
            n = begin + tl.arange(0, N_BLOCK)
            keep = (n[:, None] < samples) & inside[None, :]
            k, d, v = read_moments(hi, lo, var, n[:, None].to(tl.int64) * sample_stride + c[None, :], keep, pieces, stride, piece, size, fold, MERGE)  # noqa: E501  # fmt: skip
            g, a = weights_at(shares, mass, n, samples, contexts, whole, least, CONTEXTS, K_BLOCK)
            e = (k - first[None, :] + d)[:, None, :] - mean[None, :, :]
            inner += a * v[:, None, :]
            outer += a * e * e
        within, between = tl.sum(inner, 0), tl.sum(outer, 0)
    spread = within + (f * f)[None, :] * between
    used, delta, p = spread, mean * 0.0, mean * 0.0 + 1.0
    if BLEND or FROZEN or CHOOSE == 1:
        old = tl.load(running_spread + c, mask=inside, other=0.0).to(tl.float32)[None, :] + mean * 0.0
        away = tl.load(running_mean + c, mask=inside, other=0.0).to(tl.float32) - first - w_m * first
        away = away[None, :] - f[None, :] * mean
    if STD and not FROZEN:
        used = tl.sqrt_rn(tl.maximum(spread, TINY))
    if FROZEN:
        used, delta, p = old, away, mean * 0.0
    elif BLEND:
        alpha, steps = new_weight(running_mean, updates, rate, channels, power, POWER, 256)
        delta, used, p = (1.0 - alpha) * away, alpha * used + (1.0 - alpha) * old, p * alpha
    elif CHOOSE == 1:
        off = tl.load(condensed) != 0.0
        used, delta = tl.where(off, old, used), tl.where(off, away, delta)
        p = tl.where(off, 0.0, p)
    if DETACH:
        p = p * 0.0
    one = tl.full((), 1.0, tl.float32)
    r = tl.div_rn(one, used + eps) if STD else tl.div_rn(one, tl.sqrt_rn(used + eps))
    count = tl.cast(samples, tl.float32) * whole
    if CONTEXTS:
        alone = mass * whole
        count = (alone + tl.maximum(1.0 - alone / tl.cast(least, tl.float32), 0.0) * (count - alone))[:, None]
    base = first[None, :] + mean
    target, moved = f[None, :] * base + delta, used
    if not BLEND:
        target, moved = f[None, :] * base, spread * (count / tl.maximum(count - 1.0, 1.0))
    rows = contexts * channels
    tl.store(stats + at, base, mask=kept)
    tl.store(stats + rows + at, mean - (base - first[None, :]), mask=kept)
    tl.store(stats + 2 * rows + at, between, mask=kept)
    tl.store(stats + 3 * rows + at, spread, mask=kept)
    tl.store(stats + 4 * rows + at, delta, mask=kept)
    tl.store(stats + 5 * rows + at, r, mask=kept)
    tl.store(stats + 6 * rows + at, p, mask=kept)
    tl.store(stats + 7 * rows + at, target, mask=kept)
    tl.store(stats + 8 * rows + at, moved, mask=kept)
    gamma = per_channel(weight, at, kept, 1.0, WEIGHT)[None, :, :]
    beta = per_channel(bias, at, kept, 0.0, BIAS)[None, :, :]
    for begin in range(0, samples, N_BLOCK):
        n = begin + tl.arange(0, N_BLOCK)
        keep = (n[:, None] < samples) & inside[None, :]
        i = n[:, None] * channels + c[None, :]
        if OWN:
            k, d, v = read_moments(hi, lo, var, n[:, None].to(tl.int64) * sample_stride + c[None, :], keep, pieces, stride, piece, size, fold, MERGE)  # noqa: E501  # fmt: skip
            if MERGE:
                tl.store(own + i, k, mask=keep)
                tl.store(own + number + i, d, mask=keep)
                tl.store(own + 2 * number + i, v, mask=keep)
        else:
            k = first[None, :] + tl.zeros((N_BLOCK, C_BLOCK), tl.float32)
            d = k * 0.0
        g, a = weights_at(shares, mass, n, samples, contexts, whole, least, CONTEXTS, K_BLOCK)
        z = f[None, None, :] * ((k - first[None, :] + d)[:, None, :] - mean[None, :, :]) - delta[None, :, :]
        scale = gamma * r[None, :, :]
        if SCALE:
            w, b = tl.load(scale_weight + c, mask=inside, other=0.0), tl.load(scale_bias + c, mask=inside, other=0.0)
            s, h = gate(w.to(tl.float32), b.to(tl.float32), r[None, :, :] * z, unit_scale)
            scale = scale * h
        if AFFINE:
            w, b = tl.load(affine_weight + c, mask=inside, other=0.0), tl.load(affine_bias + c, mask=inside, other=0.0)
            s, h = gate(w.to(tl.float32), b.to(tl.float32), (k + d)[:, None, :], unit_affine)
            scale = scale * h
        offset = g * (beta + scale * (z - d[:, None, :]))
        tl.store(coef + i, k, mask=keep)
        tl.store(coef + number + i, tl.sum(g * scale, 1), mask=keep)
        tl.store(coef + 2 * number + i, tl.sum(offset, 1), mask=keep)


@triton.jit
def commit(
    stats, shares, condensed, running_mean, running_spread, tracked, skipped, updates, gap, prior, rate, samples,
    channels, contexts, eps, power, BLEND: tl.constexpr, STD: tl.constexpr, POWER: tl.constexpr, CHOOSE: tl.constexpr,
    CONTEXTS: tl.constexpr, AVERAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the running statistics, unless a batch statistic is NaN or infinite. One program."""
    rows = contexts * channels
    bad = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, rows, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        seen = tl.load(stats + i, mask=i < rows, other=0.0) + tl.load(stats + 3 * rows + i, mask=i < rows, other=0.0)
        bad += tl.where(tl.abs(seen) < float("inf"), 0, 1)
    good = tl.sum(bad, 0) == 0
    missed = tl.load(skipped) + 1 - good.to(tl.int64)
    if CHOOSE != 0:
        good = good & (tl.load(condensed) == 0.0)
    count = tl.load(tracked) + good.to(tl.int64)
    seen = tl.maximum(count, 1).to(tl.float32)
    if AVERAGE:
        speed = 1.0 / seen
    else:
        speed = tl.load(rate).to(tl.float32)
    if BLEND:
        alpha, steps = new_weight(running_mean, updates, rate, channels, power, POWER, BLOCK)
        far = tl.zeros((BLOCK,), tl.float32)
        wide = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, channels, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            now = tl.load(stats + 3 * rows + i, mask=i < rows, other=0.0)
            was = tl.load(stats + 8 * rows + i, mask=i < rows, other=0.0)
            if STD:
                now = tl.maximum(now, TINY)
            else:
                was = tl.sqrt_rn(was)
            r = 1.0 / (was + tl.cast(eps, tl.float32))
            far += tl.abs(tl.load(stats + 4 * rows + i, mask=i < rows, other=0.0) * r)
            wide += tl.where(i < rows, tl.abs(tl.sqrt_rn(now) - was) * r, 0.0)
    tl.debug_barrier()  # every thread has read what is now written
    tl.store(skipped, missed)
    tl.store(tracked, count)
    if BLEND:
        tl.store(updates, steps, mask=good)
        tl.store(gap, tl.sum(far, 0) / channels, mask=good)
        tl.store(gap + 1, tl.sum(wide, 0) / channels, mask=good)
    for context in range(0, contexts):
        step, move = speed, good
        if CONTEXTS:
            held = tl.zeros((BLOCK,), tl.float32)
            for begin in range(0, samples, BLOCK):
                n = begin + tl.arange(0, BLOCK)
                held += tl.load(shares + n * contexts + context, mask=n < samples, other=0.0)
            share = tl.sum(held, 0) / samples
            old = tl.load(prior + context).to(tl.float32)
            new = old + speed * (share - old)
            if AVERAGE:
                step = share / tl.maximum(seen * new, TINY)
            else:
                step = speed * tl.minimum(contexts * share, 1.0)
            moved = tl.zeros((BLOCK,), tl.int32)
            for begin in range(0, channels, BLOCK):
                c = begin + tl.arange(0, BLOCK)
                m = tl.load(running_mean + context * channels + c, mask=c < channels, other=0.0)
                v = tl.load(running_spread + context * channels + c, mask=c < channels, other=1.0)
                moved += tl.where((m == 0.0) & (v == 1.0), 0, 1)
            move = good & (share > 0.0)
            step = tl.where(tl.sum(moved, 0) == 0, 1.0, step)
            tl.debug_barrier()
            tl.store(prior + context, new, mask=good)
        for begin in range(0, channels, BLOCK):
            c = begin + tl.arange(0, BLOCK)
            i, keep = context * channels + c, c < channels
            mean = tl.load(stats + 7 * rows + i, mask=keep, other=0.0)
            spread = tl.load(stats + 8 * rows + i, mask=keep, other=0.0)
            if not BLEND:
                mean = (1.0 - step) * tl.load(running_mean + i, mask=keep, other=0.0) + step * mean
                spread = (1.0 - step) * tl.load(running_spread + i, mask=keep, other=0.0) + step * spread
            tl.store(running_mean + i, mean, mask=keep & move)
            tl.store(running_spread + i, spread, mask=keep & move)

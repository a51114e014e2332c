"""Device code: equations in which each channel stands alone, in one launch; ``backward`` holds their adjoint.

Statistics of the batch, or of K contexts in it, per channel. Running ones may be mixed in (dbn), or stand in for them
(a condensed batch of ubn, evaluation). Then a sample's mean may strengthen or weaken it before (centering) and gate it
after (scaling, affine; rbn and ubn). With a_n the weight of a sample in a context's statistics:

    V = sum_n a_n (var_n + f^2 (mean_n - mean_B)^2), f = 1 + center_weight
    z = f mean_n - U, U = f mean_B + delta, r = 1 / sqrt(V + eps)
    y = gamma g1(r z) g2(mean_n) r (x - mean_n + z) + beta, summed over contexts by a sample's responsibilities

Letters of the code, beside these, in the order of the axes (N, K, C) of samples, contexts and channels:

* n, q, c: the samples, contexts and channels of a tile; ``keep``, ``inside`` and ``kc_mask``: which of them exist.
* k + d, v: mean_n as hi and lo, and var_n, as ``read_moments`` returns them. S = size * fold elements are behind each.
* g, a: a context's responsibility for a sample, and the sample's weight a_n in the context's statistics.
* s, h: sigmoid of a gate's argument, and the gate's value (g1 or g2), which is s times a constant.
* w_m: center_weight. ``first``: a mean from which all others are counted as small differences.
* p: the weight of the batch's statistics in those that are used, by which their gradient is multiplied; where the
  batch's are scaled to the value of others, the ratio of the two variances.

A program holds all samples of a few channels, so nothing is handed from one program to another. What concerns all
channels was seen by ``running_stats.survey`` before.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.mixture.forward import per_channel
from lightning_norm.kernels.passes.forward import read_moments
from lightning_norm.kernels.per_channel.condensation import decide
from lightning_norm.kernels.per_channel.running_stats import NAN, TINY, move, new_weight


@triton.jit
def masses(responsibilities, stride, samples, contexts, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr):
    """Return the sum over samples of each context's responsibilities, (K,)."""
    q = tl.arange(0, K_BLOCK)
    mass = tl.zeros((N_BLOCK, K_BLOCK), tl.float32)
    for begin in range(0, samples, N_BLOCK):
        n = begin + tl.arange(0, N_BLOCK)
        inside = (n[:, None] < samples) & (q[None, :] < contexts)
        # Kept apart by sample and added up at the end: a tile is reduced once, not in every turn.
        mass += tl.load(responsibilities + n[:, None] * stride + q[None, :], mask=inside, other=0.0)
    return tl.sum(mass, 0)


@triton.jit
def weights_at(
    responsibilities, stride, mass, n, samples, contexts, size, least, CONTEXTS: tl.constexpr, K_BLOCK: tl.constexpr
):
    """Return each context's responsibility for a sample, and the sample's weight in its statistics: (N, K, 1) each.

    The responsibilities of two samples lie ``stride`` apart. A context of fewer than ``least`` elements is drawn
    towards all samples, by the part that it lacks.
    """
    q = tl.arange(0, K_BLOCK)
    inside = (n[:, None] < samples) & (q[None, :] < contexts)
    if CONTEXTS:
        # ``part`` is 0 for a context that is large enough.
        g = tl.load(responsibilities + n[:, None] * stride + q[None, :], mask=inside, other=0.0)
        part = tl.maximum(1.0 - mass * size / tl.cast(least, tl.float32), 0.0, propagate_nan=NAN)[None, :]
        a = (1.0 - part) * g / tl.maximum(mass, TINY, propagate_nan=NAN)[None, :] + part / samples
    else:
        # Without contexts there is one, and every sample belongs to it.
        g = tl.where(inside, 1.0, 0.0)
        a = g / tl.maximum(samples, 1)
    return g[:, :, None], tl.where(inside, a, 0.0)[:, :, None]


@triton.jit
def prior_scale(survey_out, contexts, K_BLOCK: tl.constexpr):
    """Return 1 / sqrt of each context's prior, (K,), at most 10; a new context has the others' factor."""
    q = tl.arange(0, K_BLOCK)
    prior = tl.load(survey_out + 2 + 2 * contexts + q, mask=q < contexts, other=0.0)
    # A rare context would be scaled without bound; 0.01 is where the factor is 10.
    factor = tl.rsqrt(tl.maximum(prior, 0.01, propagate_nan=NAN))
    return tl.where(prior > 0.0, factor, tl.sum(prior * factor, 0))


@triton.jit
def running_of(
    running_mean, running_var, survey_out, at, kc_mask, contexts, POOLED: tl.constexpr, K_BLOCK: tl.constexpr
):
    """Return the mean of all contexts, (C,), and each context's mean, counted from there, and variance, (K, C).

    A new context has those of all together, and with POOLED every one has.
    """
    q = tl.arange(0, K_BLOCK)
    prior = tl.load(survey_out + 2 + 2 * contexts + q, mask=q < contexts, other=0.0)[:, None]
    new = tl.load(survey_out + 2 + contexts + q, mask=q < contexts, other=0.0)[:, None] != 0.0
    mean = tl.load(running_mean + at, mask=kc_mask, other=0.0)
    var = tl.load(running_var + at, mask=kc_mask, other=0.0)
    # All contexts together, by the law of total variance with their priors as weights.
    # Each is counted from the mean of all: differences of large means keep their digits in float32.
    first = tl.sum(prior * mean, 0)
    away = mean - first[None, :]
    rest = tl.sum(prior * away, 0)[None, :]
    pooled = tl.sum(prior * (var + (away - rest) * (away - rest)), 0)[None, :]
    if POOLED:
        # True for every context, as a tensor and not as a constant of the compiler.
        new = new | (prior >= 0.0)
    return first, tl.where(new, rest, away), tl.where(new, pooled, var)


@triton.jit
def gate(w, b, k, unit):
    """Return s = sigmoid(w k + b) and s * unit, which is 1 at the gate's starting value."""
    s = 1.0 / (1.0 + tl.exp(-(w * k + b)))
    return s, s * tl.cast(unit, tl.float32)


@triton.jit
def batch_of(
    hi, lo, var, responsibilities, mass, first, c, samples, channels, contexts, responsibility_stride, pieces,
    sample_stride, stride, piece, size, fold, least, MERGE: tl.constexpr, CONTEXTS: tl.constexpr, N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the mean, counted from ``first``, and the variance within and between samples: (K, C) each.

    mean = sum_n a_n mean_n; within = sum_n a_n var_n; between = sum_n a_n (mean_n - mean)^2.
    """
    inside, whole = c < channels, size * fold
    # The means, as differences from ``first``: float32 is enough at any mean.
    total = tl.zeros((N_BLOCK, K_BLOCK, C_BLOCK), tl.float32)
    for begin in range(0, samples, N_BLOCK):
        n = begin + tl.arange(0, N_BLOCK)
        keep = (n[:, None] < samples) & inside[None, :]
        k, d, v = read_moments(hi, lo, var, n[:, None].to(tl.int64) * sample_stride + c[None, :], keep, pieces, stride, piece, size, fold, MERGE)  # noqa: E501  # fmt: skip
        g, a = weights_at(
            responsibilities, responsibility_stride, mass, n, samples, contexts, whole, least, CONTEXTS, K_BLOCK
        )
        total += a * tl.where(keep, k - first[None, :] + d, 0.0)[:, None, :]
    mean = tl.sum(total, 0)
    # A second walk over the samples, around the mean: nothing cancels.
    inner = tl.zeros((N_BLOCK, K_BLOCK, C_BLOCK), tl.float32)
    outer = inner
    for begin in range(0, samples, N_BLOCK):
        n = begin + tl.arange(0, N_BLOCK)
        keep = (n[:, None] < samples) & inside[None, :]
        k, d, v = read_moments(hi, lo, var, n[:, None].to(tl.int64) * sample_stride + c[None, :], keep, pieces, stride, piece, size, fold, MERGE)  # noqa: E501  # fmt: skip
        g, a = weights_at(
            responsibilities, responsibility_stride, mass, n, samples, contexts, whole, least, CONTEXTS, K_BLOCK
        )
        e = (k - first[None, :] + d)[:, None, :] - mean[None, :, :]
        inner += a * v[:, None, :]
        outer += a * e * e
    return mean, tl.sum(inner, 0), tl.sum(outer, 0)


@triton.jit(do_not_specialize=["samples", "pieces", "piece", "size", "fold"])
def pool_channels(
    hi, lo, var, center_weight, batch, samples, channels, pieces, sample_stride, stride, piece, size, fold,
    MERGE: tl.constexpr, CENTER: tl.constexpr, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """U of this rank's samples as hi and lo, and their V, (3, C): what other ranks need. Without contexts, so K is 1.

    The grid is (blocks of channels,), as in ``channels_of``.
    """
    piece, size, fold = tl.cast(piece, tl.int32), tl.cast(size, tl.int32), tl.cast(fold, tl.int32)
    c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    inside = c < channels
    # The first sample's mean is near all others of the channel, and costs one load.
    first = tl.load(hi + c, mask=inside, other=0.0)
    w_m = per_channel(center_weight, c, inside, 0.0, CENTER)
    mean, within, between = batch_of(
        hi, lo, var, hi, 0.0, first, c, samples, channels, 1, 1, pieces, sample_stride, stride, piece, size, fold, 1.0,
        MERGE, False, N_BLOCK, K_BLOCK, C_BLOCK,
    )  # fmt: skip
    # U = (1 + w) mean with what each rounding leaves, for mean may be large.
    more = w_m * first
    near = first + more  # and what rounding both has left
    away = tl.fma(w_m, first, -more) + (more - (near - first)) + (1.0 + w_m) * tl.sum(mean, 0)
    # As hi and lo: other ranks count from means of their own, and need all digits.
    rounded = near + away
    tl.store(batch + c, rounded, mask=inside)
    tl.store(batch + channels + c, away - (rounded - near), mask=inside)
    tl.store(batch + 2 * channels + c, tl.sum(within + ((1.0 + w_m) * (1.0 + w_m))[None, :] * between, 0), mask=inside)


@triton.jit(do_not_specialize=["samples", "jobs", "pieces", "piece", "size", "fold"])
def channels_of(
    hi, lo, var, responsibilities, weight, bias, center_weight, scale_weight, scale_bias, affine_weight, affine_bias,
    running_mean, running_var, tracked, skipped, updates, prior, last, measured, skipped_condensed, in_a_row, rate,
    threshold, limit, survey_out, parts, pooled, gathered, moments, stats, affine, samples, number, channels, contexts,
    responsibility_stride, jobs, pieces, sample_stride, stride, piece, size, fold, eps, inner, least, power,
    unit_scale, unit_affine, MOMENTS: tl.constexpr, MERGE: tl.constexpr, FROZEN: tl.constexpr, BLEND: tl.constexpr,
    STD: tl.constexpr, COPY: tl.constexpr, POWER: tl.constexpr, DETACH: tl.constexpr, CONDENSED: tl.constexpr,
    MOVE: tl.constexpr, CONTEXTS: tl.constexpr, PRIOR: tl.constexpr, POOLED: tl.constexpr, CENTER: tl.constexpr,
    SCALE: tl.constexpr, AFFINE: tl.constexpr, RANKS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Pivot, scale and offset (3, N * C), and ``stats`` (7 to 11, K, C); with MOVE the running statistics move.

    Rows of ``stats``: mean as hi and lo, variance between samples, V, delta, r, the weight p of the batch in what was
    used, and with BLEND what the running mean and variance become, and how far that mean is from the batch's. With
    RANKS U and V are those of all ranks, ``pooled`` (3, C); delta holds how far that U is from f mean_B of this one,
    and a last row that alone. One block of channels to a program.
    """
    piece, size, fold = tl.cast(piece, tl.int32), tl.cast(size, tl.int32), tl.cast(fold, tl.int32)
    eps, inner, whole = tl.cast(eps, tl.float32), tl.cast(inner, tl.float32), size * fold
    c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    inside = c < channels
    q = tl.arange(0, K_BLOCK)
    kc_mask = (q[:, None] < contexts) & inside[None, :]
    at = q[:, None] * channels + c[None, :]
    # Everything is counted from ``first``, a mean near all others of the channel.
    if FROZEN and CONTEXTS:
        first, away, old = running_of(running_mean, running_var, survey_out, at, kc_mask, contexts, POOLED, K_BLOCK)
    else:
        first = tl.load((hi if MOMENTS else running_mean) + c, mask=inside, other=0.0).to(tl.float32)
    w_m = per_channel(center_weight, c, inside, 0.0, CENTER)
    f = 1.0 + w_m
    mass = tl.zeros((K_BLOCK,), tl.float32)
    if CONTEXTS:
        mass = masses(responsibilities, responsibility_stride, samples, contexts, N_BLOCK, K_BLOCK)
    mean = tl.zeros((K_BLOCK, C_BLOCK), tl.float32)
    within, between, apart = mean, mean, mean
    # Statistics of the batch.
    if not FROZEN:
        mean, within, between = batch_of(
            hi, lo, var, responsibilities, mass, first, c, samples, channels, contexts, responsibility_stride, pieces,
            sample_stride, stride, piece, size, fold, least, MERGE, CONTEXTS, N_BLOCK, K_BLOCK, C_BLOCK,
        )  # fmt: skip
    variance = within + (f * f)[None, :] * between
    # V and U of all ranks; ``apart`` is how far that U is from this rank's.
    if RANKS:
        of_all, rest = (
            tl.load(pooled + c, mask=inside, other=0.0),
            tl.load(pooled + channels + c, mask=inside, other=0.0),
        )
        variance = tl.load(pooled + 2 * channels + c, mask=inside, other=0.0)[None, :] + mean * 0.0
        apart = (tl.fma(-w_m, first, of_all - first) + rest)[None, :] - f[None, :] * mean
    used, delta, p = variance, apart, mean * 0.0 + 1.0
    # Where running statistics take part, ``away`` is how far they are from U.
    if BLEND != 0 or CONDENSED % 2 == 1 or (FROZEN and not CONTEXTS):
        old = tl.load(running_var + c, mask=inside, other=0.0).to(tl.float32)[None, :] + mean * 0.0
        away = tl.load(running_mean + c, mask=inside, other=0.0).to(tl.float32) - first - w_m * first
        away = away[None, :] - f[None, :] * mean
        if RANKS:
            away = (tl.load(running_mean + c, mask=inside, other=0.0) - of_all - rest)[None, :] + mean * 0.0
    # From here on ``used`` is what is divided by, ``delta`` the shift of U, ``p`` the weight of the batch.
    if STD and not FROZEN:
        used = tl.sqrt_rn(tl.maximum(variance + inner, TINY, propagate_nan=NAN)) - inner
    if FROZEN:
        used, delta, p = old, away, mean * 0.0
    elif BLEND != 0:
        alpha, steps = new_weight(running_mean, updates, rate, channels, power, COPY, POWER, 256)
        blend = (1.0 - alpha) * away
        blended = alpha * used + (1.0 - alpha) * old
        if BLEND == 3:  # the batch's own scale times a constant, and a constant offset
            p = tl.div_rn(blended + eps, used + eps)
        if BLEND == 1:
            p = p * alpha
        if BLEND % 2 == 1:
            delta, used = blend + apart, blended
        if BLEND == 4:  # within limits, and the first batch, which is copied, agrees with itself
            if COPY:
                old, away = tl.where(steps == 1, used, old), tl.where(steps == 1, 0.0, away)
            most = tl.load(threshold).to(tl.float32)
            if not STD:
                most = most * most
            p = tl.div_rn(old + eps, used + eps)
            p = tl.minimum(tl.maximum(p, 1.0 / most, propagate_nan=NAN), most, propagate_nan=NAN)
            used = (used + eps) * p - eps
    # A Boolean tensor that is False.
    off = tl.program_id(0) < 0
    if CONDENSED != 0:
        off = decide(survey_out, parts, last, measured, skipped_condensed, in_a_row, threshold, samples, jobs, 256)
    # A condensed batch: the running statistics replace its own, ...
    if CONDENSED == 1:
        used, delta = tl.where(off, old, used), tl.where(off, away, delta)
        p = tl.where(off, 0.0, p)
    # ... or it keeps its own and is scaled and moved to the value of theirs, both clamped: to a factor of 3 between
    # deviations, which is 9 between variances, and to 5 deviations, see ``UnifiedBatchNorm``.
    if CONDENSED == 3:  # p is the ratio of the variances, and delta a constant in units of 1 / r
        ratio = tl.div_rn(old + eps, variance + eps)
        p = tl.minimum(tl.maximum(ratio, 1.0 / 9.0, propagate_nan=NAN), 9.0, propagate_nan=NAN)
        p = tl.where(off, p, 1.0)
    if DETACH:
        p = p * 0.0
    # r, with an eps inside the root or beside the deviation.
    one = tl.full((), 1.0, tl.float32)
    if CONDENSED == 3:
        r = tl.div_rn(one, tl.sqrt_rn((variance + eps) * p))
        apart = tl.div_rn(away, tl.sqrt_rn(old + eps))
        clamped = tl.minimum(tl.maximum(apart, -5.0, propagate_nan=NAN), 5.0, propagate_nan=NAN)
        delta = tl.where(off, tl.div_rn(clamped, r), 0.0)
    elif STD:
        r = tl.div_rn(one, used + eps)
    else:
        r = tl.div_rn(one, tl.sqrt_rn(used + eps))
    if BLEND == 4:
        far = tl.div_rn(away, (old + eps) if STD else tl.sqrt_rn(old + eps))
        most = tl.load(limit).to(tl.float32)
        delta = apart + tl.div_rn(tl.minimum(tl.maximum(far, -most, propagate_nan=NAN), most, propagate_nan=NAN), r)
    # Elements behind each statistic, for the unbiased variance.
    count = tl.cast(samples, tl.float32) * whole
    if CONTEXTS:
        alone = mass * whole
        count = (alone + tl.maximum(1.0 - alone / tl.cast(least, tl.float32), 0.0) * (count - alone))[:, None]
    base = first[None, :] + mean
    target = f[None, :] * base
    if RANKS:
        count, target = tl.load(gathered).to(tl.float32), (of_all + rest)[None, :] + mean * 0.0
        variance = tl.where(count > 1.0, variance, float("nan"))  # too few for a variance: nothing moves
    # What the backward pass needs; r and p also tell it what was chosen.
    rows = contexts * channels
    tl.store(stats + at, base, mask=kc_mask)
    tl.store(stats + rows + at, mean - (base - first[None, :]), mask=kc_mask)
    tl.store(stats + 2 * rows + at, between, mask=kc_mask)
    tl.store(stats + 3 * rows + at, variance, mask=kc_mask)
    tl.store(stats + 4 * rows + at, delta, mask=kc_mask)
    tl.store(stats + 5 * rows + at, r, mask=kc_mask)
    tl.store(stats + 6 * rows + at, p, mask=kc_mask)
    if BLEND != 0:
        if RANKS:
            target = of_all[None, :] + (rest[None, :] + blend)
        else:
            target = target + blend
        tl.store(stats + 7 * rows + at, target, mask=kc_mask)
        tl.store(stats + 8 * rows + at, blended, mask=kc_mask)
        tl.store(stats + 9 * rows + at, blend, mask=kc_mask)
    if RANKS:
        tl.store(stats + (10 if BLEND != 0 else 7) * rows + at, apart, mask=kc_mask)
    # The programs own their channels, and ``survey`` saw what concerns all of them.
    if MOVE:
        move(
            target, variance * (count / tl.maximum(count - 1.0, 1.0)), mass / tl.maximum(samples, 1), off, running_mean,
            running_var, tracked, skipped, prior, rate, survey_out, pooled, count > 1.0, at, kc_mask,
            tl.program_id(0) == 0, samples, channels, contexts, CONTEXTS, MOVE == 2, RANKS, K_BLOCK, 256,
        )  # fmt: skip
    # The affine map of each sample: walk over the samples once more.
    gamma = per_channel(weight, at, kc_mask, 1.0, WEIGHT)[None, :, :]
    beta = per_channel(bias, at, kc_mask, 0.0, BIAS)[None, :, :]
    if PRIOR:
        factor = prior_scale(survey_out, contexts, K_BLOCK)[None, :, None]
        gamma, beta = gamma * factor, beta * factor
    for begin in range(0, samples, N_BLOCK):
        n = begin + tl.arange(0, N_BLOCK)
        keep = (n[:, None] < samples) & inside[None, :]
        i = n[:, None] * channels + c[None, :]
        if MOMENTS:
            # The moments of x, joined here for the backward pass.
            k, d, v = read_moments(hi, lo, var, n[:, None].to(tl.int64) * sample_stride + c[None, :], keep, pieces, stride, piece, size, fold, MERGE)  # noqa: E501  # fmt: skip
            if MERGE:
                tl.store(moments + i, d, mask=keep)
                tl.store(moments + number + i, v, mask=keep)
        else:
            k = first[None, :] + tl.zeros((N_BLOCK, C_BLOCK), tl.float32)
            d = k * 0.0
        g, a = weights_at(
            responsibilities, responsibility_stride, mass, n, samples, contexts, whole, least, CONTEXTS, K_BLOCK
        )
        # z of the equations, from differences only.
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
        # The sum over contexts of responsibility times affine map is one affine map.
        offset = g * (beta + scale * (z - d[:, None, :]))
        # The pivot is stored already where the pass over x wrote it there.
        if MERGE or not MOMENTS:
            tl.store(affine + i, k, mask=keep)
        tl.store(affine + number + i, tl.sum(g * scale, 1), mask=keep)
        tl.store(affine + 2 * number + i, tl.sum(offset, 1), mask=keep)

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

from lightning_norm.kernels.arguments import Moments
from lightning_norm.kernels.mixture.forward import per_channel
from lightning_norm.kernels.passes.forward import layout_of, read_moments
from lightning_norm.kernels.per_channel.condensation import decide
from lightning_norm.kernels.per_channel.flags import Learned, Numbers, PerChannelStatistics, Rates, Shape, State
from lightning_norm.kernels.per_channel.running_stats import NAN, TINY, move, new_weight


@triton.jit
def responsibilities_at(responsibilities, n, shape, FLAGS: tl.constexpr, K_BLOCK: tl.constexpr):
    """Return each context's responsibility for some samples, (N, K), and which of them there are.

    With ``pooled`` all samples have the same ones, and these are stored once.
    """
    q = tl.arange(0, K_BLOCK)
    inside = (n[:, None] < shape.samples) & (q[None, :] < shape.contexts)
    at = q[None, :] + n[:, None] * (0 if FLAGS.pooled else shape.contexts)
    return tl.load(responsibilities + at, mask=inside, other=0.0), inside


@triton.jit
def masses(responsibilities, shape, FLAGS: tl.constexpr, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr):
    """Return the sum over samples of each context's responsibilities, (K,); 0 without contexts, where nobody asks."""
    b_mass = tl.zeros((N_BLOCK, K_BLOCK), tl.float32)
    if FLAGS.contexts:
        for begin in range(0, shape.samples, N_BLOCK):
            g, inside = responsibilities_at(responsibilities, begin + tl.arange(0, N_BLOCK), shape, FLAGS, K_BLOCK)
            # Kept apart by sample and added up at the end: a tile is reduced once, not in every turn.
            b_mass += g
    return tl.sum(b_mass, 0)


@triton.jit
def weights_at(responsibilities, mass, n, shape, size, least, FLAGS: tl.constexpr, K_BLOCK: tl.constexpr):
    """Return each context's responsibility for a sample, and the sample's weight in its statistics: (N, K, 1) each.

    A context of fewer than ``least`` elements is drawn towards all samples, by the part that it lacks.
    """
    samples = shape.samples
    inside = (n[:, None] < samples) & (tl.arange(0, K_BLOCK)[None, :] < shape.contexts)
    if FLAGS.contexts:
        # ``part`` is 0 for a context that is large enough.
        g, inside = responsibilities_at(responsibilities, n, shape, FLAGS, K_BLOCK)
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
def running_of(state, survey_out, at, kc_mask, contexts, POOLED: tl.constexpr, K_BLOCK: tl.constexpr):
    """Return the mean of all contexts, (C,), and each context's mean, counted from there, and variance, (K, C).

    A new context has those of all together, and with POOLED every one has.
    """
    q = tl.arange(0, K_BLOCK)
    prior = tl.load(survey_out + 2 + 2 * contexts + q, mask=q < contexts, other=0.0)[:, None]
    new = tl.load(survey_out + 2 + contexts + q, mask=q < contexts, other=0.0)[:, None] != 0.0
    mean = tl.load(state.mean + at, mask=kc_mask, other=0.0)
    var = tl.load(state.var + at, mask=kc_mask, other=0.0)
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
    parts, responsibilities, mass, first, c, shape, layout, least, FLAGS: tl.constexpr, N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the mean, counted from ``first``, and the variance within and between samples: (K, C) each.

    mean = sum_n a_n mean_n; within = sum_n a_n var_n; between = sum_n a_n (mean_n - mean)^2.
    """
    samples, inside, whole = shape.samples, c < shape.channels, layout.size * layout.fold
    # The means, as differences from ``first``: float32 is enough at any mean.
    total = tl.zeros((N_BLOCK, K_BLOCK, C_BLOCK), tl.float32)
    for begin in range(0, samples, N_BLOCK):
        n = begin + tl.arange(0, N_BLOCK)
        keep = (n[:, None] < samples) & inside[None, :]
        at = n[:, None].to(tl.int64) * layout.sample_stride + c[None, :]
        k, d, v = read_moments(parts, at, keep, layout, FLAGS.merge)
        g, a = weights_at(responsibilities, mass, n, shape, whole, least, FLAGS, K_BLOCK)
        total += a * tl.where(keep, k - first[None, :] + d, 0.0)[:, None, :]
    mean = tl.sum(total, 0)
    # A second walk over the samples, around the mean: nothing cancels.
    inner = tl.zeros((N_BLOCK, K_BLOCK, C_BLOCK), tl.float32)
    outer = inner
    for begin in range(0, samples, N_BLOCK):
        n = begin + tl.arange(0, N_BLOCK)
        keep = (n[:, None] < samples) & inside[None, :]
        at = n[:, None].to(tl.int64) * layout.sample_stride + c[None, :]
        k, d, v = read_moments(parts, at, keep, layout, FLAGS.merge)
        g, a = weights_at(responsibilities, mass, n, shape, whole, least, FLAGS, K_BLOCK)
        e = (k - first[None, :] + d)[:, None, :] - mean[None, :, :]
        inner += a * v[:, None, :]
        outer += a * e * e
    return mean, tl.sum(inner, 0), tl.sum(outer, 0)


@triton.jit(do_not_specialize=["samples", "pieces", "piece", "size", "fold"])
def pool_channels(
    parts: Moments, center_weight, batch, samples, channels, pieces, sample_stride, stride, piece, size, fold,
    FLAGS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """U of this rank's samples as hi and lo, and their V, (3, C): what other ranks need. Without contexts, so K is 1.

    The grid is (blocks of channels,), as in ``channels_of``.
    """
    layout = layout_of(pieces, sample_stride, stride, piece, size, fold)
    c = tl.program_id(0) * TILE.c + tl.arange(0, TILE.c)
    inside = c < channels
    # The first sample's mean is near all others of the channel, and costs one load.
    first = tl.load(parts.hi + c, mask=inside, other=0.0)
    w_m = per_channel(center_weight, c, inside, 0.0, FLAGS.center)
    shape = Shape(samples, 0, channels, 1)
    mean, within, between = batch_of(
        parts, parts.hi, 0.0, first, c, shape, layout, 1.0, FLAGS, TILE.n, TILE.k, TILE.c
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
    parts: Moments, learned: Learned, state: State, rates: Rates, out: PerChannelStatistics, directions, samples,
    number, channels, contexts, jobs, pieces, sample_stride, stride, piece, size, fold, numbers: Numbers,
    FLAGS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Pivot, scale and offset (3, N * C), and ``stats`` (7 to 11, K, C); the running statistics may move.

    Rows of ``stats``: mean as hi and lo, variance between samples, V, delta, r, the weight p of the batch in what was
    used, and with ``blend`` what the running mean and variance become, and how far that mean is from the batch's. With
    ``ranks`` U and V are those of all ranks; delta holds how far that U is from f mean_B of this one, and a last row
    that alone. One block of channels to a program.
    """
    N_BLOCK: tl.constexpr = TILE.n
    K_BLOCK: tl.constexpr = TILE.k
    C_BLOCK: tl.constexpr = TILE.c
    layout = layout_of(pieces, sample_stride, stride, piece, size, fold)
    shape = Shape(samples, number, channels, contexts)
    eps, inner, whole = tl.cast(numbers.eps, tl.float32), tl.cast(numbers.inner, tl.float32), layout.size * layout.fold
    pooled, stats, least = out.pooled, out.stats, tl.cast(numbers.least, tl.float32)
    c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    inside = c < channels
    q = tl.arange(0, K_BLOCK)
    kc_mask = (q[:, None] < contexts) & inside[None, :]
    at = q[:, None] * channels + c[None, :]
    # Everything is counted from ``first``, a mean near all others of the channel.
    if FLAGS.frozen and FLAGS.contexts:
        first, away, old = running_of(state, out.survey_out, at, kc_mask, contexts, FLAGS.pooled, K_BLOCK)
    else:
        p_first = parts.hi if FLAGS.needs_moments else state.mean
        first = tl.load(p_first + c, mask=inside, other=0.0).to(tl.float32)
    w_m = per_channel(learned.center_weight, c, inside, 0.0, FLAGS.center)
    f = 1.0 + w_m
    mass = masses(learned.responsibilities, shape, FLAGS, N_BLOCK, K_BLOCK)
    mean = tl.zeros((K_BLOCK, C_BLOCK), tl.float32)
    within, between, apart = mean, mean, mean
    # Statistics of the batch.
    if not FLAGS.frozen:
        mean, within, between = batch_of(
            parts, learned.responsibilities, mass, first, c, shape, layout, least, FLAGS, N_BLOCK, K_BLOCK, C_BLOCK
        )  # fmt: skip
    variance = within + (f * f)[None, :] * between
    # V and U of all ranks; ``apart`` is how far that U is from this rank's.
    if FLAGS.ranks:
        of_all = tl.load(pooled + c, mask=inside, other=0.0)
        rest = tl.load(pooled + channels + c, mask=inside, other=0.0)
        variance = tl.load(pooled + 2 * channels + c, mask=inside, other=0.0)[None, :] + mean * 0.0
        apart = (tl.fma(-w_m, first, of_all - first) + rest)[None, :] - f[None, :] * mean
    used, delta, p = variance, apart, mean * 0.0 + 1.0
    # Where running statistics take part, ``away`` is how far they are from U.
    if FLAGS.blend != 0 or FLAGS.condensed % 2 == 1 or (FLAGS.frozen and not FLAGS.contexts):
        old = tl.load(state.var + c, mask=inside, other=0.0).to(tl.float32)[None, :] + mean * 0.0
        away = tl.load(state.mean + c, mask=inside, other=0.0).to(tl.float32) - first - w_m * first
        away = away[None, :] - f[None, :] * mean
        if FLAGS.ranks:
            away = (tl.load(state.mean + c, mask=inside, other=0.0) - of_all - rest)[None, :] + mean * 0.0
    # From here on ``used`` is what is divided by, ``delta`` the shift of U, ``p`` the weight of the batch.
    if FLAGS.std and not FLAGS.frozen:
        used = tl.sqrt_rn(tl.maximum(variance + inner, TINY, propagate_nan=NAN)) - inner
    if FLAGS.frozen:
        used, delta, p = old, away, mean * 0.0
    elif FLAGS.blend != 0:
        alpha, steps = new_weight(state, rates.rate, channels, numbers.power, FLAGS, 256)
        blend = (1.0 - alpha) * away
        blended = alpha * used + (1.0 - alpha) * old
        if FLAGS.blend == 3:  # the batch's own scale times a constant, and a constant offset
            p = tl.div_rn(blended + eps, used + eps)
        if FLAGS.blend == 1:
            p = p * alpha
        if FLAGS.blend % 2 == 1:
            delta, used = blend + apart, blended
        if FLAGS.blend == 4:  # within limits, and the first batch, which is copied, agrees with itself
            if FLAGS.copies_first:
                old, away = tl.where(steps == 1, used, old), tl.where(steps == 1, 0.0, away)
            most = tl.load(rates.threshold).to(tl.float32)
            if not FLAGS.std:
                most = most * most
            p = tl.div_rn(old + eps, used + eps)
            p = tl.minimum(tl.maximum(p, 1.0 / most, propagate_nan=NAN), most, propagate_nan=NAN)
            used = (used + eps) * p - eps
    # A Boolean tensor that is False.
    off = tl.program_id(0) < 0
    if FLAGS.condensed != 0:
        off = decide(out.survey_out, directions, state, rates.threshold, samples, jobs, 256)
    # A condensed batch: the running statistics replace its own, ...
    if FLAGS.condensed == 1:
        used, delta = tl.where(off, old, used), tl.where(off, away, delta)
        p = tl.where(off, 0.0, p)
    # ... or it keeps its own and is scaled and moved to the value of theirs, both clamped: to a factor of 3 between
    # deviations, which is 9 between variances, and to 5 deviations, see ``UnifiedBatchNorm``.
    if FLAGS.condensed == 3:  # p is the ratio of the variances, and delta a constant in units of 1 / r
        ratio = tl.div_rn(old + eps, variance + eps)
        p = tl.minimum(tl.maximum(ratio, 1.0 / 9.0, propagate_nan=NAN), 9.0, propagate_nan=NAN)
        p = tl.where(off, p, 1.0)
    if FLAGS.detach:
        p = p * 0.0
    # r, with an eps inside the root or beside the deviation.
    one = tl.full((), 1.0, tl.float32)
    if FLAGS.condensed == 3:
        r = tl.div_rn(one, tl.sqrt_rn((variance + eps) * p))
        apart = tl.div_rn(away, tl.sqrt_rn(old + eps))
        clamped = tl.minimum(tl.maximum(apart, -5.0, propagate_nan=NAN), 5.0, propagate_nan=NAN)
        delta = tl.where(off, tl.div_rn(clamped, r), 0.0)
    elif FLAGS.std:
        r = tl.div_rn(one, used + eps)
    else:
        r = tl.div_rn(one, tl.sqrt_rn(used + eps))
    if FLAGS.blend == 4:
        far = tl.div_rn(away, (old + eps) if FLAGS.std else tl.sqrt_rn(old + eps))
        most = tl.load(rates.limit).to(tl.float32)
        delta = apart + tl.div_rn(tl.minimum(tl.maximum(far, -most, propagate_nan=NAN), most, propagate_nan=NAN), r)
    # Elements behind each statistic, for the unbiased variance.
    count = tl.cast(samples, tl.float32) * whole
    if FLAGS.contexts:
        alone = mass * whole
        count = (alone + tl.maximum(1.0 - alone / least, 0.0) * (count - alone))[:, None]
    base = first[None, :] + mean
    target = f[None, :] * base
    if FLAGS.ranks:
        count, target = tl.load(out.rank_sums).to(tl.float32), (of_all + rest)[None, :] + mean * 0.0
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
    if FLAGS.blend != 0:
        if FLAGS.ranks:
            target = of_all[None, :] + (rest[None, :] + blend)
        else:
            target = target + blend
        tl.store(stats + 7 * rows + at, target, mask=kc_mask)
        tl.store(stats + 8 * rows + at, blended, mask=kc_mask)
        tl.store(stats + 9 * rows + at, blend, mask=kc_mask)
    if FLAGS.ranks:
        tl.store(stats + (10 if FLAGS.blend != 0 else 7) * rows + at, apart, mask=kc_mask)
    # The programs own their channels, and ``survey`` saw what concerns all of them.
    if FLAGS.moves and not FLAGS.owner:
        move(
            target, variance * (count / tl.maximum(count - 1.0, 1.0)), mass / tl.maximum(samples, 1), off, count > 1.0,
            state, rates.rate, out.survey_out, pooled, at, kc_mask, tl.program_id(0) == 0, samples, channels, contexts,
            FLAGS, K_BLOCK, 256,
        )  # fmt: skip
    # The affine map of each sample: walk over the samples once more.
    gamma = per_channel(learned.weight, at, kc_mask, 1.0, FLAGS.weight)[None, :, :]
    beta = per_channel(learned.bias, at, kc_mask, 0.0, FLAGS.bias)[None, :, :]
    if FLAGS.prior:
        factor = prior_scale(out.survey_out, contexts, K_BLOCK)[None, :, None]
        gamma, beta = gamma * factor, beta * factor
    for begin in range(0, samples, N_BLOCK):
        n = begin + tl.arange(0, N_BLOCK)
        keep = (n[:, None] < samples) & inside[None, :]
        i = n[:, None] * channels + c[None, :]
        if FLAGS.needs_moments:
            # The moments of x, joined here for the backward pass.
            p_n = n[:, None].to(tl.int64) * sample_stride + c[None, :]
            k, d, v = read_moments(parts, p_n, keep, layout, FLAGS.merge)
            if FLAGS.merge:
                tl.store(out.moments + i, d, mask=keep)
                tl.store(out.moments + number + i, v, mask=keep)
        else:
            k = first[None, :] + tl.zeros((N_BLOCK, C_BLOCK), tl.float32)
            d = k * 0.0
        g, a = weights_at(learned.responsibilities, mass, n, shape, whole, least, FLAGS, K_BLOCK)
        # z of the equations, from differences only.
        z = f[None, None, :] * ((k - first[None, :] + d)[:, None, :] - mean[None, :, :]) - delta[None, :, :]
        scale = gamma * r[None, :, :]
        if FLAGS.scale:
            w = per_channel(learned.scale_weight, c, inside, 0.0, True)
            b = per_channel(learned.scale_bias, c, inside, 0.0, True)
            s, h = gate(w, b, r[None, :, :] * z, numbers.unit_scale)
            scale = scale * h
        if FLAGS.affine:
            w = per_channel(learned.affine_weight, c, inside, 0.0, True)
            b = per_channel(learned.affine_bias, c, inside, 0.0, True)
            s, h = gate(w, b, (k + d)[:, None, :], numbers.unit_affine)
            scale = scale * h
        # The sum over contexts of responsibility times affine map is one affine map.
        offset = g * (beta + scale * (z - d[:, None, :]))
        # The pivot is stored already where the pass over x wrote it there.
        if FLAGS.merge or not FLAGS.needs_moments:
            tl.store(out.affine + i, k, mask=keep)
        tl.store(out.affine + number + i, tl.sum(g * scale, 1), mask=keep)
        tl.store(out.affine + 2 * number + i, tl.sum(offset, 1), mask=keep)

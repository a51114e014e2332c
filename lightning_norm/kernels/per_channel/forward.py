"""Device code: equations in which each channel stands alone, in one launch; ``backward`` holds their adjoint.

Statistics of the batch, or of K contexts in it, per channel. Running ones may be mixed in (dbn), or stand in for them
(a condensed batch of ubn, evaluation). Then a sample's mean may strengthen or weaken it before (centering) and gate it
after (scaling, affine; rbn and ubn). With a_n the weight of a sample in a context's statistics:

    V = sum_n a_n (var_n + f^2 (mean_n - mean_B)^2), f = 1 + center_weight
    z = f mean_n - U, U = f mean_B + delta, r = 1 / sqrt(V + eps)
    y = gamma g1(r z) g2(mean_n) r (x - mean_n + z) + beta, summed over contexts by a sample's responsibilities

Letters of the code, beside these, behind the prefix of a tile, whose axes are (N, K, C), samples, contexts, channels:

* k + d, v: mean_n as hi and lo, and var_n, as ``read_moments`` returns them. S = size * fold elements are behind each.
* g, a: a context's responsibility for a sample, and the sample's weight a_n in the context's statistics.
* s, h: sigmoid of a gate's argument, and the gate's value (g1 or g2), which is s times a constant.
* w_m: center_weight. ``b_first``: a mean from which all others are counted as small differences.
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
def responsibilities_at(responsibilities, o_n, shape, FLAGS: tl.constexpr, K_BLOCK: tl.constexpr):
    """Return each context's responsibility for some samples, (N, K), and which of them there are.

    With ``pooled`` all samples have the same ones, and these are stored once.
    """
    o_k = tl.arange(0, K_BLOCK)
    m_nk = (o_n[:, None] < shape.samples) & (o_k[None, :] < shape.contexts)
    o_nk = o_k[None, :] + o_n[:, None] * (0 if FLAGS.pooled else shape.contexts)
    return tl.load(responsibilities + o_nk, mask=m_nk, other=0.0), m_nk


@triton.jit
def masses(responsibilities, shape, FLAGS: tl.constexpr, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr):
    """Return the sum over samples of each context's responsibilities, (K,); 0 without contexts, where nobody asks."""
    b_mass = tl.zeros((N_BLOCK, K_BLOCK), tl.float32)
    if FLAGS.contexts:
        for begin in range(0, shape.samples, N_BLOCK):
            b_g, m_nk = responsibilities_at(responsibilities, begin + tl.arange(0, N_BLOCK), shape, FLAGS, K_BLOCK)
            # Kept apart by sample and added up at the end: a tile is reduced once, not in every turn.
            b_mass += b_g
    return tl.sum(b_mass, 0)


@triton.jit
def weights_at(responsibilities, b_mass, o_n, shape, size, least, FLAGS: tl.constexpr, K_BLOCK: tl.constexpr):
    """Return each context's responsibility for a sample, and the sample's weight in its statistics: (N, K, 1) each.

    A context of fewer than ``least`` elements is drawn towards all samples, by the part that it lacks.
    """
    samples = shape.samples
    m_nk = (o_n[:, None] < samples) & (tl.arange(0, K_BLOCK)[None, :] < shape.contexts)
    if FLAGS.contexts:
        # ``b_part`` is 0 for a context that is large enough.
        b_g, m_nk = responsibilities_at(responsibilities, o_n, shape, FLAGS, K_BLOCK)
        b_part = tl.maximum(1.0 - b_mass * size / tl.cast(least, tl.float32), 0.0, propagate_nan=NAN)[None, :]
        b_a = (1.0 - b_part) * b_g / tl.maximum(b_mass, TINY, propagate_nan=NAN)[None, :] + b_part / samples
    else:
        # Without contexts there is one, and every sample belongs to it.
        b_g = tl.where(m_nk, 1.0, 0.0)
        b_a = b_g / tl.maximum(samples, 1)
    return b_g[:, :, None], tl.where(m_nk, b_a, 0.0)[:, :, None]


@triton.jit
def prior_scale(survey_out, contexts, K_BLOCK: tl.constexpr):
    """Return 1 / sqrt of each context's prior, (K,), at most 10; a new context has the others' factor."""
    o_k = tl.arange(0, K_BLOCK)
    b_prior = tl.load(survey_out + 2 + 2 * contexts + o_k, mask=o_k < contexts, other=0.0)  # [K_BLOCK]
    # A rare context would be scaled without bound; 0.01 is where the factor is 10.
    b_factor = tl.rsqrt(tl.maximum(b_prior, 0.01, propagate_nan=NAN))
    return tl.where(b_prior > 0.0, b_factor, tl.sum(b_prior * b_factor, 0))


@triton.jit
def running_of(state, survey_out, o_kc, m_kc, contexts, POOLED: tl.constexpr, K_BLOCK: tl.constexpr):
    """Return the mean of all contexts, (C,), and each context's mean, counted from there, and variance, (K, C).

    A new context has those of all together, and with POOLED every one has.
    """
    o_k = tl.arange(0, K_BLOCK)
    b_prior = tl.load(survey_out + 2 + 2 * contexts + o_k, mask=o_k < contexts, other=0.0)[:, None]  # [K_BLOCK, 1]
    m_new = tl.load(survey_out + 2 + contexts + o_k, mask=o_k < contexts, other=0.0)[:, None] != 0.0
    b_mean = tl.load(state.mean + o_kc, mask=m_kc, other=0.0)
    b_var = tl.load(state.var + o_kc, mask=m_kc, other=0.0)
    # All contexts together, by the law of total variance with their priors as weights.
    # Each is counted from the mean of all: differences of large means keep their digits in float32.
    b_first = tl.sum(b_prior * b_mean, 0)  # [C]
    b_away = b_mean - b_first[None, :]
    b_rest = tl.sum(b_prior * b_away, 0)[None, :]  # [1, C]
    b_pooled = tl.sum(b_prior * (b_var + (b_away - b_rest) * (b_away - b_rest)), 0)[None, :]  # [1, C]
    if POOLED:
        # True for every context, as a tensor and not as a constant of the compiler.
        m_new = m_new | (b_prior >= 0.0)
    return b_first, tl.where(m_new, b_rest, b_away), tl.where(m_new, b_pooled, b_var)


@triton.jit
def gate(b_w, b_b, b_k, unit):
    """Return s = sigmoid(w k + b) and s * unit, which is 1 at the gate's starting value."""
    b_s = 1.0 / (1.0 + tl.exp(-(b_w * b_k + b_b)))
    return b_s, b_s * tl.cast(unit, tl.float32)


@triton.jit
def batch_of(
    parts, responsibilities, b_mass, b_first, o_c, shape, layout, least, FLAGS: tl.constexpr, N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the mean, counted from ``b_first``, and the variance within and between samples: (K, C) each.

    mean = sum_n a_n mean_n; within = sum_n a_n var_n; between = sum_n a_n (mean_n - mean)^2.
    """
    samples, m_c, whole = shape.samples, o_c < shape.channels, layout.size * layout.fold
    # The means, as differences from ``b_first``: float32 is enough at any mean.
    b_total = tl.zeros((N_BLOCK, K_BLOCK, C_BLOCK), tl.float32)
    for begin in range(0, samples, N_BLOCK):
        o_n = begin + tl.arange(0, N_BLOCK)
        m_nc = (o_n[:, None] < samples) & m_c[None, :]
        o_nc = o_n[:, None].to(tl.int64) * layout.sample_stride + o_c[None, :]  # [N_BLOCK, C_BLOCK]
        b_k, b_d, b_v = read_moments(parts, o_nc, m_nc, layout, FLAGS.merge)
        b_g, b_a = weights_at(responsibilities, b_mass, o_n, shape, whole, least, FLAGS, K_BLOCK)
        b_total += b_a * tl.where(m_nc, b_k - b_first[None, :] + b_d, 0.0)[:, None, :]
    b_mean = tl.sum(b_total, 0)  # [K_BLOCK, C_BLOCK]
    # A second walk over the samples, around the mean: nothing cancels.
    b_inner = tl.zeros((N_BLOCK, K_BLOCK, C_BLOCK), tl.float32)
    b_outer = b_inner
    for begin in range(0, samples, N_BLOCK):
        o_n = begin + tl.arange(0, N_BLOCK)
        m_nc = (o_n[:, None] < samples) & m_c[None, :]
        o_nc = o_n[:, None].to(tl.int64) * layout.sample_stride + o_c[None, :]
        b_k, b_d, b_v = read_moments(parts, o_nc, m_nc, layout, FLAGS.merge)
        b_g, b_a = weights_at(responsibilities, b_mass, o_n, shape, whole, least, FLAGS, K_BLOCK)
        b_e = (b_k - b_first[None, :] + b_d)[:, None, :] - b_mean[None, :, :]  # [N_BLOCK, K_BLOCK, C_BLOCK]
        b_inner += b_a * b_v[:, None, :]
        b_outer += b_a * b_e * b_e
    return b_mean, tl.sum(b_inner, 0), tl.sum(b_outer, 0)


@triton.jit(do_not_specialize=["samples", "pieces", "piece", "size", "fold"])
def pool_channels(
    parts: Moments, center_weight, batch, samples, channels, pieces, sample_stride, stride, piece, size, fold,
    FLAGS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """U of this rank's samples as hi and lo, and their V, (3, C): what other ranks need. Without contexts, so K is 1.

    The grid is (blocks of channels,), as in ``channels_of``.
    """
    layout = layout_of(pieces, sample_stride, stride, piece, size, fold)
    o_c = tl.program_id(0) * TILE.c + tl.arange(0, TILE.c)
    m_c = o_c < channels
    # The first sample's mean is near all others of the channel, and costs one load.
    b_first = tl.load(parts.hi + o_c, mask=m_c, other=0.0)
    b_w_m = per_channel(center_weight, o_c, m_c, 0.0, FLAGS.center)
    shape = Shape(samples, 0, channels, 1)
    b_mean, b_within, b_between = batch_of(
        parts, parts.hi, 0.0, b_first, o_c, shape, layout, 1.0, FLAGS, TILE.n, TILE.k, TILE.c
    )  # fmt: skip
    # U = (1 + w) mean with what each rounding leaves, for mean may be large.
    b_more = b_w_m * b_first
    b_near = b_first + b_more  # and what rounding both has left
    b_away = tl.fma(b_w_m, b_first, -b_more) + (b_more - (b_near - b_first)) + (1.0 + b_w_m) * tl.sum(b_mean, 0)
    # As hi and lo: other ranks count from means of their own, and need all digits.
    b_rounded = b_near + b_away
    tl.store(batch + o_c, b_rounded, mask=m_c)
    tl.store(batch + channels + o_c, b_away - (b_rounded - b_near), mask=m_c)
    tl.store(
        batch + 2 * channels + o_c,
        tl.sum(b_within + ((1.0 + b_w_m) * (1.0 + b_w_m))[None, :] * b_between, 0),
        mask=m_c,
    )


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
    o_c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    m_c = o_c < channels
    o_k = tl.arange(0, K_BLOCK)
    m_kc = (o_k[:, None] < contexts) & m_c[None, :]
    o_kc = o_k[:, None] * channels + o_c[None, :]  # [K_BLOCK, C_BLOCK]
    # Everything is counted from ``b_first``, a mean near all others of the channel.
    if FLAGS.frozen and FLAGS.contexts:
        b_first, b_away, b_old = running_of(state, out.survey_out, o_kc, m_kc, contexts, FLAGS.pooled, K_BLOCK)
    else:
        p_first = parts.hi if FLAGS.needs_moments else state.mean
        b_first = tl.load(p_first + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_w_m = per_channel(learned.center_weight, o_c, m_c, 0.0, FLAGS.center)
    b_f = 1.0 + b_w_m
    b_mass = masses(learned.responsibilities, shape, FLAGS, N_BLOCK, K_BLOCK)  # [K_BLOCK]
    b_mean = tl.zeros((K_BLOCK, C_BLOCK), tl.float32)
    b_within, b_between, b_apart = b_mean, b_mean, b_mean
    # Statistics of the batch.
    if not FLAGS.frozen:
        b_mean, b_within, b_between = batch_of(
            parts, learned.responsibilities, b_mass, b_first, o_c, shape, layout, least, FLAGS, N_BLOCK, K_BLOCK,
            C_BLOCK,
        )  # fmt: skip
    b_var = b_within + (b_f * b_f)[None, :] * b_between
    # V and U of all ranks; ``b_apart`` is how far that U is from this rank's.
    if FLAGS.ranks:
        b_of_all = tl.load(pooled + o_c, mask=m_c, other=0.0)
        b_rest = tl.load(pooled + channels + o_c, mask=m_c, other=0.0)
        b_var = tl.load(pooled + 2 * channels + o_c, mask=m_c, other=0.0)[None, :] + b_mean * 0.0
        b_apart = (tl.fma(-b_w_m, b_first, b_of_all - b_first) + b_rest)[None, :] - b_f[None, :] * b_mean
    b_used, b_delta, b_p = b_var, b_apart, b_mean * 0.0 + 1.0
    # Where running statistics take part, ``b_away`` is how far they are from U.
    if FLAGS.blend != 0 or FLAGS.condensed % 2 == 1 or (FLAGS.frozen and not FLAGS.contexts):
        b_old = tl.load(state.var + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :] + b_mean * 0.0
        b_away = tl.load(state.mean + o_c, mask=m_c, other=0.0).to(tl.float32) - b_first - b_w_m * b_first
        b_away = b_away[None, :] - b_f[None, :] * b_mean
        if FLAGS.ranks:
            b_away = (tl.load(state.mean + o_c, mask=m_c, other=0.0) - b_of_all - b_rest)[None, :] + b_mean * 0.0
    # From here on ``b_used`` is what is divided by, ``b_delta`` the shift of U, ``b_p`` the weight of the batch.
    if FLAGS.std and not FLAGS.frozen:
        b_used = tl.sqrt_rn(tl.maximum(b_var + inner, TINY, propagate_nan=NAN)) - inner
    if FLAGS.frozen:
        b_used, b_delta, b_p = b_old, b_away, b_mean * 0.0
    elif FLAGS.blend != 0:
        alpha, steps = new_weight(state, rates.rate, channels, numbers.power, FLAGS, 256)
        b_blend = (1.0 - alpha) * b_away
        b_blended = alpha * b_used + (1.0 - alpha) * b_old
        if FLAGS.blend == 3:  # the batch's own scale times a constant, and a constant offset
            b_p = tl.div_rn(b_blended + eps, b_used + eps)
        if FLAGS.blend == 1:
            b_p = b_p * alpha
        if FLAGS.blend % 2 == 1:
            b_delta, b_used = b_blend + b_apart, b_blended
        if FLAGS.blend == 4:  # within limits, and the first batch, which is copied, agrees with itself
            if FLAGS.copies_first:
                b_old, b_away = tl.where(steps == 1, b_used, b_old), tl.where(steps == 1, 0.0, b_away)
            most = tl.load(rates.threshold).to(tl.float32)
            if not FLAGS.std:
                most = most * most
            b_p = tl.div_rn(b_old + eps, b_used + eps)
            b_p = tl.minimum(tl.maximum(b_p, 1.0 / most, propagate_nan=NAN), most, propagate_nan=NAN)
            b_used = (b_used + eps) * b_p - eps
    # A Boolean tensor that is False.
    off = tl.program_id(0) < 0
    if FLAGS.condensed != 0:
        off = decide(out.survey_out, directions, state, rates.threshold, samples, jobs, 256)
    # A condensed batch: the running statistics replace its own, ...
    if FLAGS.condensed == 1:
        b_used, b_delta = tl.where(off, b_old, b_used), tl.where(off, b_away, b_delta)
        b_p = tl.where(off, 0.0, b_p)
    # ... or it keeps its own and is scaled and moved to the value of theirs, both clamped: to a factor of 3 between
    # deviations, which is 9 between variances, and to 5 deviations, see ``UnifiedBatchNorm``.
    if FLAGS.condensed == 3:  # p is the ratio of the variances, and delta a constant in units of 1 / r
        b_ratio = tl.div_rn(b_old + eps, b_var + eps)
        b_p = tl.minimum(tl.maximum(b_ratio, 1.0 / 9.0, propagate_nan=NAN), 9.0, propagate_nan=NAN)
        b_p = tl.where(off, b_p, 1.0)
    if FLAGS.detach:
        b_p = b_p * 0.0
    # r, with an eps inside the root or beside the deviation.
    one = tl.full((), 1.0, tl.float32)
    if FLAGS.condensed == 3:
        b_r = tl.div_rn(one, tl.sqrt_rn((b_var + eps) * b_p))
        b_apart = tl.div_rn(b_away, tl.sqrt_rn(b_old + eps))
        b_clamped = tl.minimum(tl.maximum(b_apart, -5.0, propagate_nan=NAN), 5.0, propagate_nan=NAN)
        b_delta = tl.where(off, tl.div_rn(b_clamped, b_r), 0.0)
    elif FLAGS.std:
        b_r = tl.div_rn(one, b_used + eps)
    else:
        b_r = tl.div_rn(one, tl.sqrt_rn(b_used + eps))
    if FLAGS.blend == 4:
        b_far = tl.div_rn(b_away, (b_old + eps) if FLAGS.std else tl.sqrt_rn(b_old + eps))
        most = tl.load(rates.limit).to(tl.float32)
        b_delta = b_apart + tl.div_rn(
            tl.minimum(tl.maximum(b_far, -most, propagate_nan=NAN), most, propagate_nan=NAN), b_r
        )
    # Elements behind each statistic, for the unbiased variance.
    b_count = tl.cast(samples, tl.float32) * whole
    if FLAGS.contexts:
        b_alone = b_mass * whole
        b_count = (b_alone + tl.maximum(1.0 - b_alone / least, 0.0) * (b_count - b_alone))[:, None]
    b_base = b_first[None, :] + b_mean  # [K_BLOCK, C_BLOCK]
    b_target = b_f[None, :] * b_base
    if FLAGS.ranks:
        b_count, b_target = tl.load(out.rank_sums).to(tl.float32), (b_of_all + b_rest)[None, :] + b_mean * 0.0
        b_var = tl.where(b_count > 1.0, b_var, float("nan"))  # too few for a variance: nothing moves
    # What the backward pass needs; r and p also tell it what was chosen.
    rows = contexts * channels
    tl.store(stats + o_kc, b_base, mask=m_kc)
    tl.store(stats + rows + o_kc, b_mean - (b_base - b_first[None, :]), mask=m_kc)
    tl.store(stats + 2 * rows + o_kc, b_between, mask=m_kc)
    tl.store(stats + 3 * rows + o_kc, b_var, mask=m_kc)
    tl.store(stats + 4 * rows + o_kc, b_delta, mask=m_kc)
    tl.store(stats + 5 * rows + o_kc, b_r, mask=m_kc)
    tl.store(stats + 6 * rows + o_kc, b_p, mask=m_kc)
    if FLAGS.blend != 0:
        if FLAGS.ranks:
            b_target = b_of_all[None, :] + (b_rest[None, :] + b_blend)
        else:
            b_target = b_target + b_blend
        tl.store(stats + 7 * rows + o_kc, b_target, mask=m_kc)
        tl.store(stats + 8 * rows + o_kc, b_blended, mask=m_kc)
        tl.store(stats + 9 * rows + o_kc, b_blend, mask=m_kc)
    if FLAGS.ranks:
        tl.store(stats + (10 if FLAGS.blend != 0 else 7) * rows + o_kc, b_apart, mask=m_kc)
    # The programs own their channels, and ``survey`` saw what concerns all of them.
    if FLAGS.moves and not FLAGS.owner:
        move(
            b_target, b_var * (b_count / tl.maximum(b_count - 1.0, 1.0)), b_mass / tl.maximum(samples, 1), off,
            b_count > 1.0, state, rates.rate, out.survey_out, pooled, o_kc, m_kc, tl.program_id(0) == 0, samples,
            channels, contexts, FLAGS, K_BLOCK, 256,
        )  # fmt: skip
    # The affine map of each sample: walk over the samples once more.
    b_gamma = per_channel(learned.weight, o_kc, m_kc, 1.0, FLAGS.weight)[None, :, :]
    b_beta = per_channel(learned.bias, o_kc, m_kc, 0.0, FLAGS.bias)[None, :, :]
    if FLAGS.prior:
        b_factor = prior_scale(out.survey_out, contexts, K_BLOCK)[None, :, None]
        b_gamma, b_beta = b_gamma * b_factor, b_beta * b_factor
    for begin in range(0, samples, N_BLOCK):
        o_n = begin + tl.arange(0, N_BLOCK)
        m_nc = (o_n[:, None] < samples) & m_c[None, :]
        o_nc = o_n[:, None] * channels + o_c[None, :]  # [N_BLOCK, C_BLOCK]
        if FLAGS.needs_moments:
            # The moments of x, joined here for the backward pass.
            o_at = o_n[:, None].to(tl.int64) * sample_stride + o_c[None, :]
            b_k, b_d, b_v = read_moments(parts, o_at, m_nc, layout, FLAGS.merge)
            if FLAGS.merge:
                tl.store(out.moments + o_nc, b_d, mask=m_nc)
                tl.store(out.moments + number + o_nc, b_v, mask=m_nc)
        else:
            b_k = b_first[None, :] + tl.zeros((N_BLOCK, C_BLOCK), tl.float32)
            b_d = b_k * 0.0
        b_g, b_a = weights_at(learned.responsibilities, b_mass, o_n, shape, whole, least, FLAGS, K_BLOCK)
        # z of the equations, from differences only.
        b_z = (
            b_f[None, None, :] * ((b_k - b_first[None, :] + b_d)[:, None, :] - b_mean[None, :, :]) - b_delta[None, :, :]
        )
        b_scale = b_gamma * b_r[None, :, :]  # [1, K_BLOCK, C_BLOCK]
        if FLAGS.scale:
            b_w = per_channel(learned.scale_weight, o_c, m_c, 0.0, True)
            b_b = per_channel(learned.scale_bias, o_c, m_c, 0.0, True)
            b_s, b_h = gate(b_w, b_b, b_r[None, :, :] * b_z, numbers.unit_scale)
            b_scale = b_scale * b_h
        if FLAGS.affine:
            b_w = per_channel(learned.affine_weight, o_c, m_c, 0.0, True)
            b_b = per_channel(learned.affine_bias, o_c, m_c, 0.0, True)
            b_s, b_h = gate(b_w, b_b, (b_k + b_d)[:, None, :], numbers.unit_affine)
            b_scale = b_scale * b_h
        # The sum over contexts of responsibility times affine map is one affine map.
        b_offset = b_g * (b_beta + b_scale * (b_z - b_d[:, None, :]))  # [N_BLOCK, K_BLOCK, C_BLOCK]
        # The pivot is stored already where the pass over x wrote it there.
        if FLAGS.merge or not FLAGS.needs_moments:
            tl.store(out.affine + o_nc, b_k, mask=m_nc)
        tl.store(out.affine + number + o_nc, tl.sum(b_g * b_scale, 1), mask=m_nc)
        tl.store(out.affine + 2 * number + o_nc, tl.sum(b_offset, 1), mask=m_nc)

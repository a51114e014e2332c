"""Device code: the equations of the mixture family on (N, C) numbers, in two launches; ``backward`` has their adjoint.

*Statistics* are mixed: center and variance are mixtures of the means and variances of instance (in), layer or group
(ln) and batch (bn). One of them alone is instance, layer, group or batch normalization; sn mixes three:

    c = sum_k w_k mean_k, V = sum_k v_k var_k, scale = gamma / sqrt(V + eps), y = scale (x - c) + beta

Or *outputs* are mixed (OUTPUTS, bcn), channel by channel, with iota in w:

    y = gamma (iota x^_bn + (1 - iota) x^_ln) + beta

Or the instance's mean square takes the place of its variance, and nothing is subtracted (``uncentered``, frn). Its
threshold tau, in w, is subtracted from beta and added again behind a ReLU: max(y, tau) = relu(y - tau) + tau.

First the statistics are pooled: ``pool``, columns of (N, C) in some programs and rows in the others. Then every (n, c)
is computed from them: ``mix``. Backward in the same two steps: ``vjp_pool``, ``vjp_mix``.

All in shifted coordinates. k = hi of the sample's mean is what the passes over x subtract, d = lo what rounding it
left. Other means enter as differences from k, so float32 is enough at any mean / std: mixing weights sum to one.

The letters: w and v mix means and variances; dl and db are the means of layer and batch minus k, lv and bv their
variances; t0 and t1 are the sums of dy and of dy * (x - k); f and e are the gradients of a center and of a variance.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Moments
from lightning_norm.kernels.mixture.flags import Given, MixtureStatistics, Parameters, Running, Shape
from lightning_norm.kernels.passes.forward import layout_of, place, read_moments


@triton.jit
def weights_of(t, FLAGS: tl.constexpr):
    """Return the mixing weights of instance, layer and batch, K numbers at ``t``; 1 for each if K is 0.

    With ``softmax`` ``t`` holds logits. A statistic that takes no part has no position in ``t``.
    """
    one = tl.full((), 1.0, tl.float32)
    a, b, c = one, one, one
    if FLAGS.num_weights > 0:
        # A statistic that takes no part has weight 0: a logit of -inf.
        low = tl.full((), float("-inf") if FLAGS.softmax else 0.0, tl.float32)
        a, b, c = low, low, low
        if FLAGS.at_in >= 0:
            a = tl.load(t + FLAGS.at_in).to(tl.float32)
        if FLAGS.at_ln >= 0:
            b = tl.load(t + FLAGS.at_ln).to(tl.float32)
        if FLAGS.at_bn >= 0:
            c = tl.load(t + FLAGS.at_bn).to(tl.float32)
        if FLAGS.softmax:
            # The largest logit is subtracted, so that nothing overflows.
            top = tl.maximum(tl.maximum(a, b), c)
            a, b, c = tl.exp(a - top), tl.exp(b - top), tl.exp(c - top)
            total = a + b + c
            a, b, c = tl.div_rn(a, total), tl.div_rn(b, total), tl.div_rn(c, total)
    return a, b, c


@triton.jit
def mixtures(given, w, v, FLAGS: tl.constexpr):
    """Return the mixture of the means, counted from k, and that of the variances, for each element of a tile."""
    b_center, b_var = given.d * 0.0, given.d * 0.0
    # Only those that take part: where nothing is mixed, all weights are 1.
    if FLAGS.at_in >= 0:
        b_center, b_var = w[0] * given.d, v[0] * given.vi
    if FLAGS.at_ln >= 0:
        b_center, b_var = b_center + w[1] * given.dl, b_var + v[1] * given.lv
    if FLAGS.at_bn >= 0:
        b_center, b_var = b_center + w[2] * given.db, b_var + v[2] * given.bv
    return b_center, b_var


@triton.jit
def group_of(o_n, o_c, shape):
    """Return the number of the group, of all samples, that a channel belongs to."""
    return o_n * (shape.channels // shape.per_group) + o_c // shape.per_group


@triton.jit
def with_pooled(b_k, b_d, b_vi, stats, running, o_n, o_c, m_nc, shape, FLAGS: tl.constexpr):
    """Return ``Given``: a tile's own mean and variance, and those of layer and batch, means minus k."""
    b_dl, b_lv, b_db, b_bv = b_k * 0.0, b_k * 0.0, b_k * 0.0, b_k * 0.0
    # hi - k first, which is exact where both are large and close; then lo.
    if FLAGS.at_ln >= 0:
        layer, groups, o_g = stats.layer, shape.groups_in_all, group_of(o_n, o_c, shape)
        b_dl = tl.load(layer + o_g, mask=m_nc, other=0.0) - b_k + tl.load(layer + groups + o_g, mask=m_nc, other=0.0)
        b_lv = tl.load(layer + 2 * groups + o_g, mask=m_nc, other=0.0)
    if FLAGS.at_bn >= 0:
        # The running statistics stand in for the batch's.
        if FLAGS.frozen:
            b_db = tl.load(running.mean + o_c, mask=m_nc, other=0.0).to(tl.float32) - b_k
            b_bv = tl.load(running.var + o_c, mask=m_nc, other=0.0).to(tl.float32)
        else:
            batch, channels = stats.batch, shape.channels
            b_db = (
                tl.load(batch + o_c, mask=m_nc, other=0.0) - b_k + tl.load(batch + channels + o_c, mask=m_nc, other=0.0)
            )
            b_bv = tl.load(batch + 2 * channels + o_c, mask=m_nc, other=0.0)
    # The center is 0, which lies at -k.
    if FLAGS.uncentered:
        b_vi, b_d = b_vi + (b_k + b_d) * (b_k + b_d), -b_k
    return Given(b_d, b_vi, b_dl, b_lv, b_db, b_bv)


@triton.jit
def per_channel(t, o_c, m_c, default: tl.constexpr, PRESENT: tl.constexpr):
    """Return a (C,) parameter, or its default where the layer has none."""
    if PRESENT:
        b_value = tl.load(t + o_c, mask=m_c, other=0.0).to(tl.float32)
    else:
        b_value = tl.where(m_c, default, 0.0).to(tl.float32)
    return b_value


@triton.jit
def root(b_v, eps):
    """Return 1 / sqrt(v + eps); square root and division are each rounded correctly, unlike ``rsqrt``."""
    one = tl.full((), 1.0, tl.float32)
    return tl.div_rn(one, tl.sqrt_rn(b_v + tl.cast(eps, tl.float32)))


@triton.jit(
    do_not_specialize=["samples", "groups_in_all", "per_group", "column_jobs", "pieces", "piece", "size", "fold"]
)
def pool(
    parts: Moments, batch, layer, samples, channels, groups_in_all, per_group, column_jobs, pieces, sample_stride,
    stride, piece, size, fold, factor, MERGE: tl.constexpr, TILE: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """Pool the moments of x: batch statistics (3, C), and group statistics (3, N * G), each as hi, lo and variance.

    The first ``column_jobs`` programs take blocks of channels, the others blocks of groups: one launch for both.
    """
    layout, i_job = layout_of(pieces, sample_stride, stride, piece, size, fold), place(AT, 0)
    if i_job < column_jobs:
        pool_columns(i_job, parts, batch, samples, channels, layout, factor, MERGE, TILE.n, TILE.c)
    else:
        shape = Shape(samples, 0, channels, groups_in_all, per_group)
        pool_rows(i_job - column_jobs, parts, layer, shape, layout, factor, MERGE, TILE.g, TILE.t)


@triton.jit
def pool_columns(
    i_c, parts, batch, samples, channels, layout, factor, MERGE: tl.constexpr, N_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Batch statistics of a block of channels: mean over samples, and var = mean of (var_n + (mean_n - mean)^2).

    ``factor`` turns a sample's variance into the unbiased one.
    """
    # Neighbouring threads take neighbouring channels, which lie side by side in (N, C).
    o_c = i_c * C_BLOCK + tl.arange(0, C_BLOCK)
    m_c = o_c < channels
    # Means enter as differences from the first sample's, so that a large mean costs no digits.
    b_first = tl.load(parts.hi + o_c, mask=m_c, other=0.0)  # [C_BLOCK]
    b_means = tl.zeros((N_BLOCK, C_BLOCK), tl.float32)
    for begin in range(0, samples, N_BLOCK):
        o_n = (begin + tl.arange(0, N_BLOCK))[:, None].to(tl.int64)  # [N_BLOCK, 1]
        m_nc = (o_n < samples) & m_c[None, :]  # [N_BLOCK, C_BLOCK]
        b_k, b_d, b_v = read_moments(parts, o_n * layout.sample_stride + o_c[None, :], m_nc, layout, MERGE)
        b_means += tl.where(m_nc, b_k - b_first[None, :] + b_d, 0.0)
    b_mean = tl.sum(b_means, 0) / samples  # [C_BLOCK]
    # The law of total variance: within samples and between them.
    b_var = tl.zeros((N_BLOCK, C_BLOCK), tl.float32)
    for begin in range(0, samples, N_BLOCK):
        o_n = (begin + tl.arange(0, N_BLOCK))[:, None].to(tl.int64)
        m_nc = (o_n < samples) & m_c[None, :]
        b_k, b_d, b_v = read_moments(parts, o_n * layout.sample_stride + o_c[None, :], m_nc, layout, MERGE)
        b_e = b_k - b_first[None, :] + b_d - b_mean[None, :]
        b_var += tl.where(m_nc, b_v * tl.cast(factor, tl.float32) + b_e * b_e, 0.0)
    store_statistics(batch, o_c, m_c, channels, b_first, b_mean, tl.sum(b_var, 0) / samples)


@triton.jit
def pool_rows(
    i_g, parts, layer, shape, layout, factor, MERGE: tl.constexpr, G_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr
):
    """Statistics of a few groups of channels; as ``pool_columns``, over the channels of a group."""
    o_g = i_g.to(tl.int64) * G_BLOCK + tl.arange(0, G_BLOCK)
    m_g = o_g < shape.groups_in_all
    per_group, groups = shape.per_group, shape.channels // shape.per_group
    # Where a group's first channel lies.
    o_start = o_g // groups * layout.sample_stride + o_g % groups * per_group  # [G_BLOCK]
    # Differences from the group's first channel, as above.
    b_first = tl.load(parts.hi + o_start, mask=m_g, other=0.0)
    b_means = tl.zeros((G_BLOCK, T_BLOCK), tl.float32)
    for begin in range(0, per_group, T_BLOCK):
        o_t = begin + tl.arange(0, T_BLOCK)[None, :]  # [1, T_BLOCK]
        m_gt = (o_t < per_group) & m_g[:, None]  # [G_BLOCK, T_BLOCK]
        b_k, b_d, b_v = read_moments(parts, o_start[:, None] + o_t, m_gt, layout, MERGE)
        b_means += tl.where(m_gt, b_k - b_first[:, None] + b_d, 0.0)
    b_mean = tl.sum(b_means, 1) / per_group  # [G_BLOCK]
    # Within channels and between them.
    b_var = tl.zeros((G_BLOCK, T_BLOCK), tl.float32)
    for begin in range(0, per_group, T_BLOCK):
        o_t = begin + tl.arange(0, T_BLOCK)[None, :]
        m_gt = (o_t < per_group) & m_g[:, None]
        b_k, b_d, b_v = read_moments(parts, o_start[:, None] + o_t, m_gt, layout, MERGE)
        b_e = b_k - b_first[:, None] + b_d - b_mean[:, None]
        b_var += tl.where(m_gt, b_v * tl.cast(factor, tl.float32) + b_e * b_e, 0.0)
    store_statistics(layer, o_g, m_g, shape.groups_in_all, b_first, b_mean, tl.sum(b_var, 1) / per_group)


@triton.jit
def store_statistics(out, o_at, m_at, number, b_first, b_mean, b_var):
    """Store first + mean as hi and lo, and the variance."""
    b_rounded = b_first + b_mean
    tl.store(out + o_at, b_rounded, mask=m_at)
    tl.store(out + number + o_at, b_mean - (b_rounded - b_first), mask=m_at)
    tl.store(out + 2 * number + o_at, b_var, mask=m_at)


@triton.jit(do_not_specialize=["groups_in_all", "per_group", "pieces", "piece", "size", "fold"])
def mix(
    parts: Moments, stats: MixtureStatistics, parameters: Parameters, running: Running, number, channels,
    groups_in_all, per_group, pieces, sample_stride, stride, piece, size, fold, eps, factor, unbias,
    FLAGS: tl.constexpr, BLOCK: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """Pivot, scale and offset (3, N * C) of y = scale * (x - pivot) + offset, from the pooled statistics.

    BLOCK pairs (n, c) to a program. With ``merge`` also the joined moments of x, for the backward pass. Program 0 moves
    the running statistics.
    """
    # Flat over (N, C), so that few samples of many channels fill a GPU as well as many samples of few.
    o_nc = place(AT, 0) * BLOCK + tl.arange(0, BLOCK)
    o_n = o_nc // channels
    shape = Shape(0, number, channels, groups_in_all, per_group)
    layout = layout_of(pieces, sample_stride, stride, piece, size, fold)
    mix_at(
        parts, stats, parameters, running, o_n, o_nc - o_n * channels, o_nc < number, shape, layout, eps, factor, FLAGS
    )
    # No other program reads the running statistics while this one writes them.
    if FLAGS.track != 0 and place(AT, 0) == 0:
        factor = tl.cast(unbias, tl.float32)
        # The number of elements is known after the ranks have met, so the unbiased factor is computed here.
        if FLAGS.ranks:
            count = tl.load(stats.rank_sums).to(tl.float32)
            factor = tl.where(factor > 0.0, count / tl.maximum(count - 1.0, 1.0), 1.0)
            factor = tl.where(count > 1.0, factor, float("nan"))  # too few for a variance: nothing moves
        track(stats.batch, running, channels, factor, FLAGS.track, BLOCK)


@triton.jit
def mix_at(parts, stats, parameters, running, o_n, o_c, m_nc, shape, layout, eps, factor, FLAGS: tl.constexpr):
    """Write ``mix``'s coefficients for the samples n and channels c of a tile of any shape."""
    number, o_nc = shape.number, o_n * shape.channels + o_c
    # The moments of x, or where only running statistics count, their mean as the pivot.
    if FLAGS.needs_moments:
        b_k, b_d, b_vi = read_moments(parts, o_n.to(tl.int64) * layout.sample_stride + o_c, m_nc, layout, FLAGS.merge)
        if FLAGS.merge:
            tl.store(stats.moments + o_nc, b_d, mask=m_nc)
            tl.store(stats.moments + number + o_nc, b_vi, mask=m_nc)
        b_vi = b_vi * tl.cast(factor, tl.float32)
    else:
        b_k = tl.load(running.mean + o_c, mask=m_nc, other=0.0).to(tl.float32)
        b_d, b_vi = b_k * 0.0, b_k * 0.0
    # The pivot is stored already where the pass over x wrote it there.
    if FLAGS.merge or not FLAGS.needs_moments:
        tl.store(stats.affine + o_nc, b_k, mask=m_nc)
    given = with_pooled(b_k, b_d, b_vi, stats, running, o_n, o_c, m_nc, shape, FLAGS)
    # Without a weight or a bias the defaults leave y as it is.
    b_gamma = per_channel(parameters.weight, o_c, m_nc, 1.0, FLAGS.weight)
    b_beta = per_channel(parameters.bias, o_c, m_nc, 0.0, FLAGS.bias)
    b_beta -= per_channel(parameters.w, o_c, m_nc, 0.0, FLAGS.threshold)
    # Both outputs have the same pivot, so their mixture is one affine map.
    if FLAGS.outputs:
        b_iota = tl.load(parameters.w + o_c, mask=m_nc, other=0.0).to(tl.float32)
        b_bn, b_ln = b_iota * root(given.bv, eps), (1.0 - b_iota) * root(given.lv, eps)
        b_scale = b_gamma * (b_bn + b_ln)
        b_offset = b_beta - b_gamma * (b_bn * given.db + b_ln * given.dl)
    else:
        # Center and variance as mixtures; the center counted from k.
        b_center, b_var = mixtures(given, weights_of(parameters.w, FLAGS), weights_of(parameters.v, FLAGS), FLAGS)
        b_scale = b_gamma * root(b_var, eps)
        b_offset = b_beta - b_scale * b_center
    tl.store(stats.affine + number + o_nc, b_scale, mask=m_nc)
    tl.store(stats.affine + 2 * number + o_nc, b_offset, mask=m_nc)
    if FLAGS.threshold:
        b_floor = per_channel(parameters.w, o_c, m_nc, 0.0, True)
        tl.store(stats.affine + 3 * number + o_nc, b_floor, mask=m_nc)


@triton.jit
def track(batch, running, channels, unbias, TRACK: tl.constexpr, BLOCK: tl.constexpr):
    """Move the running statistics towards the batch's, unless one of these is NaN or infinite.

    TRACK: 1 by the momentum, 2 as the average of all batches.
    """
    # First look at all channels: either all of them move or none.
    b_bad = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, channels, BLOCK):
        o_c = begin + tl.arange(0, BLOCK)
        b_mean = tl.load(batch + o_c, mask=o_c < channels, other=0.0)  # [BLOCK]
        b_var = tl.load(batch + 2 * channels + o_c, mask=o_c < channels, other=0.0) * unbias  # [BLOCK]
        b_bad += tl.where(tl.abs(b_mean + b_var) < float("inf"), 0, 1)
    good = tl.sum(b_bad, 0) == 0
    count, skips = tl.load(running.tracked) + good.to(tl.int64), tl.load(running.skipped) + 1 - good.to(tl.int64)
    tl.debug_barrier()  # every thread has read what is now written
    tl.store(running.tracked, count)
    tl.store(running.skipped, skips)
    # The average of all batches gives the latest one the weight 1 / count.
    if TRACK == 2:
        step = 1.0 / tl.maximum(count, 1).to(tl.float32)
    else:
        step = tl.load(running.momentum).to(tl.float32)
    for begin in range(0, channels, BLOCK):
        o_c = begin + tl.arange(0, BLOCK)
        m_c = o_c < channels
        b_mean = tl.load(batch + o_c, mask=m_c, other=0.0) + tl.load(batch + channels + o_c, mask=m_c, other=0.0)
        b_var = tl.load(batch + 2 * channels + o_c, mask=m_c, other=0.0) * unbias
        b_old = tl.load(running.mean + o_c, mask=m_c, other=0.0)
        tl.store(running.mean + o_c, (1.0 - step) * b_old + step * b_mean, mask=m_c & good)
        b_old = tl.load(running.var + o_c, mask=m_c, other=0.0)
        tl.store(running.var + o_c, (1.0 - step) * b_old + step * b_var, mask=m_c & good)

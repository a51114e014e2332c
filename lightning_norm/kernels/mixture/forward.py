"""Device code: the equations of the mixture family on (N, C) numbers, in two launches; ``backward`` has their adjoint.

*Statistics* are mixed: center and variance are mixtures of the means and variances of instance (in), layer or group
(ln) and batch (bn). One of them alone is instance, layer, group or batch normalization; sn mixes three:

    c = sum_k w_k mean_k, V = sum_k v_k var_k, scale = gamma / sqrt(V + eps), y = scale (x - c) + beta

Or *outputs* are mixed (OUTPUTS, bcn), channel by channel, with iota in w:

    y = gamma (iota x^_bn + (1 - iota) x^_ln) + beta

Or the instance's mean square takes the place of its variance, and nothing is subtracted (``uncentered``, frn). Its
threshold, in w, is subtracted from beta: what is left above it is a ReLU of y.

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
from lightning_norm.kernels.passes.forward import layout_of, read_moments


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
    center, variance = given.d * 0.0, given.d * 0.0
    # Only those that take part: where nothing is mixed, all weights are 1.
    if FLAGS.at_in >= 0:
        center, variance = w[0] * given.d, v[0] * given.vi
    if FLAGS.at_ln >= 0:
        center, variance = center + w[1] * given.dl, variance + v[1] * given.lv
    if FLAGS.at_bn >= 0:
        center, variance = center + w[2] * given.db, variance + v[2] * given.bv
    return center, variance


@triton.jit
def group_of(n, c, shape):
    """Return the number of the group, of all samples, that a channel belongs to."""
    return n * (shape.channels // shape.per_group) + c // shape.per_group


@triton.jit
def with_pooled(k, d, vi, stats, running, n, c, keep, shape, FLAGS: tl.constexpr):
    """Return ``Given``: a tile's own mean and variance, and those of layer and batch, means minus k."""
    dl, lv, db, bv = k * 0.0, k * 0.0, k * 0.0, k * 0.0
    # hi - k first, which is exact where both are large and close; then lo.
    if FLAGS.at_ln >= 0:
        layer, groups, j = stats.layer, shape.groups_in_all, group_of(n, c, shape)
        dl = tl.load(layer + j, mask=keep, other=0.0) - k + tl.load(layer + groups + j, mask=keep, other=0.0)
        lv = tl.load(layer + 2 * groups + j, mask=keep, other=0.0)
    if FLAGS.at_bn >= 0:
        # The running statistics stand in for the batch's.
        if FLAGS.frozen:
            db = tl.load(running.mean + c, mask=keep, other=0.0).to(tl.float32) - k
            bv = tl.load(running.var + c, mask=keep, other=0.0).to(tl.float32)
        else:
            batch, channels = stats.batch, shape.channels
            db = tl.load(batch + c, mask=keep, other=0.0) - k + tl.load(batch + channels + c, mask=keep, other=0.0)
            bv = tl.load(batch + 2 * channels + c, mask=keep, other=0.0)
    # The center is 0, which lies at -k.
    if FLAGS.uncentered:
        vi, d = vi + (k + d) * (k + d), -k
    return Given(d, vi, dl, lv, db, bv)


@triton.jit
def per_channel(t, c, keep, default: tl.constexpr, PRESENT: tl.constexpr):
    """Return a (C,) parameter, or its default where the layer has none."""
    if PRESENT:
        value = tl.load(t + c, mask=keep, other=0.0).to(tl.float32)
    else:
        value = tl.where(keep, default, 0.0).to(tl.float32)
    return value


@triton.jit
def root(v, eps):
    """Return 1 / sqrt(v + eps); square root and division are each rounded correctly, unlike ``rsqrt``."""
    one = tl.full((), 1.0, tl.float32)
    return tl.div_rn(one, tl.sqrt_rn(v + tl.cast(eps, tl.float32)))


@triton.jit(
    do_not_specialize=["samples", "groups_in_all", "per_group", "column_jobs", "pieces", "piece", "size", "fold"]
)
def pool(
    parts: Moments, batch, layer, samples, channels, groups_in_all, per_group, column_jobs, pieces, sample_stride,
    stride, piece, size, fold, factor, MERGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Pool the moments of x: batch statistics (3, C), and group statistics (3, N * G), each as hi, lo and variance.

    The first ``column_jobs`` programs take blocks of channels, the others blocks of groups: one launch for both.
    """
    layout, pid = layout_of(pieces, sample_stride, stride, piece, size, fold), tl.program_id(0)
    if pid < column_jobs:
        pool_columns(pid, parts, batch, samples, channels, layout, factor, MERGE, TILE.n, TILE.c)
    else:
        shape = Shape(samples, 0, channels, groups_in_all, per_group)
        pool_rows(pid - column_jobs, parts, layer, shape, layout, factor, MERGE, TILE.g, TILE.t)


@triton.jit
def pool_columns(
    pid, parts, batch, samples, channels, layout, factor, MERGE: tl.constexpr, N_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Batch statistics of a block of channels: mean over samples, and var = mean of (var_n + (mean_n - mean)^2).

    ``factor`` turns a sample's variance into the unbiased one.
    """
    # Neighbouring threads take neighbouring channels, which lie side by side in (N, C).
    c = pid * C_BLOCK + tl.arange(0, C_BLOCK)
    inside = c < channels
    # Means enter as differences from the first sample's, so that a large mean costs no digits.
    first = tl.load(parts.hi + c, mask=inside, other=0.0)
    b_mean = tl.zeros((N_BLOCK, C_BLOCK), tl.float32)
    for begin in range(0, samples, N_BLOCK):
        n = (begin + tl.arange(0, N_BLOCK))[:, None].to(tl.int64)
        keep = (n < samples) & inside[None, :]
        k, d, v = read_moments(parts, n * layout.sample_stride + c[None, :], keep, layout, MERGE)
        b_mean += tl.where(keep, k - first[None, :] + d, 0.0)
    mean = tl.sum(b_mean, 0) / samples
    # The law of total variance: within samples and between them.
    b_var = tl.zeros((N_BLOCK, C_BLOCK), tl.float32)
    for begin in range(0, samples, N_BLOCK):
        n = (begin + tl.arange(0, N_BLOCK))[:, None].to(tl.int64)
        keep = (n < samples) & inside[None, :]
        k, d, v = read_moments(parts, n * layout.sample_stride + c[None, :], keep, layout, MERGE)
        e = k - first[None, :] + d - mean[None, :]
        b_var += tl.where(keep, v * tl.cast(factor, tl.float32) + e * e, 0.0)
    store_statistics(batch, c, inside, channels, first, mean, tl.sum(b_var, 0) / samples)


@triton.jit
def pool_rows(
    pid, parts, layer, shape, layout, factor, MERGE: tl.constexpr, G_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr
):
    """Statistics of a few groups of channels; as ``pool_columns``, over the channels of a group."""
    j = pid.to(tl.int64) * G_BLOCK + tl.arange(0, G_BLOCK)
    inside = j < shape.groups_in_all
    per_group, groups = shape.per_group, shape.channels // shape.per_group
    # Where a group's first channel lies.
    start = j // groups * layout.sample_stride + j % groups * per_group
    # Differences from the group's first channel, as above.
    first = tl.load(parts.hi + start, mask=inside, other=0.0)
    b_mean = tl.zeros((G_BLOCK, T_BLOCK), tl.float32)
    for begin in range(0, per_group, T_BLOCK):
        t = begin + tl.arange(0, T_BLOCK)[None, :]
        keep = (t < per_group) & inside[:, None]
        k, d, v = read_moments(parts, start[:, None] + t, keep, layout, MERGE)
        b_mean += tl.where(keep, k - first[:, None] + d, 0.0)
    mean = tl.sum(b_mean, 1) / per_group
    # Within channels and between them.
    b_var = tl.zeros((G_BLOCK, T_BLOCK), tl.float32)
    for begin in range(0, per_group, T_BLOCK):
        t = begin + tl.arange(0, T_BLOCK)[None, :]
        keep = (t < per_group) & inside[:, None]
        k, d, v = read_moments(parts, start[:, None] + t, keep, layout, MERGE)
        e = k - first[:, None] + d - mean[:, None]
        b_var += tl.where(keep, v * tl.cast(factor, tl.float32) + e * e, 0.0)
    store_statistics(layer, j, inside, shape.groups_in_all, first, mean, tl.sum(b_var, 1) / per_group)


@triton.jit
def store_statistics(out, at, keep, number, first, mean, var):
    """Store first + mean as hi and lo, and the variance."""
    rounded = first + mean
    tl.store(out + at, rounded, mask=keep)
    tl.store(out + number + at, mean - (rounded - first), mask=keep)
    tl.store(out + 2 * number + at, var, mask=keep)


@triton.jit(do_not_specialize=["groups_in_all", "per_group", "pieces", "piece", "size", "fold"])
def mix(
    parts: Moments, stats: MixtureStatistics, parameters: Parameters, running: Running, number, channels,
    groups_in_all, per_group, pieces, sample_stride, stride, piece, size, fold, eps, factor, unbias,
    FLAGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pivot, scale and offset (3, N * C) of y = scale * (x - pivot) + offset, from the pooled statistics.

    BLOCK pairs (n, c) to a program. With ``merge`` also the joined moments of x, for the backward pass. Program 0 moves
    the running statistics.
    """
    # Flat over (N, C), so that few samples of many channels fill a GPU as well as many samples of few.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = i // channels
    shape = Shape(0, number, channels, groups_in_all, per_group)
    layout = layout_of(pieces, sample_stride, stride, piece, size, fold)
    mix_at(parts, stats, parameters, running, n, i - n * channels, i < number, shape, layout, eps, factor, FLAGS)
    # No other program reads the running statistics while this one writes them.
    if FLAGS.track != 0 and tl.program_id(0) == 0:
        factor = tl.cast(unbias, tl.float32)
        # The number of elements is known after the ranks have met, so the unbiased factor is computed here.
        if FLAGS.ranks:
            count = tl.load(stats.rank_sums).to(tl.float32)
            factor = tl.where(factor > 0.0, count / tl.maximum(count - 1.0, 1.0), 1.0)
            factor = tl.where(count > 1.0, factor, float("nan"))  # too few for a variance: nothing moves
        track(stats.batch, running, channels, factor, FLAGS.track, BLOCK)


@triton.jit
def mix_at(parts, stats, parameters, running, n, c, keep, shape, layout, eps, factor, FLAGS: tl.constexpr):
    """Write ``mix``'s coefficients for the samples n and channels c of a tile of any shape."""
    number, i = shape.number, n * shape.channels + c
    # The moments of x, or where only running statistics count, their mean as the pivot.
    if FLAGS.needs_moments:
        k, d, vi = read_moments(parts, n.to(tl.int64) * layout.sample_stride + c, keep, layout, FLAGS.merge)
        if FLAGS.merge:
            tl.store(stats.moments + i, d, mask=keep)
            tl.store(stats.moments + number + i, vi, mask=keep)
        vi = vi * tl.cast(factor, tl.float32)
    else:
        k = tl.load(running.mean + c, mask=keep, other=0.0).to(tl.float32)
        d, vi = k * 0.0, k * 0.0
    # The pivot is stored already where the pass over x wrote it there.
    if FLAGS.merge or not FLAGS.needs_moments:
        tl.store(stats.affine + i, k, mask=keep)
    given = with_pooled(k, d, vi, stats, running, n, c, keep, shape, FLAGS)
    # Without a weight or a bias the defaults leave y as it is.
    gamma = per_channel(parameters.weight, c, keep, 1.0, FLAGS.weight)
    beta = per_channel(parameters.bias, c, keep, 0.0, FLAGS.bias)
    beta -= per_channel(parameters.w, c, keep, 0.0, FLAGS.threshold)
    # Both outputs have the same pivot, so their mixture is one affine map.
    if FLAGS.outputs:
        iota = tl.load(parameters.w + c, mask=keep, other=0.0).to(tl.float32)
        x, y = iota * root(given.bv, eps), (1.0 - iota) * root(given.lv, eps)
        scale = gamma * (x + y)
        offset = beta - gamma * (x * given.db + y * given.dl)
    else:
        # Center and variance as mixtures; the center counted from k.
        center, variance = mixtures(given, weights_of(parameters.w, FLAGS), weights_of(parameters.v, FLAGS), FLAGS)
        scale = gamma * root(variance, eps)
        offset = beta - scale * center
    tl.store(stats.affine + number + i, scale, mask=keep)
    tl.store(stats.affine + 2 * number + i, offset, mask=keep)


@triton.jit
def track(batch, running, channels, unbias, TRACK: tl.constexpr, BLOCK: tl.constexpr):
    """Move the running statistics towards the batch's, unless one of these is NaN or infinite.

    TRACK: 1 by the momentum, 2 as the average of all batches.
    """
    # First look at all channels: either all of them move or none.
    bad = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        mean = tl.load(batch + c, mask=c < channels, other=0.0)
        var = tl.load(batch + 2 * channels + c, mask=c < channels, other=0.0) * unbias
        bad += tl.where(tl.abs(mean + var) < float("inf"), 0, 1)
    good = tl.sum(bad, 0) == 0
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
        c = begin + tl.arange(0, BLOCK)
        keep = c < channels
        mean = tl.load(batch + c, mask=keep, other=0.0) + tl.load(batch + channels + c, mask=keep, other=0.0)
        var = tl.load(batch + 2 * channels + c, mask=keep, other=0.0) * unbias
        old = tl.load(running.mean + c, mask=keep, other=0.0)
        tl.store(running.mean + c, (1.0 - step) * old + step * mean, mask=keep & good)
        old = tl.load(running.var + c, mask=keep, other=0.0)
        tl.store(running.var + c, (1.0 - step) * old + step * var, mask=keep & good)

"""Device code: the equations of the mixture family on (N, C) numbers, in two launches; ``backward`` has their adjoint.

*Statistics* are mixed: center and variance are mixtures of the means and variances of instance (in), layer or group
(ln) and batch (bn). One of them alone is instance, layer, group or batch normalization; sn mixes three:

    c = sum_k w_k mean_k, V = sum_k v_k var_k, scale = gamma / sqrt(V + eps), y = scale (x - c) + beta

Or *outputs* are mixed (OUTPUTS, bcn), channel by channel, with iota in w:

    y = gamma (iota x^_bn + (1 - iota) x^_ln) + beta

First the statistics are pooled: ``pool``, columns of (N, C) in some programs and rows in the others. Then every (n, c)
is computed from them: ``mix``. Backward in the same two steps: ``vjp_pool``, ``vjp_mix``.

All in shifted coordinates. k = hi of the sample's mean is what the passes over x subtract, d = lo what rounding it
left. Other means enter as differences from k, so float32 is enough at any mean / std: mixing weights sum to one.

The letters: w and v mix means and variances; dl and db are the means of layer and batch minus k, lv and bv their
variances; t0 and t1 are the sums of dy and of dy * (x - k); f and e are the gradients of a center and of a variance.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.passes.forward import read_moments


@triton.jit
def weights_of(t, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr, K: tl.constexpr, SOFTMAX: tl.constexpr):
    """Return the mixing weights of instance, layer and batch, K numbers at ``t``; 1 for each if K is 0.

    With SOFTMAX ``t`` holds logits. IN, LN and BN are the positions in ``t``, -1 for a statistic that takes no part.
    """
    one = tl.full((), 1.0, tl.float32)
    a, b, c = one, one, one
    if K > 0:
        # A statistic that takes no part has weight 0: a logit of -inf.
        low = tl.full((), float("-inf"), tl.float32)
        if not SOFTMAX:
            low = tl.full((), 0.0, tl.float32)
        a, b, c = low, low, low
        if IN >= 0:
            a = tl.load(t + IN).to(tl.float32)
        if LN >= 0:
            b = tl.load(t + LN).to(tl.float32)
        if BN >= 0:
            c = tl.load(t + BN).to(tl.float32)
        if SOFTMAX:
            # The largest logit is subtracted, so that nothing overflows.
            top = tl.maximum(tl.maximum(a, b), c)
            a, b, c = tl.exp(a - top), tl.exp(b - top), tl.exp(c - top)
            total = a + b + c
            a, b, c = tl.div_rn(a, total), tl.div_rn(b, total), tl.div_rn(c, total)
    return a, b, c


@triton.jit
def mixtures(
    d, vi, dl, lv, db, bv, wi, wl, wb, zi, zl, zb, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Return the mixture of the means, counted from k, and that of the variances, for each element of a tile."""
    center, variance = d * 0.0, d * 0.0
    # Only those that take part: where nothing is mixed, all weights are 1.
    if IN >= 0:
        center, variance = wi * d, zi * vi
    if LN >= 0:
        center, variance = center + wl * dl, variance + zl * lv
    if BN >= 0:
        center, variance = center + wb * db, variance + zb * bv
    return center, variance


@triton.jit
def layer_and_batch(
    layer, batch, running_mean, running_var, i, c, j, keep, k, groups_in_all, channels,
    LN: tl.constexpr, BN: tl.constexpr, FROZEN: tl.constexpr,
):  # fmt: skip
    """Return the means of layer and batch minus k, and their variances, for each element of a tile."""
    dl, lv, db, bv = k * 0.0, k * 0.0, k * 0.0, k * 0.0
    # hi - k first, which is exact where both are large and close; then lo.
    if LN >= 0:
        dl = tl.load(layer + j, mask=keep, other=0.0) - k + tl.load(layer + groups_in_all + j, mask=keep, other=0.0)
        lv = tl.load(layer + 2 * groups_in_all + j, mask=keep, other=0.0)
    if BN >= 0:
        # The running statistics stand in for the batch's.
        if FROZEN:
            db = tl.load(running_mean + c, mask=keep, other=0.0).to(tl.float32) - k
            bv = tl.load(running_var + c, mask=keep, other=0.0).to(tl.float32)
        else:
            db = tl.load(batch + c, mask=keep, other=0.0) - k + tl.load(batch + channels + c, mask=keep, other=0.0)
            bv = tl.load(batch + 2 * channels + c, mask=keep, other=0.0)
    return dl, lv, db, bv


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
    hi, lo, var, batch, layer, samples, channels, groups_in_all, per_group, column_jobs, pieces, sample_stride, stride,
    piece, size, fold, factor, MERGE: tl.constexpr, N_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
    G_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr,
):  # fmt: skip
    """Pool the moments of x: batch statistics (3, C), and group statistics (3, N * G), each as hi, lo and variance.

    The first ``column_jobs`` programs take blocks of channels, the others blocks of groups: one launch for both.
    """
    piece, size, fold = tl.cast(piece, tl.int32), tl.cast(size, tl.int32), tl.cast(fold, tl.int32)
    pid = tl.program_id(0)
    if pid < column_jobs:
        pool_columns(
            pid, hi, lo, var, batch, samples, channels, pieces, sample_stride, stride, piece, size, fold, factor, MERGE,
            N_BLOCK, C_BLOCK,
        )  # fmt: skip
    else:
        pool_rows(
            pid - column_jobs, hi, lo, var, layer, channels, groups_in_all, per_group, pieces, sample_stride, stride,
            piece, size, fold, factor, MERGE, G_BLOCK, T_BLOCK,
        )  # fmt: skip


@triton.jit
def pool_columns(
    pid, hi, lo, var, batch, samples, channels, pieces, sample_stride, stride, piece, size, fold, factor,
    MERGE: tl.constexpr, N_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Batch statistics of a block of channels: mean over samples, and var = mean of (var_n + (mean_n - mean)^2).

    ``factor`` turns a sample's variance into the unbiased one.
    """
    # Neighbouring threads take neighbouring channels, which lie side by side in (N, C).
    c = pid * C_BLOCK + tl.arange(0, C_BLOCK)
    moments = c < channels
    # Means enter as differences from the first sample's, so that a large mean costs no digits.
    first = tl.load(hi + c, mask=moments, other=0.0)
    total = tl.zeros((N_BLOCK, C_BLOCK), tl.float32)
    for begin in range(0, samples, N_BLOCK):
        n = (begin + tl.arange(0, N_BLOCK))[:, None].to(tl.int64)
        keep = (n < samples) & moments[None, :]
        k, d, v = read_moments(hi, lo, var, n * sample_stride + c[None, :], keep, pieces, stride, piece, size, fold, MERGE)  # noqa: E501  # fmt: skip
        total += tl.where(keep, k - first[None, :] + d, 0.0)
    mean = tl.sum(total, 0) / samples
    # The law of total variance: within samples and between them.
    variance = tl.zeros((N_BLOCK, C_BLOCK), tl.float32)
    for begin in range(0, samples, N_BLOCK):
        n = (begin + tl.arange(0, N_BLOCK))[:, None].to(tl.int64)
        keep = (n < samples) & moments[None, :]
        k, d, v = read_moments(hi, lo, var, n * sample_stride + c[None, :], keep, pieces, stride, piece, size, fold, MERGE)  # noqa: E501  # fmt: skip
        e = k - first[None, :] + d - mean[None, :]
        variance += tl.where(keep, v * tl.cast(factor, tl.float32) + e * e, 0.0)
    store_statistics(batch, c, moments, channels, first, mean, tl.sum(variance, 0) / samples)


@triton.jit
def pool_rows(
    pid, hi, lo, var, layer, channels, groups_in_all, per_group, pieces, sample_stride, stride, piece, size, fold,
    factor, MERGE: tl.constexpr, G_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of a few groups of channels; as ``pool_columns``, over the channels of a group."""
    j = pid.to(tl.int64) * G_BLOCK + tl.arange(0, G_BLOCK)
    moments = j < groups_in_all
    groups = channels // per_group
    # Where a group's first channel lies.
    start = j // groups * sample_stride + j % groups * per_group
    # Differences from the group's first channel, as above.
    first = tl.load(hi + start, mask=moments, other=0.0)
    total = tl.zeros((G_BLOCK, T_BLOCK), tl.float32)
    for begin in range(0, per_group, T_BLOCK):
        t = begin + tl.arange(0, T_BLOCK)[None, :]
        keep = (t < per_group) & moments[:, None]
        k, d, v = read_moments(hi, lo, var, start[:, None] + t, keep, pieces, stride, piece, size, fold, MERGE)
        total += tl.where(keep, k - first[:, None] + d, 0.0)
    mean = tl.sum(total, 1) / per_group
    # Within channels and between them.
    variance = tl.zeros((G_BLOCK, T_BLOCK), tl.float32)
    for begin in range(0, per_group, T_BLOCK):
        t = begin + tl.arange(0, T_BLOCK)[None, :]
        keep = (t < per_group) & moments[:, None]
        k, d, v = read_moments(hi, lo, var, start[:, None] + t, keep, pieces, stride, piece, size, fold, MERGE)
        e = k - first[:, None] + d - mean[:, None]
        variance += tl.where(keep, v * tl.cast(factor, tl.float32) + e * e, 0.0)
    store_statistics(layer, j, moments, groups_in_all, first, mean, tl.sum(variance, 1) / per_group)


@triton.jit
def store_statistics(out, at, keep, number, first, mean, var):
    """Store first + mean as hi and lo, and the variance."""
    rounded = first + mean
    tl.store(out + at, rounded, mask=keep)
    tl.store(out + number + at, mean - (rounded - first), mask=keep)
    tl.store(out + 2 * number + at, var, mask=keep)


@triton.jit(do_not_specialize=["groups_in_all", "per_group", "pieces", "piece", "size", "fold"])
def mix(
    hi, lo, var, batch, layer, gathered, weight, bias, w, v, running_mean, running_var, tracked, skipped, momentum,
    moments, affine, number, channels, groups_in_all, per_group, pieces, sample_stride, stride, piece, size, fold, eps,
    factor, unbias, MOMENTS: tl.constexpr, MERGE: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr,
    K: tl.constexpr, SOFTMAX: tl.constexpr, OUTPUTS: tl.constexpr, FROZEN: tl.constexpr, TRACK: tl.constexpr,
    RANKS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pivot, scale and offset (3, N * C) of y = scale * (x - pivot) + offset, from the pooled statistics.

    BLOCK pairs (n, c) to a program. With MERGE also the joined moments of x, for the backward pass. Program 0 moves the
    running statistics, TRACK: 1 by the momentum, 2 as the average of all batches.
    """
    # Flat over (N, C), so that few samples of many channels fill a GPU as well as many samples of few.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = i // channels
    mix_at(
        hi, lo, var, batch, layer, weight, bias, w, v, running_mean, running_var, moments, affine, n, i - n * channels,
        i < number, number, channels, groups_in_all, per_group, pieces, sample_stride, stride, piece, size, fold, eps,
        factor, MOMENTS, MERGE, IN, LN, BN, K, SOFTMAX, OUTPUTS, FROZEN, WEIGHT, BIAS,
    )  # fmt: skip
    # No other program reads the running statistics while this one writes them.
    if TRACK != 0 and tl.program_id(0) == 0:
        factor = tl.cast(unbias, tl.float32)
        # The number of elements is known after the ranks have met, so the unbiased factor is computed here.
        if RANKS:
            count = tl.load(gathered).to(tl.float32)
            factor = tl.where(factor > 0.0, count / tl.maximum(count - 1.0, 1.0), 1.0)
            factor = tl.where(count > 1.0, factor, float("nan"))  # too few for a variance: nothing moves
        track(batch, running_mean, running_var, tracked, skipped, momentum, channels, factor, TRACK, BLOCK)


@triton.jit
def mix_at(
    hi, lo, var, batch, layer, weight, bias, w, v, running_mean, running_var, moments, affine, n, c, keep, number,
    channels, groups_in_all, per_group, pieces, sample_stride, stride, piece, size, fold, eps, factor,
    MOMENTS: tl.constexpr, MERGE: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr, K: tl.constexpr,
    SOFTMAX: tl.constexpr, OUTPUTS: tl.constexpr, FROZEN: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Write ``mix``'s coefficients for the samples n and channels c of a tile of any shape."""
    piece, size, fold = tl.cast(piece, tl.int32), tl.cast(size, tl.int32), tl.cast(fold, tl.int32)
    i = n * channels + c
    j = n * (channels // per_group) + c // per_group
    # The moments of x, or where only running statistics count, their mean as the pivot.
    if MOMENTS:
        at = n.to(tl.int64) * sample_stride + c
        k, d, vi = read_moments(hi, lo, var, at, keep, pieces, stride, piece, size, fold, MERGE)
        if MERGE:
            tl.store(moments + i, d, mask=keep)
            tl.store(moments + number + i, vi, mask=keep)
        vi = vi * tl.cast(factor, tl.float32)
    else:
        k = tl.load(running_mean + c, mask=keep, other=0.0).to(tl.float32)
        d, vi = k * 0.0, k * 0.0
    # The pivot is stored already where the pass over x wrote it there.
    if MERGE or not MOMENTS:
        tl.store(affine + i, k, mask=keep)
    dl, lv, db, bv = layer_and_batch(
        layer, batch, running_mean, running_var, i, c, j, keep, k, groups_in_all, channels, LN, BN, FROZEN
    )
    # Without a weight or a bias the defaults leave y as it is.
    gamma = per_channel(weight, c, keep, 1.0, WEIGHT)
    beta = per_channel(bias, c, keep, 0.0, BIAS)
    # Both outputs have the same pivot, so their mixture is one affine map.
    if OUTPUTS:
        iota = tl.load(w + c, mask=keep, other=0.0).to(tl.float32)
        x, y = iota * root(bv, eps), (1.0 - iota) * root(lv, eps)
        scale = gamma * (x + y)
        offset = beta - gamma * (x * db + y * dl)
    else:
        # Center and variance as mixtures; the center counted from k.
        wi, wl, wb = weights_of(w, IN, LN, BN, K, SOFTMAX)
        zi, zl, zb = weights_of(v, IN, LN, BN, K, SOFTMAX)
        center, variance = mixtures(d, vi, dl, lv, db, bv, wi, wl, wb, zi, zl, zb, IN, LN, BN)
        scale = gamma * root(variance, eps)
        offset = beta - scale * center
    tl.store(affine + number + i, scale, mask=keep)
    tl.store(affine + 2 * number + i, offset, mask=keep)


@triton.jit
def track(
    batch, running_mean, running_var, tracked, skipped, momentum, channels, unbias, TRACK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the running statistics towards the batch's, unless one of these is NaN or infinite."""
    # First look at all channels: either all of them move or none.
    bad = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        mean = tl.load(batch + c, mask=c < channels, other=0.0)
        var = tl.load(batch + 2 * channels + c, mask=c < channels, other=0.0) * unbias
        bad += tl.where(tl.abs(mean + var) < float("inf"), 0, 1)
    good = tl.sum(bad, 0) == 0
    count, skips = tl.load(tracked) + good.to(tl.int64), tl.load(skipped) + 1 - good.to(tl.int64)
    tl.debug_barrier()  # every thread has read what is now written
    tl.store(tracked, count)
    tl.store(skipped, skips)
    # The average of all batches gives the latest one the weight 1 / count.
    if TRACK == 2:
        step = 1.0 / tl.maximum(count, 1).to(tl.float32)
    else:
        step = tl.load(momentum).to(tl.float32)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        keep = c < channels
        mean = tl.load(batch + c, mask=keep, other=0.0) + tl.load(batch + channels + c, mask=keep, other=0.0)
        var = tl.load(batch + 2 * channels + c, mask=keep, other=0.0) * unbias
        old = tl.load(running_mean + c, mask=keep, other=0.0)
        tl.store(running_mean + c, (1.0 - step) * old + step * mean, mask=keep & good)
        old = tl.load(running_var + c, mask=keep, other=0.0)
        tl.store(running_var + c, (1.0 - step) * old + step * var, mask=keep & good)

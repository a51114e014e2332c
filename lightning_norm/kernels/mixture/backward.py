"""Device code: the vector-Jacobian product of the equations in ``forward``, in two launches. Letters as there.

``vjp_pool`` sums over samples and over groups of channels what each (n, c) sends to the statistics that it shares with
others, and leaves the parameters' gradients; ``vjp_mix`` spreads the sums again over (n, c).
"""

import triton
import triton.language as tl

from lightning_norm.kernels.mixture.forward import layer_and_batch, mixtures, per_channel, root, weights_of
from lightning_norm.kernels.passes.backward import read_sum


@triton.jit
def adjoint(
    t0, t1, gamma, iota, d, vi, dl, lv, db, bv, wi, wl, wb, zi, zl, zb, eps, IN: tl.constexpr, LN: tl.constexpr,
    BN: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Return the layer's (f, e), the batch's (f, e), and what this (n, c) adds to the gradients of gamma and iota.

    With scale = gamma r, r = 1 / sqrt(V + eps) and q = t1 - (c - k) t0 = sum dy (x - c):

        f = dL/dc = -gamma r t0, e = dL/dV = -gamma r^3 q / 2, dL/dgamma = r q
    """
    if OUTPUTS:
        # Two normalized outputs, each with a scale of its own.
        rb, rl = root(bv, eps), root(lv, eps)
        qb, ql = t1 - db * t0, t1 - dl * t0
        ab, al = iota * gamma * rb, (1.0 - iota) * gamma * rl
        fl, el, fb, eb = -al * t0, -0.5 * al * rl * rl * ql, -ab * t0, -0.5 * ab * rb * rb * qb
        dgamma, diota = iota * rb * qb + (1.0 - iota) * rl * ql, gamma * (rb * qb - rl * ql)
    else:
        center, variance = mixtures(d, vi, dl, lv, db, bv, wi, wl, wb, zi, zl, zb, IN, LN, BN)
        # One scale, so layer and batch get the same gradients, to be weighted by w and v.
        # Computed again from the statistics: saving it would cost an (N, C) tensor and a read.
        r = root(variance, eps)
        q = t1 - center * t0
        fl, el = -gamma * r * t0, -0.5 * gamma * r * r * r * q
        fb, eb = fl, el
        dgamma, diota = r * q, q
    return fl, el, fb, eb, dgamma, diota


@triton.jit
def adjoint_at(
    total, dot, affine, moments, batch, layer, weight, w, v, running_mean, running_var, n, c, keep, number, channels,
    groups_in_all, per_group, pieces, sample_stride, stride, eps, factor,
    MOMENTS: tl.constexpr, MERGE: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr, K: tl.constexpr,
    SOFTMAX: tl.constexpr, OUTPUTS: tl.constexpr, FROZEN: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """Return ``adjoint`` for a tile of (n, c) read from memory, t0, and what the gradients of w and v need."""
    i = n * channels + c
    at = n.to(tl.int64) * sample_stride + c
    # The sums that the pass over dy and x left.
    t0 = read_sum(total, at, keep, pieces, stride, MERGE)
    t1 = read_sum(dot, at, keep, pieces, stride, MERGE)
    k = tl.load(affine + i, mask=keep, other=0.0)
    # The sample's moments; where only running statistics count there are none.
    d, vi = k * 0.0, k * 0.0
    if MOMENTS:
        d = tl.load(moments + i, mask=keep, other=0.0)
        vi = tl.load(moments + number + i, mask=keep, other=0.0) * tl.cast(factor, tl.float32)
    j = n * (channels // per_group) + c // per_group
    dl, lv, db, bv = layer_and_batch(
        layer, batch, running_mean, running_var, i, c, j, keep, k, groups_in_all, channels, LN, BN, FROZEN
    )
    gamma = per_channel(weight, c, keep, 1.0, WEIGHT)
    iota = per_channel(w, c, keep, 1.0, OUTPUTS)
    wi, wl, wb = weights_of(w, IN, LN, BN, K, SOFTMAX)
    zi, zl, zb = weights_of(v, IN, LN, BN, K, SOFTMAX)
    fl, el, fb, eb, dgamma, diota = adjoint(
        t0, t1, gamma, iota, d, vi, dl, lv, db, bv, wi, wl, wb, zi, zl, zb, eps, IN, LN, BN, OUTPUTS
    )
    return t0, d, vi, dl, lv, db, bv, wl * fl, zl * el, wb * fb, zb * eb, wi * fl, zi * el, fl, el, dgamma, diota


@triton.jit(do_not_specialize=["samples", "groups_in_all", "per_group", "column_jobs", "pieces"])
def vjp_pool(
    total, dot, affine, moments, batch, layer, weight, w, v, running_mean, running_var, dbatch, dlayer, dweight, dbias,
    dw, weight_partials, samples, number, channels, groups_in_all, per_group, column_jobs, pieces, sample_stride,
    stride, eps, factor, MOMENTS: tl.constexpr, MERGE: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr,
    BN: tl.constexpr, K: tl.constexpr, SOFTMAX: tl.constexpr, OUTPUTS: tl.constexpr, FROZEN: tl.constexpr,
    WEIGHT: tl.constexpr, N_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr, G_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of what is pooled: the batch's (2, C), the groups' (2, N * G), the parameters'; parts of w's, v's.

    The first ``column_jobs`` programs take blocks of channels, the others blocks of groups, as in ``pool``.
    """
    pid = tl.program_id(0)
    if pid < column_jobs:
        vjp_columns(
            pid, total, dot, affine, moments, batch, layer, weight, w, v, running_mean, running_var, dbatch, dweight,
            dbias, dw, weight_partials, samples, number, channels, groups_in_all, per_group, column_jobs, pieces,
            sample_stride, stride, eps, factor, MOMENTS, MERGE, IN, LN, BN, K, SOFTMAX, OUTPUTS, FROZEN, WEIGHT,
            N_BLOCK, C_BLOCK,
        )  # fmt: skip
    else:
        vjp_rows(
            pid - column_jobs, total, dot, affine, moments, batch, layer, weight, w, v, running_mean, running_var,
            dlayer, number, channels, groups_in_all, per_group, pieces, sample_stride, stride, eps, factor, MOMENTS,
            MERGE, IN, LN, BN, K, SOFTMAX, OUTPUTS, FROZEN, WEIGHT, G_BLOCK, T_BLOCK,
        )  # fmt: skip


@triton.jit
def vjp_columns(
    pid, total, dot, affine, moments, batch, layer, weight, w, v, running_mean, running_var, dbatch, dweight, dbias, dw,
    weight_partials, samples, number, channels, groups_in_all, per_group, column_jobs, pieces, sample_stride, stride,
    eps, factor, MOMENTS: tl.constexpr, MERGE: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr,
    K: tl.constexpr, SOFTMAX: tl.constexpr, OUTPUTS: tl.constexpr, FROZEN: tl.constexpr, WEIGHT: tl.constexpr,
    N_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over samples, for a block of channels.

    ``weight_partials`` (6, column_jobs) receives this block's part of the gradients of w and v, three each.
    """
    c = (pid * C_BLOCK + tl.arange(0, C_BLOCK))[None, :]
    # One accumulator per sum; the tile is summed once, at the end.
    f, e = tl.zeros((N_BLOCK, C_BLOCK), tl.float32), tl.zeros((N_BLOCK, C_BLOCK), tl.float32)
    gamma, beta, iota = f, f, f
    # For w and v: what each statistic's mean and variance contributed.
    m0, m1, m2, s0, s1, s2 = f, f, f, f, f, f
    for begin in range(0, samples, N_BLOCK):
        n = (begin + tl.arange(0, N_BLOCK))[:, None]
        keep = (n < samples) & (c < channels)
        t0, d, vi, dl, lv, db, bv, fl, el, fb, eb, fi, ei, f1, e1, dgamma, diota = adjoint_at(
            total, dot, affine, moments, batch, layer, weight, w, v, running_mean, running_var, n, c, keep, number,
            channels, groups_in_all, per_group, pieces, sample_stride, stride, eps, factor,
            MOMENTS, MERGE, IN, LN, BN, K, SOFTMAX, OUTPUTS, FROZEN, WEIGHT,
        )  # fmt: skip
        f += tl.where(keep, fb, 0.0)
        e += tl.where(keep, eb, 0.0)
        gamma += tl.where(keep, dgamma, 0.0)
        beta += tl.where(keep, t0, 0.0)
        if OUTPUTS:
            iota += tl.where(keep, diota, 0.0)
        if K > 0:
            m0 += tl.where(keep, f1 * d, 0.0)
            m1 += tl.where(keep, f1 * dl, 0.0)
            m2 += tl.where(keep, f1 * db, 0.0)
            s0 += tl.where(keep, e1 * vi, 0.0)
            s1 += tl.where(keep, e1 * lv, 0.0)
            s2 += tl.where(keep, e1 * bv, 0.0)
    c = pid * C_BLOCK + tl.arange(0, C_BLOCK)
    # The last program's block may reach beyond the channels.
    channel_mask = c < channels
    # Each program owns its channels: nothing is added to by two.
    tl.store(dbatch + c, tl.sum(f, 0), mask=channel_mask)
    tl.store(dbatch + channels + c, tl.sum(e, 0), mask=channel_mask)
    tl.store(dweight + c, tl.sum(gamma, 0), mask=channel_mask)
    tl.store(dbias + c, tl.sum(beta, 0), mask=channel_mask)
    if OUTPUTS:
        tl.store(dw + c, tl.sum(iota, 0), mask=channel_mask)
    if K > 0:
        tl.store(weight_partials + pid, tl.sum(tl.sum(m0, 0), 0))
        tl.store(weight_partials + column_jobs + pid, tl.sum(tl.sum(m1, 0), 0))
        tl.store(weight_partials + 2 * column_jobs + pid, tl.sum(tl.sum(m2, 0), 0))
        tl.store(weight_partials + 3 * column_jobs + pid, tl.sum(tl.sum(s0, 0), 0))
        tl.store(weight_partials + 4 * column_jobs + pid, tl.sum(tl.sum(s1, 0), 0))
        tl.store(weight_partials + 5 * column_jobs + pid, tl.sum(tl.sum(s2, 0), 0))


@triton.jit
def vjp_rows(
    pid, total, dot, affine, moments, batch, layer, weight, w, v, running_mean, running_var, dlayer, number, channels,
    groups_in_all, per_group, pieces, sample_stride, stride, eps, factor,
    MOMENTS: tl.constexpr, MERGE: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr, K: tl.constexpr,
    SOFTMAX: tl.constexpr, OUTPUTS: tl.constexpr, FROZEN: tl.constexpr, WEIGHT: tl.constexpr,
    G_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the channels of a few groups: the gradients of the groups' means and variances."""
    j = pid * G_BLOCK + tl.arange(0, G_BLOCK)
    groups = channels // per_group
    f, e = tl.zeros((G_BLOCK, T_BLOCK), tl.float32), tl.zeros((G_BLOCK, T_BLOCK), tl.float32)
    for begin in range(0, per_group, T_BLOCK):
        t = begin + tl.arange(0, T_BLOCK)[None, :]
        keep = (t < per_group) & (j[:, None] < groups_in_all)
        # A group's number tells its sample and its first channel.
        n = (j // groups)[:, None] + t * 0
        c = (j % groups * per_group)[:, None] + t
        t0, d, vi, dl, lv, db, bv, fl, el, fb, eb, fi, ei, f1, e1, dgamma, diota = adjoint_at(
            total, dot, affine, moments, batch, layer, weight, w, v, running_mean, running_var, n, c, keep, number,
            channels, groups_in_all, per_group, pieces, sample_stride, stride, eps, factor,
            MOMENTS, MERGE, IN, LN, BN, K, SOFTMAX, OUTPUTS, FROZEN, WEIGHT,
        )  # fmt: skip
        f += tl.where(keep, fl, 0.0)
        e += tl.where(keep, el, 0.0)
    # A group lies in one program, so its sums are complete here.
    tl.store(dlayer + j, tl.sum(f, 1), mask=j < groups_in_all)
    tl.store(dlayer + groups_in_all + j, tl.sum(e, 1), mask=j < groups_in_all)


@triton.jit(do_not_specialize=["samples", "groups_in_all", "per_group", "column_jobs", "pieces", "size"])
def vjp_mix(
    total, dot, affine, moments, batch, layer, weight, w, v, running_mean, running_var, dbatch, dlayer, weight_partials,
    dw, dv, out, samples, number, channels, groups_in_all, per_group, column_jobs, pieces, sample_stride, stride, size,
    eps, factor, MOMENTS: tl.constexpr, MERGE: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr,
    K: tl.constexpr, SOFTMAX: tl.constexpr, OUTPUTS: tl.constexpr, FROZEN: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Constant and slope (2, N * C) of dx = scale * dy + constant + slope * (x - k). Program 0: dw and dv.

    A pooled mean or variance sends 1 / (number of its members) of its gradient to each of them, and a pooled variance
    also 2 (mean_n - mean) / number to the member's mean.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = i // channels
    vjp_mix_at(
        total, dot, affine, moments, batch, layer, weight, w, v, running_mean, running_var, dbatch, dlayer, out, n,
        i - n * channels, i < number, samples, number, channels, groups_in_all, per_group, pieces, sample_stride,
        stride, size, eps, factor, MOMENTS, MERGE, IN, LN, BN, K, SOFTMAX, OUTPUTS, FROZEN, WEIGHT,
    )  # fmt: skip
    # All parts were stored by the launch before.
    if K > 0 and tl.program_id(0) == 0:
        store_weight_gradients(weight_partials, w, dw, column_jobs, IN, LN, BN, K, SOFTMAX, BLOCK)
        store_weight_gradients(weight_partials + 3 * column_jobs, v, dv, column_jobs, IN, LN, BN, K, SOFTMAX, BLOCK)


@triton.jit
def vjp_mix_at(
    total, dot, affine, moments, batch, layer, weight, w, v, running_mean, running_var, dbatch, dlayer, out, n, c, keep,
    samples, number, channels, groups_in_all, per_group, pieces, sample_stride, stride, size, eps, factor,
    MOMENTS: tl.constexpr, MERGE: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr, K: tl.constexpr,
    SOFTMAX: tl.constexpr, OUTPUTS: tl.constexpr, FROZEN: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """Write ``vjp_mix``'s constant and slope for the samples n and channels c of a tile of any shape."""
    i = n * channels + c
    t0, d, vi, dl, lv, db, bv, fl, el, fb, eb, fi, ei, f1, e1, dgamma, diota = adjoint_at(
        total, dot, affine, moments, batch, layer, weight, w, v, running_mean, running_var, n, c, keep, number,
        channels, groups_in_all, per_group, pieces, sample_stride, stride, eps, factor,
        MOMENTS, MERGE, IN, LN, BN, K, SOFTMAX, OUTPUTS, FROZEN, WEIGHT,
    )  # fmt: skip
    # Gradients of this (n, c)'s mean and variance: of the instance itself, ...
    dmean, dvar = d * 0.0, d * 0.0
    if IN >= 0:
        # The instance's own statistics belong to no other (n, c), so nothing was pooled.
        dmean, dvar = fi, ei
    if LN >= 0:
        # ... through the group's statistics, ...
        j = n * (channels // per_group) + c // per_group
        f = tl.load(dlayer + j, mask=keep, other=0.0) / per_group
        e = tl.load(dlayer + groups_in_all + j, mask=keep, other=0.0) / per_group
        dmean, dvar = dmean + f + 2.0 * (d - dl) * e, dvar + e
    if BN >= 0 and not FROZEN:
        # ... and through the batch's. Frozen ones are constants.
        f = tl.load(dbatch + c, mask=keep, other=0.0) / samples
        e = tl.load(dbatch + channels + c, mask=keep, other=0.0) / samples
        dmean, dvar = dmean + f + 2.0 * (d - db) * e, dvar + e
    # dx = dmean / S + 2 dvar / S (x - mean), and x - mean = (x - k) - d.
    slope = dvar * (2.0 * tl.cast(factor, tl.float32)) / size
    tl.store(out + i, dmean / size - slope * d, mask=keep)
    tl.store(out + number + i, slope, mask=keep)


@triton.jit
def store_weight_gradients(
    weight_partials, t, dt, jobs, IN: tl.constexpr, LN: tl.constexpr, BN: tl.constexpr, K: tl.constexpr,
    SOFTMAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the mixing weights, or of the logits behind them, from each column program's part."""
    part = tl.zeros((BLOCK,), tl.float32)
    p0, p1, p2 = part, part, part
    for begin in range(0, jobs, BLOCK):
        q = begin + tl.arange(0, BLOCK)
        # In blocks and in order, for the same sum in every run; atomics would add in any order.
        p0 += tl.load(weight_partials + q, mask=q < jobs, other=0.0)
        p1 += tl.load(weight_partials + jobs + q, mask=q < jobs, other=0.0)
        p2 += tl.load(weight_partials + 2 * jobs + q, mask=q < jobs, other=0.0)
    g0, g1, g2 = tl.sum(p0, 0), tl.sum(p1, 0), tl.sum(p2, 0)
    # The softmax's adjoint: w_k (g_k - sum_j w_j g_j).
    if SOFTMAX:
        a, b, c = weights_of(t, IN, LN, BN, K, SOFTMAX)
        mean = a * g0 + b * g1 + c * g2
        g0, g1, g2 = a * (g0 - mean), b * (g1 - mean), c * (g2 - mean)
    if IN >= 0:
        tl.store(dt + IN, g0)
    if LN >= 0:
        tl.store(dt + LN, g1)
    if BN >= 0:
        tl.store(dt + BN, g2)

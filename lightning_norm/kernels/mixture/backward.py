"""Device code: the vector-Jacobian product of the equations in ``forward``, in two launches. Letters as there.

``vjp_pool`` sums over samples and over groups of channels what each (n, c) sends to the statistics that it shares with
others, and leaves the parameters' gradients; ``vjp_mix`` spreads the sums again over (n, c).
"""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Layout, Sums
from lightning_norm.kernels.mixture.flags import Gradients, MixtureStatistics, Parameters, Running, Sent, Shape
from lightning_norm.kernels.mixture.forward import group_of, mixtures, per_channel, root, weights_of, with_pooled
from lightning_norm.kernels.passes.backward import read_sums


@triton.jit
def adjoint(t0, t1, gamma, iota, given, w, v, eps, FLAGS: tl.constexpr):
    """Return ``Sent``: what a tile of (n, c) sends to the statistics and to the gradients of the parameters.

    With scale = gamma r, r = 1 / sqrt(V + eps) and q = t1 - (c - k) t0 = sum dy (x - c):

        f = dL/dc = -gamma r t0, e = dL/dV = -gamma r^3 q / 2, dL/dgamma = r q
    """
    if FLAGS.outputs:
        # Two normalized outputs, each with a scale of its own.
        rb, rl = root(given.bv, eps), root(given.lv, eps)
        qb, ql = t1 - given.db * t0, t1 - given.dl * t0
        ab, al = iota * gamma * rb, (1.0 - iota) * gamma * rl
        fl, el, fb, eb = -al * t0, -0.5 * al * rl * rl * ql, -ab * t0, -0.5 * ab * rb * rb * qb
        dgamma, diota = iota * rb * qb + (1.0 - iota) * rl * ql, gamma * (rb * qb - rl * ql)
    else:
        center, variance = mixtures(given, w, v, FLAGS)
        # One scale, so layer and batch get the same gradients, to be weighted by w and v.
        # Computed again from the statistics: saving it would cost an (N, C) tensor and a read.
        r = root(variance, eps)
        q = t1 - center * t0
        fl, el = -gamma * r * t0, -0.5 * gamma * r * r * r * q
        fb, eb = fl, el
        dgamma, diota = r * q, q
    return Sent(w[1] * fl, v[1] * el, w[2] * fb, v[2] * eb, w[0] * fl, v[0] * el, fl, el, dgamma, diota)


@triton.jit
def adjoint_at(sums, stats, parameters, running, n, c, keep, shape, layout, eps, factor, FLAGS: tl.constexpr):
    """Return t0, the statistics and ``adjoint`` of a tile of (n, c), read from memory."""
    i = n * shape.channels + c
    # The sums that the pass over dy and x left.
    t0, t1 = read_sums(sums, n.to(tl.int64) * layout.sample_stride + c, keep, layout, FLAGS.merge)
    k = tl.load(stats.affine + i, mask=keep, other=0.0)
    # The sample's moments; where only running statistics count there are none.
    d, vi = k * 0.0, k * 0.0
    if FLAGS.needs_moments:
        d = tl.load(stats.moments + i, mask=keep, other=0.0)
        vi = tl.load(stats.moments + shape.number + i, mask=keep, other=0.0) * tl.cast(factor, tl.float32)
    given = with_pooled(k, d, vi, stats, running, n, c, keep, shape, FLAGS)
    gamma = per_channel(parameters.weight, c, keep, 1.0, FLAGS.weight)
    iota = per_channel(parameters.w, c, keep, 1.0, FLAGS.outputs)
    w, v = weights_of(parameters.w, FLAGS), weights_of(parameters.v, FLAGS)
    return t0, given, adjoint(t0, t1, gamma, iota, given, w, v, eps, FLAGS)


@triton.jit(do_not_specialize=["samples", "groups_in_all", "per_group", "column_jobs", "pieces"])
def vjp_pool(
    sums: Sums, stats: MixtureStatistics, parameters: Parameters, running: Running, out: Gradients, samples, number,
    channels, groups_in_all, per_group, column_jobs, pieces, sample_stride, stride, eps, factor,
    FLAGS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of what is pooled, of gamma, beta and iota; parts of those of w and v.

    The first ``column_jobs`` programs take blocks of channels, the others blocks of groups, as in ``pool``.
    """
    pid, shape = tl.program_id(0), Shape(samples, number, channels, groups_in_all, per_group)
    layout = Layout(pieces, sample_stride, stride, 1, 1, 1)
    if pid < column_jobs:
        vjp_columns(
            pid, sums, stats, parameters, running, out, shape, layout, column_jobs, eps, factor, FLAGS, TILE.n, TILE.c
        )
    else:
        vjp_rows(
            pid - column_jobs, sums, stats, parameters, running, out, shape, layout, eps, factor, FLAGS, TILE.g, TILE.t
        )


@triton.jit
def vjp_columns(
    pid, sums, stats, parameters, running, out, shape, layout, column_jobs, eps, factor, FLAGS: tl.constexpr,
    N_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over samples, for a block of channels."""
    c = (pid * C_BLOCK + tl.arange(0, C_BLOCK))[None, :]
    # One accumulator per sum; the tile is summed once, at the end.
    zero = tl.zeros((N_BLOCK, C_BLOCK), tl.float32)
    f, e, gamma, beta, iota = zero, zero, zero, zero, zero
    # For w and v: what each statistic's mean and variance contributed.
    m0, m1, m2, s0, s1, s2 = zero, zero, zero, zero, zero, zero
    for begin in range(0, shape.samples, N_BLOCK):
        n = (begin + tl.arange(0, N_BLOCK))[:, None]
        keep = (n < shape.samples) & (c < shape.channels)
        t0, given, sent = adjoint_at(
            sums, stats, parameters, running, n, c, keep, shape, layout, eps, factor, FLAGS
        )  # fmt: skip
        f += tl.where(keep, sent.fb, 0.0)
        e += tl.where(keep, sent.eb, 0.0)
        gamma += tl.where(keep, sent.gamma, 0.0)
        beta += tl.where(keep, t0, 0.0)
        if FLAGS.outputs:
            iota += tl.where(keep, sent.iota, 0.0)
        if FLAGS.num_weights > 0:
            m0 += tl.where(keep, sent.f * given.d, 0.0)
            m1 += tl.where(keep, sent.f * given.dl, 0.0)
            m2 += tl.where(keep, sent.f * given.db, 0.0)
            s0 += tl.where(keep, sent.e * given.vi, 0.0)
            s1 += tl.where(keep, sent.e * given.lv, 0.0)
            s2 += tl.where(keep, sent.e * given.bv, 0.0)
    c = pid * C_BLOCK + tl.arange(0, C_BLOCK)
    # The last program's block may reach beyond the channels.
    channel_mask = c < shape.channels
    # Each program owns its channels: nothing is added to by two.
    tl.store(out.batch + c, tl.sum(f, 0), mask=channel_mask)
    tl.store(out.batch + shape.channels + c, tl.sum(e, 0), mask=channel_mask)
    tl.store(out.weight + c, tl.sum(gamma, 0), mask=channel_mask)
    tl.store(out.bias + c, tl.sum(beta, 0), mask=channel_mask)
    if FLAGS.outputs:
        tl.store(out.w + c, tl.sum(iota, 0), mask=channel_mask)
    if FLAGS.threshold:
        tl.store(out.w + c, -tl.sum(beta, 0), mask=channel_mask)
    if FLAGS.num_weights > 0:
        p_parts = out.partials + pid
        tl.store(p_parts, tl.sum(tl.sum(m0, 0), 0))
        tl.store(p_parts + column_jobs, tl.sum(tl.sum(m1, 0), 0))
        tl.store(p_parts + 2 * column_jobs, tl.sum(tl.sum(m2, 0), 0))
        tl.store(p_parts + 3 * column_jobs, tl.sum(tl.sum(s0, 0), 0))
        tl.store(p_parts + 4 * column_jobs, tl.sum(tl.sum(s1, 0), 0))
        tl.store(p_parts + 5 * column_jobs, tl.sum(tl.sum(s2, 0), 0))


@triton.jit
def vjp_rows(
    pid, sums, stats, parameters, running, out, shape, layout, eps, factor, FLAGS: tl.constexpr, G_BLOCK: tl.constexpr,
    T_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the channels of a few groups: the gradients of the groups' means and variances."""
    j = pid * G_BLOCK + tl.arange(0, G_BLOCK)
    per_group, groups = shape.per_group, shape.channels // shape.per_group
    f, e = tl.zeros((G_BLOCK, T_BLOCK), tl.float32), tl.zeros((G_BLOCK, T_BLOCK), tl.float32)
    for begin in range(0, per_group, T_BLOCK):
        t = begin + tl.arange(0, T_BLOCK)[None, :]
        keep = (t < per_group) & (j[:, None] < shape.groups_in_all)
        # A group's number tells its sample and its first channel.
        n = (j // groups)[:, None] + t * 0
        c = (j % groups * per_group)[:, None] + t
        t0, given, sent = adjoint_at(
            sums, stats, parameters, running, n, c, keep, shape, layout, eps, factor, FLAGS
        )  # fmt: skip
        f += tl.where(keep, sent.fl, 0.0)
        e += tl.where(keep, sent.el, 0.0)
    # A group lies in one program, so its sums are complete here.
    tl.store(out.layer + j, tl.sum(f, 1), mask=j < shape.groups_in_all)
    tl.store(out.layer + shape.groups_in_all + j, tl.sum(e, 1), mask=j < shape.groups_in_all)


@triton.jit(do_not_specialize=["samples", "groups_in_all", "per_group", "column_jobs", "pieces", "size"])
def vjp_mix(
    sums: Sums, stats: MixtureStatistics, parameters: Parameters, running: Running, out: Gradients, samples, number,
    channels, groups_in_all, per_group, column_jobs, pieces, sample_stride, stride, size, eps, factor,
    FLAGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Constant and slope (2, N * C) of dx = scale * dy + constant + slope * (x - k). Program 0: gradients of w and v.

    A pooled mean or variance sends 1 / (number of its members) of its gradient to each of them, and a pooled variance
    also 2 (mean_n - mean) / number to the member's mean.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n, shape = i // channels, Shape(samples, number, channels, groups_in_all, per_group)
    layout = Layout(pieces, sample_stride, stride, 1, size, 1)
    vjp_mix_at(
        sums, stats, parameters, running, out, n, i - n * channels, i < number, shape, layout, eps, factor, FLAGS
    )
    # All parts were stored by the launch before.
    if FLAGS.num_weights > 0 and tl.program_id(0) == 0:
        store_weight_gradients(out.partials, parameters.w, out.w, column_jobs, FLAGS, BLOCK)
        store_weight_gradients(out.partials + 3 * column_jobs, parameters.v, out.v, column_jobs, FLAGS, BLOCK)


@triton.jit
def vjp_mix_at(sums, stats, parameters, running, out, n, c, keep, shape, layout, eps, factor, FLAGS: tl.constexpr):
    """Write ``vjp_mix``'s constant and slope for the samples n and channels c of a tile of any shape."""
    i, size = n * shape.channels + c, layout.size
    t0, given, sent = adjoint_at(sums, stats, parameters, running, n, c, keep, shape, layout, eps, factor, FLAGS)
    # Gradients of this (n, c)'s mean and variance: of the instance itself, ...
    d = given.d
    dmean, dvar = d * 0.0, d * 0.0
    if FLAGS.at_in >= 0:
        # The instance's own statistics belong to no other (n, c), so nothing was pooled.
        dmean, dvar = d * 0.0 if FLAGS.uncentered else sent.fi, sent.ei
    if FLAGS.at_ln >= 0:
        # ... through the group's statistics, ...
        j = group_of(n, c, shape)
        f = tl.load(out.layer + j, mask=keep, other=0.0) / shape.per_group
        e = tl.load(out.layer + shape.groups_in_all + j, mask=keep, other=0.0) / shape.per_group
        dmean, dvar = dmean + f + 2.0 * (d - given.dl) * e, dvar + e
    if FLAGS.at_bn >= 0 and not FLAGS.frozen:
        # ... and through the batch's. Frozen ones are constants.
        f = tl.load(out.batch + c, mask=keep, other=0.0) / shape.samples
        e = tl.load(out.batch + shape.channels + c, mask=keep, other=0.0) / shape.samples
        dmean, dvar = dmean + f + 2.0 * (d - given.db) * e, dvar + e
    # dx = dmean / S + 2 dvar / S (x - mean), and x - mean = (x - k) - d.
    slope = dvar * (2.0 * tl.cast(factor, tl.float32)) / size
    tl.store(out.dx_affine + i, dmean / size - slope * d, mask=keep)
    tl.store(out.dx_affine + shape.number + i, slope, mask=keep)


@triton.jit
def store_weight_gradients(partials, t, dt, jobs, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of the mixing weights, or of the logits behind them, from each column program's part."""
    part = tl.zeros((BLOCK,), tl.float32)
    p0, p1, p2 = part, part, part
    for begin in range(0, jobs, BLOCK):
        q = begin + tl.arange(0, BLOCK)
        # In blocks and in order, for the same sum in every run; atomics would add in any order.
        p0 += tl.load(partials + q, mask=q < jobs, other=0.0)
        p1 += tl.load(partials + jobs + q, mask=q < jobs, other=0.0)
        p2 += tl.load(partials + 2 * jobs + q, mask=q < jobs, other=0.0)
    g0, g1, g2 = tl.sum(p0, 0), tl.sum(p1, 0), tl.sum(p2, 0)
    # The softmax's adjoint: w_k (g_k - sum_j w_j g_j).
    if FLAGS.softmax:
        a, b, c = weights_of(t, FLAGS)
        mean = a * g0 + b * g1 + c * g2
        g0, g1, g2 = a * (g0 - mean), b * (g1 - mean), c * (g2 - mean)
    if FLAGS.at_in >= 0:
        tl.store(dt + FLAGS.at_in, g0)
    if FLAGS.at_ln >= 0:
        tl.store(dt + FLAGS.at_ln, g1)
    if FLAGS.at_bn >= 0:
        tl.store(dt + FLAGS.at_bn, g2)

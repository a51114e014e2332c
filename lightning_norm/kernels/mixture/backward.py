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
from lightning_norm.kernels.passes.forward import place


@triton.jit
def adjoint(b_t0, b_t1, b_gamma, b_iota, given, w, v, eps, FLAGS: tl.constexpr):
    """Return ``Sent``: what a tile of (n, c) sends to the statistics and to the gradients of the parameters.

    With scale = gamma r, r = 1 / sqrt(V + eps) and q = t1 - (c - k) t0 = sum dy (x - c):

        f = dL/dc = -gamma r t0, e = dL/dV = -gamma r^3 q / 2, dL/dgamma = r q
    """
    if FLAGS.outputs:
        # Two normalized outputs, each with a scale of its own.
        b_rb, b_rl = root(given.bv, eps), root(given.lv, eps)
        b_qb, b_ql = b_t1 - given.db * b_t0, b_t1 - given.dl * b_t0
        b_ab, b_al = b_iota * b_gamma * b_rb, (1.0 - b_iota) * b_gamma * b_rl
        b_fl, b_el = -b_al * b_t0, -0.5 * b_al * b_rl * b_rl * b_ql
        b_fb, b_eb = -b_ab * b_t0, -0.5 * b_ab * b_rb * b_rb * b_qb
        b_dgamma, b_diota = b_iota * b_rb * b_qb + (1.0 - b_iota) * b_rl * b_ql, b_gamma * (b_rb * b_qb - b_rl * b_ql)
    else:
        b_center, b_var = mixtures(given, w, v, FLAGS)
        # One scale, so layer and batch get the same gradients, to be weighted by w and v.
        # Computed again from the statistics: saving it would cost an (N, C) tensor and a read.
        b_r = root(b_var, eps)
        b_q = b_t1 - b_center * b_t0
        b_fl, b_el = -b_gamma * b_r * b_t0, -0.5 * b_gamma * b_r * b_r * b_r * b_q
        b_fb, b_eb = b_fl, b_el
        b_dgamma, b_diota = b_r * b_q, b_q
    return Sent(
        w[1] * b_fl, v[1] * b_el, w[2] * b_fb, v[2] * b_eb, w[0] * b_fl, v[0] * b_el, b_fl, b_el, b_dgamma, b_diota
    )


@triton.jit
def adjoint_at(sums, stats, parameters, running, o_n, o_c, m_nc, shape, layout, eps, factor, FLAGS: tl.constexpr):
    """Return t0, the statistics and ``adjoint`` of a tile of (n, c), read from memory."""
    o_nc = o_n * shape.channels + o_c
    # The sums that the pass over dy and x left.
    b_t0, b_t1 = read_sums(sums, o_n.to(tl.int64) * layout.sample_stride + o_c, m_nc, layout, FLAGS.merge)
    b_k = tl.load(stats.affine + o_nc, mask=m_nc, other=0.0)
    # The sample's moments; where only running statistics count there are none.
    b_d, b_vi = b_k * 0.0, b_k * 0.0
    if FLAGS.needs_moments:
        b_d = tl.load(stats.moments + o_nc, mask=m_nc, other=0.0)
        b_vi = tl.load(stats.moments + shape.number + o_nc, mask=m_nc, other=0.0) * tl.cast(factor, tl.float32)
    given = with_pooled(b_k, b_d, b_vi, stats, running, o_n, o_c, m_nc, shape, FLAGS)
    b_gamma = per_channel(parameters.weight, o_c, m_nc, 1.0, FLAGS.weight)
    b_iota = per_channel(parameters.w, o_c, m_nc, 1.0, FLAGS.outputs)
    w, v = weights_of(parameters.w, FLAGS), weights_of(parameters.v, FLAGS)
    return b_t0, given, adjoint(b_t0, b_t1, b_gamma, b_iota, given, w, v, eps, FLAGS)


@triton.jit(do_not_specialize=["samples", "groups_in_all", "per_group", "column_jobs", "pieces"])
def vjp_pool(
    sums: Sums, stats: MixtureStatistics, parameters: Parameters, running: Running, out: Gradients, samples, number,
    channels, groups_in_all, per_group, column_jobs, pieces, sample_stride, stride, eps, factor,
    FLAGS: tl.constexpr, TILE: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """Gradients of what is pooled, of gamma, beta and iota; parts of those of w and v.

    The first ``column_jobs`` programs take blocks of channels, the others blocks of groups, as in ``pool``.
    """
    i_job, shape = place(AT, 0), Shape(samples, number, channels, groups_in_all, per_group)
    layout = Layout(pieces, sample_stride, stride, 1, 1, 1)
    if i_job < column_jobs:
        vjp_columns(
            i_job, sums, stats, parameters, running, out, shape, layout, column_jobs, eps, factor, FLAGS, TILE.n, TILE.c
        )
    else:
        vjp_rows(
            i_job - column_jobs, sums, stats, parameters, running, out, shape, layout, eps, factor, FLAGS, TILE.g,
            TILE.t,
        )  # fmt: skip


@triton.jit
def vjp_columns(
    i_c, sums, stats, parameters, running, out, shape, layout, column_jobs, eps, factor, FLAGS: tl.constexpr,
    N_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over samples, for a block of channels."""
    o_c = (i_c * C_BLOCK + tl.arange(0, C_BLOCK))[None, :]  # [1, C_BLOCK]
    # One accumulator per sum; the tile is summed once, at the end.
    b_zero = tl.zeros((N_BLOCK, C_BLOCK), tl.float32)
    b_f, b_e, b_gamma, b_beta, b_iota, b_tau = b_zero, b_zero, b_zero, b_zero, b_zero, b_zero
    # For w and v: what each statistic's mean and variance contributed.
    b_m0, b_m1, b_m2, b_s0, b_s1, b_s2 = b_zero, b_zero, b_zero, b_zero, b_zero, b_zero
    for begin in range(0, shape.samples, N_BLOCK):
        o_n = (begin + tl.arange(0, N_BLOCK))[:, None]  # [N_BLOCK, 1]
        m_nc = (o_n < shape.samples) & (o_c < shape.channels)  # [N_BLOCK, C_BLOCK]
        b_t0, given, sent = adjoint_at(
            sums, stats, parameters, running, o_n, o_c, m_nc, shape, layout, eps, factor, FLAGS
        )  # fmt: skip
        b_f += tl.where(m_nc, sent.fb, 0.0)
        b_e += tl.where(m_nc, sent.eb, 0.0)
        b_gamma += tl.where(m_nc, sent.gamma, 0.0)
        b_beta += tl.where(m_nc, b_t0, 0.0)
        if FLAGS.outputs:
            b_iota += tl.where(m_nc, sent.iota, 0.0)
        if FLAGS.threshold:
            # y is tau where the gradient does not go on to g. Both sums of a pair are read, and here both are this one.
            o_at = o_n.to(tl.int64) * layout.sample_stride + o_c
            b_rest, _ = read_sums(Sums(sums.rest, sums.rest, sums.rest), o_at, m_nc, layout, FLAGS.merge)
            b_tau += b_rest
        if FLAGS.num_weights > 0:
            b_m0 += tl.where(m_nc, sent.f * given.d, 0.0)
            b_m1 += tl.where(m_nc, sent.f * given.dl, 0.0)
            b_m2 += tl.where(m_nc, sent.f * given.db, 0.0)
            b_s0 += tl.where(m_nc, sent.e * given.vi, 0.0)
            b_s1 += tl.where(m_nc, sent.e * given.lv, 0.0)
            b_s2 += tl.where(m_nc, sent.e * given.bv, 0.0)
    o_c = i_c * C_BLOCK + tl.arange(0, C_BLOCK)
    # The last program's block may reach beyond the channels.
    m_c = o_c < shape.channels
    # Each program owns its channels: nothing is added to by two.
    tl.store(out.batch + o_c, tl.sum(b_f, 0), mask=m_c)
    tl.store(out.batch + shape.channels + o_c, tl.sum(b_e, 0), mask=m_c)
    tl.store(out.weight + o_c, tl.sum(b_gamma, 0), mask=m_c)
    tl.store(out.bias + o_c, tl.sum(b_beta, 0), mask=m_c)
    if FLAGS.outputs:
        tl.store(out.w + o_c, tl.sum(b_iota, 0), mask=m_c)
    if FLAGS.threshold:
        tl.store(out.w + o_c, tl.sum(b_tau, 0), mask=m_c)
    if FLAGS.num_weights > 0:
        p_parts = out.partials + i_c
        tl.store(p_parts, tl.sum(tl.sum(b_m0, 0), 0))
        tl.store(p_parts + column_jobs, tl.sum(tl.sum(b_m1, 0), 0))
        tl.store(p_parts + 2 * column_jobs, tl.sum(tl.sum(b_m2, 0), 0))
        tl.store(p_parts + 3 * column_jobs, tl.sum(tl.sum(b_s0, 0), 0))
        tl.store(p_parts + 4 * column_jobs, tl.sum(tl.sum(b_s1, 0), 0))
        tl.store(p_parts + 5 * column_jobs, tl.sum(tl.sum(b_s2, 0), 0))


@triton.jit
def vjp_rows(
    i_g, sums, stats, parameters, running, out, shape, layout, eps, factor, FLAGS: tl.constexpr, G_BLOCK: tl.constexpr,
    T_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the channels of a few groups: the gradients of the groups' means and variances."""
    o_g = i_g * G_BLOCK + tl.arange(0, G_BLOCK)
    per_group, groups = shape.per_group, shape.channels // shape.per_group
    b_f, b_e = tl.zeros((G_BLOCK, T_BLOCK), tl.float32), tl.zeros((G_BLOCK, T_BLOCK), tl.float32)
    for begin in range(0, per_group, T_BLOCK):
        o_t = begin + tl.arange(0, T_BLOCK)[None, :]  # [1, T_BLOCK]
        m_gt = (o_t < per_group) & (o_g[:, None] < shape.groups_in_all)  # [G_BLOCK, T_BLOCK]
        # A group's number tells its sample and its first channel.
        o_n = (o_g // groups)[:, None] + o_t * 0  # [G_BLOCK, T_BLOCK]
        o_c = (o_g % groups * per_group)[:, None] + o_t  # [G_BLOCK, T_BLOCK]
        b_t0, given, sent = adjoint_at(
            sums, stats, parameters, running, o_n, o_c, m_gt, shape, layout, eps, factor, FLAGS
        )  # fmt: skip
        b_f += tl.where(m_gt, sent.fl, 0.0)
        b_e += tl.where(m_gt, sent.el, 0.0)
    # A group lies in one program, so its sums are complete here.
    tl.store(out.layer + o_g, tl.sum(b_f, 1), mask=o_g < shape.groups_in_all)
    tl.store(out.layer + shape.groups_in_all + o_g, tl.sum(b_e, 1), mask=o_g < shape.groups_in_all)


@triton.jit(do_not_specialize=["samples", "groups_in_all", "per_group", "column_jobs", "pieces", "size"])
def vjp_mix(
    sums: Sums, stats: MixtureStatistics, parameters: Parameters, running: Running, out: Gradients, samples, number,
    channels, groups_in_all, per_group, column_jobs, pieces, sample_stride, stride, size, eps, factor,
    FLAGS: tl.constexpr, BLOCK: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """Constant and slope (2, N * C) of dx = scale * dy + constant + slope * (x - k). Program 0: gradients of w and v.

    A pooled mean or variance sends 1 / (number of its members) of its gradient to each of them, and a pooled variance
    also 2 (mean_n - mean) / number to the member's mean.
    """
    o_nc = place(AT, 0) * BLOCK + tl.arange(0, BLOCK)
    o_n, shape = o_nc // channels, Shape(samples, number, channels, groups_in_all, per_group)
    layout = Layout(pieces, sample_stride, stride, 1, size, 1)
    vjp_mix_at(
        sums, stats, parameters, running, out, o_n, o_nc - o_n * channels, o_nc < number, shape, layout, eps, factor,
        FLAGS,
    )  # fmt: skip
    # All parts were stored by the launch before.
    if FLAGS.num_weights > 0 and place(AT, 0) == 0:
        store_weight_gradients(out.partials, parameters.w, out.w, column_jobs, FLAGS, BLOCK)
        store_weight_gradients(out.partials + 3 * column_jobs, parameters.v, out.v, column_jobs, FLAGS, BLOCK)


@triton.jit
def vjp_mix_at(sums, stats, parameters, running, out, o_n, o_c, m_nc, shape, layout, eps, factor, FLAGS: tl.constexpr):
    """Write ``vjp_mix``'s constant and slope for the samples n and channels c of a tile of any shape."""
    o_nc, size = o_n * shape.channels + o_c, layout.size
    b_t0, given, sent = adjoint_at(sums, stats, parameters, running, o_n, o_c, m_nc, shape, layout, eps, factor, FLAGS)
    # Gradients of this (n, c)'s mean and variance: of the instance itself, ...
    b_d = given.d
    b_dmean, b_dvar = b_d * 0.0, b_d * 0.0
    if FLAGS.at_in >= 0:
        # The instance's own statistics belong to no other (n, c), so nothing was pooled.
        b_dmean, b_dvar = b_d * 0.0 if FLAGS.uncentered else sent.fi, sent.ei
    if FLAGS.at_ln >= 0:
        # ... through the group's statistics, ...
        o_g = group_of(o_n, o_c, shape)
        b_f = tl.load(out.layer + o_g, mask=m_nc, other=0.0) / shape.per_group
        b_e = tl.load(out.layer + shape.groups_in_all + o_g, mask=m_nc, other=0.0) / shape.per_group
        b_dmean, b_dvar = b_dmean + b_f + 2.0 * (b_d - given.dl) * b_e, b_dvar + b_e
    if FLAGS.at_bn >= 0 and not FLAGS.frozen:
        # ... and through the batch's. Frozen ones are constants.
        b_f = tl.load(out.batch + o_c, mask=m_nc, other=0.0) / shape.samples
        b_e = tl.load(out.batch + shape.channels + o_c, mask=m_nc, other=0.0) / shape.samples
        b_dmean, b_dvar = b_dmean + b_f + 2.0 * (b_d - given.db) * b_e, b_dvar + b_e
    # dx = dmean / S + 2 dvar / S (x - mean), and x - mean = (x - k) - d.
    b_slope = b_dvar * (2.0 * tl.cast(factor, tl.float32)) / size
    tl.store(out.dx_affine + o_nc, b_dmean / size - b_slope * b_d, mask=m_nc)
    tl.store(out.dx_affine + shape.number + o_nc, b_slope, mask=m_nc)


@triton.jit
def store_weight_gradients(partials, t, dt, jobs, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of the mixing weights, or of the logits behind them, from each column program's part."""
    b_part = tl.zeros((BLOCK,), tl.float32)
    b_p0, b_p1, b_p2 = b_part, b_part, b_part
    for begin in range(0, jobs, BLOCK):
        o_q = begin + tl.arange(0, BLOCK)
        # In blocks and in order, for the same sum in every run; atomics would add in any order.
        b_p0 += tl.load(partials + o_q, mask=o_q < jobs, other=0.0)
        b_p1 += tl.load(partials + jobs + o_q, mask=o_q < jobs, other=0.0)
        b_p2 += tl.load(partials + 2 * jobs + o_q, mask=o_q < jobs, other=0.0)
    g0, g1, g2 = tl.sum(b_p0, 0), tl.sum(b_p1, 0), tl.sum(b_p2, 0)
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

"""Device code: the vector-Jacobian product of the equations in ``forward``, in one launch. Letters as there.

Where the responsibilities come from a gate, two small launches more: from what each block of channels leaves to the
gradient of the logits (``gate_logits_vjp``), and on to the gate's parameters and the samples' means (``gate_vjp``).

Letters beside those: t0 and t1 are the sums over positions of dy and of dy (x - k), dy taken before the activation; q
is the gradient of a sample's whole scale; u1 and u2 are the gradients of the gates' arguments. ``b_by_gamma`` and its
like hold, sample by sample, what is added up to the gradient of that name.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Layout, Sums
from lightning_norm.kernels.mixture.forward import per_channel
from lightning_norm.kernels.passes.backward import read_sums
from lightning_norm.kernels.per_channel import flags as tuples
from lightning_norm.kernels.per_channel.forward import gate, masses, prior_scale, weights_at
from lightning_norm.kernels.per_channel.running_stats import NAN, TINY


@triton.jit
def parts_at(
    begin, sums, stats, responsibilities, b_mass, o_c, of, shape, layout, numbers, FLAGS: tl.constexpr,
    N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return ``OfSample``, for (N, K, C) or (N, C): a tile of samples, and what each sends to the sums over samples.

    ``b_e`` is mean_n - mean_B. Both walks need all of it, and to store it would cost more than to compute it again.
    """
    o_n = begin + tl.arange(0, N_BLOCK)
    m_nc = (o_n[:, None] < shape.samples) & (o_c < shape.channels)[None, :]
    b_g, b_a = weights_at(responsibilities, b_mass, o_n, shape, layout.size, numbers.least, FLAGS, K_BLOCK)
    # Statistics and gamma are those of a context and a channel, (K, C), the same for every sample.
    b_r, b_gamma = of.r[None, :, :], of.gamma[None, :, :]
    # The two sums that the pass over dy and x left for each (n, c).
    o_nc = o_n[:, None] * shape.channels + o_c[None, :]  # [N_BLOCK, C]
    o_at = o_n[:, None].to(tl.int64) * layout.sample_stride + o_c[None, :]
    b_t0, b_t1 = read_sums(sums, o_at, m_nc, layout, FLAGS.merge)
    b_k = tl.load(stats.affine + o_nc, mask=m_nc, other=0.0)
    b_d = b_k * 0.0
    if FLAGS.needs_moments:
        b_d = tl.load(stats.moments + o_nc, mask=m_nc, other=0.0)
    # z of the equations again, from hi and lo: differences of large means.
    b_away = b_k[:, None, :] - of.base[None, :, :] + b_d[:, None, :] - of.rest[None, :, :]  # [N_BLOCK, K_BLOCK, C]
    b_e = tl.where(m_nc[:, None, :], b_away, 0.0)
    b_z = of.f * b_e - of.delta[None, :, :]
    # y = scale (x - mean_n + z): the gates and what their slopes need.
    b_inner = b_gamma * b_r  # [1, K_BLOCK, C]
    b_gain = 1.0 + b_e * 0.0
    b_s1, b_s2 = b_gain, b_gain
    if FLAGS.scale:
        b_s1, b_h = gate(of.w_v, of.w_b, b_r * b_z, numbers.unit_scale)
        b_gain = b_gain * b_h
    if FLAGS.affine:
        b_s2, b_h = gate(of.w_a, of.b_a, (b_k + b_d)[:, None, :], numbers.unit_affine)
        b_gain = b_gain * b_h
    # q is the gradient of the whole scale, ``b_direct`` that of z where it is added to x.
    b_beta = b_g * b_t0[:, None, :]  # [N_BLOCK, K_BLOCK, C]
    b_q = b_g * b_t1[:, None, :] + b_beta * (b_z - b_d[:, None, :])
    b_direct = b_beta * b_inner * b_gain
    # Of the gates' arguments: s' = s (1 - s).
    b_u1, b_u2 = b_q * b_inner * b_gain * (1.0 - b_s1), b_q * b_inner * b_gain * (1.0 - b_s2)
    b_dz = b_direct
    if FLAGS.scale:
        b_dz = b_direct + b_u1 * of.w_v * b_r
    return tuples.OfSample(
        o_n, m_nc, b_g, b_a, (b_k + b_d)[:, None, :], b_d, b_e, b_z, b_gain, b_t0, b_t1, b_beta, b_q, b_direct, b_u1,
        b_u2, b_dz,
    )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "pieces", "size"])
def channels_vjp(
    sums: Sums, given: tuples.PerChannelStatistics, apart, learned: tuples.Learned, out: tuples.PerChannelGradients,
    samples, number, channels, contexts, pieces, sample_stride, stride, size, numbers: tuples.Numbers,
    FLAGS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters, and constant and slope (2, N * C) of dx = scale dy + constant + slope (x - k).

    Two walks over the samples: the first sums what they send to the channel's statistics and parameters, the second
    turns the statistics' gradients into those of each sample's mean and variance.

    With ``gate`` a program also leaves what its channels add to the gradient of the responsibilities, (1 + N, K): the
    first row is that of every sample. Where the batch lies on several ranks there are two launches: with ``ranks`` 1 it
    leaves the gradients of U and V, and with 2 it takes those of all ranks from there, see ``kernels/ranks``.
    """
    N_BLOCK: tl.constexpr = TILE.n
    K_BLOCK: tl.constexpr = TILE.k
    C_BLOCK: tl.constexpr = TILE.c
    shape, layout = tuples.Shape(samples, number, channels, contexts), Layout(pieces, sample_stride, stride, 1, size, 1)
    stats, dpooled, least = given.stats, out.pooled, tl.cast(numbers.least, tl.float32)
    o_c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    m_c = o_c < channels
    o_k = tl.arange(0, K_BLOCK)
    m_kc = (o_k[:, None] < contexts) & m_c[None, :]
    o_kc = o_k[:, None] * channels + o_c[None, :]  # [K_BLOCK, C_BLOCK]
    rows = contexts * channels
    # What ``channels_of`` stored: mean, delta and r; then the parameters.
    b_base, b_rest = tl.load(stats + o_kc, mask=m_kc, other=0.0), tl.load(stats + rows + o_kc, mask=m_kc, other=0.0)
    # Stored by the forward pass: what was chosen there, such as a clamped r, cannot be computed from V again.
    b_delta = tl.load(stats + 4 * rows + o_kc, mask=m_kc, other=0.0)
    b_r = tl.load(stats + 5 * rows + o_kc, mask=m_kc, other=0.0)
    b_gamma, b_factor = per_channel(learned.weight, o_kc, m_kc, 1.0, FLAGS.weight), 1.0
    if FLAGS.prior:
        # A context's share of the data scales its gamma and beta alike, and both gradients with them.
        b_factor = prior_scale(given.survey_out, contexts, K_BLOCK)[:, None]
        b_gamma = b_gamma * b_factor
    b_w_v = per_channel(learned.scale_weight, o_c, m_c, 0.0, FLAGS.scale)
    b_w_b = per_channel(learned.scale_bias, o_c, m_c, 0.0, FLAGS.scale)
    b_w_a = per_channel(learned.affine_weight, o_c, m_c, 0.0, FLAGS.affine)
    b_b_a = per_channel(learned.affine_bias, o_c, m_c, 0.0, FLAGS.affine)
    # f stays 1 without a centering, so that the same lines serve every method.
    b_f = 1.0 + per_channel(learned.center_weight, o_c, m_c, 0.0, FLAGS.center)
    of = tuples.OfChannel(b_base, b_rest, b_delta, b_r, b_f, b_gamma, b_w_v, b_w_b, b_w_a, b_b_a)
    b_mass = masses(learned.responsibilities, shape, FLAGS, N_BLOCK, K_BLOCK)  # [K_BLOCK]
    # First walk.
    if FLAGS.ranks != 2:
        # A tile for each sum, reduced over samples once at the end: fewer reductions, and always in one order.
        b_zero = tl.zeros((N_BLOCK, K_BLOCK, C_BLOCK), tl.float32)
        b_by_gamma, b_by_beta, b_by_r, b_by_center = b_zero, b_zero, b_zero, b_zero
        b_by_m, b_by_v, b_by_b, b_by_a, b_by_c = b_zero, b_zero, b_zero, b_zero, b_zero
        for begin in range(0, samples, N_BLOCK):
            s = parts_at(
                begin, sums, given, learned.responsibilities, b_mass, o_c, of, shape, layout, numbers, FLAGS, N_BLOCK,
                K_BLOCK,
            )  # fmt: skip
            # What every method needs: the gradients of scale, offset and center.
            b_by_gamma += s.q * s.gain
            b_by_beta += s.beta
            b_by_center -= s.dz
            # Only what a rectification asks for.
            if FLAGS.center:
                b_by_m += s.dz * s.e
            if FLAGS.scale:
                b_by_r += s.u1 * b_w_v * s.z
                b_by_v += s.u1 * b_r[None, :, :] * s.z
                b_by_b += s.u1
            if FLAGS.affine:
                b_by_a += s.u2 * s.mean
                b_by_c += s.u2
        # Gradients of r, of U and of V, and with them the parameters'.
        b_dgamma = tl.sum(b_by_gamma, 0)  # [K_BLOCK, C_BLOCK]
        b_dr = b_dgamma * b_gamma + tl.sum(b_by_r, 0)
        b_dcenter = tl.sum(b_by_center, 0)
        b_var = tl.load(stats + 3 * rows + o_kc, mask=m_kc, other=0.0)
        b_p = tl.load(stats + 6 * rows + o_kc, mask=m_kc, other=0.0)
        # The scale's ratio p is a constant, and delta, beyond what lies between ranks, one in units of 1 / r.
        if FLAGS.condensed == 3 or FLAGS.blend >= 3:
            b_constant = b_delta
            if FLAGS.ranks == 1:
                b_constant -= tl.load(apart + o_kc, mask=m_kc, other=0.0)
            b_dr -= b_dcenter * tl.div_rn(b_constant, tl.where(m_kc, b_r, 1.0))
        b_dvar = -0.5 * b_dr * b_r * b_r * b_r
        if FLAGS.std:
            b_dvar = -b_dr * b_r * b_r
        b_dvar = b_dvar * b_p
        if FLAGS.condensed == 3 or FLAGS.blend >= 3:
            b_p = b_p * 0.0 + 1.0
        # From the deviation to the variance below it; flat where the variance was clamped. A NaN is below nothing.
        if FLAGS.std and not FLAGS.frozen:
            b_var += tl.cast(numbers.inner, tl.float32)
            b_std = tl.sqrt_rn(tl.maximum(b_var, TINY, propagate_nan=NAN))
            b_dvar = tl.where(b_var < TINY, 0.0, 0.5 * tl.div_rn(b_dvar, b_std))
        # Each program has all samples of its channels, so these are whole gradients and no parts of them.
        tl.store(out.weight + o_kc, b_dgamma * b_r * b_factor, mask=m_kc)
        tl.store(out.bias + o_kc, tl.sum(b_by_beta, 0) * b_factor, mask=m_kc)
        # The gradients of U and V go to the other ranks before anything follows from them.
        if FLAGS.ranks == 1:
            tl.store(dpooled + o_kc, b_p * b_dcenter, mask=m_kc)
            tl.store(dpooled + channels + o_kc, b_dvar, mask=m_kc)
            tl.store(out.centered + o_kc, tl.sum(b_by_m, 0), mask=m_kc)
        elif FLAGS.center:
            b_between = tl.load(stats + 2 * rows + o_kc, mask=m_kc, other=0.0)
            b_dm = (
                tl.sum(b_by_m, 0)
                - (1.0 - b_p) * (b_base + b_rest) * b_dcenter
                + 2.0 * b_f[None, :] * b_between * b_dvar
            )
            tl.store(out.center_weight + o_c, tl.sum(b_dm, 0), mask=m_c)
        if FLAGS.scale:
            tl.store(out.scale_weight + o_c, tl.sum(tl.sum(b_by_v, 0), 0), mask=m_c)
            tl.store(out.scale_bias + o_c, tl.sum(tl.sum(b_by_b, 0), 0), mask=m_c)
        if FLAGS.affine:
            tl.store(out.affine_weight + o_c, tl.sum(tl.sum(b_by_a, 0), 0), mask=m_c)
            tl.store(out.affine_bias + o_c, tl.sum(tl.sum(b_by_c, 0), 0), mask=m_c)
    # Back from the other ranks: ``b_far`` is what moving the center of V's squares costs.
    if FLAGS.ranks == 2:
        b_dvar = tl.load(dpooled + channels + o_kc, mask=m_kc, other=0.0)
        b_far = 2.0 * tl.load(apart + o_kc, mask=m_kc, other=0.0) * b_dvar
        b_dbatch = b_f[None, :] * (tl.load(dpooled + o_kc, mask=m_kc, other=0.0) - b_far)
        if FLAGS.center:
            b_dm = tl.load(out.centered + o_kc, mask=m_kc, other=0.0)
            b_dm += (b_base + b_rest) * (tl.load(dpooled + 2 * channels + o_kc, mask=m_kc, other=0.0) - b_far)
            b_dm += 2.0 * b_f[None, :] * tl.load(stats + 2 * rows + o_kc, mask=m_kc, other=0.0) * b_dvar
            tl.store(out.center_weight + o_c, tl.sum(b_dm, 0), mask=m_c)
    else:
        b_dbatch = b_p * b_f[None, :] * b_dcenter
    # Second walk.
    if FLAGS.needs_moments and FLAGS.ranks != 1:
        b_curve = 2.0 * (b_f * b_f)[None, :] * b_dvar
        # How a responsibility enters a sample's weight, its context's mass included.
        if FLAGS.gate:
            b_beta = per_channel(learned.bias, o_kc, m_kc, 0.0, FLAGS.bias) * b_factor
            p_dresponsibilities = out.responsibilities + tl.program_id(0).to(tl.int64) * ((samples + 1) * contexts)
            b_part = tl.maximum(1.0 - b_mass * size / least, 0.0, propagate_nan=NAN)  # [K_BLOCK]
            b_wide = tl.maximum(b_mass, TINY, propagate_nan=NAN)
            b_dpart = tl.where(b_part > 0.0, -1.0 * size / least, 0.0)
            b_every = tl.zeros((N_BLOCK, K_BLOCK), tl.float32)
        for begin in range(0, samples, N_BLOCK):
            s = parts_at(
                begin, sums, given, learned.responsibilities, b_mass, o_c, of, shape, layout, numbers, FLAGS, N_BLOCK,
                K_BLOCK,
            )  # fmt: skip
            # Through z, through the gates, and through mean_B and the variance between samples.
            b_dmean = b_f * s.dz - s.direct + s.a * (b_dbatch[None, :, :] + b_curve[None, :, :] * s.e)
            if FLAGS.affine:
                # The affine gate looks at the plain mean, and adds to its gradient directly.
                b_dmean += s.u2 * b_w_a
            # d var / dx = 2 (x - mean) / S: the slope is for x - mean, and dx is written in x - k.
            b_slope = tl.sum(s.a * b_dvar[None, :, :], 1) * 2.0 / size  # [N_BLOCK, C_BLOCK]
            o_nc = s.n[:, None] * channels + o_c[None, :]  # [N_BLOCK, C_BLOCK]
            tl.store(out.dx_affine + o_nc, tl.sum(b_dmean, 1) / size - b_slope * s.d, mask=s.keep)
            tl.store(out.dx_affine + number + o_nc, b_slope, mask=s.keep)
            # By the sample's own weight, and by its share of the affine map.
            if FLAGS.gate:
                b_v = tl.load(given.moments + number + o_nc, mask=s.keep, other=0.0)[:, None, :]
                b_by_weight = tl.sum(b_dbatch[None, :, :] * s.e + b_dvar[None, :, :] * (b_v + s.e * s.e), 2)
                b_t0, b_t1 = s.t0[:, None, :], s.t1[:, None, :]
                b_of_scale = (b_t1 + b_t0 * (s.z - s.d[:, None, :])) * (b_gamma * b_r)[None, :, :]
                b_dresponsibility = tl.sum(b_of_scale + b_t0 * b_beta[None, :, :], 2)
                b_fraction = tl.sum(s.g, 2) / b_wide[None, :]  # [N_BLOCK, K_BLOCK]
                b_every += b_by_weight * (b_dpart[None, :] * (1.0 / samples - b_fraction) - (1.0 - b_part)[None, :] * b_fraction / b_wide[None, :])  # noqa: E501  # fmt: skip
                # Only real samples and contexts: tiles are padded to powers of two.
                m_nk = (s.n[:, None] < samples) & (o_k[None, :] < contexts)
                b_dresponsibility += b_by_weight * ((1.0 - b_part) / b_wide)[None, :]
                tl.store(
                    p_dresponsibilities + (s.n[:, None] + 1) * contexts + o_k[None, :], b_dresponsibility, mask=m_nk
                )
        if FLAGS.gate:
            tl.store(p_dresponsibilities + o_k, tl.sum(b_every, 0), mask=o_k < contexts)


@triton.jit(do_not_specialize=["samples", "blocks"])
def gate_logits_vjp(
    dresponsibilities, responsibilities, dlogits, samples, contexts, blocks, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the gradient of a sample's logits, (N, K): all blocks of channels added up, then the softmax's adjoint."""
    i_n, o_k = tl.program_id(0), tl.arange(0, K_BLOCK)
    b_total = tl.zeros((BLOCK, K_BLOCK), tl.float32)
    for begin in range(0, blocks, BLOCK):
        o_b = begin + tl.arange(0, BLOCK)
        m_bk = (o_b[:, None] < blocks) & (o_k[None, :] < contexts)
        o_bk = o_b[:, None].to(tl.int64) * ((samples + 1) * contexts) + o_k[None, :]  # [BLOCK, K_BLOCK]
        # What holds for every sample, then what this one's affine map adds.
        b_total += tl.load(dresponsibilities + o_bk, mask=m_bk, other=0.0)
        b_total += tl.load(dresponsibilities + o_bk + (i_n + 1) * contexts, mask=m_bk, other=0.0)
    b_dg = tl.sum(b_total, 0)  # [K_BLOCK]
    # The softmax's adjoint: g_k (dg_k - sum_j g_j dg_j).
    b_g = tl.load(responsibilities + i_n * contexts + o_k, mask=o_k < contexts, other=0.0)
    tl.store(dlogits + i_n * contexts + o_k, b_g * (b_dg - tl.sum(b_g * b_dg, 0)), mask=o_k < contexts)


@triton.jit(do_not_specialize=["samples", "size"])
def gate_vjp(
    dlogits, affine, moments, gate_weight, dgate_weight, dgate_bias, dx_affine, samples, number, channels, contexts,
    size, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the gate's weight and bias, (K, C) and (K,); and the logits' part of dx, added to its constant."""
    o_c, o_k = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK), tl.arange(0, K_BLOCK)
    o_kc = o_k[:, None] * channels + o_c[None, :]  # [K_BLOCK, C_BLOCK]
    m_kc = (o_k[:, None] < contexts) & (o_c[None, :] < channels)
    b_w = tl.load(gate_weight + o_kc, mask=m_kc, other=0.0).to(tl.float32)  # [K_BLOCK, C_BLOCK]
    b_dw = tl.zeros((N_BLOCK, K_BLOCK, C_BLOCK), tl.float32)
    b_db = tl.zeros((N_BLOCK, K_BLOCK), tl.float32)
    for begin in range(0, samples, N_BLOCK):
        o_n = begin + tl.arange(0, N_BLOCK)
        m_nc = (o_n[:, None] < samples) & (o_c[None, :] < channels)
        o_nc = o_n[:, None] * channels + o_c[None, :]  # [N_BLOCK, C_BLOCK]
        m_nk = (o_n[:, None] < samples) & (o_k[None, :] < contexts)
        b_dl = tl.load(dlogits + o_n[:, None] * contexts + o_k[None, :], mask=m_nk, other=0.0)  # [N_BLOCK, K_BLOCK]
        b_mean = tl.load(affine + o_nc, mask=m_nc, other=0.0) + tl.load(moments + o_nc, mask=m_nc, other=0.0)
        b_dw += b_dl[:, :, None] * b_mean[:, None, :]
        b_db += b_dl
        # A logit depends on the sample's mean: dmean / S joins the constant.
        b_constant = tl.load(dx_affine + o_nc, mask=m_nc, other=0.0)
        tl.store(dx_affine + o_nc, b_constant + tl.sum(b_dl[:, :, None] * b_w[None, :, :], 1) / size, mask=m_nc)
    tl.store(dgate_weight + o_kc, tl.sum(b_dw, 0), mask=m_kc)
    tl.store(dgate_bias + o_k, tl.sum(b_db, 0), mask=(o_k < contexts) & (tl.program_id(0) == 0))

"""Device code: the vector-Jacobian product of the equations in ``forward``, in one launch. Letters as there.

Where the responsibilities come from a gate, two small launches more: from what each block of channels leaves to the
gradient of the logits (``gate_logits_vjp``), and on to the gate's parameters and the samples' means (``gate_vjp``).

Letters beside those: t0 and t1 are the sums over positions of dy and of dy (x - k), dy taken before the activation; q
is the gradient of a sample's whole scale, so that the contexts of a tile are q_ here; u1 and u2 are the gradients of
the gates' arguments. ``by_gamma`` and its like hold, sample by sample, what is added up to the gradient of that name.
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
    begin, sums, stats, responsibilities, mass, c, of, shape, layout, numbers, FLAGS: tl.constexpr,
    N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return ``OfSample``, for (N, K, C) or (N, C): a tile of samples, and what each sends to the sums over samples.

    ``e`` is mean_n - mean_B. Both walks need all of it, and to store it would cost more than to compute it again.
    """
    n = begin + tl.arange(0, N_BLOCK)
    keep = (n[:, None] < shape.samples) & (c < shape.channels)[None, :]
    g, a = weights_at(responsibilities, mass, n, shape, layout.size, numbers.least, FLAGS, K_BLOCK)
    # Statistics and gamma are those of a context and a channel, (K, C), the same for every sample.
    r, gamma = of.r[None, :, :], of.gamma[None, :, :]
    # The two sums that the pass over dy and x left for each (n, c).
    i = n[:, None] * shape.channels + c[None, :]
    at = n[:, None].to(tl.int64) * layout.sample_stride + c[None, :]
    t0, t1 = read_sums(sums, at, keep, layout, FLAGS.merge)
    k = tl.load(stats.affine + i, mask=keep, other=0.0)
    d = k * 0.0
    if FLAGS.needs_moments:
        d = tl.load(stats.moments + i, mask=keep, other=0.0)
    # z of the equations again, from hi and lo: differences of large means.
    away = k[:, None, :] - of.base[None, :, :] + d[:, None, :] - of.rest[None, :, :]
    e = tl.where(keep[:, None, :], away, 0.0)
    z = of.f * e - of.delta[None, :, :]
    # y = scale (x - mean_n + z): the gates and what their slopes need.
    inner = gamma * r
    gain = 1.0 + e * 0.0
    s1, s2 = gain, gain
    if FLAGS.scale:
        s1, h = gate(of.w_v, of.w_b, r * z, numbers.unit_scale)
        gain = gain * h
    if FLAGS.affine:
        s2, h = gate(of.w_a, of.b_a, (k + d)[:, None, :], numbers.unit_affine)
        gain = gain * h
    # q is the gradient of the whole scale, ``direct`` that of z where it is added to x.
    beta = g * t0[:, None, :]
    q = g * t1[:, None, :] + beta * (z - d[:, None, :])
    direct = beta * inner * gain
    # Of the gates' arguments: s' = s (1 - s).
    u1, u2 = q * inner * gain * (1.0 - s1), q * inner * gain * (1.0 - s2)
    dz = direct
    if FLAGS.scale:
        dz = direct + u1 * of.w_v * r
    return tuples.OfSample(n, keep, g, a, (k + d)[:, None, :], d, e, z, gain, t0, t1, beta, q, direct, u1, u2, dz)


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
    c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    inside = c < channels
    q_ = tl.arange(0, K_BLOCK)
    kc_mask = (q_[:, None] < contexts) & inside[None, :]
    at = q_[:, None] * channels + c[None, :]
    rows = contexts * channels
    # What ``channels_of`` stored: mean, delta and r; then the parameters.
    base, rest = tl.load(stats + at, mask=kc_mask, other=0.0), tl.load(stats + rows + at, mask=kc_mask, other=0.0)
    # Stored by the forward pass: what was chosen there, such as a clamped r, cannot be computed from V again.
    delta = tl.load(stats + 4 * rows + at, mask=kc_mask, other=0.0)
    r = tl.load(stats + 5 * rows + at, mask=kc_mask, other=0.0)
    gamma, factor = per_channel(learned.weight, at, kc_mask, 1.0, FLAGS.weight), 1.0
    if FLAGS.prior:
        # A context's share of the data scales its gamma and beta alike, and both gradients with them.
        factor = prior_scale(given.survey_out, contexts, K_BLOCK)[:, None]
        gamma = gamma * factor
    w_v = per_channel(learned.scale_weight, c, inside, 0.0, FLAGS.scale)
    w_b = per_channel(learned.scale_bias, c, inside, 0.0, FLAGS.scale)
    w_a = per_channel(learned.affine_weight, c, inside, 0.0, FLAGS.affine)
    b_a = per_channel(learned.affine_bias, c, inside, 0.0, FLAGS.affine)
    # f stays 1 without a centering, so that the same lines serve every method.
    f = 1.0 + per_channel(learned.center_weight, c, inside, 0.0, FLAGS.center)
    of = tuples.OfChannel(base, rest, delta, r, f, gamma, w_v, w_b, w_a, b_a)
    mass = masses(learned.responsibilities, shape, FLAGS, N_BLOCK, K_BLOCK)
    # First walk.
    if FLAGS.ranks != 2:
        # A tile for each sum, reduced over samples once at the end: fewer reductions, and always in one order.
        zero = tl.zeros((N_BLOCK, K_BLOCK, C_BLOCK), tl.float32)
        by_gamma, by_beta, by_r, by_center = zero, zero, zero, zero
        by_m, by_v, by_b, by_a, by_c = zero, zero, zero, zero, zero
        for begin in range(0, samples, N_BLOCK):
            s = parts_at(
                begin, sums, given, learned.responsibilities, mass, c, of, shape, layout, numbers, FLAGS, N_BLOCK,
                K_BLOCK,
            )  # fmt: skip
            # What every method needs: the gradients of scale, offset and center.
            by_gamma += s.q * s.gain
            by_beta += s.beta
            by_center -= s.dz
            # Only what a rectification asks for.
            if FLAGS.center:
                by_m += s.dz * s.e
            if FLAGS.scale:
                by_r += s.u1 * w_v * s.z
                by_v += s.u1 * r[None, :, :] * s.z
                by_b += s.u1
            if FLAGS.affine:
                by_a += s.u2 * s.mean
                by_c += s.u2
        # Gradients of r, of U and of V, and with them the parameters'.
        dgamma = tl.sum(by_gamma, 0)
        dr = dgamma * gamma + tl.sum(by_r, 0)
        dcenter = tl.sum(by_center, 0)
        variance = tl.load(stats + 3 * rows + at, mask=kc_mask, other=0.0)
        p = tl.load(stats + 6 * rows + at, mask=kc_mask, other=0.0)
        # The scale's ratio p is a constant, and delta, beyond what lies between ranks, one in units of 1 / r.
        if FLAGS.condensed == 3 or FLAGS.blend >= 3:
            constant = delta
            if FLAGS.ranks == 1:
                constant -= tl.load(apart + at, mask=kc_mask, other=0.0)
            dr -= dcenter * tl.div_rn(constant, tl.where(kc_mask, r, 1.0))
        dvariance = -0.5 * dr * r * r * r
        if FLAGS.std:
            dvariance = -dr * r * r
        dvariance = dvariance * p
        if FLAGS.condensed == 3 or FLAGS.blend >= 3:
            p = p * 0.0 + 1.0
        # From the deviation to the variance below it; flat where the variance was clamped. A NaN is below nothing.
        if FLAGS.std and not FLAGS.frozen:
            variance += tl.cast(numbers.inner, tl.float32)
            std = tl.sqrt_rn(tl.maximum(variance, TINY, propagate_nan=NAN))
            dvariance = tl.where(variance < TINY, 0.0, 0.5 * tl.div_rn(dvariance, std))
        # Each program has all samples of its channels, so these are whole gradients and no parts of them.
        tl.store(out.weight + at, dgamma * r * factor, mask=kc_mask)
        tl.store(out.bias + at, tl.sum(by_beta, 0) * factor, mask=kc_mask)
        # The gradients of U and V go to the other ranks before anything follows from them.
        if FLAGS.ranks == 1:
            tl.store(dpooled + at, p * dcenter, mask=kc_mask)
            tl.store(dpooled + channels + at, dvariance, mask=kc_mask)
            tl.store(out.centered + at, tl.sum(by_m, 0), mask=kc_mask)
        elif FLAGS.center:
            between = tl.load(stats + 2 * rows + at, mask=kc_mask, other=0.0)
            dm = tl.sum(by_m, 0) - (1.0 - p) * (base + rest) * dcenter + 2.0 * f[None, :] * between * dvariance
            tl.store(out.center_weight + c, tl.sum(dm, 0), mask=inside)
        if FLAGS.scale:
            tl.store(out.scale_weight + c, tl.sum(tl.sum(by_v, 0), 0), mask=inside)
            tl.store(out.scale_bias + c, tl.sum(tl.sum(by_b, 0), 0), mask=inside)
        if FLAGS.affine:
            tl.store(out.affine_weight + c, tl.sum(tl.sum(by_a, 0), 0), mask=inside)
            tl.store(out.affine_bias + c, tl.sum(tl.sum(by_c, 0), 0), mask=inside)
    # Back from the other ranks: ``far`` is what moving the center of V's squares costs.
    if FLAGS.ranks == 2:
        dvariance = tl.load(dpooled + channels + at, mask=kc_mask, other=0.0)
        far = 2.0 * tl.load(apart + at, mask=kc_mask, other=0.0) * dvariance
        dbatch = f[None, :] * (tl.load(dpooled + at, mask=kc_mask, other=0.0) - far)
        if FLAGS.center:
            dm = tl.load(out.centered + at, mask=kc_mask, other=0.0)
            dm += (base + rest) * (tl.load(dpooled + 2 * channels + at, mask=kc_mask, other=0.0) - far)
            dm += 2.0 * f[None, :] * tl.load(stats + 2 * rows + at, mask=kc_mask, other=0.0) * dvariance
            tl.store(out.center_weight + c, tl.sum(dm, 0), mask=inside)
    else:
        dbatch = p * f[None, :] * dcenter
    # Second walk.
    if FLAGS.needs_moments and FLAGS.ranks != 1:
        curve = 2.0 * (f * f)[None, :] * dvariance
        # How a responsibility enters a sample's weight, its context's mass included.
        if FLAGS.gate:
            beta_ = per_channel(learned.bias, at, kc_mask, 0.0, FLAGS.bias) * factor
            dresponsibilities = out.responsibilities + tl.program_id(0).to(tl.int64) * ((samples + 1) * contexts)
            part = tl.maximum(1.0 - mass * size / least, 0.0, propagate_nan=NAN)
            wide = tl.maximum(mass, TINY, propagate_nan=NAN)
            dpart = tl.where(part > 0.0, -1.0 * size / least, 0.0)
            every = tl.zeros((N_BLOCK, K_BLOCK), tl.float32)
        for begin in range(0, samples, N_BLOCK):
            s = parts_at(
                begin, sums, given, learned.responsibilities, mass, c, of, shape, layout, numbers, FLAGS, N_BLOCK,
                K_BLOCK,
            )  # fmt: skip
            # Through z, through the gates, and through mean_B and the variance between samples.
            dmean = f * s.dz - s.direct + s.a * (dbatch[None, :, :] + curve[None, :, :] * s.e)
            if FLAGS.affine:
                # The affine gate looks at the plain mean, and adds to its gradient directly.
                dmean += s.u2 * w_a
            # d var / dx = 2 (x - mean) / S: the slope is for x - mean, and dx is written in x - k.
            slope = tl.sum(s.a * dvariance[None, :, :], 1) * 2.0 / size
            i = s.n[:, None] * channels + c[None, :]
            tl.store(out.dx_affine + i, tl.sum(dmean, 1) / size - slope * s.d, mask=s.keep)
            tl.store(out.dx_affine + number + i, slope, mask=s.keep)
            # By the sample's own weight, and by its share of the affine map.
            if FLAGS.gate:
                v = tl.load(given.moments + number + i, mask=s.keep, other=0.0)[:, None, :]
                by_weight = tl.sum(dbatch[None, :, :] * s.e + dvariance[None, :, :] * (v + s.e * s.e), 2)
                t0, t1 = s.t0[:, None, :], s.t1[:, None, :]
                of_scale = (t1 + t0 * (s.z - s.d[:, None, :])) * (gamma * r)[None, :, :]
                dresponsibility = tl.sum(of_scale + t0 * beta_[None, :, :], 2)
                fraction = tl.sum(s.g, 2) / wide[None, :]
                every += by_weight * (dpart[None, :] * (1.0 / samples - fraction) - (1.0 - part)[None, :] * fraction / wide[None, :])  # noqa: E501  # fmt: skip
                # Only real samples and contexts: tiles are padded to powers of two.
                here = (s.n[:, None] < samples) & (q_[None, :] < contexts)
                dresponsibility += by_weight * ((1.0 - part) / wide)[None, :]
                tl.store(dresponsibilities + (s.n[:, None] + 1) * contexts + q_[None, :], dresponsibility, mask=here)
        if FLAGS.gate:
            tl.store(dresponsibilities + q_, tl.sum(every, 0), mask=q_ < contexts)


@triton.jit(do_not_specialize=["samples", "blocks"])
def gate_logits_vjp(
    dresponsibilities, responsibilities, dlogits, samples, contexts, blocks, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the gradient of a sample's logits, (N, K): all blocks of channels added up, then the softmax's adjoint."""
    n, q = tl.program_id(0), tl.arange(0, K_BLOCK)
    total = tl.zeros((BLOCK, K_BLOCK), tl.float32)
    for begin in range(0, blocks, BLOCK):
        b = begin + tl.arange(0, BLOCK)
        keep = (b[:, None] < blocks) & (q[None, :] < contexts)
        at = b[:, None].to(tl.int64) * ((samples + 1) * contexts) + q[None, :]
        # What holds for every sample, then what this one's affine map adds.
        total += tl.load(dresponsibilities + at, mask=keep, other=0.0)
        total += tl.load(dresponsibilities + at + (n + 1) * contexts, mask=keep, other=0.0)
    dg = tl.sum(total, 0)
    # The softmax's adjoint: g_k (dg_k - sum_j g_j dg_j).
    g = tl.load(responsibilities + n * contexts + q, mask=q < contexts, other=0.0)
    tl.store(dlogits + n * contexts + q, g * (dg - tl.sum(g * dg, 0)), mask=q < contexts)


@triton.jit(do_not_specialize=["samples", "size"])
def gate_vjp(
    dlogits, affine, moments, gate_weight, dgate_weight, dgate_bias, dx_affine, samples, number, channels, contexts,
    size, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the gate's weight and bias, (K, C) and (K,); and the logits' part of dx, added to its constant."""
    c, q = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK), tl.arange(0, K_BLOCK)
    at = q[:, None] * channels + c[None, :]
    inside = (q[:, None] < contexts) & (c[None, :] < channels)
    w = tl.load(gate_weight + at, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((N_BLOCK, K_BLOCK, C_BLOCK), tl.float32)
    db = tl.zeros((N_BLOCK, K_BLOCK), tl.float32)
    for begin in range(0, samples, N_BLOCK):
        n = begin + tl.arange(0, N_BLOCK)
        keep = (n[:, None] < samples) & (c[None, :] < channels)
        i = n[:, None] * channels + c[None, :]
        here = (n[:, None] < samples) & (q[None, :] < contexts)
        dl = tl.load(dlogits + n[:, None] * contexts + q[None, :], mask=here, other=0.0)
        mean = tl.load(affine + i, mask=keep, other=0.0) + tl.load(moments + i, mask=keep, other=0.0)
        dw += dl[:, :, None] * mean[:, None, :]
        db += dl
        # A logit depends on the sample's mean: dmean / S joins the constant.
        constant = tl.load(dx_affine + i, mask=keep, other=0.0)
        tl.store(dx_affine + i, constant + tl.sum(dl[:, :, None] * w[None, :, :], 1) / size, mask=keep)
    tl.store(dgate_weight + at, tl.sum(dw, 0), mask=inside)
    tl.store(dgate_bias + q, tl.sum(db, 0), mask=(q < contexts) & (tl.program_id(0) == 0))

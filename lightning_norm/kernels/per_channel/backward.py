"""Device code: the vector-Jacobian product of the equations in ``forward``, in one launch. Letters as there.

Where the responsibilities come from a gate, two small launches more: from what each block of channels leaves to the
gradient of the logits (``gate_logits_vjp``), and on to the gate's parameters and the samples' means (``gate_vjp``).

Letters beside those: t0 and t1 are the sums over positions of dy and of dy (x - k), dy taken before the activation; q
is the gradient of a sample's whole scale, so that the contexts of a tile are q_ here; u1 and u2 are the gradients of
the gates' arguments. ``by_gamma`` and its like hold, sample by sample, what is added up to the gradient of that name.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.mixture.forward import per_channel
from lightning_norm.kernels.passes.backward import read_sum
from lightning_norm.kernels.per_channel.forward import gate, masses, prior_scale, weights_at
from lightning_norm.kernels.per_channel.running_stats import NAN, TINY


@triton.jit
def parts_at(
    begin, total, dot, affine, moments, responsibilities, mass, c, inside, samples, number, channels, contexts,
    responsibility_stride, pieces, sample_stride, stride, size, least, base, rest, delta, r, f, gamma, w_v, w_b, w_a,
    b_a, unit_scale, unit_affine, MOMENTS: tl.constexpr, MERGE: tl.constexpr, CONTEXTS: tl.constexpr,
    SCALE: tl.constexpr, AFFINE: tl.constexpr, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return a tile of samples, their mask and weights, and for (N, K, C) what each sends to the sums over samples.

    ``e`` is mean_n - mean_B. Both walks need all of it, and to store it would cost more than to compute it again.
    """
    n = begin + tl.arange(0, N_BLOCK)
    keep = (n[:, None] < samples) & inside[None, :]
    g, a = weights_at(
        responsibilities, responsibility_stride, mass, n, samples, contexts, size, least, CONTEXTS, K_BLOCK
    )
    # Statistics and gamma are those of a context and a channel, (K, C), the same for every sample.
    base, rest, delta, r, gamma = base[None, :, :], rest[None, :, :], delta[None, :, :], r[None, :, :], gamma[None, :, :]  # noqa: E501  # fmt: skip
    # The two sums that the pass over dy and x left for each (n, c).
    i = n[:, None] * channels + c[None, :]
    at = n[:, None].to(tl.int64) * sample_stride + c[None, :]
    t0 = read_sum(total, at, keep, pieces, stride, MERGE)
    t1 = read_sum(dot, at, keep, pieces, stride, MERGE)
    k = tl.load(affine + i, mask=keep, other=0.0)
    d = k * 0.0
    if MOMENTS:
        d = tl.load(moments + i, mask=keep, other=0.0)
    # z of the equations again, from hi and lo: differences of large means.
    e = tl.where(keep[:, None, :], k[:, None, :] - base + d[:, None, :] - rest, 0.0)
    z = f * e - delta
    # y = scale (x - mean_n + z): the gates and what their slopes need.
    inner = gamma * r
    gain = 1.0 + e * 0.0
    s1, s2 = gain, gain
    if SCALE:
        s1, h = gate(w_v, w_b, r * z, unit_scale)
        gain = gain * h
    if AFFINE:
        s2, h = gate(w_a, b_a, (k + d)[:, None, :], unit_affine)
        gain = gain * h
    # q is the gradient of the whole scale, ``direct`` that of z where it is added to x.
    beta = g * t0[:, None, :]
    q = g * t1[:, None, :] + beta * (z - d[:, None, :])
    direct = beta * inner * gain
    # Of the gates' arguments: s' = s (1 - s).
    u1, u2 = q * inner * gain * (1.0 - s1), q * inner * gain * (1.0 - s2)
    dz = direct
    if SCALE:
        dz = direct + u1 * w_v * r
    return n, keep, g, a, (k + d)[:, None, :], d, e, z, gain, t0, t1, beta, q, direct, u1, u2, dz


@triton.jit(do_not_specialize=["samples", "pieces", "size"])
def channels_vjp(
    total, dot, affine, moments, stats, responsibilities, survey_out, weight, bias, center_weight, scale_weight,
    scale_bias, affine_weight, affine_bias, dweight, dbias, dcenter_weight, dscale_weight, dscale_bias, daffine_weight,
    daffine_bias, dx_affine, dresponsibilities, apart, dpooled, centered, samples, number, channels, contexts,
    responsibility_stride, pieces, sample_stride, stride, size, inner, least, unit_scale, unit_affine,
    MOMENTS: tl.constexpr, MERGE: tl.constexpr, STD: tl.constexpr, STD_OF_VAR: tl.constexpr, RENORM: tl.constexpr,
    CONTEXTS: tl.constexpr, PRIOR: tl.constexpr, GATE: tl.constexpr, RANKS: tl.constexpr, CENTER: tl.constexpr,
    SCALE: tl.constexpr, AFFINE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters, and constant and slope (2, N * C) of dx = scale dy + constant + slope (x - k).

    Two walks over the samples: the first sums what they send to the channel's statistics and parameters, the second
    turns the statistics' gradients into those of each sample's mean and variance.

    With GATE a program also leaves what its channels add to the gradient of the responsibilities, (1 + N, K): the first
    row is that of every sample. Where the batch lies on several ranks there are two launches: with RANKS 1 it leaves
    the gradients of U and V in ``dpooled``, and with 2 it takes those of all ranks from there, see ``ranks``.
    """
    c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    inside = c < channels
    q_ = tl.arange(0, K_BLOCK)
    kc_mask = (q_[:, None] < contexts) & inside[None, :]
    at = q_[:, None] * channels + c[None, :]
    rows = contexts * channels
    # What ``channels_of`` stored: mean, delta and r; then the parameters.
    base, rest = tl.load(stats + at, mask=kc_mask, other=0.0), tl.load(stats + rows + at, mask=kc_mask, other=0.0)
    # Stored by the forward pass: what was chosen there, such as a clamped r, cannot be computed from V again.
    delta, r = (
        tl.load(stats + 4 * rows + at, mask=kc_mask, other=0.0),
        tl.load(stats + 5 * rows + at, mask=kc_mask, other=0.0),
    )
    gamma, factor = per_channel(weight, at, kc_mask, 1.0, WEIGHT), 1.0
    if PRIOR:
        # A context's share of the data scales its gamma and beta alike, and both gradients with them.
        factor = prior_scale(survey_out, contexts, K_BLOCK)[:, None]
        gamma = gamma * factor
    w_v, w_b = per_channel(scale_weight, c, inside, 0.0, SCALE), per_channel(scale_bias, c, inside, 0.0, SCALE)
    w_a, b_a = per_channel(affine_weight, c, inside, 0.0, AFFINE), per_channel(affine_bias, c, inside, 0.0, AFFINE)
    # f stays 1 without a centering, so that the same lines serve every method.
    f = 1.0 + per_channel(center_weight, c, inside, 0.0, CENTER)
    # Without contexts every sample weighs the same, and no mass is asked for.
    mass = tl.zeros((K_BLOCK,), tl.float32)
    if CONTEXTS:
        mass = masses(responsibilities, responsibility_stride, samples, contexts, N_BLOCK, K_BLOCK)
    # First walk.
    if RANKS != 2:
        # A tile for each sum, reduced over samples once at the end: fewer reductions, and always in one order.
        zero = tl.zeros((N_BLOCK, K_BLOCK, C_BLOCK), tl.float32)
        by_gamma, by_beta, by_r, by_center = zero, zero, zero, zero
        by_m, by_v, by_b, by_a, by_c = zero, zero, zero, zero, zero
        for begin in range(0, samples, N_BLOCK):
            n, keep, g, a, mean, d, e, z, gain, t0, t1, beta, q, direct, u1, u2, dz = parts_at(
                begin, total, dot, affine, moments, responsibilities, mass, c, inside, samples, number, channels,
                contexts, responsibility_stride, pieces, sample_stride, stride, size, least, base, rest, delta, r, f,
                gamma, w_v, w_b, w_a, b_a, unit_scale, unit_affine, MOMENTS, MERGE, CONTEXTS, SCALE, AFFINE, N_BLOCK,
                K_BLOCK,
            )  # fmt: skip
            # What every method needs: the gradients of scale, offset and center.
            by_gamma += q * gain
            by_beta += beta
            by_center -= dz
            # Only what a rectification asks for.
            if CENTER:
                by_m += dz * e
            if SCALE:
                by_r += u1 * w_v * z
                by_v += u1 * r[None, :, :] * z
                by_b += u1
            if AFFINE:
                by_a += u2 * mean
                by_c += u2
        # Gradients of r, of U and of V, and with them the parameters'.
        dgamma = tl.sum(by_gamma, 0)
        dr = dgamma * gamma + tl.sum(by_r, 0)
        dcenter = tl.sum(by_center, 0)
        variance = tl.load(stats + 3 * rows + at, mask=kc_mask, other=0.0)
        p = tl.load(stats + 6 * rows + at, mask=kc_mask, other=0.0)
        # The scale's ratio p is a constant, and delta, beyond what lies between ranks, one in units of 1 / r.
        if RENORM:
            constant = delta
            if RANKS == 1:
                constant -= tl.load(apart + at, mask=kc_mask, other=0.0)
            dr -= dcenter * tl.div_rn(constant, tl.where(kc_mask, r, 1.0))
        dvariance = -0.5 * dr * r * r * r
        if STD:
            dvariance = -dr * r * r
        dvariance = dvariance * p
        if RENORM:
            p = p * 0.0 + 1.0
        # From the deviation to the variance below it; flat where the variance was clamped. A NaN is below nothing.
        if STD_OF_VAR:
            variance += tl.cast(inner, tl.float32)
            std = tl.sqrt_rn(tl.maximum(variance, TINY, propagate_nan=NAN))
            dvariance = tl.where(variance < TINY, 0.0, 0.5 * tl.div_rn(dvariance, std))
        # Each program has all samples of its channels, so these are whole gradients and no parts of them.
        tl.store(dweight + at, dgamma * r * factor, mask=kc_mask)
        tl.store(dbias + at, tl.sum(by_beta, 0) * factor, mask=kc_mask)
        # The gradients of U and V go to the other ranks before anything follows from them.
        if RANKS == 1:
            tl.store(dpooled + at, p * dcenter, mask=kc_mask)
            tl.store(dpooled + channels + at, dvariance, mask=kc_mask)
            tl.store(centered + at, tl.sum(by_m, 0), mask=kc_mask)
        elif CENTER:
            between = tl.load(stats + 2 * rows + at, mask=kc_mask, other=0.0)
            dm = tl.sum(by_m, 0) - (1.0 - p) * (base + rest) * dcenter + 2.0 * f[None, :] * between * dvariance
            tl.store(dcenter_weight + c, tl.sum(dm, 0), mask=inside)
        if SCALE:
            tl.store(dscale_weight + c, tl.sum(tl.sum(by_v, 0), 0), mask=inside)
            tl.store(dscale_bias + c, tl.sum(tl.sum(by_b, 0), 0), mask=inside)
        if AFFINE:
            tl.store(daffine_weight + c, tl.sum(tl.sum(by_a, 0), 0), mask=inside)
            tl.store(daffine_bias + c, tl.sum(tl.sum(by_c, 0), 0), mask=inside)
    # Back from the other ranks: ``far`` is what moving the center of V's squares costs.
    if RANKS == 2:
        dvariance = tl.load(dpooled + channels + at, mask=kc_mask, other=0.0)
        far = 2.0 * tl.load(apart + at, mask=kc_mask, other=0.0) * dvariance
        dbatch = f[None, :] * (tl.load(dpooled + at, mask=kc_mask, other=0.0) - far)
        if CENTER:
            dm = tl.load(centered + at, mask=kc_mask, other=0.0)
            dm += (base + rest) * (tl.load(dpooled + 2 * channels + at, mask=kc_mask, other=0.0) - far)
            dm += 2.0 * f[None, :] * tl.load(stats + 2 * rows + at, mask=kc_mask, other=0.0) * dvariance
            tl.store(dcenter_weight + c, tl.sum(dm, 0), mask=inside)
    else:
        dbatch = p * f[None, :] * dcenter
    # Second walk.
    if MOMENTS and RANKS != 1:
        curve = 2.0 * (f * f)[None, :] * dvariance
        # How a responsibility enters a sample's weight, its context's mass included.
        if GATE:
            beta_ = per_channel(bias, at, kc_mask, 0.0, BIAS) * factor
            dresponsibilities += tl.program_id(0).to(tl.int64) * ((samples + 1) * contexts)
            part = tl.maximum(1.0 - mass * size / tl.cast(least, tl.float32), 0.0, propagate_nan=NAN)
            wide = tl.maximum(mass, TINY, propagate_nan=NAN)
            dpart = tl.where(part > 0.0, -1.0 * size / tl.cast(least, tl.float32), 0.0)
            every = tl.zeros((N_BLOCK, K_BLOCK), tl.float32)
        for begin in range(0, samples, N_BLOCK):
            n, keep, g, a, mean, d, e, z, gain, t0, t1, beta, q, direct, u1, u2, dz = parts_at(
                begin, total, dot, affine, moments, responsibilities, mass, c, inside, samples, number, channels,
                contexts, responsibility_stride, pieces, sample_stride, stride, size, least, base, rest, delta, r, f,
                gamma, w_v, w_b, w_a, b_a, unit_scale, unit_affine, MOMENTS, MERGE, CONTEXTS, SCALE, AFFINE, N_BLOCK,
                K_BLOCK,
            )  # fmt: skip
            # Through z, through the gates, and through mean_B and the variance between samples.
            dmean = f * dz - direct + a * (dbatch[None, :, :] + curve[None, :, :] * e)
            if AFFINE:
                # The affine gate looks at the plain mean, and adds to its gradient directly.
                dmean += u2 * w_a
            # d var / dx = 2 (x - mean) / S: the slope is for x - mean, and dx is written in x - k.
            slope = tl.sum(a * dvariance[None, :, :], 1) * 2.0 / size
            i = n[:, None] * channels + c[None, :]
            tl.store(dx_affine + i, tl.sum(dmean, 1) / size - slope * d, mask=keep)
            tl.store(dx_affine + number + i, slope, mask=keep)
            # By the sample's own weight, and by its share of the affine map.
            if GATE:
                v = tl.load(moments + number + i, mask=keep, other=0.0)[:, None, :]
                by_weight = tl.sum(dbatch[None, :, :] * e + dvariance[None, :, :] * (v + e * e), 2)
                dresponsibility = tl.sum((t1[:, None, :] + t0[:, None, :] * (z - d[:, None, :])) * (gamma * r)[None, :, :] + t0[:, None, :] * beta_[None, :, :], 2)  # noqa: E501  # fmt: skip
                fraction = tl.sum(g, 2) / wide[None, :]
                every += by_weight * (dpart[None, :] * (1.0 / samples - fraction) - (1.0 - part)[None, :] * fraction / wide[None, :])  # noqa: E501  # fmt: skip
                # Only real samples and contexts: tiles are padded to powers of two.
                here = (n[:, None] < samples) & (q_[None, :] < contexts)
                dresponsibility += by_weight * ((1.0 - part) / wide)[None, :]
                tl.store(dresponsibilities + (n[:, None] + 1) * contexts + q_[None, :], dresponsibility, mask=here)
        if GATE:
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

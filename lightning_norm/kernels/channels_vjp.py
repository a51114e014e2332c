"""Device code: the vector-Jacobian product of the equations in ``channels``, in one launch. Letters as there."""

import triton
import triton.language as tl

from lightning_norm.kernels.algebra import per_channel
from lightning_norm.kernels.channels import TINY, gate, masses, weights_at
from lightning_norm.kernels.reductions import read_sum


@triton.jit
def parts_at(
    total, dot, coef, own, n, c, keep, number, channels, pieces, sample_stride, stride, g, base, rest, delta, r, f,
    gamma, w_v, w_b, w_a, b_a, unit_scale, unit_affine,
    OWN: tl.constexpr, MERGE: tl.constexpr, SCALE: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """For a tile (N, K, C): what each sample hands to the sums over samples; ``e`` is mean_n - mean_B."""
    i = n[:, None] * channels + c[None, :]
    at = n[:, None].to(tl.int64) * sample_stride + c[None, :]
    t0 = read_sum(total, at, keep, pieces, stride, MERGE)
    t1 = read_sum(dot, at, keep, pieces, stride, MERGE)
    k = tl.load(coef + i, mask=keep, other=0.0)
    d = k * 0.0
    if OWN:
        d = tl.load(own + number + i, mask=keep, other=0.0)
    e = tl.where(keep[:, None, :], k[:, None, :] - base + d[:, None, :] - rest, 0.0)
    z = f * e - delta
    inner = gamma * r
    gain = 1.0 + e * 0.0
    s1, s2 = gain, gain
    if SCALE:
        s1, h = gate(w_v, w_b, r * z, unit_scale)
        gain = gain * h
    if AFFINE:
        s2, h = gate(w_a, b_a, (k + d)[:, None, :], unit_affine)
        gain = gain * h
    beta = g * t0[:, None, :]
    q = g * t1[:, None, :] + beta * (z - d[:, None, :])
    direct = beta * inner * gain
    u1, u2 = q * inner * gain * (1.0 - s1), q * inner * gain * (1.0 - s2)
    dz = direct
    if SCALE:
        dz = direct + u1 * w_v * r
    return (k + d)[:, None, :], d, e, z, gain, beta, q, direct, u1, u2, dz


@triton.jit
def channels_vjp(
    total, dot, coef, own, stats, shares, weight, center_weight, scale_weight, scale_bias, affine_weight, affine_bias,
    dweight, dbias, dcenter_weight, dscale_weight, dscale_bias, daffine_weight, daffine_bias, line, samples, number,
    channels, contexts, pieces, sample_stride, stride, size, least, unit_scale, unit_affine,
    OWN: tl.constexpr, MERGE: tl.constexpr, STD: tl.constexpr, STD_OF_VAR: tl.constexpr, CONTEXTS: tl.constexpr,
    CENTER: tl.constexpr, SCALE: tl.constexpr, AFFINE: tl.constexpr, WEIGHT: tl.constexpr, N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters, and constant and slope (2, N * C) of dx = scale dy + constant + slope (x - k)."""
    c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    inside = c < channels
    q_ = tl.arange(0, K_BLOCK)
    kept = (q_[:, None] < contexts) & inside[None, :]
    at = q_[:, None] * channels + c[None, :]
    rows = contexts * channels
    base, rest = tl.load(stats + at, mask=kept, other=0.0), tl.load(stats + rows + at, mask=kept, other=0.0)
    delta, r = (
        tl.load(stats + 4 * rows + at, mask=kept, other=0.0),
        tl.load(stats + 5 * rows + at, mask=kept, other=0.0),
    )
    gamma = per_channel(weight, at, kept, 1.0, WEIGHT)
    w_v, w_b = per_channel(scale_weight, c, inside, 0.0, SCALE), per_channel(scale_bias, c, inside, 0.0, SCALE)
    w_a, b_a = per_channel(affine_weight, c, inside, 0.0, AFFINE), per_channel(affine_bias, c, inside, 0.0, AFFINE)
    f = 1.0 + per_channel(center_weight, c, inside, 0.0, CENTER)
    mass = tl.zeros((K_BLOCK,), tl.float32)
    if CONTEXTS:
        mass = masses(shares, samples, contexts, N_BLOCK, K_BLOCK)
    zero = tl.zeros((N_BLOCK, K_BLOCK, C_BLOCK), tl.float32)
    by_gamma, by_beta, by_r, by_center = zero, zero, zero, zero
    by_m, by_v, by_b, by_a, by_c = zero, zero, zero, zero, zero
    for begin in range(0, samples, N_BLOCK):
        n = begin + tl.arange(0, N_BLOCK)
        keep = (n[:, None] < samples) & inside[None, :]
        g, a = weights_at(shares, mass, n, samples, contexts, size, least, CONTEXTS, K_BLOCK)
        mean, d, e, z, gain, beta, q, direct, u1, u2, dz = parts_at(
            total, dot, coef, own, n, c, keep, number, channels, pieces, sample_stride, stride, g, base[None, :, :],
            rest[None, :, :], delta[None, :, :], r[None, :, :], f, gamma[None, :, :], w_v, w_b, w_a, b_a, unit_scale,
            unit_affine, OWN, MERGE, SCALE, AFFINE,
        )  # fmt: skip
        by_gamma += q * gain
        by_beta += beta
        by_center -= dz
        if CENTER:
            by_m += dz * e
        if SCALE:
            by_r += u1 * w_v * z
            by_v += u1 * r[None, :, :] * z
            by_b += u1
        if AFFINE:
            by_a += u2 * mean
            by_c += u2
    dgamma = tl.sum(by_gamma, 0)
    dr = dgamma * gamma + tl.sum(by_r, 0)
    dcenter = tl.sum(by_center, 0)
    spread = tl.load(stats + 3 * rows + at, mask=kept, other=0.0)
    p = tl.load(stats + 6 * rows + at, mask=kept, other=0.0)
    dspread = -0.5 * dr * r * r * r
    if STD:
        dspread = -dr * r * r
    dspread = dspread * p
    if STD_OF_VAR:
        dspread = tl.where(spread >= TINY, 0.5 * tl.div_rn(dspread, tl.sqrt_rn(tl.maximum(spread, TINY))), 0.0)
    tl.store(dweight + at, dgamma * r, mask=kept)
    tl.store(dbias + at, tl.sum(by_beta, 0), mask=kept)
    if CENTER:
        between = tl.load(stats + 2 * rows + at, mask=kept, other=0.0)
        dm = tl.sum(by_m, 0) - (1.0 - p) * (base + rest) * dcenter + 2.0 * f[None, :] * between * dspread
        tl.store(dcenter_weight + c, tl.sum(dm, 0), mask=inside)
    if SCALE:
        tl.store(dscale_weight + c, tl.sum(tl.sum(by_v, 0), 0), mask=inside)
        tl.store(dscale_bias + c, tl.sum(tl.sum(by_b, 0), 0), mask=inside)
    if AFFINE:
        tl.store(daffine_weight + c, tl.sum(tl.sum(by_a, 0), 0), mask=inside)
        tl.store(daffine_bias + c, tl.sum(tl.sum(by_c, 0), 0), mask=inside)
    if OWN:
        dbatch = p * f[None, :] * dcenter
        curve = 2.0 * (f * f)[None, :] * dspread
        for begin in range(0, samples, N_BLOCK):
            n = begin + tl.arange(0, N_BLOCK)
            keep = (n[:, None] < samples) & inside[None, :]
            g, a = weights_at(shares, mass, n, samples, contexts, size, least, CONTEXTS, K_BLOCK)
            mean, d, e, z, gain, beta, q, direct, u1, u2, dz = parts_at(
                total, dot, coef, own, n, c, keep, number, channels, pieces, sample_stride, stride, g, base[None, :, :],
                rest[None, :, :], delta[None, :, :], r[None, :, :], f, gamma[None, :, :], w_v, w_b, w_a, b_a,
                unit_scale, unit_affine, OWN, MERGE, SCALE, AFFINE,
            )  # fmt: skip
            dmean = f * dz - direct + a * (dbatch[None, :, :] + curve[None, :, :] * e)
            if AFFINE:
                dmean += u2 * w_a
            slope = tl.sum(a * dspread[None, :, :], 1) * 2.0 / size
            i = n[:, None] * channels + c[None, :]
            tl.store(line + i, tl.sum(dmean, 1) / size - slope * d, mask=keep)
            tl.store(line + number + i, slope, mask=keep)

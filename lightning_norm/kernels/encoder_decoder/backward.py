"""Device code: the vector-Jacobian product of the equations in ``forward``, in three launches. Letters as there.

``vjp_affine`` turns the sums over x into the gradients of the decoders' outputs, ``vjp_decode`` these into the
decoders' weights' and the hidden units', ``vjp_encode`` these into the encoders' weights' and the statistics'. A
decoder and an encoder cannot share a launch, for every channel looks at all others.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.encoder_decoder.forward import (
    dropout_factor,
    gate_of,
    linear_at,
    read_statistics,
    sigmoid,
    spans_at,
    store_for_all_samples,
    tanh,
    times,
)
from lightning_norm.kernels.mixture.forward import per_channel
from lightning_norm.kernels.passes.backward import read_sum


@triton.jit
def outer(p, a, R_BLOCK: tl.constexpr):
    """Return the product p^T a of p (R, J) and a (R, K)."""
    if R_BLOCK == 1:
        y = tl.trans(p) * a
    else:
        y = tl.dot(tl.trans(p), a, input_precision="ieee")
    return y


@triton.jit(do_not_specialize=["samples", "pieces"])
def vjp_affine(
    total, dot, stats, outputs, weight, lambda_mu, lambda_sigma, lambda_beta, lambda_gamma, dweight, dbias, dmu_bias,
    dsigma_bias, dbeta_bias, dgamma_bias, gates, doutputs, direct, samples, rows, channels, pieces, sample_stride,
    stride, eps, BATCH: tl.constexpr, MERGE: tl.constexpr, GATED: tl.constexpr, WEIGHT: tl.constexpr,
    N_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the decoders' outputs (4, R, C), of mean and deviation past them (2, R, C), of the parameters.

    ``gates`` (4, programs) are the parts of the gates' gradients. A program takes a block of channels, all rows.
    """
    rows, channels = tl.cast(rows, tl.int64), tl.cast(channels, tl.int32)
    pid, number = tl.program_id(0), rows * channels
    c = pid * C_BLOCK + tl.arange(0, C_BLOCK)
    inside = c < channels
    w = per_channel(weight, c, inside, 1.0, WEIGHT)[None, :]
    l_mu, l_sigma = gate_of(lambda_mu, 0.0, True), gate_of(lambda_sigma, 0.0, True)
    # The gates, and 1 - g as a sigmoid of its own, which keeps its digits.
    g_mu, g_sigma, rest_mu, rest_sigma = sigmoid(l_mu), sigmoid(l_sigma), sigmoid(-l_mu), sigmoid(-l_sigma)
    l_beta, l_gamma = gate_of(lambda_beta, 1.0, GATED), gate_of(lambda_gamma, 1.0, GATED)
    least = tl.sqrt_rn(tl.zeros((), tl.float32) + tl.cast(eps, tl.float32))
    # One accumulator per gradient that is summed over rows.
    by = tl.zeros((R_BLOCK, C_BLOCK), tl.float32)
    by_w, by_b, by_mu, by_sigma, by_beta, by_gamma = by, by, by, by, by, by
    of_mu, of_sigma, of_beta, of_gamma = by, by, by, by
    for begin in range(0, rows, R_BLOCK):
        r = begin + tl.arange(0, R_BLOCK)
        keep = (r[:, None] < rows) & inside[None, :]
        at = r[:, None].to(tl.int64) * channels + c[None, :]
        # The one row of statistics gets the sums of all samples.
        if BATCH:
            s0, s1 = tl.zeros((N_BLOCK, C_BLOCK), tl.float32), tl.zeros((N_BLOCK, C_BLOCK), tl.float32)
            for start in range(0, samples, N_BLOCK):
                n = (start + tl.arange(0, N_BLOCK))[:, None].to(tl.int64)
                here, sample_mask = n * sample_stride + c[None, :], (n < samples) & inside[None, :]
                s0 += read_sum(total, here, sample_mask, pieces, stride, MERGE)
                s1 += read_sum(dot, here, sample_mask, pieces, stride, MERGE)
            t0, t1 = tl.sum(s0, 0)[None, :], tl.sum(s1, 0)[None, :]
        else:
            here = r[:, None].to(tl.int64) * sample_stride + c[None, :]
            t0 = read_sum(total, here, keep, pieces, stride, MERGE)
            t1 = read_sum(dot, here, keep, pieces, stride, MERGE)
        k, lo, std, v = read_statistics(stats, r, c, rows, channels, eps)
        mu, sigma = tl.load(outputs + at, mask=keep, other=0.0), tl.load(outputs + number + at, mask=keep, other=0.0)
        beta = tl.load(outputs + 2 * number + at, mask=keep, other=0.0)
        gamma = tl.load(outputs + 3 * number + at, mask=keep, other=0.0)
        # The affine map again, as ``decode`` had it.
        away = k - mu + lo
        d = std + g_sigma * (sigma - std)
        floor = tl.where(keep, tl.where(d < least, least, d), 1.0)
        bent, slope = tanh(beta)
        opened = sigmoid(gamma)
        scale = tl.div_rn(w + l_gamma * opened, floor)
        # q is the gradient of the numerator; dd of d, da of m.
        q = tl.where(keep, tl.div_rn(t1 + t0 * (g_mu * away - lo), floor), 0.0)
        dd = tl.where((d <= least) | (keep == 0), 0.0, -q * scale)
        da = tl.where(keep, t0 * scale, 0.0)
        # Through the gates to the decoders' outputs, ...
        end_mu = -g_mu * da
        end_sigma = tl.where(sigma <= 0.0, 0.0, g_sigma * dd)
        end_beta, end_gamma = l_beta * t0 * slope, l_gamma * q * opened * sigmoid(-gamma)
        # ... to what is summed over rows, ...
        by_w += q
        by_b += t0
        by_mu += end_mu
        by_sigma += end_sigma
        by_beta += end_beta
        by_gamma += end_gamma
        of_mu += da * away
        of_sigma += dd * tl.where(keep, sigma - std, 0.0)
        of_beta += t0 * bent
        of_gamma += q * opened
        tl.store(doutputs + at, end_mu, mask=keep)
        tl.store(doutputs + number + at, end_sigma, mask=keep)
        tl.store(doutputs + 2 * number + at, end_beta, mask=keep)
        tl.store(doutputs + 3 * number + at, end_gamma, mask=keep)
        # ... and past the decoders to mean and deviation themselves.
        tl.store(direct + at, -rest_mu * da, mask=keep)
        tl.store(direct + number + at, rest_sigma * dd, mask=keep)
    tl.store(dweight + c, tl.sum(by_w, 0), mask=inside)
    tl.store(dbias + c, tl.sum(by_b, 0), mask=inside)
    tl.store(dmu_bias + c, tl.sum(by_mu, 0), mask=inside)
    tl.store(dsigma_bias + c, tl.sum(by_sigma, 0), mask=inside)
    tl.store(dbeta_bias + c, tl.sum(by_beta, 0), mask=inside)
    tl.store(dgamma_bias + c, tl.sum(by_gamma, 0), mask=inside)
    # This program's part of each gate's gradient; ``vjp_encode`` adds the parts up.
    jobs = tl.num_programs(0)
    tl.store(gates + pid, tl.sum(tl.sum(of_mu, 0), 0) * g_mu * rest_mu)
    tl.store(gates + jobs + pid, tl.sum(tl.sum(of_sigma, 0), 0) * g_sigma * rest_sigma)
    tl.store(gates + 2 * jobs + pid, tl.sum(tl.sum(of_beta, 0), 0))
    tl.store(gates + 3 * jobs + pid, tl.sum(tl.sum(of_gamma, 0), 0))


@triton.jit
def vjp_decode(
    doutputs, hidden, mu_weight, sigma_weight, beta_weight, gamma_weight, dmu_weight, dsigma_weight, dbeta_weight,
    dgamma_weight, parts, rows, channels, std_units, rescale_units, span,
    SPANS: tl.constexpr, R_BLOCK: tl.constexpr, H_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """The adjoint of one decoder per second index: its hidden units' gradients, and its weight's.

    In the first programs sums over a span of channels of the gradients of the hidden units, (spans, 2, R, H); in the
    others a tile of the weight's gradient.
    """
    rows, channels = tl.cast(rows, tl.int64), tl.cast(channels, tl.int32)
    pid, j = tl.program_id(0), tl.program_id(1)
    units, before = tl.where(j < 2, std_units, rescale_units), tl.where(j < 2, 0, std_units)
    # Which decoder: mu, sigma, beta or gamma.
    weight, dweight = mu_weight, dmu_weight
    if j == 1:
        weight, dweight = sigma_weight, dsigma_weight
    if j == 2:
        weight, dweight = beta_weight, dbeta_weight
    if j == 3:
        weight, dweight = gamma_weight, dgamma_weight
    # The gradients of the four decoders lie one behind the other.
    doutputs += j * rows * channels
    total, blocks = std_units + rescale_units, tl.cdiv(units, H_BLOCK)
    sums = blocks * tl.cdiv(rows, R_BLOCK).to(tl.int32) * SPANS
    # Two kinds of programs in one launch, for neither reads what the other writes.
    job = tl.where(pid < sums, pid, pid - sums)
    h = job % blocks * H_BLOCK + tl.arange(0, H_BLOCK)
    # mu and beta read what follows from the mean (even), sigma and gamma what follows from the deviation (odd).
    side = j % 2 * rows
    # dh = p W, over the channels of a span.
    if pid < sums:
        part = job // blocks % SPANS
        r = job // blocks // SPANS * R_BLOCK + tl.arange(0, R_BLOCK)
        dh = tl.zeros((R_BLOCK, H_BLOCK), tl.float32)
        for begin in range(0, span, C_BLOCK):
            c = part * span + begin + tl.arange(0, C_BLOCK)
            p = linear_at(doutputs, r, c, channels, rows, channels)
            dh += times(p, tl.trans(linear_at(weight, c, h, units, channels, units)), R_BLOCK)
        at = (part * 2 * rows + side + r[:, None]) * total + before + h[None, :]
        tl.store(parts + at, dh, mask=(r[:, None] < rows) & (h[None, :] < units))
    # dW = p^T a, over all rows.
    elif job // blocks * C_BLOCK < channels:
        c = job // blocks * C_BLOCK + tl.arange(0, C_BLOCK)
        dw = tl.zeros((C_BLOCK, H_BLOCK), tl.float32)
        for begin in range(0, rows, R_BLOCK):
            r = begin + tl.arange(0, R_BLOCK)
            a = linear_at(hidden + side * total + before, r, h, total, rows, units)
            dw += outer(linear_at(doutputs, r, c, channels, rows, channels), a, R_BLOCK)
        at = c[:, None].to(tl.int64) * units + h[None, :]
        tl.store(dweight + at, dw, mask=(c[:, None] < channels) & (h[None, :] < units))


@triton.jit
def hidden_gradient(parts, hidden, r, h, q, before, rows, units, total, SPANS: tl.constexpr):
    """Return the gradient of the hidden units (R, H) before their ReLU."""
    keep = (r[:, None] < rows) & (h[None, :] < units)
    at = (q * rows + r[:, None]) * total + before + h[None, :]
    # The ReLU's mask follows from its own output, which was stored: 0 where it was cut off.
    a = tl.load(hidden + at, mask=keep, other=0.0)
    return tl.where(a <= 0.0, 0.0, spans_at(parts, at, keep, 2 * rows * total, SPANS))


@triton.jit
def through_encoder(
    parts, hidden, weight, r, c, before, rows, channels, units, total,
    SPANS: tl.constexpr, R_BLOCK: tl.constexpr, H_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return what an encoder sends to the gradients of the mean and of the standard deviation, (R, C) each."""
    dmean, dstd = tl.zeros((R_BLOCK, C_BLOCK), tl.float32), tl.zeros((R_BLOCK, C_BLOCK), tl.float32)
    for begin in range(0, units, H_BLOCK):
        h = begin + tl.arange(0, H_BLOCK)
        w = tl.trans(linear_at(weight, h, c, channels, units, channels))
        dmean += times(hidden_gradient(parts, hidden, r, h, 0, before, rows, units, total, SPANS), w, R_BLOCK)
        dstd += times(hidden_gradient(parts, hidden, r, h, 1, before, rows, units, total, SPANS), w, R_BLOCK)
    return dmean, dstd


@triton.jit
def vjp_statistics(
    job, parts, hidden, stats, direct, noise, drop_prob, std_weight, rescale_weight, dx_affine, samples, rows, channels,
    std_units, rescale_units, size, seed, drawn, eps, BATCH: tl.constexpr, DROP: tl.constexpr, SPANS: tl.constexpr,
    N_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr, H_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """Constant and slope (2, N * C) of dx = scale dy + constant + slope (x - k), for a tile of (R, C)."""
    blocks, number, total = tl.cdiv(channels, C_BLOCK), rows * channels, std_units + rescale_units
    r, c = job // blocks * R_BLOCK + tl.arange(0, R_BLOCK), job % blocks * C_BLOCK + tl.arange(0, C_BLOCK)
    # Through E_s with its dropout, through E_r, and past both.
    dmean, dstd = through_encoder(parts, hidden, std_weight, r, c, 0, rows, channels, std_units, total, SPANS, R_BLOCK, H_BLOCK, C_BLOCK)  # noqa: E501  # fmt: skip
    if DROP:
        dmean *= dropout_factor(noise, drop_prob, seed, drawn, 0, c, channels)
        dstd *= dropout_factor(noise, drop_prob, seed, drawn, 1, c, channels)
    more, most = through_encoder(parts, hidden, rescale_weight, r, c, std_units, rows, channels, rescale_units, total, SPANS, R_BLOCK, H_BLOCK, C_BLOCK)  # noqa: E501  # fmt: skip
    keep = (r[:, None] < rows) & (c[None, :] < channels)
    at = r[:, None].to(tl.int64) * channels + c[None, :]
    dmean += more + tl.load(direct + at, mask=keep, other=0.0)
    dstd += most + tl.load(direct + number + at, mask=keep, other=0.0)
    k, lo, std, v = read_statistics(stats, r, c, rows, channels, eps)
    # Elements behind each statistic.
    count = tl.cast(size, tl.float32)
    if BATCH:
        count = count * samples
    # d std / d x = (x - mean) / (count std), and x - mean = (x - k) - lo.
    slope = tl.div_rn(dstd, tl.where(keep, std, 1.0)) / count
    constant = dmean / count - slope * lo
    if BATCH:
        store_for_all_samples(dx_affine, constant, slope, c, samples, channels, N_BLOCK, C_BLOCK)
    else:
        tl.store(dx_affine + at, constant, mask=keep)
        tl.store(dx_affine + number + at, slope, mask=keep)


@triton.jit
def vjp_encoder(
    job, parts, hidden, stats, noise, drop_prob, dstd_weight, dstd_bias, drescale_weight, drescale_bias, rows, channels,
    std_units, rescale_units, seed, drawn, eps, DROP: tl.constexpr, SPANS: tl.constexpr, R_BLOCK: tl.constexpr,
    H_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of the gradients of an encoder's weight, and of its bias."""
    blocks, of_std = tl.cdiv(channels, C_BLOCK), tl.cdiv(std_units, H_BLOCK)
    j = job // blocks
    # Which encoder, and which of its hidden units.
    second = j >= of_std
    units, before = tl.where(second, rescale_units, std_units), tl.where(second, std_units, 0)
    dweight, dbias = dstd_weight, dstd_bias
    if second:
        dweight, dbias = drescale_weight, drescale_bias
    h = (j - tl.where(second, of_std, 0)) * H_BLOCK + tl.arange(0, H_BLOCK)
    c = job % blocks * C_BLOCK + tl.arange(0, C_BLOCK)
    dw, db = tl.zeros((H_BLOCK, C_BLOCK), tl.float32), tl.zeros((R_BLOCK, H_BLOCK), tl.float32)
    # dW = z^T input, over all rows: mean and deviation are two inputs of one layer.
    for begin in range(0, rows, R_BLOCK):
        r = begin + tl.arange(0, R_BLOCK)
        mean, lo, std, v = read_statistics(stats, r, c, rows, channels, eps)
        if DROP:
            mean = tl.where(second, mean, mean * dropout_factor(noise, drop_prob, seed, drawn, 0, c, channels))
            std = tl.where(second, std, std * dropout_factor(noise, drop_prob, seed, drawn, 1, c, channels))
        z = hidden_gradient(parts, hidden, r, h, 0, before, rows, units, std_units + rescale_units, SPANS)
        y = hidden_gradient(parts, hidden, r, h, 1, before, rows, units, std_units + rescale_units, SPANS)
        dw += outer(z, mean, R_BLOCK) + outer(y, std, R_BLOCK)
        db += z + y
    at = h[:, None].to(tl.int64) * channels + c[None, :]
    tl.store(dweight + at, dw, mask=(h[:, None] < units) & (c[None, :] < channels))
    tl.store(dbias + h, tl.sum(db, 0), mask=(h < units) & (job % blocks == 0))


@triton.jit(do_not_specialize=["seed", "drawn"])
def vjp_encode(
    parts, hidden, stats, direct, gates, noise, drop_prob, std_weight, rescale_weight, dstd_weight, dstd_bias,
    drescale_weight, drescale_bias, dgates, dx_affine, samples, rows, channels, std_units, rescale_units,
    statistics_jobs, gate_parts, size, seed, drawn, eps, BATCH: tl.constexpr, DROP: tl.constexpr, SPANS: tl.constexpr,
    N_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr, H_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the statistics in the first ``statistics_jobs`` programs, of the encoders in the others.

    Program 0 adds up the ``gate_parts`` parts of each gate's gradient, (4,).
    """
    rows, channels, pid = tl.cast(rows, tl.int64), tl.cast(channels, tl.int32), tl.program_id(0)
    if pid < statistics_jobs:
        vjp_statistics(
            pid, parts, hidden, stats, direct, noise, drop_prob, std_weight, rescale_weight, dx_affine, samples, rows,
            channels, std_units, rescale_units, size, seed, drawn, eps, BATCH, DROP, SPANS, N_BLOCK, R_BLOCK, H_BLOCK,
            C_BLOCK,
        )  # fmt: skip
    else:
        vjp_encoder(
            pid - statistics_jobs, parts, hidden, stats, noise, drop_prob, dstd_weight, dstd_bias, drescale_weight,
            drescale_bias, rows, channels, std_units, rescale_units, seed, drawn, eps, DROP, SPANS, R_BLOCK, H_BLOCK,
            C_BLOCK,
        )  # fmt: skip
    # The parts were stored two launches before.
    if pid == 0:
        for q in tl.static_range(4):
            part = tl.zeros((T_BLOCK,), tl.float32)
            for begin in range(0, gate_parts, T_BLOCK):
                i = begin + tl.arange(0, T_BLOCK)
                part += tl.load(gates + q * gate_parts + i, mask=i < gate_parts, other=0.0)
            tl.store(dgates + q, tl.sum(part, 0))

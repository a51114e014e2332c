"""Device code: the vector-Jacobian product of the equations in ``forward``, in three launches. Letters as there.

``vjp_affine`` turns the sums over x into the gradients of the decoders' outputs, ``vjp_decode`` these into the
decoders' weights' and the hidden units', ``vjp_encode`` these into the encoders' weights' and the statistics'. A
decoder and an encoder cannot share a launch, for every channel looks at all others.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Layout, Sums
from lightning_norm.kernels.encoder_decoder import flags as tuples
from lightning_norm.kernels.encoder_decoder.forward import (
    dropout_factor,
    gate_of,
    linear_at,
    read_statistics,
    shape_of,
    sigmoid,
    spans_at,
    store_for_all_samples,
    tanh,
    times,
)
from lightning_norm.kernels.mixture.forward import per_channel
from lightning_norm.kernels.passes.backward import read_sums
from lightning_norm.kernels.passes.forward import zeros


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
    sums: Sums, given: tuples.EncoderDecoderStatistics, weight, gates: tuples.Gates, out: tuples.AffineGradients,
    samples, channels, pieces, sample_stride, stride, eps, FLAGS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of the decoders' outputs (4, R, C), of mean and deviation past them (2, R, C), of the parameters.

    The gates' gradients are in parts, (4, programs). A program takes a block of channels, all rows.
    """
    layout = Layout(pieces, sample_stride, stride, 1, 1, 1)
    samples, rows, channels, _, _ = shape_of(samples, channels, 0, 0, FLAGS.batch)
    pid, number, outputs = tl.program_id(0), rows * channels, given.outputs
    c = pid * TILE.c + tl.arange(0, TILE.c)
    inside = c < channels
    w = per_channel(weight, c, inside, 1.0, FLAGS.weight)[None, :]
    l_mu, l_sigma = gate_of(gates.mu, 0.0, True), gate_of(gates.sigma, 0.0, True)
    # The gates, and 1 - g as a sigmoid of its own, which keeps its digits.
    g_mu, g_sigma, rest_mu, rest_sigma = sigmoid(l_mu), sigmoid(l_sigma), sigmoid(-l_mu), sigmoid(-l_sigma)
    l_beta, l_gamma = gate_of(gates.beta, 1.0, FLAGS.gated), gate_of(gates.gamma, 1.0, FLAGS.gated)
    least = tl.sqrt_rn(tl.zeros((), tl.float32) + tl.cast(eps, tl.float32))
    # One accumulator per gradient that is summed over rows.
    by = zeros(TILE.r, TILE.c)
    by_w, by_b, by_mu, by_sigma, by_beta, by_gamma = by, by, by, by, by, by
    of_mu, of_sigma, of_beta, of_gamma = by, by, by, by
    for begin in range(0, rows, TILE.r):
        r = begin + tl.arange(0, TILE.r)
        keep = (r[:, None] < rows) & inside[None, :]
        at = r[:, None].to(tl.int64) * channels + c[None, :]
        # The one row of statistics gets the sums of all samples.
        if FLAGS.batch:
            s0, s1 = zeros(TILE.n, TILE.c), zeros(TILE.n, TILE.c)
            for start in range(0, samples, TILE.n):
                n = (start + tl.arange(0, TILE.n))[:, None].to(tl.int64)
                here, sample_mask = n * sample_stride + c[None, :], (n < samples) & inside[None, :]
                total, dot = read_sums(sums, here, sample_mask, layout, FLAGS.merge)
                s0 += total
                s1 += dot
            t0, t1 = tl.sum(s0, 0)[None, :], tl.sum(s1, 0)[None, :]
        else:
            here = r[:, None].to(tl.int64) * sample_stride + c[None, :]
            t0, t1 = read_sums(sums, here, keep, layout, FLAGS.merge)
        k, lo, std, v = read_statistics(given.stats, r, c, rows, channels, eps)
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
        tl.store(out.outputs + at, end_mu, mask=keep)
        tl.store(out.outputs + number + at, end_sigma, mask=keep)
        tl.store(out.outputs + 2 * number + at, end_beta, mask=keep)
        tl.store(out.outputs + 3 * number + at, end_gamma, mask=keep)
        # ... and past the decoders to mean and deviation themselves.
        tl.store(out.direct + at, -rest_mu * da, mask=keep)
        tl.store(out.direct + number + at, rest_sigma * dd, mask=keep)
    tl.store(out.weight + c, tl.sum(by_w, 0), mask=inside)
    tl.store(out.bias + c, tl.sum(by_b, 0), mask=inside)
    tl.store(out.mu_bias + c, tl.sum(by_mu, 0), mask=inside)
    tl.store(out.sigma_bias + c, tl.sum(by_sigma, 0), mask=inside)
    tl.store(out.beta_bias + c, tl.sum(by_beta, 0), mask=inside)
    tl.store(out.gamma_bias + c, tl.sum(by_gamma, 0), mask=inside)
    # This program's part of each gate's gradient; ``vjp_encode`` adds the parts up.
    jobs = tl.num_programs(0)
    p_gates = out.gates + pid
    tl.store(p_gates, tl.sum(tl.sum(of_mu, 0), 0) * g_mu * rest_mu)
    tl.store(p_gates + jobs, tl.sum(tl.sum(of_sigma, 0), 0) * g_sigma * rest_sigma)
    tl.store(p_gates + 2 * jobs, tl.sum(tl.sum(of_beta, 0), 0))
    tl.store(p_gates + 3 * jobs, tl.sum(tl.sum(of_gamma, 0), 0))


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
def hidden_gradient(sums, hidden, r, h, q, before, units, shape, SPANS: tl.constexpr):
    """Return the gradient of the hidden units (R, H) before their ReLU."""
    rows, total = shape.rows, shape.std_units + shape.rescale_units
    keep = (r[:, None] < rows) & (h[None, :] < units)
    at = (q * rows + r[:, None]) * total + before + h[None, :]
    # The ReLU's mask follows from its own output, which was stored: 0 where it was cut off.
    a = tl.load(hidden + at, mask=keep, other=0.0)
    return tl.where(a <= 0.0, 0.0, spans_at(sums, at, keep, 2 * rows * total, SPANS))


@triton.jit
def through_encoder(sums, hidden, weight, r, c, before, units, shape, SPANS: tl.constexpr, TILE: tl.constexpr):
    """Return what an encoder sends to the gradients of the mean and of the standard deviation, (R, C) each."""
    dmean, dstd = zeros(TILE.r, TILE.c), zeros(TILE.r, TILE.c)
    for begin in range(0, units, TILE.h):
        h = begin + tl.arange(0, TILE.h)
        w = tl.trans(linear_at(weight, h, c, shape.channels, units, shape.channels))
        dmean += times(hidden_gradient(sums, hidden, r, h, 0, before, units, shape, SPANS), w, TILE.r)
        dstd += times(hidden_gradient(sums, hidden, r, h, 1, before, units, shape, SPANS), w, TILE.r)
    return dmean, dstd


@triton.jit
def vjp_statistics(
    job, sums, given, direct, encoders, dx_affine, shape, size, seed, eps, FLAGS: tl.constexpr, TILE: tl.constexpr
):
    """Constant and slope (2, N * C) of dx = scale dy + constant + slope (x - k), for a tile of (R, C)."""
    samples, rows, channels, std_units, rescale_units = shape
    blocks, number, hidden = tl.cdiv(channels, TILE.c), rows * channels, given.hidden
    r, c = job // blocks * TILE.r + tl.arange(0, TILE.r), job % blocks * TILE.c + tl.arange(0, TILE.c)
    # Through E_s with its dropout, through E_r, and past both.
    dmean, dstd = through_encoder(sums, hidden, encoders.std_weight, r, c, 0, std_units, shape, FLAGS.spans, TILE)
    if FLAGS.drop:
        dmean *= dropout_factor(encoders, seed, 0, c, channels)
        dstd *= dropout_factor(encoders, seed, 1, c, channels)
    more, most = through_encoder(
        sums, hidden, encoders.rescale_weight, r, c, std_units, rescale_units, shape, FLAGS.spans, TILE
    )
    keep = (r[:, None] < rows) & (c[None, :] < channels)
    at = r[:, None].to(tl.int64) * channels + c[None, :]
    dmean += more + tl.load(direct + at, mask=keep, other=0.0)
    dstd += most + tl.load(direct + number + at, mask=keep, other=0.0)
    k, lo, std, v = read_statistics(given.stats, r, c, rows, channels, eps)
    # Elements behind each statistic.
    count = tl.cast(size, tl.float32)
    if FLAGS.batch:
        count = count * samples
    # d std / d x = (x - mean) / (count std), and x - mean = (x - k) - lo.
    slope = tl.div_rn(dstd, tl.where(keep, std, 1.0)) / count
    constant = dmean / count - slope * lo
    if FLAGS.batch:
        store_for_all_samples(dx_affine, constant, slope, c, samples, channels, TILE.n, TILE.c)
    else:
        tl.store(dx_affine + at, constant, mask=keep)
        tl.store(dx_affine + number + at, slope, mask=keep)


@triton.jit
def vjp_encoder(job, sums, given, encoders, out, shape, seed, eps, FLAGS: tl.constexpr, TILE: tl.constexpr):
    """A tile of the gradients of an encoder's weight, and of its bias."""
    samples, rows, channels, std_units, rescale_units = shape
    blocks, of_std = tl.cdiv(channels, TILE.c), tl.cdiv(std_units, TILE.h)
    j = job // blocks
    # Which encoder, and which of its hidden units.
    second = j >= of_std
    units, before = tl.where(second, rescale_units, std_units), tl.where(second, std_units, 0)
    dweight, dbias = out.std_weight, out.std_bias
    if second:
        dweight, dbias = out.rescale_weight, out.rescale_bias
    h = (j - tl.where(second, of_std, 0)) * TILE.h + tl.arange(0, TILE.h)
    c = job % blocks * TILE.c + tl.arange(0, TILE.c)
    dw, db = zeros(TILE.h, TILE.c), zeros(TILE.r, TILE.h)
    # dW = z^T input, over all rows: mean and deviation are two inputs of one layer.
    for begin in range(0, rows, TILE.r):
        r = begin + tl.arange(0, TILE.r)
        mean, lo, std, v = read_statistics(given.stats, r, c, rows, channels, eps)
        if FLAGS.drop:
            mean = tl.where(second, mean, mean * dropout_factor(encoders, seed, 0, c, channels))
            std = tl.where(second, std, std * dropout_factor(encoders, seed, 1, c, channels))
        z = hidden_gradient(sums, given.hidden, r, h, 0, before, units, shape, FLAGS.spans)
        y = hidden_gradient(sums, given.hidden, r, h, 1, before, units, shape, FLAGS.spans)
        dw += outer(z, mean, TILE.r) + outer(y, std, TILE.r)
        db += z + y
    at = h[:, None].to(tl.int64) * channels + c[None, :]
    tl.store(dweight + at, dw, mask=(h[:, None] < units) & (c[None, :] < channels))
    tl.store(dbias + h, tl.sum(db, 0), mask=(h < units) & (job % blocks == 0))


@triton.jit(do_not_specialize=["seed"])
def vjp_encode(
    sums, given: tuples.EncoderDecoderStatistics, direct, gates, encoders: tuples.Encoders,
    out: tuples.EncoderGradients, samples, channels, std_units, rescale_units, statistics_jobs, gate_parts, size, seed,
    eps, FLAGS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of the statistics in the first ``statistics_jobs`` programs, of the encoders in the others.

    Program 0 adds up the ``gate_parts`` parts of each gate's gradient, (4,).
    """
    T: tl.constexpr = TILE.t
    shape, pid = shape_of(samples, channels, std_units, rescale_units, FLAGS.batch), tl.program_id(0)
    if pid < statistics_jobs:
        vjp_statistics(pid, sums, given, direct, encoders, out.dx_affine, shape, size, seed, eps, FLAGS, TILE)
    else:
        vjp_encoder(pid - statistics_jobs, sums, given, encoders, out, shape, seed, eps, FLAGS, TILE)
    # The parts were stored two launches before.
    if pid == 0:
        for q in tl.static_range(4):
            part = tl.zeros((T,), tl.float32)
            for begin in range(0, gate_parts, T):
                i = begin + tl.arange(0, T)
                part += tl.load(gates + q * gate_parts + i, mask=i < gate_parts, other=0.0)
            tl.store(out.gates + q, tl.sum(part, 0))

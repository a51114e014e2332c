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
def outer(b_p, b_a, R_BLOCK: tl.constexpr):
    """Return the product p^T a of p (R, J) and a (R, K)."""
    if R_BLOCK == 1:
        b_y = tl.trans(b_p) * b_a
    else:
        b_y = tl.dot(tl.trans(b_p), b_a, input_precision="ieee")
    return b_y


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
    i_c, number, outputs = tl.program_id(0), rows * channels, given.outputs
    o_c = i_c * TILE.c + tl.arange(0, TILE.c)
    m_c = o_c < channels
    b_w = per_channel(weight, o_c, m_c, 1.0, FLAGS.weight)[None, :]  # [1, TILE.c]
    l_mu, l_sigma = gate_of(gates.mu, 0.0, True), gate_of(gates.sigma, 0.0, True)
    # The gates, and 1 - g as a sigmoid of its own, which keeps its digits.
    g_mu, g_sigma, rest_mu, rest_sigma = sigmoid(l_mu), sigmoid(l_sigma), sigmoid(-l_mu), sigmoid(-l_sigma)
    l_beta, l_gamma = gate_of(gates.beta, 1.0, FLAGS.gated), gate_of(gates.gamma, 1.0, FLAGS.gated)
    least = tl.sqrt_rn(tl.zeros((), tl.float32) + tl.cast(eps, tl.float32))
    # One accumulator per gradient that is summed over rows.
    b_zero = zeros(TILE.r, TILE.c)
    b_by_w, b_by_b, b_by_mu, b_by_sigma, b_by_beta, b_by_gamma = b_zero, b_zero, b_zero, b_zero, b_zero, b_zero
    b_of_mu, b_of_sigma, b_of_beta, b_of_gamma = b_zero, b_zero, b_zero, b_zero
    for begin in range(0, rows, TILE.r):
        o_r = begin + tl.arange(0, TILE.r)
        m_rc = (o_r[:, None] < rows) & m_c[None, :]
        o_rc = o_r[:, None].to(tl.int64) * channels + o_c[None, :]  # [TILE.r, TILE.c]
        # The one row of statistics gets the sums of all samples.
        if FLAGS.batch:
            b_s0, b_s1 = zeros(TILE.n, TILE.c), zeros(TILE.n, TILE.c)
            for start in range(0, samples, TILE.n):
                o_n = (start + tl.arange(0, TILE.n))[:, None].to(tl.int64)  # [TILE.n, 1]
                o_at, m_nc = o_n * sample_stride + o_c[None, :], (o_n < samples) & m_c[None, :]
                b_total, b_dot = read_sums(sums, o_at, m_nc, layout, FLAGS.merge)
                b_s0 += b_total
                b_s1 += b_dot
            b_t0, b_t1 = tl.sum(b_s0, 0)[None, :], tl.sum(b_s1, 0)[None, :]  # [1, TILE.c]
        else:
            o_at = o_r[:, None].to(tl.int64) * sample_stride + o_c[None, :]
            b_t0, b_t1 = read_sums(sums, o_at, m_rc, layout, FLAGS.merge)
        b_k, b_lo, b_std, b_v = read_statistics(given.stats, o_r, o_c, rows, channels, eps)  # [TILE.r, TILE.c]
        b_mu = tl.load(outputs + o_rc, mask=m_rc, other=0.0)
        b_sigma = tl.load(outputs + number + o_rc, mask=m_rc, other=0.0)
        b_beta = tl.load(outputs + 2 * number + o_rc, mask=m_rc, other=0.0)
        b_gamma = tl.load(outputs + 3 * number + o_rc, mask=m_rc, other=0.0)
        # The affine map again, as ``decode`` had it.
        b_away = b_k - b_mu + b_lo
        b_d = b_std + g_sigma * (b_sigma - b_std)
        b_floor = tl.where(m_rc, tl.where(b_d < least, least, b_d), 1.0)
        b_bent, b_slope = tanh(b_beta)
        b_opened = sigmoid(b_gamma)
        b_scale = tl.div_rn(b_w + l_gamma * b_opened, b_floor)
        # q is the gradient of the numerator; dd of d, da of m.
        b_q = tl.where(m_rc, tl.div_rn(b_t1 + b_t0 * (g_mu * b_away - b_lo), b_floor), 0.0)
        b_dd = tl.where((b_d <= least) | (m_rc == 0), 0.0, -b_q * b_scale)
        b_da = tl.where(m_rc, b_t0 * b_scale, 0.0)
        # Through the gates to the decoders' outputs, ...
        b_end_mu = -g_mu * b_da
        b_end_sigma = tl.where(b_sigma <= 0.0, 0.0, g_sigma * b_dd)
        b_end_beta, b_end_gamma = l_beta * b_t0 * b_slope, l_gamma * b_q * b_opened * sigmoid(-b_gamma)
        # ... to what is summed over rows, ...
        b_by_w += b_q
        b_by_b += b_t0
        b_by_mu += b_end_mu
        b_by_sigma += b_end_sigma
        b_by_beta += b_end_beta
        b_by_gamma += b_end_gamma
        b_of_mu += b_da * b_away
        b_of_sigma += b_dd * tl.where(m_rc, b_sigma - b_std, 0.0)
        b_of_beta += b_t0 * b_bent
        b_of_gamma += b_q * b_opened
        tl.store(out.outputs + o_rc, b_end_mu, mask=m_rc)
        tl.store(out.outputs + number + o_rc, b_end_sigma, mask=m_rc)
        tl.store(out.outputs + 2 * number + o_rc, b_end_beta, mask=m_rc)
        tl.store(out.outputs + 3 * number + o_rc, b_end_gamma, mask=m_rc)
        # ... and past the decoders to mean and deviation themselves.
        tl.store(out.direct + o_rc, -rest_mu * b_da, mask=m_rc)
        tl.store(out.direct + number + o_rc, rest_sigma * b_dd, mask=m_rc)
    tl.store(out.weight + o_c, tl.sum(b_by_w, 0), mask=m_c)
    tl.store(out.bias + o_c, tl.sum(b_by_b, 0), mask=m_c)
    tl.store(out.mu_bias + o_c, tl.sum(b_by_mu, 0), mask=m_c)
    tl.store(out.sigma_bias + o_c, tl.sum(b_by_sigma, 0), mask=m_c)
    tl.store(out.beta_bias + o_c, tl.sum(b_by_beta, 0), mask=m_c)
    tl.store(out.gamma_bias + o_c, tl.sum(b_by_gamma, 0), mask=m_c)
    # This program's part of each gate's gradient; ``vjp_encode`` adds the parts up.
    jobs = tl.num_programs(0)
    p_gates = out.gates + i_c
    tl.store(p_gates, tl.sum(tl.sum(b_of_mu, 0), 0) * g_mu * rest_mu)
    tl.store(p_gates + jobs, tl.sum(tl.sum(b_of_sigma, 0), 0) * g_sigma * rest_sigma)
    tl.store(p_gates + 2 * jobs, tl.sum(tl.sum(b_of_beta, 0), 0))
    tl.store(p_gates + 3 * jobs, tl.sum(tl.sum(b_of_gamma, 0), 0))


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
    i_program, i_j = tl.program_id(0), tl.program_id(1)
    units, before = tl.where(i_j < 2, std_units, rescale_units), tl.where(i_j < 2, 0, std_units)
    # Which decoder: mu, sigma, beta or gamma.
    weight, dweight = mu_weight, dmu_weight
    if i_j == 1:
        weight, dweight = sigma_weight, dsigma_weight
    if i_j == 2:
        weight, dweight = beta_weight, dbeta_weight
    if i_j == 3:
        weight, dweight = gamma_weight, dgamma_weight
    # The gradients of the four decoders lie one behind the other.
    doutputs += i_j * rows * channels
    total, blocks = std_units + rescale_units, tl.cdiv(units, H_BLOCK)
    sums = blocks * tl.cdiv(rows, R_BLOCK).to(tl.int32) * SPANS
    # Two kinds of programs in one launch, for neither reads what the other writes.
    i_job = tl.where(i_program < sums, i_program, i_program - sums)
    o_h = i_job % blocks * H_BLOCK + tl.arange(0, H_BLOCK)
    # mu and beta read what follows from the mean (even), sigma and gamma what follows from the deviation (odd).
    side = i_j % 2 * rows
    # dh = p W, over the channels of a span.
    if i_program < sums:
        i_span = i_job // blocks % SPANS
        o_r = i_job // blocks // SPANS * R_BLOCK + tl.arange(0, R_BLOCK)
        b_dh = tl.zeros((R_BLOCK, H_BLOCK), tl.float32)
        for begin in range(0, span, C_BLOCK):
            o_c = i_span * span + begin + tl.arange(0, C_BLOCK)
            b_p = linear_at(doutputs, o_r, o_c, channels, rows, channels)  # [R_BLOCK, C_BLOCK]
            b_dh += times(b_p, tl.trans(linear_at(weight, o_c, o_h, units, channels, units)), R_BLOCK)
        o_at = (i_span * 2 * rows + side + o_r[:, None]) * total + before + o_h[None, :]
        tl.store(parts + o_at, b_dh, mask=(o_r[:, None] < rows) & (o_h[None, :] < units))
    # dW = p^T a, over all rows.
    elif i_job // blocks * C_BLOCK < channels:
        o_c = i_job // blocks * C_BLOCK + tl.arange(0, C_BLOCK)
        b_dw = tl.zeros((C_BLOCK, H_BLOCK), tl.float32)
        for begin in range(0, rows, R_BLOCK):
            o_r = begin + tl.arange(0, R_BLOCK)
            b_a = linear_at(hidden + side * total + before, o_r, o_h, total, rows, units)  # [R_BLOCK, H_BLOCK]
            b_dw += outer(linear_at(doutputs, o_r, o_c, channels, rows, channels), b_a, R_BLOCK)
        o_at = o_c[:, None].to(tl.int64) * units + o_h[None, :]
        tl.store(dweight + o_at, b_dw, mask=(o_c[:, None] < channels) & (o_h[None, :] < units))


@triton.jit
def hidden_gradient(sums, hidden, o_r, o_h, q, before, units, shape, SPANS: tl.constexpr):
    """Return the gradient of the hidden units (R, H) before their ReLU."""
    rows, total = shape.rows, shape.std_units + shape.rescale_units
    m_rh = (o_r[:, None] < rows) & (o_h[None, :] < units)
    o_rh = (q * rows + o_r[:, None]) * total + before + o_h[None, :]
    # The ReLU's mask follows from its own output, which was stored: 0 where it was cut off.
    b_a = tl.load(hidden + o_rh, mask=m_rh, other=0.0)
    return tl.where(b_a <= 0.0, 0.0, spans_at(sums, o_rh, m_rh, 2 * rows * total, SPANS))


@triton.jit
def through_encoder(sums, hidden, weight, o_r, o_c, before, units, shape, SPANS: tl.constexpr, TILE: tl.constexpr):
    """Return what an encoder sends to the gradients of the mean and of the standard deviation, (R, C) each."""
    b_dmean, b_dstd = zeros(TILE.r, TILE.c), zeros(TILE.r, TILE.c)
    for begin in range(0, units, TILE.h):
        o_h = begin + tl.arange(0, TILE.h)
        b_w = tl.trans(linear_at(weight, o_h, o_c, shape.channels, units, shape.channels))  # [TILE.c, TILE.h]
        b_dmean += times(hidden_gradient(sums, hidden, o_r, o_h, 0, before, units, shape, SPANS), b_w, TILE.r)
        b_dstd += times(hidden_gradient(sums, hidden, o_r, o_h, 1, before, units, shape, SPANS), b_w, TILE.r)
    return b_dmean, b_dstd


@triton.jit
def vjp_statistics(
    i_job, sums, given, direct, encoders, dx_affine, shape, size, seed, eps, FLAGS: tl.constexpr, TILE: tl.constexpr
):
    """Constant and slope (2, N * C) of dx = scale dy + constant + slope (x - k), for a tile of (R, C)."""
    samples, rows, channels, std_units, rescale_units = shape
    blocks, number, hidden = tl.cdiv(channels, TILE.c), rows * channels, given.hidden
    o_r, o_c = i_job // blocks * TILE.r + tl.arange(0, TILE.r), i_job % blocks * TILE.c + tl.arange(0, TILE.c)
    # Through E_s with its dropout, through E_r, and past both.
    b_dmean, b_dstd = through_encoder(
        sums, hidden, encoders.std_weight, o_r, o_c, 0, std_units, shape, FLAGS.spans, TILE
    )
    if FLAGS.drop:
        b_dmean *= dropout_factor(encoders, seed, 0, o_c, channels)
        b_dstd *= dropout_factor(encoders, seed, 1, o_c, channels)
    b_more, b_most = through_encoder(
        sums, hidden, encoders.rescale_weight, o_r, o_c, std_units, rescale_units, shape, FLAGS.spans, TILE
    )
    m_rc = (o_r[:, None] < rows) & (o_c[None, :] < channels)
    o_rc = o_r[:, None].to(tl.int64) * channels + o_c[None, :]  # [TILE.r, TILE.c]
    b_dmean += b_more + tl.load(direct + o_rc, mask=m_rc, other=0.0)
    b_dstd += b_most + tl.load(direct + number + o_rc, mask=m_rc, other=0.0)
    b_k, b_lo, b_std, b_v = read_statistics(given.stats, o_r, o_c, rows, channels, eps)
    # Elements behind each statistic.
    count = tl.cast(size, tl.float32)
    if FLAGS.batch:
        count = count * samples
    # d std / d x = (x - mean) / (count std), and x - mean = (x - k) - lo.
    b_slope = tl.div_rn(b_dstd, tl.where(m_rc, b_std, 1.0)) / count
    b_constant = b_dmean / count - b_slope * b_lo
    if FLAGS.batch:
        store_for_all_samples(dx_affine, b_constant, b_slope, o_c, samples, channels, TILE.n, TILE.c)
    else:
        tl.store(dx_affine + o_rc, b_constant, mask=m_rc)
        tl.store(dx_affine + number + o_rc, b_slope, mask=m_rc)


@triton.jit
def vjp_encoder(i_job, sums, given, encoders, out, shape, seed, eps, FLAGS: tl.constexpr, TILE: tl.constexpr):
    """A tile of the gradients of an encoder's weight, and of its bias."""
    samples, rows, channels, std_units, rescale_units = shape
    blocks, of_std = tl.cdiv(channels, TILE.c), tl.cdiv(std_units, TILE.h)
    i_h = i_job // blocks
    # Which encoder, and which of its hidden units.
    second = i_h >= of_std
    units, before = tl.where(second, rescale_units, std_units), tl.where(second, std_units, 0)
    dweight, dbias = out.std_weight, out.std_bias
    if second:
        dweight, dbias = out.rescale_weight, out.rescale_bias
    o_h = (i_h - tl.where(second, of_std, 0)) * TILE.h + tl.arange(0, TILE.h)
    o_c = i_job % blocks * TILE.c + tl.arange(0, TILE.c)
    b_dw, b_db = zeros(TILE.h, TILE.c), zeros(TILE.r, TILE.h)
    # dW = z^T input, over all rows: mean and deviation are two inputs of one layer.
    for begin in range(0, rows, TILE.r):
        o_r = begin + tl.arange(0, TILE.r)
        b_mean, b_lo, b_std, b_v = read_statistics(given.stats, o_r, o_c, rows, channels, eps)
        if FLAGS.drop:
            b_mean = tl.where(second, b_mean, b_mean * dropout_factor(encoders, seed, 0, o_c, channels))
            b_std = tl.where(second, b_std, b_std * dropout_factor(encoders, seed, 1, o_c, channels))
        b_z = hidden_gradient(sums, given.hidden, o_r, o_h, 0, before, units, shape, FLAGS.spans)  # [TILE.r, TILE.h]
        b_y = hidden_gradient(sums, given.hidden, o_r, o_h, 1, before, units, shape, FLAGS.spans)
        b_dw += outer(b_z, b_mean, TILE.r) + outer(b_y, b_std, TILE.r)
        b_db += b_z + b_y
    o_hc = o_h[:, None].to(tl.int64) * channels + o_c[None, :]  # [TILE.h, TILE.c]
    tl.store(dweight + o_hc, b_dw, mask=(o_h[:, None] < units) & (o_c[None, :] < channels))
    tl.store(dbias + o_h, tl.sum(b_db, 0), mask=(o_h < units) & (i_job % blocks == 0))


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
    shape, i_job = shape_of(samples, channels, std_units, rescale_units, FLAGS.batch), tl.program_id(0)
    if i_job < statistics_jobs:
        vjp_statistics(i_job, sums, given, direct, encoders, out.dx_affine, shape, size, seed, eps, FLAGS, TILE)
    else:
        vjp_encoder(i_job - statistics_jobs, sums, given, encoders, out, shape, seed, eps, FLAGS, TILE)
    # The parts were stored two launches before.
    if i_job == 0:
        for i_q in tl.static_range(4):
            b_part = tl.zeros((T,), tl.float32)
            for begin in range(0, gate_parts, T):
                o_part = begin + tl.arange(0, T)
                b_part += tl.load(gates + i_q * gate_parts + o_part, mask=o_part < gate_parts, other=0.0)
            tl.store(out.gates + i_q, tl.sum(b_part, 0))

"""Device code: the equations of two gated encoder-decoders, in two launches; ``backward`` holds their adjoint.

The statistics are rows of (R, C) numbers: those of each sample (R = N, asr), or the one row of the batch or of the
running ones (afn), of which every program pools the channels that it needs. ``encode`` leaves sums over channels behind
the hidden units of both encoders, ``decode`` makes of them

    m = mean + g (D_mu E_s mean - mean), d = std + g (relu(D_sigma E_s std) - std)
    scale = (weight + l sigmoid(D_gamma E_r std)) / max(d, sqrt(eps)), offset = bias + l tanh(D_beta E_r mean)

and y = scale (x - m) + offset, around k = hi of the mean. E is a linear layer and a ReLU, D a linear layer, g the
sigmoid of a gate's parameter. A matrix product over one row is a sum of products, over more rows a dot in full float32.
Long sums over channels are cut into spans, which are added where they are read, in order.

The letter q is 0 for the mean and what follows from it, else 1.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Moments
from lightning_norm.kernels.encoder_decoder.flags import Decoders, EncoderDecoderStatistics, Encoders, Gates, Shape
from lightning_norm.kernels.mixture.flags import Running
from lightning_norm.kernels.mixture.forward import per_channel, pool_columns, track
from lightning_norm.kernels.passes.forward import layout_of, read_moments, zeros


@triton.jit
def times(b_a, b_w, R_BLOCK: tl.constexpr):
    """Return the product a w^T of a (R, K) and w (J, K); a dot needs 16 rows or more, and one row has none to spare."""
    if R_BLOCK == 1:
        b_y = tl.sum(b_a * b_w, 1)[None, :]
    else:
        b_y = tl.dot(b_a, tl.trans(b_w), input_precision="ieee")
    return b_y


@triton.jit
def sigmoid(b_x):
    """Return 1 / (1 + exp(-x)), without an overflow on the way; 0 at -inf."""
    # exp of a number that is never positive.
    b_e = tl.exp(-tl.abs(b_x))
    one = tl.full((), 1.0, tl.float32)
    return tl.where(b_x >= 0.0, tl.div_rn(one, 1.0 + b_e), tl.div_rn(b_e, 1.0 + b_e))


@triton.jit
def tanh(b_x):
    """Return the hyperbolic tangent and its slope."""
    b_s = b_x * b_x
    # Near 0 by the series, where 1 - exp(-2 x) would lose digits.
    b_near = b_x + b_x * b_s * (-1.0 / 3.0 + b_s * (2.0 / 15.0 + b_s * (-17.0 / 315.0 + b_s * (62.0 / 2835.0))))
    b_e = tl.exp(-2.0 * tl.abs(b_x))
    # The slope as 4 e / (1 + e)^2: 1 - tanh^2 would lose its digits where tanh saturates.
    b_far = tl.div_rn(1.0 - b_e, 1.0 + b_e)
    return (
        tl.where(b_s < 0.0625, b_near, tl.where(b_x < 0.0, -b_far, b_far)),
        tl.div_rn(4.0 * b_e, (1.0 + b_e) * (1.0 + b_e)),
    )


@triton.jit
def gate_of(t, default: tl.constexpr, PRESENT: tl.constexpr):
    """Return a gate's parameter, or its default where the layer has none."""
    if PRESENT:
        value = tl.load(t).to(tl.float32)
    else:
        value = tl.full((), default, tl.float32)
    return value


@triton.jit
def linear_at(weight, o_j, o_k, width, rows, columns):
    """Return a tile (J, K) of a matrix whose rows are ``width`` apart."""
    m_jk = (o_j[:, None] < rows) & (o_k[None, :] < columns)
    return tl.load(weight + o_j[:, None].to(tl.int64) * width + o_k[None, :], mask=m_jk, other=0.0).to(tl.float32)


@triton.jit
def read_statistics(stats, o_r, o_c, rows, channels, eps):
    """Return the mean as hi and lo, the standard deviation sqrt(var + eps) and the variance, (R, C) each."""
    m_rc = (o_r[:, None] < rows) & (o_c[None, :] < channels)
    o_rc = o_r[:, None].to(tl.int64) * channels + o_c[None, :]
    number = rows * channels.to(tl.int64)
    b_k = tl.load(stats + o_rc, mask=m_rc, other=0.0)
    b_d = tl.load(stats + number + o_rc, mask=m_rc, other=0.0)
    b_v = tl.load(stats + 2 * number + o_rc, mask=m_rc, other=0.0)
    return b_k, b_d, tl.sqrt_rn(b_v + tl.cast(eps, tl.float32)), b_v


@triton.jit
def dropout_factor(encoders, seed, q, o_c, channels):
    """Return what mean or standard deviation is multiplied by before E_s, (1, C): 0 with probability ``drop_prob``.

    ``noise`` (2, C) is uniform in [0, 1); with a seed that is not negative it is drawn here, the same in every kernel.
    """
    p = tl.load(encoders.drop_prob).to(tl.float32)
    # Not told by a compile-time constant: a kernel that was not loaded before cannot be launched while a CUDA graph is
    # recorded.
    b_u = tl.load(encoders.noise + q * channels + o_c, mask=(o_c < channels) & (seed < 0), other=0.0)
    b_u = tl.where(seed < 0, b_u, tl.rand(seed, q * channels + o_c))[None, :]  # [1, C]
    # What is not dropped is scaled up, so that the expectation stays.
    left = tl.maximum(1.0 - p, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(b_u >= p, tl.div_rn(tl.full((), 1.0, tl.float32), left), 0.0)


@triton.jit
def shape_of(samples, channels, std_units, rescale_units, BATCH: tl.constexpr):
    """Return a ``Shape`` of a kernel's integers; one that is 1 may be a constant, which has no dtype of its own."""
    rows = tl.cast(1 if BATCH else samples, tl.int64)
    return Shape(samples, rows, tl.cast(channels, tl.int32), std_units, rescale_units)


@triton.jit
def store_for_all_samples(out, b_a, b_b, o_c, samples, channels, N_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr):
    """Store two rows (1, C) for every sample, (2, N * C): all samples share the statistics."""
    number = samples * channels.to(tl.int64)
    for begin in range(0, samples, N_BLOCK):
        o_n = begin + tl.arange(0, N_BLOCK)[:, None]  # [N_BLOCK, 1]
        p_out, m_nc = out + o_n.to(tl.int64) * channels + o_c[None, :], (o_n < samples) & (o_c[None, :] < channels)
        tl.store(p_out, tl.broadcast_to(b_a, (N_BLOCK, C_BLOCK)), mask=m_nc)
        tl.store(p_out + number, tl.broadcast_to(b_b, (N_BLOCK, C_BLOCK)), mask=m_nc)


@triton.jit(do_not_specialize=["samples", "pieces", "piece", "size", "fold", "seed"])
def encode(
    parts: Moments, running: Running, encoders: Encoders, stats, sums, samples, channels, std_units, rescale_units,
    span, pieces, sample_stride, stride, piece, size, fold, seed, eps, FLAGS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sums over a span of channels behind the hidden units, (spans, 2, R, H), and ``stats`` (3, R, C): hi, lo, var.

    The hidden units of E_s come first in H, then those of E_r. The grid is (blocks of rows, blocks of hidden units,
    spans).
    """
    layout = layout_of(pieces, sample_stride, stride, piece, size, fold)
    samples, rows, channels, _, _ = shape_of(samples, channels, std_units, rescale_units, FLAGS.batch)
    o_r = tl.program_id(0) * TILE.r + tl.arange(0, TILE.r)
    i_h, of_std = tl.program_id(1), tl.cdiv(std_units, TILE.h)
    # Which encoder this block of hidden units belongs to, and where it begins in it.
    second = i_h >= of_std
    units, before = tl.where(second, rescale_units, std_units), tl.where(second, std_units, 0)
    o_h = (i_h - tl.where(second, of_std, 0)) * TILE.h + tl.arange(0, TILE.h)
    # Chosen once, outside of the walk: both encoders then run the same code.
    weight = encoders.std_weight
    if second:
        weight = encoders.rescale_weight
    b_mean, b_std = zeros(TILE.r, TILE.h), zeros(TILE.r, TILE.h)
    number = rows * channels
    # Walk over the channels of the span.
    for begin in range(0, span, TILE.c):
        start = tl.program_id(2) * span + begin
        o_c = start + tl.arange(0, TILE.c)
        m_keep = (o_r[:, None] < rows) & (o_c[None, :] < channels)
        if FLAGS.batch and not FLAGS.frozen:
            # Every program alike: the same numbers are written, and read back behind the barrier.
            pool_columns(start // TILE.c, parts, stats, samples, channels, layout, 1.0, FLAGS.merge, TILE.n, TILE.c)
            tl.debug_barrier()
            b_k, b_d, b_s, b_v = read_statistics(stats, o_r, o_c, rows, channels, eps)
        else:
            # Running statistics, or each sample's moments; the first block of units stores them for ``decode``.
            if FLAGS.frozen:
                b_k = tl.load(running.mean + o_c, mask=o_c < channels, other=0.0).to(tl.float32)[None, :]
                b_v = tl.load(running.var + o_c, mask=o_c < channels, other=0.0).to(tl.float32)[None, :]
                b_d = b_k * 0.0
            else:
                o_at = o_r[:, None].to(tl.int64) * sample_stride + o_c[None, :]
                b_k, b_d, b_v = read_moments(parts, o_at, m_keep, layout, FLAGS.merge)
            if (FLAGS.frozen or FLAGS.merge) and i_h == 0:
                o_at = o_r[:, None].to(tl.int64) * channels + o_c[None, :]
                tl.store(stats + o_at, b_k, mask=m_keep)
                tl.store(stats + number + o_at, b_d, mask=m_keep)
                tl.store(stats + 2 * number + o_at, b_v, mask=m_keep)
            b_s = tl.sqrt_rn(b_v + tl.cast(eps, tl.float32))
        # Dropout acts before E_s alone, not before E_r.
        if FLAGS.drop:
            b_k = tl.where(second, b_k, b_k * dropout_factor(encoders, seed, 0, o_c, channels))
            b_s = tl.where(second, b_s, b_s * dropout_factor(encoders, seed, 1, o_c, channels))
        b_w = linear_at(weight, o_h, o_c, channels, units, channels)  # [TILE.h, TILE.c]
        b_mean += times(tl.where(m_keep, b_k, 0.0), b_w, TILE.r)
        b_std += times(tl.where(m_keep, b_s, 0.0), b_w, TILE.r)
    # Sums of the mean (q = 0), and of the deviation behind them.
    # One row holds the units of both encoders.
    total = std_units + rescale_units
    m_keep = (o_r[:, None] < rows) & (o_h[None, :] < units)
    o_at = (tl.program_id(2) * 2 * rows + o_r[:, None]) * total + before + o_h[None, :]
    tl.store(sums + o_at, b_mean, mask=m_keep)
    tl.store(sums + rows * total + o_at, b_std, mask=m_keep)


@triton.jit
def spans_at(parts, o_at, m_at, stride, SPANS: tl.constexpr):
    """Return a tile of sums, its spans added up in order."""
    b_total = tl.load(parts + o_at, mask=m_at, other=0.0)
    for i_s in tl.static_range(1, SPANS):
        b_total += tl.load(parts + i_s * stride + o_at, mask=m_at, other=0.0)
    return b_total


@triton.jit
def decoder_output(
    sums, first_bias, weight, bias, hidden, stores_hidden, o_r, o_c, q, before, units, shape, SPANS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Return a decoder's linear layer, (R, C); the hidden units before it are stored where ``stores_hidden``."""
    rows, channels, total = shape.rows, shape.channels, shape.std_units + shape.rescale_units
    # Block by block, for a layer may have more hidden units than a tile holds.
    b_y = zeros(TILE.r, TILE.c)
    for begin in range(0, units, TILE.h):
        o_h = begin + tl.arange(0, TILE.h)
        m_rh = (o_r[:, None] < rows) & (o_h[None, :] < units)
        o_rh = (q * rows + o_r[:, None]) * total + before + o_h[None, :]  # [TILE.r, TILE.h]
        # The encoder's sums, its bias and its ReLU, whose comparison keeps NaN.
        b_a = spans_at(sums, o_rh, m_rh, 2 * rows * total, SPANS)  # [TILE.r, TILE.h]
        b_a += tl.load(first_bias + o_h, mask=o_h < units, other=0.0).to(tl.float32)[None, :]
        b_a = tl.where((b_a <= 0.0) | (m_rh == 0), 0.0, b_a)  # NaN stays NaN
        tl.store(hidden + o_rh, b_a, mask=m_rh & stores_hidden)
        b_y += times(b_a, linear_at(weight, o_c, o_h, units, channels, units), TILE.r)
    return b_y + tl.load(bias + o_c, mask=o_c < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["samples"])
def decode(
    sums, decoders: Decoders, gates: Gates, weight, bias, running: Running, out: EncoderDecoderStatistics, samples,
    channels, std_units, rescale_units, eps, unbias, FLAGS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Pivot, scale and offset, the hidden units and the four decoders' outputs.

    The grid is (blocks of rows, blocks of channels). Program 0 moves the running statistics, which no other reads.
    """
    shape = shape_of(samples, channels, std_units, rescale_units, FLAGS.batch)
    rows, channels, hidden = shape.rows, shape.channels, out.hidden
    o_r = tl.program_id(0) * TILE.r + tl.arange(0, TILE.r)
    o_c = tl.program_id(1) * TILE.c + tl.arange(0, TILE.c)
    stores_hidden = tl.program_id(1) == 0
    # mu and sigma come from E_s; beta and gamma from E_r, whose units are behind those of E_s.
    b_mu = decoder_output(sums, decoders.std_bias, decoders.mu_weight, decoders.mu_bias, hidden, stores_hidden, o_r, o_c, 0, 0, std_units, shape, FLAGS.spans, TILE)  # noqa: E501  # fmt: skip
    b_sigma = decoder_output(sums, decoders.std_bias, decoders.sigma_weight, decoders.sigma_bias, hidden, stores_hidden, o_r, o_c, 1, 0, std_units, shape, FLAGS.spans, TILE)  # noqa: E501  # fmt: skip
    b_beta = decoder_output(sums, decoders.rescale_bias, decoders.beta_weight, decoders.beta_bias, hidden, stores_hidden, o_r, o_c, 0, std_units, rescale_units, shape, FLAGS.spans, TILE)  # noqa: E501  # fmt: skip
    b_gamma = decoder_output(sums, decoders.rescale_bias, decoders.gamma_weight, decoders.gamma_bias, hidden, stores_hidden, o_r, o_c, 1, std_units, rescale_units, shape, FLAGS.spans, TILE)  # noqa: E501  # fmt: skip
    # The ReLU of the deviation's decoder; the comparison keeps NaN.
    b_sigma = tl.where(b_sigma <= 0.0, 0.0, b_sigma)
    b_bent, b_slope = tanh(b_beta)
    b_k, b_lo, b_std, b_v = read_statistics(out.stats, o_r, o_c, rows, channels, eps)  # [TILE.r, TILE.c]
    # m is counted from k: lo and the gated difference, both small.
    b_ahead = sigmoid(gate_of(gates.mu, 0.0, True)) * (b_k - b_mu + b_lo)  # [TILE.r, TILE.c]
    g, e = sigmoid(gate_of(gates.sigma, 0.0, True)), tl.cast(eps, tl.float32)
    b_change = g * (b_sigma - b_std)
    b_d = b_std + b_change
    # d is bounded below by sqrt(eps).
    least = tl.sqrt_rn(tl.zeros((), tl.float32) + e)
    b_w = per_channel(weight, o_c, o_c < channels, 1.0, FLAGS.weight)[None, :]  # [1, TILE.c]
    b_b = per_channel(bias, o_c, o_c < channels, 0.0, FLAGS.bias)[None, :]
    m_rc = (o_r[:, None] < rows) & (o_c[None, :] < channels)
    b_more = gate_of(gates.gamma, 1.0, FLAGS.gated) * sigmoid(b_gamma)
    b_up, b_down = b_w + b_more, tl.where(m_rc, tl.where(b_d < least, least, b_d), 1.0)
    # What rounding left of std, d and the sum, so that the quotient is rounded once.
    b_s = b_v + e
    b_left = tl.where(b_std > 0.0, tl.div_rn(tl.fma(-b_std, b_std, b_s) + (e - (b_s - b_v)), 2.0 * b_std), 0.0)
    b_left = tl.where((b_d > least) & m_rc, b_change - (b_d - b_std) + (1.0 - g) * b_left, 0.0)
    # The quotient, and one Newton step with what its parts have left.
    b_scale = tl.div_rn(b_up, b_down)
    b_scale += tl.div_rn(tl.fma(-b_scale, b_down, b_up) + (b_more - (b_up - b_w)) - b_scale * b_left, b_down)
    b_offset = b_scale * (b_ahead - b_lo) + (b_b + gate_of(gates.beta, 1.0, FLAGS.gated) * b_bent)
    # What the backward pass needs.
    o_rc, number = o_r[:, None].to(tl.int64) * channels + o_c[None, :], rows * channels
    tl.store(out.outputs + o_rc, b_mu, mask=m_rc)
    tl.store(out.outputs + number + o_rc, b_sigma, mask=m_rc)
    tl.store(out.outputs + 2 * number + o_rc, b_beta, mask=m_rc)
    tl.store(out.outputs + 3 * number + o_rc, b_gamma, mask=m_rc)
    # One row for all samples, or one for each.
    affine = out.affine
    if FLAGS.batch:
        p_scale = affine + samples * channels.to(tl.int64)
        store_for_all_samples(p_scale, b_scale, b_offset, o_c, samples, channels, TILE.n, TILE.c)
        store_for_all_samples(affine, b_k, b_scale, o_c, samples, channels, TILE.n, TILE.c)
    else:
        tl.store(affine + o_rc, b_k, mask=m_rc)
        tl.store(affine + number + o_rc, b_scale, mask=m_rc)
        tl.store(affine + 2 * number + o_rc, b_offset, mask=m_rc)
    if FLAGS.track != 0 and tl.program_id(0) + tl.program_id(1) == 0:
        factor = tl.cast(unbias, tl.float32)
        track(out.stats, running, channels, factor, FLAGS.track, TILE.t)

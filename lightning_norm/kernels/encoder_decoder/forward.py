"""Device code: the equations of two gated encoder-decoders, in two launches; ``backward`` holds their adjoint.

The statistics are rows of (R, C) numbers: those of each sample (R = N, asr), or the one row of the batch or of the
running ones (afn), of which every program pools the channels that it needs. ``encode`` leaves sums over channels behind
the hidden units of both encoders, ``decode`` makes of them

    m = mean + g (D_mu E_s mean - mean), d = std + g (relu(D_sigma E_s std) - std)
    scale = (weight + l sigmoid(D_gamma E_r std)) / max(d, sqrt(eps)), offset = bias + l tanh(D_beta E_r mean)

and y = scale (x - m) + offset, around k = hi of the mean. E is a linear layer and a ReLU, D a linear layer, g the
sigmoid of a gate's parameter. A matrix product over one row is a sum of products, over more rows a dot in full float32.
Long sums over channels are cut into spans, which are added where they are read, in order.

The letters: r, c, h count rows, channels and hidden units; q is 0 for the mean and what follows from it, else 1.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Moments
from lightning_norm.kernels.encoder_decoder.flags import Decoders, EncoderDecoderStatistics, Encoders, Gates, Shape
from lightning_norm.kernels.mixture.flags import Running
from lightning_norm.kernels.mixture.forward import per_channel, pool_columns, track
from lightning_norm.kernels.passes.forward import layout_of, read_moments, zeros


@triton.jit
def times(a, w, R_BLOCK: tl.constexpr):
    """Return the product a w^T of a (R, K) and w (J, K); a dot needs 16 rows or more, and one row has none to spare."""
    if R_BLOCK == 1:
        y = tl.sum(a * w, 1)[None, :]
    else:
        y = tl.dot(a, tl.trans(w), input_precision="ieee")
    return y


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)), without an overflow on the way; 0 at -inf."""
    # exp of a number that is never positive.
    e = tl.exp(-tl.abs(x))
    one = tl.full((), 1.0, tl.float32)
    return tl.where(x >= 0.0, tl.div_rn(one, 1.0 + e), tl.div_rn(e, 1.0 + e))


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent and its slope."""
    s = x * x
    # Near 0 by the series, where 1 - exp(-2 x) would lose digits.
    near = x + x * s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0))))
    e = tl.exp(-2.0 * tl.abs(x))
    # The slope as 4 e / (1 + e)^2: 1 - tanh^2 would lose its digits where tanh saturates.
    far = tl.div_rn(1.0 - e, 1.0 + e)
    return tl.where(s < 0.0625, near, tl.where(x < 0.0, -far, far)), tl.div_rn(4.0 * e, (1.0 + e) * (1.0 + e))


@triton.jit
def gate_of(t, default: tl.constexpr, PRESENT: tl.constexpr):
    """Return a gate's parameter, or its default where the layer has none."""
    if PRESENT:
        value = tl.load(t).to(tl.float32)
    else:
        value = tl.full((), default, tl.float32)
    return value


@triton.jit
def linear_at(weight, j, k, width, rows, columns):
    """Return a tile (J, K) of a matrix whose rows are ``width`` apart."""
    keep = (j[:, None] < rows) & (k[None, :] < columns)
    return tl.load(weight + j[:, None].to(tl.int64) * width + k[None, :], mask=keep, other=0.0).to(tl.float32)


@triton.jit
def read_statistics(stats, r, c, rows, channels, eps):
    """Return the mean as hi and lo, the standard deviation sqrt(var + eps) and the variance, (R, C) each."""
    keep = (r[:, None] < rows) & (c[None, :] < channels)
    at = r[:, None].to(tl.int64) * channels + c[None, :]
    number = rows * channels.to(tl.int64)
    k = tl.load(stats + at, mask=keep, other=0.0)
    d = tl.load(stats + number + at, mask=keep, other=0.0)
    v = tl.load(stats + 2 * number + at, mask=keep, other=0.0)
    return k, d, tl.sqrt_rn(v + tl.cast(eps, tl.float32)), v


@triton.jit
def dropout_factor(encoders, seed, q, c, channels):
    """Return what mean or standard deviation is multiplied by before E_s, (1, C): 0 with probability ``drop_prob``.

    ``noise`` (2, C) is uniform in [0, 1); with a seed that is not negative it is drawn here, the same in every kernel.
    """
    p = tl.load(encoders.drop_prob).to(tl.float32)
    # Not told by a compile-time constant: a kernel that was not loaded before cannot be launched while a CUDA graph is
    # recorded.
    u = tl.load(encoders.noise + q * channels + c, mask=(c < channels) & (seed < 0), other=0.0)
    u = tl.where(seed < 0, u, tl.rand(seed, q * channels + c))[None, :]
    # What is not dropped is scaled up, so that the expectation stays.
    left = tl.maximum(1.0 - p, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(u >= p, tl.div_rn(tl.full((), 1.0, tl.float32), left), 0.0)


@triton.jit
def shape_of(samples, channels, std_units, rescale_units, BATCH: tl.constexpr):
    """Return a ``Shape`` of a kernel's integers; one that is 1 may be a constant, which has no dtype of its own."""
    rows = tl.cast(1 if BATCH else samples, tl.int64)
    return Shape(samples, rows, tl.cast(channels, tl.int32), std_units, rescale_units)


@triton.jit
def store_for_all_samples(out, a, b, c, samples, channels, N_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr):
    """Store two rows (1, C) for every sample, (2, N * C): all samples share the statistics."""
    number = samples * channels.to(tl.int64)
    for begin in range(0, samples, N_BLOCK):
        n = begin + tl.arange(0, N_BLOCK)[:, None]
        to, keep = out + n.to(tl.int64) * channels + c[None, :], (n < samples) & (c[None, :] < channels)
        tl.store(to, tl.broadcast_to(a, (N_BLOCK, C_BLOCK)), mask=keep)
        tl.store(to + number, tl.broadcast_to(b, (N_BLOCK, C_BLOCK)), mask=keep)


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
    r = tl.program_id(0) * TILE.r + tl.arange(0, TILE.r)
    j, of_std = tl.program_id(1), tl.cdiv(std_units, TILE.h)
    # Which encoder this block of hidden units belongs to, and where it begins in it.
    second = j >= of_std
    units, before = tl.where(second, rescale_units, std_units), tl.where(second, std_units, 0)
    h = (j - tl.where(second, of_std, 0)) * TILE.h + tl.arange(0, TILE.h)
    # Chosen once, outside of the walk: both encoders then run the same code.
    weight = encoders.std_weight
    if second:
        weight = encoders.rescale_weight
    mean, std = zeros(TILE.r, TILE.h), zeros(TILE.r, TILE.h)
    number = rows * channels
    # Walk over the channels of the span.
    for begin in range(0, span, TILE.c):
        start = tl.program_id(2) * span + begin
        c = start + tl.arange(0, TILE.c)
        keep = (r[:, None] < rows) & (c[None, :] < channels)
        if FLAGS.batch and not FLAGS.frozen:
            # Every program alike: the same numbers are written, and read back behind the barrier.
            pool_columns(start // TILE.c, parts, stats, samples, channels, layout, 1.0, FLAGS.merge, TILE.n, TILE.c)
            tl.debug_barrier()
            k, d, s, v = read_statistics(stats, r, c, rows, channels, eps)
        else:
            # Running statistics, or each sample's moments; the first block of units stores them for ``decode``.
            if FLAGS.frozen:
                k = tl.load(running.mean + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
                v = tl.load(running.var + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
                d = k * 0.0
            else:
                at = r[:, None].to(tl.int64) * sample_stride + c[None, :]
                k, d, v = read_moments(parts, at, keep, layout, FLAGS.merge)
            if (FLAGS.frozen or FLAGS.merge) and j == 0:
                at = r[:, None].to(tl.int64) * channels + c[None, :]
                tl.store(stats + at, k, mask=keep)
                tl.store(stats + number + at, d, mask=keep)
                tl.store(stats + 2 * number + at, v, mask=keep)
            s = tl.sqrt_rn(v + tl.cast(eps, tl.float32))
        # Dropout acts before E_s alone, not before E_r.
        if FLAGS.drop:
            k = tl.where(second, k, k * dropout_factor(encoders, seed, 0, c, channels))
            s = tl.where(second, s, s * dropout_factor(encoders, seed, 1, c, channels))
        w = linear_at(weight, h, c, channels, units, channels)
        mean += times(tl.where(keep, k, 0.0), w, TILE.r)
        std += times(tl.where(keep, s, 0.0), w, TILE.r)
    # Sums of the mean (q = 0), and of the deviation behind them.
    # One row holds the units of both encoders.
    total = std_units + rescale_units
    keep = (r[:, None] < rows) & (h[None, :] < units)
    at = (tl.program_id(2) * 2 * rows + r[:, None]) * total + before + h[None, :]
    tl.store(sums + at, mean, mask=keep)
    tl.store(sums + rows * total + at, std, mask=keep)


@triton.jit
def spans_at(parts, at, keep, stride, SPANS: tl.constexpr):
    """Return a tile of sums, its spans added up in order."""
    total = tl.load(parts + at, mask=keep, other=0.0)
    for s in tl.static_range(1, SPANS):
        total += tl.load(parts + s * stride + at, mask=keep, other=0.0)
    return total


@triton.jit
def decoder_output(
    sums, first_bias, weight, bias, hidden, stores_hidden, r, c, q, before, units, shape, SPANS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Return a decoder's linear layer, (R, C); the hidden units before it are stored where ``stores_hidden``."""
    rows, channels, total = shape.rows, shape.channels, shape.std_units + shape.rescale_units
    # Block by block, for a layer may have more hidden units than a tile holds.
    y = zeros(TILE.r, TILE.c)
    for begin in range(0, units, TILE.h):
        h = begin + tl.arange(0, TILE.h)
        keep = (r[:, None] < rows) & (h[None, :] < units)
        at = (q * rows + r[:, None]) * total + before + h[None, :]
        # The encoder's sums, its bias and its ReLU, whose comparison keeps NaN.
        a = spans_at(sums, at, keep, 2 * rows * total, SPANS)
        a += tl.load(first_bias + h, mask=h < units, other=0.0).to(tl.float32)[None, :]
        a = tl.where((a <= 0.0) | (keep == 0), 0.0, a)  # NaN stays NaN
        tl.store(hidden + at, a, mask=keep & stores_hidden)
        y += times(a, linear_at(weight, c, h, units, channels, units), TILE.r)
    return y + tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]


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
    r = tl.program_id(0) * TILE.r + tl.arange(0, TILE.r)
    c = tl.program_id(1) * TILE.c + tl.arange(0, TILE.c)
    stores_hidden = tl.program_id(1) == 0
    # mu and sigma come from E_s; beta and gamma from E_r, whose units are behind those of E_s.
    mu = decoder_output(sums, decoders.std_bias, decoders.mu_weight, decoders.mu_bias, hidden, stores_hidden, r, c, 0, 0, std_units, shape, FLAGS.spans, TILE)  # noqa: E501  # fmt: skip
    sigma = decoder_output(sums, decoders.std_bias, decoders.sigma_weight, decoders.sigma_bias, hidden, stores_hidden, r, c, 1, 0, std_units, shape, FLAGS.spans, TILE)  # noqa: E501  # fmt: skip
    beta = decoder_output(sums, decoders.rescale_bias, decoders.beta_weight, decoders.beta_bias, hidden, stores_hidden, r, c, 0, std_units, rescale_units, shape, FLAGS.spans, TILE)  # noqa: E501  # fmt: skip
    gamma = decoder_output(sums, decoders.rescale_bias, decoders.gamma_weight, decoders.gamma_bias, hidden, stores_hidden, r, c, 1, std_units, rescale_units, shape, FLAGS.spans, TILE)  # noqa: E501  # fmt: skip
    # The ReLU of the deviation's decoder; the comparison keeps NaN.
    sigma = tl.where(sigma <= 0.0, 0.0, sigma)
    bent, slope = tanh(beta)
    k, lo, std, v = read_statistics(out.stats, r, c, rows, channels, eps)
    # m is counted from k: lo and the gated difference, both small.
    ahead = sigmoid(gate_of(gates.mu, 0.0, True)) * (k - mu + lo)
    g, e = sigmoid(gate_of(gates.sigma, 0.0, True)), tl.cast(eps, tl.float32)
    change = g * (sigma - std)
    d = std + change
    # d is bounded below by sqrt(eps).
    least = tl.sqrt_rn(tl.zeros((), tl.float32) + e)
    w = per_channel(weight, c, c < channels, 1.0, FLAGS.weight)[None, :]
    b = per_channel(bias, c, c < channels, 0.0, FLAGS.bias)[None, :]
    keep = (r[:, None] < rows) & (c[None, :] < channels)
    more = gate_of(gates.gamma, 1.0, FLAGS.gated) * sigmoid(gamma)
    up, down = w + more, tl.where(keep, tl.where(d < least, least, d), 1.0)
    # What rounding left of std, d and the sum, so that the quotient is rounded once.
    s = v + e
    left = tl.where(std > 0.0, tl.div_rn(tl.fma(-std, std, s) + (e - (s - v)), 2.0 * std), 0.0)
    left = tl.where((d > least) & keep, change - (d - std) + (1.0 - g) * left, 0.0)
    # The quotient, and one Newton step with what its parts have left.
    scale = tl.div_rn(up, down)
    scale += tl.div_rn(tl.fma(-scale, down, up) + (more - (up - w)) - scale * left, down)
    offset = scale * (ahead - lo) + (b + gate_of(gates.beta, 1.0, FLAGS.gated) * bent)
    # What the backward pass needs.
    at, number = r[:, None].to(tl.int64) * channels + c[None, :], rows * channels
    tl.store(out.outputs + at, mu, mask=keep)
    tl.store(out.outputs + number + at, sigma, mask=keep)
    tl.store(out.outputs + 2 * number + at, beta, mask=keep)
    tl.store(out.outputs + 3 * number + at, gamma, mask=keep)
    # One row for all samples, or one for each.
    affine = out.affine
    if FLAGS.batch:
        p_scale = affine + samples * channels.to(tl.int64)
        store_for_all_samples(p_scale, scale, offset, c, samples, channels, TILE.n, TILE.c)
        store_for_all_samples(affine, k, scale, c, samples, channels, TILE.n, TILE.c)
    else:
        tl.store(affine + at, k, mask=keep)
        tl.store(affine + number + at, scale, mask=keep)
        tl.store(affine + 2 * number + at, offset, mask=keep)
    if FLAGS.track != 0 and tl.program_id(0) + tl.program_id(1) == 0:
        factor = tl.cast(unbias, tl.float32)
        track(out.stats, running, channels, factor, FLAGS.track, TILE.t)

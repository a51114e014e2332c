"""Device code: statistics of a batch on their way to other ranks and back, C numbers each.

What travels is what ``lightning_norm.ops.sync.Ranks.pool`` sends for an algebra in PyTorch, so that ranks on either may
meet: the number of elements, their sums and their sums of squares, (1 + 2 C) in float64, the only float64 in any
kernel; and on the way back the gradients of these. BLOCK channels to a program.
"""

import triton
import triton.language as tl


@triton.jit
def mean_of(batch, c, channels, keep):
    """Return the mean, hi + lo, in float64."""
    hi = tl.load(batch + c, mask=keep, other=0.0).to(tl.float64)
    return hi + tl.load(batch + channels + c, mask=keep, other=0.0).to(tl.float64)


@triton.jit
def pack(batch, message, count, channels, BLOCK: tl.constexpr):
    """Turn this rank's statistics (3, C), hi, lo and variance, into what travels."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = c < channels
    n = tl.cast(count, tl.float64)
    mean = mean_of(batch, c, channels, keep)
    var = tl.load(batch + 2 * channels + c, mask=keep, other=0.0).to(tl.float64)
    # n mean and n (var + mean^2): sums of x and of x^2, which ranks can add up.
    tl.store(message + 1 + c, n * mean, mask=keep)
    tl.store(message + 1 + channels + c, n * (var + mean * mean), mask=keep)
    if tl.program_id(0) == 0:
        tl.store(message, n)


@triton.jit
def unpack(gathered, batch, channels, BLOCK: tl.constexpr):
    """Turn the sum over ranks into the statistics of all of them, (3, C)."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = c < channels
    n = tl.load(gathered)
    mean = tl.load(gathered + 1 + c, mask=keep, other=0.0) / n
    # E[x^2] - E[x]^2 cancels where the mean is large; float64 has the digits to spare.
    var = tl.load(gathered + 1 + channels + c, mask=keep, other=0.0) / n - mean * mean
    hi = mean.to(tl.float32)
    tl.store(batch + c, hi, mask=keep)
    tl.store(batch + channels + c, (mean - hi.to(tl.float64)).to(tl.float32), mask=keep)
    tl.store(batch + 2 * channels + c, tl.where(var < 0.0, 0.0, var).to(tl.float32), mask=keep)


@triton.jit
def pack_gradient(dbatch, batch, gathered, message, channels, BLOCK: tl.constexpr):
    """Turn the gradients (2, C) of mean and variance of all ranks into those of the sums; none of the count."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = c < channels
    n = tl.load(gathered)
    mean = mean_of(batch, c, channels, keep)
    # f is the gradient of the mean, e of the variance.
    f = tl.load(dbatch + c, mask=keep, other=0.0).to(tl.float64)
    e = tl.load(dbatch + channels + c, mask=keep, other=0.0).to(tl.float64)
    tl.store(message + 1 + c, (f - 2.0 * mean * e) / n, mask=keep)
    tl.store(message + 1 + channels + c, e / n, mask=keep)
    if tl.program_id(0) == 0:
        tl.store(message, n * 0.0)


@triton.jit
def unpack_gradient(gathered, batch, dbatch, count, channels, BLOCK: tl.constexpr):
    """Turn the sum over ranks into the gradients of mean and variance, for the ``count`` elements of this rank.

    A third row is how much the mean's gradient exceeds what this rank gave, which float32 could not tell afterwards.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = c < channels
    n = tl.cast(count, tl.float64)
    mean = mean_of(batch, c, channels, keep)
    of_sum = tl.load(gathered + 1 + c, mask=keep, other=0.0)
    of_square = tl.load(gathered + 1 + channels + c, mask=keep, other=0.0)
    # d sum / d mean = n and d sum of squares / d mean = 2 n mean, for this rank's n.
    of_mean = (of_sum + 2.0 * mean * of_square) * n
    excess = of_mean - tl.load(dbatch + c, mask=keep, other=0.0).to(tl.float64)
    tl.store(dbatch + 2 * channels + c, excess.to(tl.float32), mask=keep)
    tl.store(dbatch + c, of_mean.to(tl.float32), mask=keep)
    tl.store(dbatch + channels + c, (of_square * n).to(tl.float32), mask=keep)

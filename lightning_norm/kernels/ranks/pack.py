"""Device code: statistics of a batch on their way to other ranks and back, C numbers each.

What travels is what ``lightning_norm.ops.sync.Ranks.pool`` sends for an algebra in PyTorch, so that ranks on either may
meet: the number of all elements, then a row of each rank with its number, means and variances, 1 + R (1 + 2 C) numbers
in float64, the only float64 in any kernel; and on the way back the gradients of these. A rank fills its own row among
zeros, and a sum over ranks completes the others. BLOCK channels to a program.
"""

import triton
import triton.language as tl


@triton.jit
def row_of(message, rank, channels):
    """Return where a rank's number is; its means and variances follow."""
    # In 64 bits: ranks times channels may exceed 2^31.
    return message + 1 + tl.cast(rank, tl.int64) * (1 + 2 * channels)


@triton.jit
def pooled_mean(gathered, c, channels, ranks, keep, BLOCK: tl.constexpr):
    """Return the mean over all ranks, in float64."""
    # The first number is the count of all ranks together.
    n, mean = tl.load(gathered), tl.zeros((BLOCK,), tl.float64)
    for rank in range(0, ranks):
        row = row_of(gathered, rank, channels)
        mean += tl.load(row) / n * tl.load(row + 1 + c, mask=keep, other=0.0)
    return mean


@triton.jit
def pack(batch, message, count, rank, channels, BLOCK: tl.constexpr):
    """Turn this rank's statistics (3, C), hi, lo and variance, into its row of what travels."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = c < channels
    n, row = tl.cast(count, tl.float64), row_of(message, tl.cast(rank, tl.int32), channels)
    # The mean comes as hi + lo, two float32 numbers, and travels as one float64.
    mean = tl.load(batch + c, mask=keep, other=0.0).to(tl.float64)
    mean += tl.load(batch + channels + c, mask=keep, other=0.0).to(tl.float64)
    tl.store(row + 1 + c, mean, mask=keep)
    tl.store(row + 1 + channels + c, tl.load(batch + 2 * channels + c, mask=keep, other=0.0).to(tl.float64), mask=keep)
    # Numbers that all channels share: one program writes them.
    if tl.program_id(0) == 0:
        tl.store(message, n)
        tl.store(row, n)


@triton.jit
def unpack(gathered, batch, channels, ranks, BLOCK: tl.constexpr):
    """Turn the rows of all ranks into the statistics of all of them, (3, C), by the law of total variance."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = c < channels
    n = tl.load(gathered)
    mean = pooled_mean(gathered, c, channels, ranks, keep, BLOCK)
    var = tl.zeros((BLOCK,), tl.float64)
    for rank in range(0, ranks):
        row = row_of(gathered, rank, channels)
        away = tl.load(row + 1 + c, mask=keep, other=0.0) - mean
        var += tl.load(row) / n * (tl.load(row + 1 + channels + c, mask=keep, other=0.0) + away * away)
    # Back to hi + lo, which the other kernels read.
    hi = mean.to(tl.float32)
    tl.store(batch + c, hi, mask=keep)
    tl.store(batch + channels + c, (mean - hi.to(tl.float64)).to(tl.float32), mask=keep)
    tl.store(batch + 2 * channels + c, var.to(tl.float32), mask=keep)


@triton.jit
def pack_gradient(dbatch, gathered, message, channels, ranks, BLOCK: tl.constexpr):
    """Turn the gradients (2, C) of mean and variance of all ranks into those of every rank's row; none of a number."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = c < channels
    n = tl.load(gathered)
    mean = pooled_mean(gathered, c, channels, ranks, keep, BLOCK)
    # f is the gradient of the mean, e of the variance.
    f = tl.load(dbatch + c, mask=keep, other=0.0).to(tl.float64)
    e = tl.load(dbatch + channels + c, mask=keep, other=0.0).to(tl.float64)
    if tl.program_id(0) == 0:
        tl.store(message, n * 0.0)
    for rank in range(0, ranks):
        row, out = row_of(gathered, rank, channels), row_of(message, rank, channels)
        # d var / d (mean of a rank) = 2 (n_r / n) (mean of that rank - mean).
        part, away = tl.load(row) / n, tl.load(row + 1 + c, mask=keep, other=0.0) - mean
        tl.store(out + 1 + c, part * (f + 2.0 * e * away), mask=keep)
        tl.store(out + 1 + channels + c, part * e, mask=keep)
        if tl.program_id(0) == 0:
            tl.store(out, n * 0.0)


@triton.jit
def unpack_gradient(dgathered, gathered, dbatch, rank, channels, ranks, BLOCK: tl.constexpr):
    """Turn the sum over ranks into the gradients of mean and variance, for the elements of this rank.

    The variance is taken around the mean of all ranks, as the rest of the backward pass takes it. A third row is how
    much the mean's gradient exceeds what this rank gave, which float32 could not tell afterwards.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = c < channels
    rank = tl.cast(rank, tl.int32)
    row, drow = row_of(gathered, rank, channels), row_of(dgathered, rank, channels)
    away = tl.load(row + 1 + c, mask=keep, other=0.0) - pooled_mean(gathered, c, channels, ranks, keep, BLOCK)
    of_var = tl.load(drow + 1 + channels + c, mask=keep, other=0.0)
    of_mean = tl.load(drow + 1 + c, mask=keep, other=0.0) - 2.0 * of_var * away
    excess = of_mean - tl.load(dbatch + c, mask=keep, other=0.0).to(tl.float64)
    tl.store(dbatch + 2 * channels + c, excess.to(tl.float32), mask=keep)
    tl.store(dbatch + c, of_mean.to(tl.float32), mask=keep)
    tl.store(dbatch + channels + c, of_var.to(tl.float32), mask=keep)

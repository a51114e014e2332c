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
def pooled_mean(gathered, o_c, channels, ranks, m_c, BLOCK: tl.constexpr):
    """Return the mean over all ranks, in float64."""
    # The first number is the count of all ranks together.
    n, b_mean = tl.load(gathered), tl.zeros((BLOCK,), tl.float64)
    for rank in range(0, ranks):
        p_row = row_of(gathered, rank, channels)
        b_mean += tl.load(p_row) / n * tl.load(p_row + 1 + o_c, mask=m_c, other=0.0)
    return b_mean


@triton.jit
def pack(batch, message, count, rank, channels, BLOCK: tl.constexpr):
    """Turn this rank's statistics (3, C), hi, lo and variance, into its row of what travels."""
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < channels
    n, p_row = tl.cast(count, tl.float64), row_of(message, tl.cast(rank, tl.int32), channels)
    # The mean comes as hi + lo, two float32 numbers, and travels as one float64.
    b_mean = tl.load(batch + o_c, mask=m_c, other=0.0).to(tl.float64)  # [BLOCK]
    b_mean += tl.load(batch + channels + o_c, mask=m_c, other=0.0).to(tl.float64)
    tl.store(p_row + 1 + o_c, b_mean, mask=m_c)
    tl.store(
        p_row + 1 + channels + o_c, tl.load(batch + 2 * channels + o_c, mask=m_c, other=0.0).to(tl.float64), mask=m_c
    )
    # Numbers that all channels share: one program writes them.
    if tl.program_id(0) == 0:
        tl.store(message, n)
        tl.store(p_row, n)


@triton.jit
def unpack(gathered, batch, channels, ranks, BLOCK: tl.constexpr):
    """Turn the rows of all ranks into the statistics of all of them, (3, C), by the law of total variance."""
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < channels
    n = tl.load(gathered)
    b_mean = pooled_mean(gathered, o_c, channels, ranks, m_c, BLOCK)  # [BLOCK]
    b_var = tl.zeros((BLOCK,), tl.float64)
    for rank in range(0, ranks):
        p_row = row_of(gathered, rank, channels)
        b_away = tl.load(p_row + 1 + o_c, mask=m_c, other=0.0) - b_mean
        b_var += tl.load(p_row) / n * (tl.load(p_row + 1 + channels + o_c, mask=m_c, other=0.0) + b_away * b_away)
    # Back to hi + lo, which the other kernels read.
    b_hi = b_mean.to(tl.float32)
    tl.store(batch + o_c, b_hi, mask=m_c)
    tl.store(batch + channels + o_c, (b_mean - b_hi.to(tl.float64)).to(tl.float32), mask=m_c)
    tl.store(batch + 2 * channels + o_c, b_var.to(tl.float32), mask=m_c)


@triton.jit
def pack_gradient(dbatch, gathered, message, channels, ranks, BLOCK: tl.constexpr):
    """Turn the gradients (2, C) of mean and variance of all ranks into those of every rank's row; none of a number."""
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < channels
    n = tl.load(gathered)
    b_mean = pooled_mean(gathered, o_c, channels, ranks, m_c, BLOCK)  # [BLOCK]
    # f is the gradient of the mean, e of the variance.
    b_f = tl.load(dbatch + o_c, mask=m_c, other=0.0).to(tl.float64)
    b_e = tl.load(dbatch + channels + o_c, mask=m_c, other=0.0).to(tl.float64)
    if tl.program_id(0) == 0:
        tl.store(message, n * 0.0)
    for rank in range(0, ranks):
        p_row, p_out = row_of(gathered, rank, channels), row_of(message, rank, channels)
        # d var / d (mean of a rank) = 2 (n_r / n) (mean of that rank - mean).
        part, b_away = tl.load(p_row) / n, tl.load(p_row + 1 + o_c, mask=m_c, other=0.0) - b_mean
        tl.store(p_out + 1 + o_c, part * (b_f + 2.0 * b_e * b_away), mask=m_c)
        tl.store(p_out + 1 + channels + o_c, part * b_e, mask=m_c)
        if tl.program_id(0) == 0:
            tl.store(p_out, n * 0.0)


@triton.jit
def unpack_gradient(dgathered, gathered, dbatch, rank, channels, ranks, BLOCK: tl.constexpr):
    """Turn the sum over ranks into the gradients of mean and variance, for the elements of this rank.

    The variance is taken around the mean of all ranks, as the rest of the backward pass takes it. A third row is how
    much the mean's gradient exceeds what this rank gave, which float32 could not tell afterwards.
    """
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < channels
    rank = tl.cast(rank, tl.int32)
    p_row, p_drow = row_of(gathered, rank, channels), row_of(dgathered, rank, channels)
    b_away = tl.load(p_row + 1 + o_c, mask=m_c, other=0.0) - pooled_mean(gathered, o_c, channels, ranks, m_c, BLOCK)
    b_of_var = tl.load(p_drow + 1 + channels + o_c, mask=m_c, other=0.0)
    b_of_mean = tl.load(p_drow + 1 + o_c, mask=m_c, other=0.0) - 2.0 * b_of_var * b_away
    b_excess = b_of_mean - tl.load(dbatch + o_c, mask=m_c, other=0.0).to(tl.float64)
    tl.store(dbatch + 2 * channels + o_c, b_excess.to(tl.float32), mask=m_c)
    tl.store(dbatch + o_c, b_of_mean.to(tl.float32), mask=m_c)
    tl.store(dbatch + channels + o_c, b_of_var.to(tl.float32), mask=m_c)

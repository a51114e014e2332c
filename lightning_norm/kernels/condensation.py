"""Device code: how alike the samples of a batch are, in one more read of x. See ``lightning_norm.ops.condensation``."""

import triton
import triton.language as tl

from lightning_norm.kernels.reductions import read_moments


@triton.jit
def norms(
    hi, lo, var, out, channels, pieces, sample_stride, stride, piece, size, fold, MERGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """1 / norm of each sample, from its moments; 0 for a sample of zeros, NaN stays."""
    piece, size, fold = tl.cast(piece, tl.int32), tl.cast(size, tl.int32), tl.cast(fold, tl.int32)
    n = tl.program_id(0)
    squares = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        keep = c < channels
        k, d, v = read_moments(hi, lo, var, n.to(tl.int64) * sample_stride + c, keep, pieces, stride, piece, size, fold, MERGE)  # noqa: E501  # fmt: skip
        squares += tl.where(keep, v + (k + d) * (k + d), 0.0)
    square = tl.sum(squares, 0) * (size * fold)
    tl.store(out + n, tl.where(square <= 0.0, 0.0, tl.rsqrt(tl.where(square <= 0.0, 1.0, square))))


@triton.jit
def directions(x, inverse, out, samples, units, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over a block of positions of (sum over samples of x / norm)^2; a sample is ``units`` * ALIGN elements."""
    units = tl.cast(units, tl.int64)
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = lane < units * ALIGN
    total = tl.zeros((BLOCK,), tl.float32)
    for n in range(0, samples):
        v = tl.load(x + tl.cast(n, tl.int64) * units * ALIGN + lane, mask=keep, other=0.0).to(tl.float32)
        total = tl.fma(v, tl.load(inverse + n), total)
    tl.store(out + tl.program_id(0), tl.sum(total * total, 0))


@triton.jit
def decide(
    inverse, parts, condensed, last, measured, kept_out, in_a_row, tracked, threshold, samples, jobs, min_updates,
    max_skip, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mean pairwise cosine, whether it makes the batch condensed, and the counters. One program."""
    alive, total = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, samples, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        alive += tl.where(tl.load(inverse + n, mask=n < samples, other=0.0) == 0.0, 0.0, 1.0)
    for begin in range(0, jobs, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        total += tl.load(parts + i, mask=i < jobs, other=0.0)
    m = tl.sum(alive, 0)
    similarity = (tl.sum(total, 0) - m) / tl.maximum(m * (m - 1.0), 1.0)
    defined = (tl.abs(similarity) < float("inf")) & (m >= 2.0)
    row = tl.load(in_a_row)
    yes = defined & (similarity > tl.load(threshold).to(tl.float32))
    yes = yes & (tl.load(tracked) >= min_updates) & (row < max_skip)
    tl.debug_barrier()  # every thread has read what is now written
    tl.store(condensed, yes.to(tl.float32))
    tl.store(last, similarity, mask=defined)
    tl.store(measured, tl.load(measured) + defined.to(tl.int64))
    tl.store(kept_out, tl.load(kept_out) + yes.to(tl.int64))
    tl.store(in_a_row, tl.where(yes, row + 1, 0))

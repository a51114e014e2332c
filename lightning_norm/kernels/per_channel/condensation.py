"""Device code: how alike the samples of a batch are, in one more read of x. See ``lightning_norm.ops.condensation``."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["samples", "units"])
def directions(x, inverse, out, samples, units, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Parts of |sum_n x_n / |x_n||^2: each program's sum over BLOCK positions of (sum over samples of x / norm)^2.

    A sample is ``units`` * ALIGN elements, ``inverse`` (N,) is 1 / norm. The grid is (blocks of positions,).
    """
    units = tl.cast(units, tl.int64)
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < units * ALIGN
    b_total = tl.zeros((BLOCK,), tl.float32)
    # One position of all samples after the other: no sum over samples leaves the program.
    for i_n in range(0, samples):
        b_x = tl.load(x + tl.cast(i_n, tl.int64) * units * ALIGN + o_x, mask=m_x, other=0.0).to(tl.float32)  # [BLOCK]
        b_total = tl.fma(b_x, tl.load(inverse + i_n), b_total)
    tl.store(out + tl.program_id(0), tl.sum(b_total * b_total, 0))


@triton.jit
def decide(survey_out, parts, state, threshold, samples, jobs, BLOCK: tl.constexpr):
    """Return whether the batch is condensed: its mean cosine similarity exceeds the threshold.

    similarity = (|sum_n x_n / |x_n||^2 - m) / (m (m - 1)) over the m samples that are not zero. Every program computes
    it for itself, and the first moves the counters.
    """
    p_inverse = survey_out + 2 + 3 + samples  # of a batch without contexts, see ``tracking``
    # A sample of zeros has no direction and does not count.
    b_alive, b_total = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, samples, BLOCK):
        o_n = begin + tl.arange(0, BLOCK)
        b_alive += tl.where(tl.load(p_inverse + o_n, mask=o_n < samples, other=0.0) == 0.0, 0.0, 1.0)
    for begin in range(0, jobs, BLOCK):
        o_job = begin + tl.arange(0, BLOCK)
        b_total += tl.load(parts + o_job, mask=o_job < jobs, other=0.0)
    m = tl.sum(b_alive, 0)
    similarity = (tl.sum(b_total, 0) - m) / tl.maximum(m * (m - 1.0), 1.0)
    # Not for fewer than two samples, nor with a NaN among them.
    defined = (tl.abs(similarity) < float("inf")) & (m >= 2.0)
    yes = defined & (similarity > tl.load(threshold).to(tl.float32)) & (tl.load(survey_out + 1) != 0.0)
    first = tl.program_id(0) == 0
    # Other warps still read the counters that are written below.
    row, number, skips = tl.load(state.in_a_row), tl.load(state.measured), tl.load(state.skipped_condensed)
    tl.debug_barrier()  # every thread has read what is now written
    tl.store(state.last, similarity, mask=defined & first)
    tl.store(state.measured, number + defined.to(tl.int64), mask=first)
    tl.store(state.skipped_condensed, skips + yes.to(tl.int64), mask=first)
    tl.store(state.in_a_row, tl.where(yes, row + 1, 0), mask=first)
    return yes

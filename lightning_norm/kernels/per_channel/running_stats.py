"""Device code: what must be known before each channel can stand alone, and how running statistics move.

``survey`` looks at whole samples and at the running statistics of all channels, in a launch of its own: so the programs
of ``channels_of`` may write running statistics that others would have to read. It leaves one row of numbers,
``survey_out``, K being the contexts (1 without):

* the batches counted, and whether a batch may count as condensed;
* (K,) each context's prior, its running mean responsibility; (K,) whether the context is new; (K,) the priors among
  those that are not new;
* (N,) how many channels of each sample are NaN or infinite;
* (N,) 1 / norm of each sample, or (N, K) its responsibilities, those of the contexts' gate.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Moments
from lightning_norm.kernels.passes.forward import layout_of, read_moments
from lightning_norm.kernels.per_channel.flags import Numbers, Rates, State

TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
SMALL: tl.constexpr = tl.constexpr(1e-30)
"""Mean square below which float32 squares lose digits: the least normal number over the machine epsilon, at least."""
NAN: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)
"""With it a NaN passes through tl.maximum and tl.minimum, as it does through torch's clamp."""


@triton.jit(do_not_specialize=["samples", "pieces", "piece", "size", "fold", "min_updates", "max_skip"])
def survey(
    parts: Moments, gate_weight, gate_bias, state: State, survey_out, samples, channels, contexts, pieces,
    sample_stride, stride, piece, size, fold, min_updates, max_skip, FLAGS: tl.constexpr, K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill ``survey_out``, see above. One program per sample, if needed, and a last one for the running statistics.

    With ``gate`` the responsibilities are softmax(gate_weight mean_n + gate_bias).
    """
    layout = layout_of(pieces, sample_stride, stride, piece, size, fold)
    whole = layout.size * layout.fold
    i_n, o_k = tl.program_id(0), tl.arange(0, K_BLOCK)
    m_k = o_k < contexts
    # The last program: counters, priors, and which contexts have never been met.
    if i_n == tl.num_programs(0) - 1:
        survey_running(state, survey_out, channels, contexts, min_updates, max_skip, FLAGS, K_BLOCK, BLOCK)
    else:
        if FLAGS.moves or FLAGS.condensed != 0 or FLAGS.gate:
            # A sample: its norm, its NaNs and infinities, its logits, all channels at once.
            b_bad = tl.zeros((BLOCK,), tl.int32)
            b_squares = tl.zeros((BLOCK,), tl.float32)
            b_logits = tl.zeros((K_BLOCK, BLOCK), tl.float32)
            for begin in range(0, channels, BLOCK):
                o_c = begin + tl.arange(0, BLOCK)
                m_c = o_c < channels
                b_k, b_d, b_v = read_moments(parts, i_n.to(tl.int64) * sample_stride + o_c, m_c, layout, FLAGS.merge)
                # Written so that a NaN, for which every comparison is false, counts as bad.
                b_bad += tl.where(m_c & ~(tl.abs(b_k + b_v) < float("inf")), 1, 0)
                if FLAGS.condensed != 0:
                    # The mean square of x in this channel: its variance and its mean squared.
                    b_squares += tl.where(m_c, b_v + (b_k + b_d) * (b_k + b_d), 0.0)
                if FLAGS.gate:
                    m_kc = m_k[:, None] & m_c[None, :]
                    b_w = tl.load(gate_weight + o_k[:, None] * channels + o_c[None, :], mask=m_kc, other=0.0)
                    b_logits += tl.where(m_kc, b_w.to(tl.float32) * (b_k + b_d)[None, :], 0.0)
            # Behind the numbers about contexts.
            p_left = survey_out + 2 + 3 * contexts
            tl.store(p_left + i_n, tl.sum(b_bad, 0).to(tl.float32))
            if FLAGS.condensed != 0:  # 0 for a sample of zeros, NaN stays
                square = tl.sum(b_squares, 0) * whole
                # Squares that left float32's range say nothing about the norm: no condensation for this batch.
                least = SMALL * whole * channels
                square = tl.where((square > 0.0) & ((square < least) | (square == float("inf"))), float("nan"), square)
                tl.store(p_left + samples + i_n, tl.where(square <= 0.0, 0.0, tl.rsqrt(tl.where(square <= 0.0, 1.0, square))))  # noqa: E501  # fmt: skip
            if FLAGS.gate:
                # Lanes beyond K get a logit so low that they take no part.
                b_logit = tl.sum(b_logits, 1) + tl.load(gate_bias + o_k, mask=m_k, other=0.0).to(tl.float32)
                b_logit = tl.where(m_k, b_logit, -1e30)
                b_g = tl.where(m_k, tl.exp(b_logit - tl.max(b_logit, 0)), 0.0)
                tl.store(p_left + samples + i_n * contexts + o_k, tl.div_rn(b_g, tl.sum(b_g, 0) + b_g * 0.0), mask=m_k)


@triton.jit
def survey_running(
    state, survey_out, channels, contexts, min_updates, max_skip, FLAGS: tl.constexpr, K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill the head of ``survey_out``: what concerns the running statistics and the contexts."""
    o_k = tl.arange(0, K_BLOCK)
    m_k = o_k < contexts
    count, allowed = tl.zeros((), tl.int64), tl.zeros((), tl.int32)
    b_old, b_known_prior, m_new = tl.zeros((K_BLOCK,), tl.float32), tl.zeros((K_BLOCK,), tl.float32), o_k < 0
    if FLAGS.moves:
        count = tl.load(state.tracked)
    if FLAGS.condensed != 0:
        allowed = ((count >= min_updates) & (tl.load(state.in_a_row) < max_skip)).to(tl.int32)
    if FLAGS.contexts:
        b_old = tl.where(m_k, tl.cast(1.0, tl.float32) / contexts, 0.0)
        if FLAGS.known:
            b_old = tl.load(state.prior + o_k, mask=m_k, other=0.0)
            # A context is new while its statistics are as they were made: means 0 and variances 1.
            b_moved = tl.zeros((K_BLOCK, BLOCK), tl.int32)
            for begin in range(0, channels, BLOCK):
                o_c = begin + tl.arange(0, BLOCK)
                o_kc, m_kc = o_k[:, None] * channels + o_c[None, :], m_k[:, None] & (o_c < channels)[None, :]
                b_m = tl.load(state.mean + o_kc, mask=m_kc, other=0.0)  # [K_BLOCK, BLOCK]
                b_v = tl.load(state.var + o_kc, mask=m_kc, other=1.0)
                b_moved += tl.where((b_m == 0.0) & (b_v == 1.0), 0, 1)
            m_new = tl.sum(b_moved, 1) == 0
        # New contexts count for nothing as long as there is an old one.
        any_old = tl.sum(tl.where(m_new, 0, 1), 0) > 0
        b_known_prior = tl.where(m_new & any_old, 0.0, b_old)
        b_known_prior = b_known_prior / tl.maximum(tl.sum(b_known_prior, 0), TINY, propagate_nan=NAN)
    tl.store(survey_out, count.to(tl.float32))
    tl.store(survey_out + 1, allowed.to(tl.float32))
    tl.store(survey_out + 2 + o_k, b_old, mask=m_k)
    tl.store(survey_out + 2 + contexts + o_k, m_new.to(tl.float32), mask=m_k)
    tl.store(survey_out + 2 + 2 * contexts + o_k, b_known_prior, mask=m_k)


@triton.jit
def move(
    b_target, b_variance, b_fraction, off, enough, state, rate, survey_out, pooled, o_kc, m_kc, first, looked_at,
    channels, contexts, FLAGS: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move some channels (K, C) towards ``b_target`` and ``b_variance``, unless x has a NaN or an infinity.

    running += step (target - running). Without contexts step is the momentum, or with ``track`` 2 one over the number
    of batches. With contexts it is scaled by the context's ``b_fraction`` of the batch, and the priors move too. The
    ``first`` channels move the counters. Of ``looked_at`` parts of x ``survey_out`` tells what is not finite. A channel
    whose statistics are not finite though x is, as with a NaN among the parameters, stays.
    """
    # Whether x is finite is the same for all programs, or some channels would move and others not.
    b_bad = tl.zeros((BLOCK,), tl.int32)
    if FLAGS.ranks:  # of which all see the same
        for begin in range(0, channels, BLOCK):
            o_c = begin + tl.arange(0, BLOCK)
            b_mean = tl.load(pooled + o_c, mask=o_c < channels, other=0.0)
            b_var = tl.load(pooled + 2 * channels + o_c, mask=o_c < channels, other=0.0)
            b_bad += tl.where(tl.abs(b_mean + b_var) < float("inf"), 0, 1)
    else:
        for begin in range(0, looked_at, BLOCK):
            o_n = begin + tl.arange(0, BLOCK)
            b_bad += tl.where(
                tl.load(survey_out + 2 + 3 * contexts + o_n, mask=o_n < looked_at, other=0.0) == 0.0, 0, 1
            )
    finite = tl.sum(b_bad, 0) == 0
    if FLAGS.ranks:
        finite = finite & enough
    if FLAGS.contexts:  # whose gate may have a NaN among its parameters
        m_known = tl.abs(b_fraction) < float("inf")  # [K_BLOCK]
        finite = finite & (tl.sum(tl.where((tl.arange(0, K_BLOCK) < contexts) & ~m_known, 1, 0), 0) == 0)
    # A condensed batch is finite, but does not count (``off``).
    counts = finite & ~off
    times = tl.maximum(tl.load(survey_out) + counts.to(tl.float32), 1.0)
    if FLAGS.track == 2:
        speed = 1.0 / times
    else:
        speed = tl.load(rate).to(tl.float32)
    o_k = tl.arange(0, K_BLOCK)
    m_k = o_k < contexts
    b_step = tl.zeros((K_BLOCK,), tl.float32) + speed
    m_may = m_kc & counts & (tl.abs(b_target + b_variance) < float("inf"))
    b_new = b_step
    # A context moves as far as samples of it were met, at once where it is new.
    if FLAGS.contexts:
        b_old = tl.load(survey_out + 2 + o_k, mask=m_k, other=0.0)
        b_new = b_old + speed * (b_fraction - b_old)
        if FLAGS.track == 2:
            b_step = b_fraction / tl.maximum(times * b_new, TINY, propagate_nan=NAN)
        else:
            b_step = speed * tl.minimum(contexts * b_fraction, 1.0, propagate_nan=NAN)
        b_step = tl.where(tl.load(survey_out + 2 + contexts + o_k, mask=m_k, other=0.0) != 0.0, 1.0, b_step)
        m_may = m_may & (b_fraction > 0.0)[:, None]
    # Read, compute, and only then write, behind the barrier.
    b_mean = tl.load(state.mean + o_kc, mask=m_kc, other=0.0)
    b_var = tl.load(state.var + o_kc, mask=m_kc, other=0.0)
    b_mean = (1.0 - b_step)[:, None] * b_mean + b_step[:, None] * b_target
    b_var = (1.0 - b_step)[:, None] * b_var + b_step[:, None] * b_variance
    count, skips = tl.load(state.tracked) + counts.to(tl.int64), tl.load(state.skipped) + 1 - finite.to(tl.int64)
    tl.debug_barrier()  # every thread has read what is now written
    tl.store(state.mean + o_kc, b_mean, mask=m_may)
    tl.store(state.var + o_kc, b_var, mask=m_may)
    tl.store(state.tracked, count, mask=first)
    tl.store(state.skipped, skips, mask=first)
    if FLAGS.contexts:
        tl.store(state.prior + o_k, b_new, mask=m_k & finite & first)


@triton.jit
def new_weight(state, rate, channels, power, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    """Return alpha, 1 / m^power or the rate, and the number m of this batch; of a first one that is copied alpha is 1.

    Statistics that were moved in from another layer count as one batch.
    """
    steps = tl.load(state.updates) + 1
    if steps == 1:
        # Means that are not 0 were moved in.
        b_moved = tl.zeros((BLOCK,), tl.int32)
        for begin in range(0, channels, BLOCK):
            o_c = begin + tl.arange(0, BLOCK)
            b_moved += tl.where(tl.load(state.mean + o_c, mask=o_c < channels, other=0.0) != 0.0, 1, 0)
        steps += (tl.sum(b_moved, 0) > 0).to(tl.int64)
    if FLAGS.powers:
        alpha = tl.exp(-tl.cast(power, tl.float32) * tl.log(steps.to(tl.float32)))
    else:
        alpha = tl.load(rate).to(tl.float32)
    if FLAGS.copies_first:
        alpha = tl.where(steps == 1, 1.0, alpha)
    return alpha, steps


@triton.jit
def commit(
    stats, state: State, rates: Rates, channels, numbers: Numbers, FLAGS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Store blended statistics and how far they were from the batch's, unless one is NaN or infinite. One program.

    gap[0] is the mean over channels of |mean_B - mean| / std, gap[1] of |std_B - std| / std; mean and std are blended.
    With ``averages`` these move averages of themselves, by a rate of their own, in the same launch.
    """
    # First look at all channels: either all of them move or none.
    b_bad = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, channels, BLOCK):
        o_c = begin + tl.arange(0, BLOCK)
        m_c = o_c < channels
        # The batch's variance, and on one rank its mean: their sum is finite where both are.
        b_either = tl.load(stats + 3 * channels + o_c, mask=m_c, other=0.0)
        if not FLAGS.ranks:
            b_either += tl.load(stats + o_c, mask=m_c, other=0.0)
        b_bad += tl.where(tl.abs(b_either) < float("inf"), 0, 1)
    finite = tl.sum(b_bad, 0) == 0
    skips, count = tl.load(state.skipped) + 1 - finite.to(tl.int64), tl.load(state.tracked) + finite.to(tl.int64)
    alpha, steps = new_weight(state, rates.rate, channels, numbers.power, FLAGS, BLOCK)
    inner = tl.cast(numbers.inner, tl.float32)
    # How far the blended statistics are from the batch's own.
    b_far = tl.zeros((BLOCK,), tl.float32)
    b_wide = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, channels, BLOCK):
        o_c = begin + tl.arange(0, BLOCK)
        m_c = o_c < channels
        b_now = tl.load(stats + 3 * channels + o_c, mask=m_c, other=0.0)
        b_was = tl.load(stats + 8 * channels + o_c, mask=m_c, other=0.0)
        # What is stored is a deviation already, or a variance.
        if FLAGS.std:
            b_now = tl.maximum(b_now + inner, TINY, propagate_nan=NAN)
        else:
            b_was = tl.sqrt_rn(b_was)
        b_now = tl.sqrt_rn(b_now)
        if FLAGS.std:
            b_now -= inner
        b_r = 1.0 / (b_was + tl.cast(numbers.eps, tl.float32))
        b_far += tl.abs(tl.load(stats + 9 * channels + o_c, mask=m_c, other=0.0) * b_r)
        b_wide += tl.where(m_c, tl.abs(b_now - b_was) * b_r, 0.0)
    tl.debug_barrier()  # every thread has read what is now written
    tl.store(state.skipped, skips)
    tl.store(state.tracked, count)
    tl.store(state.updates, steps, mask=finite)
    tl.store(state.gap, tl.sum(b_far, 0) / channels, mask=finite)
    tl.store(state.gap + 1, tl.sum(b_wide, 0) / channels, mask=finite)
    for begin in range(0, channels, BLOCK):
        o_c = begin + tl.arange(0, BLOCK)
        m_c = (o_c < channels) & finite
        b_mean = tl.load(stats + 7 * channels + o_c, mask=m_c, other=0.0)
        b_var = tl.load(stats + 8 * channels + o_c, mask=m_c, other=0.0)
        if FLAGS.averages:
            speed = tl.load(rates.threshold).to(tl.float32)
            if FLAGS.copies_first:
                speed = tl.where(steps == 1, 1.0, speed)
            b_old_mean = tl.load(state.average_mean + o_c, mask=m_c, other=0.0)
            b_old_var = tl.load(state.average_var + o_c, mask=m_c, other=0.0)
            tl.store(state.average_mean + o_c, (1.0 - speed) * b_old_mean + speed * b_mean, mask=m_c)
            tl.store(state.average_var + o_c, (1.0 - speed) * b_old_var + speed * b_var, mask=m_c)
        tl.store(state.mean + o_c, b_mean, mask=m_c)
        tl.store(state.var + o_c, b_var, mask=m_c)

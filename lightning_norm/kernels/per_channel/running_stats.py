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
    n, q = tl.program_id(0), tl.arange(0, K_BLOCK)
    real = q < contexts
    # The last program: counters, priors, and which contexts have never been met.
    if n == tl.num_programs(0) - 1:
        survey_running(state, survey_out, channels, contexts, min_updates, max_skip, FLAGS, K_BLOCK, BLOCK)
    else:
        if FLAGS.moves or FLAGS.condensed != 0 or FLAGS.gate:
            # A sample: its norm, its NaNs and infinities, its logits, all channels at once.
            bad = tl.zeros((BLOCK,), tl.int32)
            squares = tl.zeros((BLOCK,), tl.float32)
            logits = tl.zeros((K_BLOCK, BLOCK), tl.float32)
            for begin in range(0, channels, BLOCK):
                c = begin + tl.arange(0, BLOCK)
                keep = c < channels
                k, d, v = read_moments(parts, n.to(tl.int64) * sample_stride + c, keep, layout, FLAGS.merge)
                # Written so that a NaN, for which every comparison is false, counts as bad.
                bad += tl.where(keep & ~(tl.abs(k + v) < float("inf")), 1, 0)
                if FLAGS.condensed != 0:
                    # The mean square of x in this channel: its variance and its mean squared.
                    squares += tl.where(keep, v + (k + d) * (k + d), 0.0)
                if FLAGS.gate:
                    inside = real[:, None] & keep[None, :]
                    w = tl.load(gate_weight + q[:, None] * channels + c[None, :], mask=inside, other=0.0)
                    logits += tl.where(inside, w.to(tl.float32) * (k + d)[None, :], 0.0)
            # Behind the numbers about contexts.
            left = survey_out + 2 + 3 * contexts
            tl.store(left + n, tl.sum(bad, 0).to(tl.float32))
            if FLAGS.condensed != 0:  # 0 for a sample of zeros, NaN stays
                square = tl.sum(squares, 0) * whole
                # Squares that left float32's range say nothing about the norm: no condensation for this batch.
                least = SMALL * whole * channels
                square = tl.where((square > 0.0) & ((square < least) | (square == float("inf"))), float("nan"), square)
                tl.store(left + samples + n, tl.where(square <= 0.0, 0.0, tl.rsqrt(tl.where(square <= 0.0, 1.0, square))))  # noqa: E501  # fmt: skip
            if FLAGS.gate:
                # Lanes beyond K get a logit so low that they take no part.
                logit = tl.sum(logits, 1) + tl.load(gate_bias + q, mask=real, other=0.0).to(tl.float32)
                logit = tl.where(real, logit, -1e30)
                g = tl.where(real, tl.exp(logit - tl.max(logit, 0)), 0.0)
                tl.store(left + samples + n * contexts + q, tl.div_rn(g, tl.sum(g, 0) + g * 0.0), mask=real)


@triton.jit
def survey_running(
    state, survey_out, channels, contexts, min_updates, max_skip, FLAGS: tl.constexpr, K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill the head of ``survey_out``: what concerns the running statistics and the contexts."""
    q = tl.arange(0, K_BLOCK)
    real = q < contexts
    count, allowed = tl.zeros((), tl.int64), tl.zeros((), tl.int32)
    old, known_prior, new = tl.zeros((K_BLOCK,), tl.float32), tl.zeros((K_BLOCK,), tl.float32), q < 0
    if FLAGS.moves:
        count = tl.load(state.tracked)
    if FLAGS.condensed != 0:
        allowed = ((count >= min_updates) & (tl.load(state.in_a_row) < max_skip)).to(tl.int32)
    if FLAGS.contexts:
        old = tl.where(real, tl.cast(1.0, tl.float32) / contexts, 0.0)
        if FLAGS.known:
            old = tl.load(state.prior + q, mask=real, other=0.0)
            # A context is new while its statistics are as they were made: means 0 and variances 1.
            moved = tl.zeros((K_BLOCK, BLOCK), tl.int32)
            for begin in range(0, channels, BLOCK):
                c = begin + tl.arange(0, BLOCK)
                at, keep = q[:, None] * channels + c[None, :], real[:, None] & (c < channels)[None, :]
                m = tl.load(state.mean + at, mask=keep, other=0.0)
                v = tl.load(state.var + at, mask=keep, other=1.0)
                moved += tl.where((m == 0.0) & (v == 1.0), 0, 1)
            new = tl.sum(moved, 1) == 0
        # New contexts count for nothing as long as there is an old one.
        any_old = tl.sum(tl.where(new, 0, 1), 0) > 0
        known_prior = tl.where(new & any_old, 0.0, old)
        known_prior = known_prior / tl.maximum(tl.sum(known_prior, 0), TINY, propagate_nan=NAN)
    tl.store(survey_out, count.to(tl.float32))
    tl.store(survey_out + 1, allowed.to(tl.float32))
    tl.store(survey_out + 2 + q, old, mask=real)
    tl.store(survey_out + 2 + contexts + q, new.to(tl.float32), mask=real)
    tl.store(survey_out + 2 + 2 * contexts + q, known_prior, mask=real)


@triton.jit
def move(
    target, variance, fraction, off, enough, state, rate, survey_out, pooled, at, kc_mask, first, looked_at, channels,
    contexts, FLAGS: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move some channels (K, C) towards ``target`` and ``variance``, unless x has a NaN or an infinity.

    running += step (target - running). Without contexts step is the momentum, or with ``track`` 2 one over the number
    of batches. With contexts it is scaled by the context's ``fraction`` of the batch, and the priors move too. The
    ``first`` channels move the counters. Of ``looked_at`` parts of x ``survey_out`` tells what is not finite. A channel
    whose statistics are not finite though x is, as with a NaN among the parameters, stays.
    """
    # Whether x is finite is the same for all programs, or some channels would move and others not.
    bad = tl.zeros((BLOCK,), tl.int32)
    if FLAGS.ranks:  # of which all see the same
        for begin in range(0, channels, BLOCK):
            c = begin + tl.arange(0, BLOCK)
            mean = tl.load(pooled + c, mask=c < channels, other=0.0)
            var = tl.load(pooled + 2 * channels + c, mask=c < channels, other=0.0)
            bad += tl.where(tl.abs(mean + var) < float("inf"), 0, 1)
    else:
        for begin in range(0, looked_at, BLOCK):
            n = begin + tl.arange(0, BLOCK)
            bad += tl.where(tl.load(survey_out + 2 + 3 * contexts + n, mask=n < looked_at, other=0.0) == 0.0, 0, 1)
    finite = tl.sum(bad, 0) == 0
    if FLAGS.ranks:
        finite = finite & enough
    if FLAGS.contexts:  # whose gate may have a NaN among its parameters
        known = tl.abs(fraction) < float("inf")
        finite = finite & (tl.sum(tl.where((tl.arange(0, K_BLOCK) < contexts) & ~known, 1, 0), 0) == 0)
    # A condensed batch is finite, but does not count (``off``).
    counts = finite & ~off
    times = tl.maximum(tl.load(survey_out) + counts.to(tl.float32), 1.0)
    if FLAGS.track == 2:
        speed = 1.0 / times
    else:
        speed = tl.load(rate).to(tl.float32)
    q = tl.arange(0, K_BLOCK)
    real = q < contexts
    step = tl.zeros((K_BLOCK,), tl.float32) + speed
    may = kc_mask & counts & (tl.abs(target + variance) < float("inf"))
    new = step
    # A context moves as far as samples of it were met, at once where it is new.
    if FLAGS.contexts:
        old = tl.load(survey_out + 2 + q, mask=real, other=0.0)
        new = old + speed * (fraction - old)
        if FLAGS.track == 2:
            step = fraction / tl.maximum(times * new, TINY, propagate_nan=NAN)
        else:
            step = speed * tl.minimum(contexts * fraction, 1.0, propagate_nan=NAN)
        step = tl.where(tl.load(survey_out + 2 + contexts + q, mask=real, other=0.0) != 0.0, 1.0, step)
        may = may & (fraction > 0.0)[:, None]
    # Read, compute, and only then write, behind the barrier.
    mean = tl.load(state.mean + at, mask=kc_mask, other=0.0)
    var = tl.load(state.var + at, mask=kc_mask, other=0.0)
    mean = (1.0 - step)[:, None] * mean + step[:, None] * target
    var = (1.0 - step)[:, None] * var + step[:, None] * variance
    count, skips = tl.load(state.tracked) + counts.to(tl.int64), tl.load(state.skipped) + 1 - finite.to(tl.int64)
    tl.debug_barrier()  # every thread has read what is now written
    tl.store(state.mean + at, mean, mask=may)
    tl.store(state.var + at, var, mask=may)
    tl.store(state.tracked, count, mask=first)
    tl.store(state.skipped, skips, mask=first)
    if FLAGS.contexts:
        tl.store(state.prior + q, new, mask=real & finite & first)


@triton.jit
def new_weight(state, rate, channels, power, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    """Return alpha, 1 / m^power or the rate, and the number m of this batch; of a first one that is copied alpha is 1.

    Statistics that were moved in from another layer count as one batch.
    """
    steps = tl.load(state.updates) + 1
    if steps == 1:
        # Means that are not 0 were moved in.
        moved = tl.zeros((BLOCK,), tl.int32)
        for begin in range(0, channels, BLOCK):
            c = begin + tl.arange(0, BLOCK)
            moved += tl.where(tl.load(state.mean + c, mask=c < channels, other=0.0) != 0.0, 1, 0)
        steps += (tl.sum(moved, 0) > 0).to(tl.int64)
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
    bad = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        keep = c < channels
        # The batch's variance, and on one rank its mean: their sum is finite where both are.
        either = tl.load(stats + 3 * channels + c, mask=keep, other=0.0)
        if not FLAGS.ranks:
            either += tl.load(stats + c, mask=keep, other=0.0)
        bad += tl.where(tl.abs(either) < float("inf"), 0, 1)
    finite = tl.sum(bad, 0) == 0
    skips, count = tl.load(state.skipped) + 1 - finite.to(tl.int64), tl.load(state.tracked) + finite.to(tl.int64)
    alpha, steps = new_weight(state, rates.rate, channels, numbers.power, FLAGS, BLOCK)
    inner = tl.cast(numbers.inner, tl.float32)
    # How far the blended statistics are from the batch's own.
    far = tl.zeros((BLOCK,), tl.float32)
    wide = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        keep = c < channels
        now = tl.load(stats + 3 * channels + c, mask=keep, other=0.0)
        was = tl.load(stats + 8 * channels + c, mask=keep, other=0.0)
        # What is stored is a deviation already, or a variance.
        if FLAGS.std:
            now = tl.maximum(now + inner, TINY, propagate_nan=NAN)
        else:
            was = tl.sqrt_rn(was)
        now = tl.sqrt_rn(now)
        if FLAGS.std:
            now -= inner
        r = 1.0 / (was + tl.cast(numbers.eps, tl.float32))
        far += tl.abs(tl.load(stats + 9 * channels + c, mask=keep, other=0.0) * r)
        wide += tl.where(keep, tl.abs(now - was) * r, 0.0)
    tl.debug_barrier()  # every thread has read what is now written
    tl.store(state.skipped, skips)
    tl.store(state.tracked, count)
    tl.store(state.updates, steps, mask=finite)
    tl.store(state.gap, tl.sum(far, 0) / channels, mask=finite)
    tl.store(state.gap + 1, tl.sum(wide, 0) / channels, mask=finite)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        keep = (c < channels) & finite
        mean = tl.load(stats + 7 * channels + c, mask=keep, other=0.0)
        var = tl.load(stats + 8 * channels + c, mask=keep, other=0.0)
        if FLAGS.averages:
            speed = tl.load(rates.threshold).to(tl.float32)
            if FLAGS.copies_first:
                speed = tl.where(steps == 1, 1.0, speed)
            old_mean = tl.load(state.average_mean + c, mask=keep, other=0.0)
            old_var = tl.load(state.average_var + c, mask=keep, other=0.0)
            tl.store(state.average_mean + c, (1.0 - speed) * old_mean + speed * mean, mask=keep)
            tl.store(state.average_var + c, (1.0 - speed) * old_var + speed * var, mask=keep)
        tl.store(state.mean + c, mean, mask=keep)
        tl.store(state.var + c, var, mask=keep)

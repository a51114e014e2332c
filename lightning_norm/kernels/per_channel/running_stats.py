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

from lightning_norm.kernels.passes.forward import read_moments

TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
SMALL: tl.constexpr = tl.constexpr(1e-30)
"""Mean square below which float32 squares lose digits: the least normal number over the machine epsilon, at least."""
NAN: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)
"""With it a NaN passes through tl.maximum and tl.minimum, as it does through torch's clamp."""


@triton.jit(do_not_specialize=["samples", "pieces", "piece", "size", "fold", "min_updates", "max_skip"])
def survey(
    hi, lo, var, gate_weight, gate_bias, running_mean, running_var, tracked, in_a_row, prior, survey_out, samples,
    channels, contexts, pieces, sample_stride, stride, piece, size, fold, min_updates, max_skip,
    LOOK: tl.constexpr, MERGE: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, MOVE: tl.constexpr,
    CONTEXTS: tl.constexpr, KNOWN: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill ``survey_out``, see above. One program per sample (LOOK), and a last one for the running statistics.

    With GATE the responsibilities are softmax(gate_weight mean_n + gate_bias).
    """
    piece, size, fold = tl.cast(piece, tl.int32), tl.cast(size, tl.int32), tl.cast(fold, tl.int32)
    n, q = tl.program_id(0), tl.arange(0, K_BLOCK)
    real = q < contexts
    # The last program: counters, priors, and which contexts have never been met.
    if n == tl.num_programs(0) - 1:
        survey_running(
            running_mean, running_var, tracked, in_a_row, prior, survey_out, channels, contexts, min_updates, max_skip,
            NORM, MOVE, CONTEXTS, KNOWN, K_BLOCK, BLOCK,
        )  # fmt: skip
    else:
        if LOOK:
            # A sample: its norm, its NaNs and infinities, its logits, all channels at once.
            bad = tl.zeros((BLOCK,), tl.int32)
            squares = tl.zeros((BLOCK,), tl.float32)
            logits = tl.zeros((K_BLOCK, BLOCK), tl.float32)
            for begin in range(0, channels, BLOCK):
                c = begin + tl.arange(0, BLOCK)
                keep = c < channels
                k, d, v = read_moments(hi, lo, var, n.to(tl.int64) * sample_stride + c, keep, pieces, stride, piece, size, fold, MERGE)  # noqa: E501  # fmt: skip
                # Written so that a NaN, for which every comparison is false, counts as bad.
                bad += tl.where(keep & ~(tl.abs(k + v) < float("inf")), 1, 0)
                if NORM:
                    # The mean square of x in this channel: its variance and its mean squared.
                    squares += tl.where(keep, v + (k + d) * (k + d), 0.0)
                if GATE:
                    inside = real[:, None] & keep[None, :]
                    w = tl.load(gate_weight + q[:, None] * channels + c[None, :], mask=inside, other=0.0)
                    logits += tl.where(inside, w.to(tl.float32) * (k + d)[None, :], 0.0)
            # Behind the numbers about contexts.
            left = survey_out + 2 + 3 * contexts
            tl.store(left + n, tl.sum(bad, 0).to(tl.float32))
            if NORM:  # 0 for a sample of zeros, NaN stays
                square = tl.sum(squares, 0) * (size * fold)
                # Squares that left float32's range say nothing about the norm: no condensation for this batch.
                least = SMALL * (size * fold) * channels
                square = tl.where((square > 0.0) & ((square < least) | (square == float("inf"))), float("nan"), square)
                tl.store(left + samples + n, tl.where(square <= 0.0, 0.0, tl.rsqrt(tl.where(square <= 0.0, 1.0, square))))  # noqa: E501  # fmt: skip
            if GATE:
                # Lanes beyond K get a logit so low that they take no part.
                logit = tl.sum(logits, 1) + tl.load(gate_bias + q, mask=real, other=0.0).to(tl.float32)
                logit = tl.where(real, logit, -1e30)
                g = tl.where(real, tl.exp(logit - tl.max(logit, 0)), 0.0)
                tl.store(left + samples + n * contexts + q, tl.div_rn(g, tl.sum(g, 0) + g * 0.0), mask=real)


@triton.jit
def survey_running(
    running_mean, running_var, tracked, in_a_row, prior, survey_out, channels, contexts, min_updates, max_skip,
    NORM: tl.constexpr, MOVE: tl.constexpr, CONTEXTS: tl.constexpr, KNOWN: tl.constexpr, K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill the head of ``survey_out``: what concerns the running statistics and the contexts."""
    q = tl.arange(0, K_BLOCK)
    real = q < contexts
    count, allowed = tl.zeros((), tl.int64), tl.zeros((), tl.int32)
    old, known_prior, new = tl.zeros((K_BLOCK,), tl.float32), tl.zeros((K_BLOCK,), tl.float32), q < 0
    if MOVE:
        count = tl.load(tracked)
    if NORM:
        allowed = ((count >= min_updates) & (tl.load(in_a_row) < max_skip)).to(tl.int32)
    if CONTEXTS:
        old = tl.where(real, tl.cast(1.0, tl.float32) / contexts, 0.0)
        if KNOWN:
            old = tl.load(prior + q, mask=real, other=0.0)
            # A context is new while its statistics are as they were made: means 0 and variances 1.
            moved = tl.zeros((K_BLOCK, BLOCK), tl.int32)
            for begin in range(0, channels, BLOCK):
                c = begin + tl.arange(0, BLOCK)
                at, keep = q[:, None] * channels + c[None, :], real[:, None] & (c < channels)[None, :]
                m = tl.load(running_mean + at, mask=keep, other=0.0)
                v = tl.load(running_var + at, mask=keep, other=1.0)
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
    target, variance, fraction, off, running_mean, running_var, tracked, skipped, prior, rate, survey_out, pooled,
    enough, at, kc_mask, first, samples, channels, contexts, CONTEXTS: tl.constexpr, AVERAGE: tl.constexpr,
    RANKS: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move some channels (K, C) towards ``target`` and ``variance``, unless x has a NaN or an infinity.

    running += step (target - running). Without contexts step is the momentum, or 1 / number of batches (AVERAGE). With
    contexts it is scaled by the context's ``fraction`` of the batch, and the priors move too. The ``first`` channels
    move the counters. A channel whose statistics are not finite though x is, as with a NaN among the parameters, stays.
    """
    # Whether x is finite is the same for all programs, or some channels would move and others not.
    bad = tl.zeros((BLOCK,), tl.int32)
    if RANKS:  # of which all see the same
        for begin in range(0, channels, BLOCK):
            c = begin + tl.arange(0, BLOCK)
            mean = tl.load(pooled + c, mask=c < channels, other=0.0)
            var = tl.load(pooled + 2 * channels + c, mask=c < channels, other=0.0)
            bad += tl.where(tl.abs(mean + var) < float("inf"), 0, 1)
    else:
        for begin in range(0, samples, BLOCK):
            n = begin + tl.arange(0, BLOCK)
            bad += tl.where(tl.load(survey_out + 2 + 3 * contexts + n, mask=n < samples, other=0.0) == 0.0, 0, 1)
    finite = tl.sum(bad, 0) == 0
    if RANKS:
        finite = finite & enough
    if CONTEXTS:  # whose gate may have a NaN among its parameters
        known = tl.abs(fraction) < float("inf")
        finite = finite & (tl.sum(tl.where((tl.arange(0, K_BLOCK) < contexts) & ~known, 1, 0), 0) == 0)
    # A condensed batch is finite, but does not count (``off``).
    counts = finite & ~off
    times = tl.maximum(tl.load(survey_out) + counts.to(tl.float32), 1.0)
    if AVERAGE:
        speed = 1.0 / times
    else:
        speed = tl.load(rate).to(tl.float32)
    q = tl.arange(0, K_BLOCK)
    real = q < contexts
    step = tl.zeros((K_BLOCK,), tl.float32) + speed
    may = kc_mask & counts & (tl.abs(target + variance) < float("inf"))
    new = step
    # A context moves as far as samples of it were met, at once where it is new.
    if CONTEXTS:
        old = tl.load(survey_out + 2 + q, mask=real, other=0.0)
        new = old + speed * (fraction - old)
        if AVERAGE:
            step = fraction / tl.maximum(times * new, TINY, propagate_nan=NAN)
        else:
            step = speed * tl.minimum(contexts * fraction, 1.0, propagate_nan=NAN)
        step = tl.where(tl.load(survey_out + 2 + contexts + q, mask=real, other=0.0) != 0.0, 1.0, step)
        may = may & (fraction > 0.0)[:, None]
    # Read, compute, and only then write, behind the barrier.
    mean = tl.load(running_mean + at, mask=kc_mask, other=0.0)
    var = tl.load(running_var + at, mask=kc_mask, other=0.0)
    mean = (1.0 - step)[:, None] * mean + step[:, None] * target
    var = (1.0 - step)[:, None] * var + step[:, None] * variance
    count, skips = tl.load(tracked) + counts.to(tl.int64), tl.load(skipped) + 1 - finite.to(tl.int64)
    tl.debug_barrier()  # every thread has read what is now written
    tl.store(running_mean + at, mean, mask=may)
    tl.store(running_var + at, var, mask=may)
    tl.store(tracked, count, mask=first)
    tl.store(skipped, skips, mask=first)
    if CONTEXTS:
        tl.store(prior + q, new, mask=real & finite & first)


@triton.jit
def new_weight(
    running_mean, updates, rate, channels, power, COPY: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr
):
    """Return alpha and the number of this batch: 1 / m^power with POWER, else the rate; with COPY 1 for the first.

    Statistics that were moved in from another layer count as one batch.
    """
    steps = tl.load(updates) + 1
    if steps == 1:
        # Means that are not 0 were moved in.
        moved = tl.zeros((BLOCK,), tl.int32)
        for begin in range(0, channels, BLOCK):
            c = begin + tl.arange(0, BLOCK)
            moved += tl.where(tl.load(running_mean + c, mask=c < channels, other=0.0) != 0.0, 1, 0)
        steps += (tl.sum(moved, 0) > 0).to(tl.int64)
    if POWER:
        alpha = tl.exp(-tl.cast(power, tl.float32) * tl.log(steps.to(tl.float32)))
    else:
        alpha = tl.load(rate).to(tl.float32)
    if COPY:
        alpha = tl.where(steps == 1, 1.0, alpha)
    return alpha, steps


@triton.jit
def commit(
    stats, running_mean, running_var, tracked, skipped, updates, gap, average_mean, average_var, rate, average_rate,
    channels, eps, inner, power, STD: tl.constexpr, COPY: tl.constexpr, POWER: tl.constexpr, AVERAGE: tl.constexpr,
    RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store blended statistics and how far they were from the batch's, unless one is NaN or infinite. One program.

    gap[0] is the mean over channels of |mean_B - mean| / std, gap[1] of |std_B - std| / std; mean and std are blended.
    With AVERAGE these move averages of themselves, by a rate of their own, in the same launch.
    """
    # First look at all channels: either all of them move or none.
    bad = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        keep = c < channels
        # The batch's variance, and on one rank its mean: their sum is finite where both are.
        either = tl.load(stats + 3 * channels + c, mask=keep, other=0.0)
        if not RANKS:
            either += tl.load(stats + c, mask=keep, other=0.0)
        bad += tl.where(tl.abs(either) < float("inf"), 0, 1)
    finite = tl.sum(bad, 0) == 0
    skips, count = tl.load(skipped) + 1 - finite.to(tl.int64), tl.load(tracked) + finite.to(tl.int64)
    alpha, steps = new_weight(running_mean, updates, rate, channels, power, COPY, POWER, BLOCK)
    # How far the blended statistics are from the batch's own.
    far = tl.zeros((BLOCK,), tl.float32)
    wide = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        keep = c < channels
        now = tl.load(stats + 3 * channels + c, mask=keep, other=0.0)
        was = tl.load(stats + 8 * channels + c, mask=keep, other=0.0)
        # What is stored is a deviation already, or a variance.
        if STD:
            now = tl.maximum(now + tl.cast(inner, tl.float32), TINY, propagate_nan=NAN)
        else:
            was = tl.sqrt_rn(was)
        now = tl.sqrt_rn(now)
        if STD:
            now -= tl.cast(inner, tl.float32)
        r = 1.0 / (was + tl.cast(eps, tl.float32))
        far += tl.abs(tl.load(stats + 9 * channels + c, mask=keep, other=0.0) * r)
        wide += tl.where(keep, tl.abs(now - was) * r, 0.0)
    tl.debug_barrier()  # every thread has read what is now written
    tl.store(skipped, skips)
    tl.store(tracked, count)
    tl.store(updates, steps, mask=finite)
    tl.store(gap, tl.sum(far, 0) / channels, mask=finite)
    tl.store(gap + 1, tl.sum(wide, 0) / channels, mask=finite)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        keep = (c < channels) & finite
        mean = tl.load(stats + 7 * channels + c, mask=keep, other=0.0)
        var = tl.load(stats + 8 * channels + c, mask=keep, other=0.0)
        if AVERAGE:
            speed = tl.load(average_rate).to(tl.float32)
            if COPY:
                speed = tl.where(steps == 1, 1.0, speed)
            old_mean = tl.load(average_mean + c, mask=keep, other=0.0)
            old_var = tl.load(average_var + c, mask=keep, other=0.0)
            tl.store(average_mean + c, (1.0 - speed) * old_mean + speed * mean, mask=keep)
            tl.store(average_var + c, (1.0 - speed) * old_var + speed * var, mask=keep)
        tl.store(running_mean + c, mean, mask=keep)
        tl.store(running_var + c, var, mask=keep)

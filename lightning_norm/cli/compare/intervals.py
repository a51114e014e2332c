"""What differences over seeds allow to say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_norm.errors import counted

LEAST_SEEDS = 3
"""Fewer give no verdict: the deviation of two numbers is hardly known."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """The paired difference of one normalizer to the baseline.

    Args:
        mean: over the seeds that both have.
        low: lower end of the interval, NaN where there is none.
        high: upper end.
        seeds: that both have.
        verdict: "higher", "lower", "no evidence" or why there is none.
    """

    mean: float
    low: float
    high: float
    seeds: int
    verdict: str


def compare_paired(values: Sequence[float], baseline: Sequence[float], comparisons: int = 1) -> Difference:
    r"""Return the mean of :math:`d_i = v_i - b_i` with its simultaneous t interval.

    .. math:: \bar d \pm t_{1 - \alpha / 2m,\; n - 1} \, s_d / \sqrt n

    with :math:`\alpha = 0.05` and m comparisons (Bonferroni): all m intervals of a table hold together with 95 %.

    Args:
        values: of the normalizer, one per seed.
        baseline: of the baseline, of the same seeds.
        comparisons: m.

    >>> compare_paired([1.01, 2.02, 3.03], [1.0, 2.0, 3.0]).verdict
    'no evidence'
    >>> round(compare_paired([1.01, 2.02, 3.03], [1.0, 2.0, 3.0]).high, 4)
    0.0448
    """
    # Paired: what a seed does to every normalizer alike leaves the deviation.
    differences = [v - b for v, b in zip(values, baseline, strict=True)]
    n = len(differences)
    if not n or not all(map(math.isfinite, differences)):
        reason = "no seed in common" if not n else "not finite: diverged"
        return Difference(math.nan, math.nan, math.nan, n, reason)
    mean = math.fsum(differences) / n
    if n < LEAST_SEEDS:
        return Difference(mean, math.nan, math.nan, n, f"no verdict from {counted(n, 'seed')}")
    from scipy.stats import t  # imported late: `compare --help` does not wait for it

    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    half = float(t.ppf(1 - (1 - CONFIDENCE) / (2 * comparisons), n - 1)) * deviation / math.sqrt(n)
    # Zero inside the interval is no evidence, which is not the same as evidence of no difference.
    verdict = "higher" if mean - half > 0 else "lower" if mean + half < 0 else "no evidence"
    return Difference(mean, mean - half, mean + half, n, verdict)


def half_width_ratio(seeds: int, more: int, comparisons: int = 1) -> float:
    """Return by which factor the interval is expected to shrink with ``more`` seeds, at the same deviation.

    >>> round(half_width_ratio(3, 3), 2)
    0.42
    """
    from scipy.stats import t

    # Both the root of n and the quantile change, and for few seeds the quantile changes more.
    level = 1 - (1 - CONFIDENCE) / (2 * comparisons)
    now, then = (float(t.ppf(level, n - 1)) / math.sqrt(n) for n in (seeds, seeds + more))
    return then / now

"""Which equations of the per-channel family run, and with which numbers."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PerChannelFlags:
    """Which equations run; with none of them, x is normalized by statistics that come from elsewhere.

    Args:
        needs_moments: the moments of x are needed; not so where everything comes from the running statistics.
        frozen: the running statistics stand in for the batch's.
        blend: the batch's statistics are mixed with the running ones by alpha (dbn), and the batch is normalized by
            1: the mixture, whose gradient passes through the batch's part. 2: its own. 3: the mixture, with the
            gradient of its own. 4: its own, scaled and moved towards the running ones within limits (brn). 0: nothing
            is mixed.
        std: what is divided by is a standard deviation plus eps, not sqrt(variance + eps) (dbn).
        copies_first: the first batch is copied, whatever alpha (dbn).
        averages: the mixture is kept beside the running statistics, which average it (dbn).
        powers: alpha follows from the number of batches, alpha(m) = 1 / m^power (dbn).
        detach: no gradient passes through the batch's statistics (dbn).
        condensed: what happens to a batch that is condensed (ubn). 0: it is not measured. 1: the running statistics
            replace its own. 2: it does not move the running statistics. 3: it is normalized by its own, scaled and
            moved to the value of the running ones.
        track: 0 leaves the running statistics as they are, 1 moves them by the momentum or alpha, 2 averages all
            batches.
        contexts: number of contexts K, each with statistics of its own (cn); 0 for one set of the whole batch.
        center: a sample's mean strengthens it (rbn, ubn).
        scale: the normalized mean gates it (rbn, ubn).
        affine: the mean gates it (ubn).
        min_updates: updates of the running statistics before a batch may count as condensed.
        max_skip: condensed batches in a row before one counts all the same.
        prior: weight and bias of a context are multiplied by 1 / sqrt(its prior), the running mean of its
            responsibilities.
        pooled: all contexts have the same statistics, and each sample's responsibilities are the priors.
        gate: the responsibilities are the softmax of a linear map of a sample's means.
        ranks: the batch lies on several ranks.
    """

    needs_moments: bool = False
    frozen: bool = False
    blend: int = 0
    std: bool = False
    copies_first: bool = True
    averages: bool = False
    powers: bool = False
    detach: bool = False
    condensed: int = 0
    track: int = 0
    contexts: int = 0
    center: bool = False
    scale: bool = False
    affine: bool = False
    min_updates: int = 0
    max_skip: int = 0
    prior: bool = False
    pooled: bool = False
    gate: bool = False
    ranks: bool = False

    @property
    def rows(self) -> int:
        """Return the sets of statistics: K, or 1."""
        return max(self.contexts, 1)

    @property
    def num_statistics(self) -> int:
        """Return how many numbers ``channels_of`` stores for each context and channel."""
        return (10 if self.blend else 7) + self.ranks

    @property
    def renorm(self) -> bool:
        """Return whether the batch's own statistics are scaled and moved, by constants, to the value of others."""
        return self.condensed == 3 or self.blend >= 3

    @property
    def moves_with_channels(self) -> bool:
        """Return whether each program moves the running statistics of its channels; ``commit`` moves blended ones."""
        return bool(self.track and not self.blend)

    @property
    def surveys_samples(self) -> bool:
        """Return whether whole samples must be looked at before each channel can stand alone."""
        return bool(self.moves_with_channels or self.condensed or self.gate)

    @property
    def surveys(self) -> bool:
        """Return whether anything must be known before each channel can stand alone."""
        return bool(self.surveys_samples or self.prior or (self.contexts and self.frozen))

    def survey_size(self, n: int) -> int:
        """Return how many numbers ``survey`` stores for n samples."""
        # Of each sample whether it is finite, its norm, and what the gate says of each context.
        of_sample = self.surveys_samples + (self.condensed > 0) + self.gate * self.rows
        return 2 + 3 * self.rows + n * of_sample if self.surveys else 0

    def compiled(self, **of_the_call: Any) -> CompiledChannels:
        """Return what a kernel is compiled for."""
        flags = {name: flag for name, flag in vars(self).items() if name in CompiledChannels._fields}
        # How many contexts there are is an argument: a kernel is compiled for whether there are any.
        flags |= {"contexts": self.contexts > 0, "moves": self.moves_with_channels, **of_the_call}
        return CompiledChannels(**{**dict.fromkeys(CompiledChannels._fields, False), **flags})


@dataclass(frozen=True)
class PerChannelNumbers:
    """The real numbers in the equations.

    Args:
        eps: inside the root, or beside it with ``std``.
        inner: added to a variance below the root of a deviation, and taken off behind it (brn).
        least: elements below which a context's statistics are drawn towards those of all samples (cn).
        power: alpha(m) = 1 / m^power (dbn).
        unit_scale: what the gate of the normalized mean is multiplied by, so that it starts at 1 (rbn, ubn).
        unit_affine: what the gate of the mean is multiplied by, likewise (ubn).
    """

    eps: float
    inner: float = 0.0
    least: float = 1.0
    power: float = 1.0
    unit_scale: float = 1.0
    unit_affine: float = 1.0


CompiledChannels = namedtuple(
    "CompiledChannels",
    "needs_moments frozen blend std copies_first averages powers detach condensed track contexts center scale affine "
    "prior pooled gate ranks moves merge weight bias known owner",
)
"""What a kernel is compiled for: some of :class:`PerChannelFlags`, and of the call.

Whether each program moves the running statistics of its channels, moments, or sums over x, are in pieces, there are a
gamma and a beta, running statistics are known, and programs own their channels, so that the last one moves statistics.
In the backward pass ``ranks`` is 1 before the ranks have met and 2 afterwards.
"""

Learned = namedtuple(
    "Learned",
    "responsibilities weight bias center_weight scale_weight scale_bias affine_weight affine_bias",
)
"""The responsibilities (N, K), gamma and beta (K, C), and the parameters of centering, scaling and affine gate."""

State = namedtuple(
    "State",
    "mean var tracked skipped updates gap average_mean average_var prior last measured skipped_condensed in_a_row",
)
"""What moves with the batches; another tensor where a layer has none.

The running statistics, how many batches moved them or were skipped; with ``blend`` their number, the two gaps and the
averages; with contexts their priors; with a condensation the last one and three counters.
"""

Rates = namedtuple("Rates", "rate threshold limit")
"""Momentum or alpha; threshold of a condensation or factor, or the averages' rate; limit of an offset (brn)."""

PerChannelStatistics = namedtuple("PerChannelStatistics", "moments stats affine survey_out pooled rank_sums")
"""What the forward launches hand to the backward ones.

Moments of x (2, N, C): what rounding left of the mean, which is the pivot, and the variance. Statistics (7 to 11, K,
C), see ``channels_of``. Pivot, scale and offset (3, N, C). What ``survey`` saw. Of the batch on all ranks U, as hi and
lo, and V (3, C), and what the R ranks added up, (1, 1 + R (1 + 2 C)) in float64.
"""

PerChannelGradients = namedtuple(
    "PerChannelGradients",
    "weight bias center_weight scale_weight scale_bias affine_weight affine_bias dx_affine responsibilities "
    "pooled centered",
)
"""What the backward launches write: gradients of what is learned, constant and slope (2, N, C) of dx, and more.

What each block of channels adds to the gradient of the responsibilities, (blocks, 1 + N, K). Across ranks the gradients
of U and V (3, C), and that of the centering as far as it is known before the ranks have met.
"""

Numbers = namedtuple("Numbers", "eps inner least power unit_scale unit_affine")
""":class:`PerChannelNumbers` for the kernels."""

Tile = namedtuple("Tile", "n k c")
"""Samples, contexts and channels that a program takes at once."""

Shape = namedtuple("Shape", "samples number channels contexts")
"""In device code."""

OfChannel = namedtuple("OfChannel", "base rest delta r f gamma w_v w_b w_a b_a")
"""In device code: statistics and parameters of channels, letters as in ``backward``."""

OfSample = namedtuple("OfSample", "n keep g a mean d e z gain t0 t1 beta q direct u1 u2 dz")
"""In device code: a tile of samples, their mask and weights, and what each sends to the sums over samples."""

"""Which equations of the mixture family run, and the statistics that its launches hand on."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class MixtureFlags:
    """Which equations of a mixture run; ``MixtureFlags.of`` fills the positions in.

    Args:
        needs_moments: the moments of x are needed; not so where everything comes from the running statistics.
        at_in: position of the instance's statistics in the weights w and v; -1 where they take no part.
        at_ln: position of those of the layer or group.
        at_bn: position of those of the batch.
        num_weights: length of w and v; 0 where nothing is mixed.
        softmax: w and v are logits, and their softmax is what mixes.
        outputs: normalized outputs are mixed, not statistics, and w is iota (C,).
        uncentered: the instance's variance is its mean square, and its mean is 0.
        threshold: w is tau (C,): y = max(gamma ... + beta, tau), computed as relu(... + beta - tau) + tau.
        frozen: the running statistics stand in for the batch's.
        track: 0 leaves the running statistics as they are, 1 moves them by the momentum, 2 averages all batches.
        num_groups: groups of channels of the layer's statistics.
        correction: 1 for unbiased variances within each sample.
    """

    needs_moments: bool
    at_in: int
    at_ln: int
    at_bn: int
    num_weights: int
    softmax: bool
    outputs: bool
    uncentered: bool
    threshold: bool
    frozen: bool
    track: int
    num_groups: int
    correction: int

    @classmethod
    def of(
        cls,
        statistics: tuple[str, ...],
        *,
        weighted: bool = False,
        softmax: bool = False,
        outputs: bool = False,
        uncentered: bool = False,
        threshold: bool = False,
        frozen: bool = False,
        track: int = 0,
        num_groups: int = 1,
        correction: int = 0,
    ) -> MixtureFlags:
        """Return the flags of a mixture of ``statistics``.

        Args:
            statistics: which of "in", "ln" and "bn" take part, in the order of the weights; "ln" is per group.
            weighted: they are mixed by weights w and v.
            softmax: as in the class.
            outputs: as in the class.
            uncentered: as in the class.
            threshold: as in the class.
            frozen: as in the class.
            track: as in the class.
            num_groups: as in the class.
            correction: as in the class.

        >>> MixtureFlags.of(("bn", "ln"), weighted=True).at_ln
        1
        """
        # Positions, since the weights stand in the order in which the user named the statistics.
        at_in, at_ln, at_bn = (statistics.index(s) if s in statistics else -1 for s in ("in", "ln", "bn"))
        return cls(
            # Frozen batch normalization reads x once, to write y.
            needs_moments=not (frozen and statistics == ("bn",)),
            at_in=at_in,
            at_ln=at_ln,
            at_bn=at_bn,
            num_weights=len(statistics) if weighted and not (outputs or threshold) else 0,
            softmax=softmax,
            outputs=outputs,
            uncentered=uncentered,
            threshold=threshold,
            frozen=frozen,
            track=track,
            num_groups=int(num_groups),
            correction=int(correction),
        )

    @property
    def pools_batch(self) -> bool:
        """Return whether the batch's own statistics take part."""
        return self.needs_moments and self.at_bn >= 0 and not self.frozen

    @property
    def pools_layer(self) -> bool:
        """Return whether statistics of layers or groups take part."""
        return self.needs_moments and self.at_ln >= 0

    @property
    def affine_rows(self) -> int:
        """Return the numbers for each (n, c) in ``MixtureStatistics.affine``."""
        return 4 if self.threshold else 3

    def activation(self, activation: str) -> str:
        """Return the activation as the passes know it: a threshold is one, and nothing else follows it there."""
        assert activation == "none" or not self.threshold
        return "threshold" if self.threshold else activation

    def length_of_w(self, channels: int) -> int:
        """Return the length of w."""
        return channels if self.outputs or self.threshold else self.num_weights

    def compiled(self, **of_the_call: Any) -> CompiledMixture:
        """Return what a kernel is compiled for."""
        # The number of groups and the correction are arguments of the kernels: any of them runs the same code.
        flags = {name: flag for name, flag in vars(self).items() if name in CompiledMixture._fields}
        return CompiledMixture(**flags, **of_the_call)


CompiledMixture = namedtuple(
    "CompiledMixture",
    "needs_moments at_in at_ln at_bn num_weights softmax outputs uncentered threshold frozen track merge weight bias "
    "ranks",
    defaults=(False, False, False, False),
)
"""What a kernel is compiled for: some of :class:`MixtureFlags`, and of the call.

Whether the numbers that come from x are in pieces, there are a gamma and a beta, and the batch is that of all ranks.
"""


class MixtureStatistics(NamedTuple):
    """What the forward launches hand to the backward ones; a part that is not needed is empty.

    Args:
        moments: (2, N, C), those of x: what rounding left of the mean, which is the pivot, and the variance.
        batch: (3, C), of the whole batch the mean as hi and lo, and the variance, on all ranks.
        layer: (3, N, G), likewise of each sample's groups.
        affine: (3, N, C), pivot, scale and offset: y = scale * (x - pivot) + offset; (4, N, C) with the threshold.
        rank_sums: (1, 1 + R (1 + 2 C)) in float64, what the R ranks added up.
    """

    moments: Tensor
    batch: Tensor
    layer: Tensor
    affine: Tensor
    rank_sums: Tensor


Parameters = namedtuple("Parameters", "weight bias w v")
"""Gamma, beta, and the weights of means and variances, or iota or tau for w; another tensor where a layer has none."""

Running = namedtuple("Running", "mean var tracked skipped momentum")
"""Running mean and variance, the batches that moved them and those that did not, and the momentum."""

Gradients = namedtuple("Gradients", "batch layer weight bias w v partials dx_affine")
"""What the backward launches write.

Gradients of the batch's means and variances (3, C), the groups' (2, N * G), gamma, beta, w and v; of the last two first
parts, (6, programs), three each; constant and slope (2, N, C) of dx = scale * dy + constant + slope * (x - pivot).
"""

Tile = namedtuple("Tile", "n c g t")
"""In which tiles (N, C) numbers are pooled: samples and channels of columns, groups and their channels of rows."""

Shape = namedtuple("Shape", "samples number channels groups_in_all per_group")
"""In device code: samples, (n, c) pairs, channels, groups of all samples, channels of a group."""

Given = namedtuple("Given", "d vi dl lv db bv")
"""In device code: means, counted from the pivot, and variances of instance, layer and batch."""

Sent = namedtuple("Sent", "fl el fb eb fi ei f e gamma iota")
"""In device code: what each (n, c) sends to mean (f) and variance (e) of layer, batch and instance.

Also the mixtures' own f and e, and what it adds to the gradients of gamma and iota.
"""

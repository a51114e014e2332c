"""Which equations of ``channels`` run, and with which numbers; passed through an operator's schema as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChannelPlan:
    """Which equations, in integers.

    Args:
        own: the moments of x are needed.
        frozen: the statistics are the running ones.
        blend: they are mixed with the running ones by alpha.
        std: the spread is a standard deviation, with eps beside the root.
        powers: alpha follows from the number of batches.
        detach: no gradient passes through the batch's statistics.
        choose: 1 where running statistics replace those of a condensed batch, 2 where it only does not move them, 3
            where it is normalized by its own, scaled and moved to the value of the running ones.
        track: 0 leaves the running statistics, 1 moves them by the momentum or alpha, 2 averages all batches.
        contexts: K; 0 for the whole batch.
        center: a sample's mean strengthens it.
        scale: the normalized mean gates it.
        affine: the mean gates it.
        min_updates: of the running statistics before a batch may count as condensed.
        max_skip: condensed batches in a row.
        prior: weight and bias of a context are multiplied by 1 / sqrt(its running share).
        pooled: all contexts have the same statistics, and a sample the running share in each.
        gate: the shares are the softmax of a linear map of a sample's means.
        ranks: the batch lies on several ranks.
    """

    own: int = 0
    frozen: int = 0
    blend: int = 0
    std: int = 0
    powers: int = 0
    detach: int = 0
    choose: int = 0
    track: int = 0
    contexts: int = 0
    center: int = 0
    scale: int = 0
    affine: int = 0
    min_updates: int = 0
    max_skip: int = 0
    prior: int = 0
    pooled: int = 0
    gate: int = 0
    ranks: int = 0

    @property
    def rows(self) -> int:
        """Return the rows of the statistics: contexts, or 1."""
        return max(self.contexts, 1)

    @property
    def lines(self) -> int:
        """Return how many statistics ``channels_of`` leaves."""
        return (9 if self.blend else 7) + self.ranks

    @property
    def moves(self) -> bool:
        """Return whether channels move their running statistics themselves; blended ones are moved afterwards."""
        return bool(self.track and not self.blend)

    @property
    def looks(self) -> bool:
        """Return whether whole samples must be looked at before each channel can stand alone."""
        return bool(self.moves or self.choose or self.gate)

    @property
    def surveys(self) -> bool:
        """Return whether anything must be known before each channel can stand alone."""
        return bool(self.looks or self.prior or (self.contexts and self.frozen))

    def seen(self, n: int) -> int:
        """Return how many numbers ``survey`` leaves for n samples."""
        of_sample = self.looks + (self.choose > 0) + self.gate * self.rows
        return 2 + 3 * self.rows + n * of_sample if self.surveys else 0

    def constants(self) -> dict[str, bool]:
        """Return the compile-time arguments that both directions share."""
        names = ("own", "std", "contexts", "center", "scale", "affine", "prior")
        return {name.upper(): bool(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class Numbers:
    """The real numbers of a plan.

    Args:
        eps: inside the root, or beside it.
        least: elements below which a context is drawn towards all samples.
        power: alpha(m) = 1 / m^power.
        unit_scale: what the gate of the normalized mean is multiplied by.
        unit_affine: what the gate of the mean is multiplied by.
    """

    eps: float
    least: float = 1.0
    power: float = 1.0
    unit_scale: float = 1.0
    unit_affine: float = 1.0

"""A normalizer whose running statistics are moved first and then normalize, in training as in evaluation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_norm.layers.base import MomentNorm
from lightning_norm.layers.running_stats import count_batch, running_buffers, write
from lightning_norm.layers.translation import Translation, std_of_var, var_of_std
from lightning_norm.ops import torch_private
from lightning_norm.ops.layout import at_least_float32


class BlendedNorm(MomentNorm):
    """Abstract: a batch is blended into the running statistics, and x is normalized by the blend.

    Args:
        num_features: channels.
        average: "std" for running standard deviations, "var" for BatchNorm's running variances.
        options: see :class:`MomentNorm`.
    """

    special = True
    counters: ClassVar[tuple[str, ...]] = ("updates",)
    no_window = "it normalizes by its running statistics in training, which each batch has to move first"
    updates: Tensor
    gap: Tensor
    """How far the last batch's mean and deviation lay from the running ones, in running deviations, (2,)."""

    def __init__(self, num_features: int, *, average: str, **options: Any) -> None:
        # Before the base class, which names the buffers by it.
        self.average = average
        super().__init__(num_features, **options)
        # Not saved: it describes the last batch, and a resumed run does not continue from it.
        gap = (
            torch.zeros(2, device=options.get("device"), dtype=at_least_float32(options.get("dtype")))
            if self.track_running_stats
            else None
        )
        self.register_buffer("gap", gap, persistent=False)

    @property
    def running_names(self) -> tuple[str, str]:
        """The second is the standard deviation, or with ``average="var"`` BatchNorm's own variance."""
        return "running_mean", f"running_{self.average}"

    @property
    def translations(self) -> tuple[Translation, ...]:
        """A BatchNorm's variance becomes a standard deviation, and that of another such layer a variance."""
        return (std_of_var(self.eps) if self.average == "std" else var_of_std(self.eps),)

    def steps(self) -> Tensor:
        """Return the number of this batch: 1 for the first; 2 where statistics were moved in, which count as one."""
        # A mean of exactly 0 in every channel is what a new layer has, and hardly what training leaves.
        return self.updates + 1 + ((self.updates == 0) & (running_buffers(self)[0] != 0).any())

    @torch_private.without_gradients
    def write_blend(
        self, blend: tuple[Tensor, Tensor], batch: tuple[Tensor, Tensor], steps: Tensor, usable: Tensor
    ) -> None:
        """Write the moved statistics, and how far the batch lay from them, if a 0-dim ``usable`` is true.

        Args:
            blend: the new running mean, and standard deviation or variance, (1, C).
            batch: the same two of the batch.
            steps: the number of this batch.
            usable: the batch has neither a NaN nor an infinity.
        """
        # The gap is measured in standard deviations, whichever of the two is stored.
        was, now = ((s if self.average == "std" else s.sqrt()) for s in (blend[1], batch[1]))
        gap = torch.stack([batch[0] - blend[0], now - was]).abs() / (was + self.eps)
        values = (*blend, steps, gap.flatten(1).mean(1))
        for name, new in zip((*self.running_names, "updates", "gap"), values, strict=True):
            # No state_dict holds the gap, so that it may not be passed to a function that is transformed.
            if name != "gap" or not torch_private.is_captured(self.gap):
                write(getattr(self, name), new, usable)
        count_batch(self, usable)

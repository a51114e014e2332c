"""Unified batch normalization: a condensation threshold chooses the statistics, and every component is rectified."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_norm.layers.accumulators import StatisticsAccumulator
from lightning_norm.layers.base import Paper
from lightning_norm.layers.declared import ExtraBuffers
from lightning_norm.layers.renormalized import renorm
from lightning_norm.layers.running_stats import moves_running_stats, trains_with_running_stats, update_running
from lightning_norm.layers.scheduled import Scheduled
from lightning_norm.normalizers.representative_batch_norm import RepresentativeBatchNorm
from lightning_norm.ops import torch_private
from lightning_norm.ops.compiled import snapshot
from lightning_norm.ops.condensation import condensation, squared_norms
from lightning_norm.ops.fused.per_channel import PerChannelSpec
from lightning_norm.ops.layout import Layout, at_least_float32
from lightning_norm.ops.moments import Affine, Moments

NOT_MEASURED = -2.0


class UnifiedBatchNorm(RepresentativeBatchNorm):
    r"""Keep a batch of samples that are too alike out of the statistics; rectify centering, scaling and affine.

    .. math::
        x_c = x + w_m K(x), \quad x_s = \frac{x_c - \mu}{\sqrt{\sigma^2 + \epsilon}}, \quad
        y = \gamma\, g(w_a K(x) + b_a)\, g(w_v K(x_s) + w_b)\, x_s + \beta

    .. math::
        (\mu, \sigma^2) = \begin{cases} \text{those of the batch, which move the running ones} & s \le \tau \\
        \text{the running ones, which stay} & s > \tau \end{cases}
        \qquad s = \frac{1}{N(N - 1)} \sum_{i \ne j} \cos(x_i, x_j)

    with g the sigmoid, K the mean over the positions of a sample and channel, and s the condensation of the layer's
    input over the whole batch. ``affine_weight`` w_a starts at 0 and ``affine_bias`` b_a at -1, each (C,), beside those
    of :class:`RepresentativeBatchNorm`. Wang et al. 2023, arXiv 2311.15993; the affine gate: Liang et al., AAAI 2020.

    When: large batches, and features that grow alike early in training. When not: on inputs that are never negative,
    whose condensation is high by construction; or without a look at ``condensation`` before a threshold is set.

    Args:
        num_features: channels, the C of an input (N, C, *).
        threshold: tau; ``None`` for no threshold, and nothing is measured.
        mode: "switch" normalizes a condensed batch by the running statistics; "gate" by its own, and only keeps them
            out of the running ones.
        condensed_grad: with "switch", the gradient of a condensed batch: "detach" none through statistics, which can
            diverge where the running ones lag behind; "renorm" that of its own statistics, with running ones that count
            as at most 3 times larger or smaller and 5 deviations off.
        min_updates: updates of the running statistics before any batch may count as condensed.
        max_skip: after so many condensed batches in a row, one is used as if it were not.
        rectify: the rectifications, out of "center", "scale" and "affine"; with none, the layer is BatchNorm.
        gate_init: "unit" divides each gate by its starting value, so that the layer starts as BatchNorm; "paper" does
            not, and starts with outputs of sigmoid(1) sigmoid(-1) = 0.197 times the size.
        momentum: weight of the new batch in the running statistics.
        options: eps, affine, bias, track_running_stats, channel_dim, device, dtype: see :class:`MomentNorm`.

    Raises:
        ValueError: threshold out of range, or without running statistics; an unknown mode, rectification or
            ``gate_init``; ``min_updates`` or ``max_skip`` not a count.

    Differs from the paper: its equations were not at hand. The measure, the switch, warm-up and lock protection, and
    which rectifications are meant, are this package's reading of what it describes.

    >>> UnifiedBatchNorm(8, threshold=0.7)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "ubn"
    paper = Paper(
        "Wang et al.",
        2023,
        "Unified Batch Normalization: Identifying and Alleviating the Feature Condensation in Batch Normalization and "
        "a Unified Framework",
        "arXiv 2311.15993",
    )
    extra_parameters: ClassVar[dict[str, str]] = {
        **RepresentativeBatchNorm.extra_parameters,
        "affine_weight": "C",
        "affine_bias": "C",
    }
    repr_arguments: ClassVar[tuple[str, ...]] = (
        "threshold",
        "mode",
        "condensed_grad",
        "min_updates",
        "max_skip",
        "rectify",
        "gate_init",
    )
    evaluation_arguments: ClassVar[tuple[str, ...]] = ("rectify", "gate_init")
    rectifications: ClassVar[dict[str, dict[str, float]]] = {
        **RepresentativeBatchNorm.rectifications,
        "affine": {"affine_weight": 0.0, "affine_bias": -1.0},
    }
    extra_buffers: ClassVar[ExtraBuffers] = ExtraBuffers(counters=("measured", "skipped", "skipped_in_a_row"))
    test_arguments: ClassVar[dict[str, Any]] = {"min_updates": 0}
    condensation: Tensor
    measured: Tensor
    skipped: Tensor
    skipped_in_a_row: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        threshold: Annotated[float | None, Scheduled(-1, 1, training_only=True)] = None,
        mode: Literal["switch", "gate"] = "switch",
        condensed_grad: Literal["detach", "renorm"] = "detach",
        min_updates: int = 100,
        max_skip: int = 100,
        rectify: Sequence[str] = ("center", "scale", "affine"),
        gate_init: Literal["unit", "paper"] = "unit",
        momentum: Annotated[float | None, Scheduled(0, 1, training_only=True)] = 0.1,
        **options: Any,
    ) -> None:
        for name, value, least in (("min_updates", min_updates, 0), ("max_skip", max_skip, 1)):
            if value < least:
                raise ValueError(f"UnifiedBatchNorm: {name} must be an int >= {least}, got {value!r}.")
        self.condensed_grad = condensed_grad
        self.mode, self.min_updates, self.max_skip = mode, int(min_updates), int(max_skip)
        super().__init__(num_features, rectify=rectify, gate_init=gate_init, momentum=momentum, **options)
        # After the base class, which may have turned them off.
        if threshold is not None and not self.track_running_stats:
            raise ValueError(
                "UnifiedBatchNorm: a threshold chooses between batch and running statistics, and this layer keeps "
                "none. Leave out threshold, or pass track_running_stats=True."
            )
        # The last value is for the monitor alone, so that no file holds it; a cosine is never -2.
        like: dict[str, Any] = {"device": options.get("device"), "dtype": at_least_float32(options.get("dtype"))}
        last_condensation = torch.full((), NOT_MEASURED, **like) if self.track_running_stats else None
        self.register_buffer("condensation", last_condensation, persistent=False)
        self.threshold = threshold

    @property
    def train_uses_running_stats(self) -> bool:
        """With a threshold, which a batch's condensation is compared with."""
        return self.threshold is not None and moves_running_stats(self)

    def algebra_of(self, x: Tensor, layout: Layout) -> Callable[[Moments], Affine]:
        """Return the algebra; with a threshold, in training, the one that also measures the condensation of x."""
        # Recalibration takes every batch, condensed or not.
        recalibrates = isinstance(self._accumulator, StatisticsAccumulator)
        may_choose = trains_with_running_stats(self) and not recalibrates
        if self.scheduled("threshold") is None or not may_choose:
            return self.algebra

        # The measure needs x itself, which an algebra of moments does not see.
        def with_threshold(m: Moments) -> Affine:
            similarity = condensation(x, squared_norms(m), m.ranks)
            return self._rectified(m, functools.partial(self._choose, similarity))

        return with_threshold

    def _chooser(self) -> Callable[[Tensor, Moments], bool] | None:
        """Return what measures the condensation of x, where a threshold is set, and counts a batch below it.

        Whether one above the threshold counts as condensed, and what then normalizes it, the algebra knows.
        """
        threshold = self.scheduled("threshold")
        if threshold is None or not trains_with_running_stats(self):
            return None

        def is_below(x: Tensor, m: Moments) -> bool:
            similarity = condensation(x, squared_norms(m)).item()
            if similarity > threshold.item():
                return False
            if moves_running_stats(self):
                # What ``_is_condensed`` writes, with values that were read.
                if math.isfinite(similarity):
                    self.condensation.fill_(similarity)
                    self.measured.add_(1)
                self.skipped_in_a_row.zero_()
            return True

        return is_below

    def fused_spec(self, layout: Layout) -> PerChannelSpec | None:
        """Return the same equations for the kernels, which measure the condensation where a threshold is set.

        They count whatever they measure, so that paused statistics are left to PyTorch.
        """
        spec, threshold = super().fused_spec(layout), self.scheduled("threshold")
        if spec is None or threshold is None or not trains_with_running_stats(self):
            return spec
        if not moves_running_stats(self):
            return None
        # The numbers are those of the kernel's ``condensed``.
        how = 2 if self.mode == "gate" else {"detach": 1, "renorm": 3}[self.condensed_grad]
        flags = replace(spec.flags, condensed=how, min_updates=int(self.min_updates), max_skip=int(self.max_skip))
        counters = tuple(self._buffers[name] for name in ("condensation", *self.extra_buffers.counters))
        return replace(spec, flags=flags, counters=counters, threshold=threshold)

    def _choose(self, similarity: Tensor, batch: Moments) -> tuple[Moments, Tensor | None]:
        """Return the statistics to normalize by, and move the running ones if the batch is not condensed.

        With "renorm" a condensed batch is normalized by its own statistics, so that the gradient flows through them;
        a factor and an offset, both constants, then give the output the value that the running statistics would give,
        within the limits of batch renormalization.

        Args:
            similarity: the condensation of the batch, 0-dim.
            batch: moments of x_c over the batch, (1, C).

        Returns:
            The moments that are mu and sigma^2, and the offset that is added to x_s, ``None`` for none.
        """
        running = self.running()
        mean, var, condensed = snapshot(running.mean, running.var, self._is_condensed(similarity))
        # A batch that is too alike must not move what the others are normalized by.
        if moves_running_stats(self):
            update_running(self, batch, ~condensed)
        # The batch keeps its own statistics, and only moves nothing.
        if self.mode == "gate":
            return batch, None
        # torch.where promotes: one dtype on both sides keeps the algebra in that of the batch.
        mean, var = mean.to(batch.mean.dtype), var.to(batch.var.dtype)
        if self.condensed_grad == "detach":
            mean, var = torch.where(condensed, mean, batch.mean), torch.where(condensed, var, batch.var)
            return Moments(mean, var, batch.count), None
        measured_stats, running_stats = ((u, (v + self.eps).rsqrt()) for u, v in ((batch.mean, batch.var), (mean, var)))
        # The limits of Ioffe's experiments; a factor on the scale is one over its square on the variance.
        r, d = renorm(measured_stats, running_stats, 3.0, 5.0)
        r, d = torch.where(condensed, r, 1.0), torch.where(condensed, d, 0.0)
        return Moments(batch.mean, (batch.var + self.eps) / r.square() - self.eps, batch.count), d

    @torch_private.without_gradients
    def _is_condensed(self, similarity: Tensor) -> Tensor:
        """Tell whether the batch counts as condensed, as a 0-dim tensor, and count it.

        A similarity of NaN, as that of a batch of one sample, is not above any threshold.
        """
        threshold = self.scheduled("threshold")
        assert threshold is not None
        # Few updates make running statistics too poor to normalize by; and no layer may skip for ever.
        may_skip = self._is_warm() & (self.skipped_in_a_row < self.max_skip)
        condensed = (similarity > threshold) & may_skip
        if not moves_running_stats(self):
            return condensed
        defined = similarity.isfinite()
        if not torch_private.is_captured(self.condensation):  # no state_dict holds it
            self.condensation.copy_(torch.where(defined, similarity.to(self.condensation.dtype), self.condensation))
        self.measured.add_(defined)
        self.skipped.add_(condensed)
        self.skipped_in_a_row.copy_(torch.where(condensed, self.skipped_in_a_row + 1, 0))
        return condensed

    def _gain(self, k: Tensor, k_s: Tensor) -> Tensor | None:
        gain = super()._gain(k, k_s)
        # The third gate sees K(x) and not K(x_s): it belongs to gamma, before anything was standardized.
        if "affine" not in self.rectify:
            return gain
        # Gates multiply, so that each of the three can be left out by itself.
        gate = self._gate("affine", k)
        return gate if gain is None else gain * gate

    @torch.no_grad()
    def monitor(self) -> dict[str, Tensor]:
        """Return the last condensation, the fraction of batches it kept out, and what the rectifications learned."""
        shown = super().monitor()
        if self.threshold is None or not self.track_running_stats or not self.has_running_stats:
            return shown
        # Nothing was measured before the first batch, and in warm-up nothing can be skipped.
        condensation = torch.where(self.condensation > NOT_MEASURED, self.condensation, torch.nan)
        skipped = torch.where(self._is_warm() & (self.measured > 0), self.skipped / self.measured, torch.nan)
        return {"condensation": condensation, "skipped": skipped, **shown}

    def monitor_notes(self) -> dict[str, str]:
        """Return until which update no batch can be condensed, while that lies ahead."""
        if self.threshold is None or not self.track_running_stats or not self.has_running_stats:
            return {}
        if bool(self._is_warm()):
            return {}
        return {"skipped": f"no batch can be condensed before update {self.min_updates}"}

    def _is_warm(self) -> Tensor:
        """Tell whether there were updates enough for a batch to count as condensed."""
        tracked = self.num_batches_tracked
        return self.measured.new_zeros(()) >= self.min_updates if tracked is None else tracked >= self.min_updates

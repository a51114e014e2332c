"""Batch renormalization: the batch's statistics, scaled and moved towards the running ones within limits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_norm.layers.accumulators import StatisticsAccumulator
from lightning_norm.layers.base import Paper
from lightning_norm.layers.blended import BlendedNorm
from lightning_norm.layers.declared import Unsupported
from lightning_norm.layers.fused_specs import per_channel_spec
from lightning_norm.layers.renormalized import renorm
from lightning_norm.layers.running_stats import (
    moves_running_stats,
    running_buffers,
    trains_with_running_stats,
    update_running,
)
from lightning_norm.layers.scheduled import Scheduled
from lightning_norm.ops.compiled import snapshot
from lightning_norm.ops.fused.per_channel import PerChannelSpec
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.moments import Affine, Moments
from lightning_norm.ops.vectors import Array


class BatchRenorm(BlendedNorm):
    r"""Normalize by the batch's statistics, then scale and move the result to where the running ones would have it.

    .. math::
        y = \gamma \left( \frac{x - \mu_B}{\sigma_B}\, r + d \right) + \beta, \qquad
        r = \mathrm{clip}_{[1 / r_{max}, r_{max}]}\!\left(\frac{\sigma_B}{\sigma}\right), \quad
        d = \mathrm{clip}_{[-d_{max}, d_{max}]}\!\left(\frac{\mu_B - \mu}{\sigma}\right)

    with :math:`\sigma_B = \sqrt{\sigma_B^2 + \epsilon}` and r and d constants: the gradient is that of the batch's own
    statistics. Afterwards :math:`\mu` and :math:`\sigma` move towards the batch's by ``momentum``; evaluation
    normalizes by them. Ioffe, NIPS 2017, arXiv 1702.03275.

    When: batches that are small, or whose samples depend on one another. When not: large batches of independent
    samples, where BatchNorm does the same for less.

    Args:
        num_features: channels, the C of an input (N, C, *).
        r_max: largest factor, at least 1; 1 with ``d_max=0`` is BatchNorm. The paper starts so and widens both.
        d_max: largest offset, in standard deviations.
        average: "std", as published, averages standard deviations; "var" variances, BatchNorm's own buffers.
        init: "first_batch" copies the first batch, whatever the momentum; "zero_one" moves mean 0 and deviation 1.
        options: see :class:`MomentNorm`; the paper's momentum is 0.01.

    Raises:
        ValueError: r_max below 1, d_max below 0, an unknown ``average``.

    Differs from the paper: the first batch is copied into the running statistics, whatever the momentum, unless
    statistics were moved in; so r and d mean something from the second batch on. The limits start at the values that
    the paper ends with, for nothing widens them but a schedule.

    >>> BatchRenorm(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "brn"
    paper = Paper(
        "Ioffe",
        2017,
        "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
        "arXiv 1702.03275",
    )
    _of_batch_alone = True
    eval_uses_input_stats: ClassVar[bool] = False
    preserves_eval = True
    gradient_is_exact = False
    unsupported = Unsupported()
    repr_arguments: ClassVar[tuple[str, ...]] = ("r_max", "d_max", "average", "init")

    def __init__(
        self,
        num_features: int,
        *,
        r_max: Annotated[float, Scheduled(1, math.inf, training_only=True)] = 3.0,
        d_max: Annotated[float, Scheduled(0, math.inf, training_only=True)] = 5.0,
        average: Literal["std", "var"] = "std",
        init: Literal["first_batch", "zero_one"] = "first_batch",
        momentum: Annotated[float | None, Scheduled(0, 1, training_only=True)] = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(num_features, average=average, init=init, momentum=momentum, **options)
        self.r_max, self.d_max = r_max, d_max

    def std_of(self, var: Tensor) -> Tensor:
        """Return sigma without the eps that stands beside it: sqrt(var + eps) - eps."""
        return (var + self.eps).sqrt() - self.eps

    def deviation_at_once(self, var: Array) -> tuple[Array, Array]:
        """Return sigma as :meth:`std_of` has it, or its square, and the root of the variance and eps."""
        root = np.sqrt(var + self._eps)
        return root - self._eps if self.average == "std" else var, root

    def weight_at(self, steps: Tensor) -> Tensor:
        """Return the momentum, or one over the number of batches without."""
        momentum = self.scheduled("momentum")
        return 1.0 / steps.double() if momentum is None else momentum

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above."""
        if self.has_running_stats and not self.training:
            mean, std_or_var = running_buffers(self)
            return self.scaled(mean, self.scale_of(std_or_var))
        batch = m.over_batch()
        measured = batch.mean, self.std_or_var_of(batch.var)
        scale = self.scale_of(measured[1])
        if not trains_with_running_stats(self):
            return self.scaled(measured[0], scale)
        if isinstance(self._accumulator, StatisticsAccumulator):
            # What is estimated anew may be far from what the weights of now give.
            update_running(self, batch)
            return self.scaled(measured[0], scale)
        constants = measured[0].detach(), measured[1].detach()
        *old, first = snapshot(*running_buffers(self), self.copies(self.steps()))
        # The statistics of the batches before, which this one moves only afterwards; the first agrees with itself.
        mean, std_or_var = (torch.where(first, new, was.to(new.dtype)) for new, was in zip(constants, old, strict=True))
        self.blend(constants, batch)
        r_max, d_max = self.scheduled("r_max"), self.scheduled("d_max")
        assert r_max is not None
        assert d_max is not None
        r, d = renorm((measured[0], scale), (mean, self.scale_of(std_or_var)), r_max, d_max)
        return self.scaled(measured[0], scale * r, d.to(scale.dtype))

    renormalizes = True
    moves_first = False

    def limits(self) -> tuple[float, float]:
        """Return r_max and d_max."""
        # By the tensors behind the attributes, which look at who has written to them.
        r_max, d_max = self.scheduled("r_max"), self.scheduled("d_max")
        assert r_max is not None
        assert d_max is not None
        return r_max.item(), d_max.item()

    def fused_spec(self, layout: Layout) -> PerChannelSpec | None:
        """Return the same equations for the kernels, which move the statistics whenever they compute them."""
        # Paused: these kernels would move what is to stand still.
        if trains_with_running_stats(self) and not moves_running_stats(self):
            return None
        frozen, std = self.has_running_stats and not self.training, self.average == "std"
        numbers = {"inner": self.eps if std else 0.0}
        if frozen or not moves_running_stats(self):
            return per_channel_spec(self, numbers, needs_moments=not frozen, std=std)
        flags: dict[str, Any] = {"blend": 4, "powers": self.momentum is None, "track": 1}
        flags |= {"needs_moments": True, "std": std, "copies_first": self.init == "first_batch"}
        spec, rate = per_channel_spec(self, numbers, **flags), self.scheduled("momentum")
        r_max, d_max = self.scheduled("r_max"), self.scheduled("d_max")
        return replace(spec, counters=(self.updates, self.gap), rate=rate, threshold=r_max, limit=d_max)

    @torch.no_grad()
    def monitor(self) -> dict[str, Tensor]:
        """Return the limits, and how far the last batch's mean and std lay from the running ones, in running stds."""
        if not self.track_running_stats or not self.has_running_stats:
            return {}
        # As far as a schedule has widened them.
        limits = {name: torch.tensor(getattr(self, name)) for name in ("r_max", "d_max")}
        return {**limits, **self.measured_gap()}

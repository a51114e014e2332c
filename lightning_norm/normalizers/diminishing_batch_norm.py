"""Diminishing batch normalization: running statistics, moved by a diminishing weight, also in training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_norm.layers.base import Paper
from lightning_norm.layers.blended import BlendedNorm
from lightning_norm.layers.fused_specs import per_channel_spec
from lightning_norm.layers.running_stats import is_usable, running_buffers
from lightning_norm.layers.scheduled import Scheduled
from lightning_norm.ops.compiled import snapshot
from lightning_norm.ops.fused.per_channel import PerChannelSpec
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.moments import Affine, Moments

TINY = torch.finfo(torch.float32).tiny


class DiminishingBatchNorm(BlendedNorm):
    r"""Normalize by running statistics, in training as in evaluation; batch m moves them by alpha(m) first.

    .. math::
        y = \gamma \frac{x - \mu^{(m)}}{\sigma^{(m)} + \epsilon} + \beta, \qquad
        (\mu, \sigma)^{(m)} = \alpha^{(m)} (\mu_B, \sigma_B) + (1 - \alpha^{(m)}) (\mu, \sigma)^{(m-1)}

    Ma and Klabjan, TNNLS 2024, arXiv 1705.08011. Not to be confused with decorrelated batch normalization, also "DBN".

    When: batches too small or too varied for their own statistics. When not: with a very small alpha and a large
    learning rate, for a gradient that hardly sees the statistics does not hold back the scale of the weights.

    Args:
        num_features: channels, the C of an input (N, C, *).
        alpha: weight of the new batch, 1 for its statistics alone.
        power: alpha(m) = 1 / m^power in place of ``alpha``, with the layer's own count m of batches; the published
            convergence proof wants more than 2, 2.001 say.
        average: "std", as published (eps beside the root), or "var" (eps inside the root, BatchNorm's own buffers).
        stat_grad: "batch" lets the gradient pass through the new batch's part, "none" through no statistics.
        eps: added to the standard deviation, or to the variance with ``average="var"``.
        options: affine, bias, track_running_stats, channel_dim, device, dtype: see :class:`MomentNorm`; no momentum.

    Raises:
        ValueError: alpha out of range, power not positive, an unknown ``average`` or ``stat_grad``; a momentum, or an
            alpha where ``power`` rules, set on the layer.

    Differs from the paper: the gradient passes through the statistics by default, so that alpha = 1 with
    ``average="var"`` is BatchNorm in value and gradient; the first batch is copied, whatever alpha, unless statistics
    were moved in, which then count as the first. A batch's statistics are biased, so the buffers are.

    >>> DiminishingBatchNorm(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "dbn"
    paper = Paper("Ma and Klabjan", 2024, "Diminishing Batch Normalization", "arXiv 1705.08011")
    eval_uses_input_stats: ClassVar[bool] = False
    no_recalibration: ClassVar[str] = "its running statistics are what it trains with, moved by alpha alone"
    repr_arguments: ClassVar[tuple[str, ...]] = ("alpha", "power", "average", "stat_grad")

    def __init__(
        self,
        num_features: int,
        *,
        alpha: Annotated[float, Scheduled(0, 1, training_only=True)] = 0.25,
        power: float | None = None,
        average: Literal["std", "var"] = "std",
        stat_grad: Literal["batch", "none"] = "batch",
        eps: float = 1e-5,
        affine: bool = True,
        track_running_stats: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bias: bool = True,
        virtual_batch_size: int | None = None,
    ) -> None:
        if power is not None and not 0 < power < math.inf:
            raise ValueError(f"DiminishingBatchNorm: power must be a number > 0 or None, got {power!r}.")
        self.stat_grad = stat_grad
        options: dict[str, Any] = {"eps": eps, "affine": affine, "channel_dim": channel_dim}
        options |= {"track_running_stats": track_running_stats, "device": device, "dtype": dtype, "bias": bias}
        options |= {"virtual_batch_size": virtual_batch_size}
        super().__init__(num_features, average=average, momentum=None, **options)
        # In this order, for with a power no alpha can be set.
        self.alpha = alpha
        self.power = None if power is None else float(power)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "alpha" and self.__dict__.get("power") is not None:
            raise ValueError(f"DiminishingBatchNorm: power={self.power} rules alpha. Set power = None first.")
        if name == "momentum" and value is not None:
            raise ValueError("DiminishingBatchNorm has no momentum. Set alpha, the weight of the new batch.")
        super().__setattr__(name, value)

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above."""
        mean, std_or_var = self._statistics(m)
        scale = 1 / (std_or_var + self.eps) if self.average == "std" else (std_or_var + self.eps).rsqrt()
        return Affine(mean, scale if self.weight is None else scale * self.weight.to(scale.dtype), self.bias)

    def _statistics(self, m: Moments) -> tuple[Tensor, Tensor]:
        """Return what to normalize by: the mean, and the standard deviation or the variance, each (1, C)."""
        if self.has_running_stats and not self.training:
            return running_buffers(self)
        batch = m.over_batch()
        mean, std_or_var = batch.mean, batch.var
        if self.average == "std":
            # The root of 0 has an infinite slope, and a channel that is constant must not get a gradient of NaN.
            std_or_var = std_or_var.clamp_min(TINY).sqrt()
        if not self.moves_running_stats:
            return mean, std_or_var
        if self.stat_grad == "none":
            mean, std_or_var = mean.detach(), std_or_var.detach()
        steps = self.steps()
        # The gradient needs alpha and the old statistics, and the lines below overwrite the buffers they are read from.
        alpha, *old = snapshot(torch.where(steps == 1, 1, self._alpha_at(steps)), *running_buffers(self))
        batch_values = (mean, std_or_var)
        # The old statistics are constants, so the gradient passes through the new batch's part alone.
        mean, std_or_var = (
            alpha * new + (1 - alpha) * was.to(new.dtype) for new, was in zip(batch_values, old, strict=True)
        )
        self.write_blend(
            (mean, std_or_var), batch_values, steps, is_usable(self, batch.mean, batch_values[1], batch.count)
        )
        return mean, std_or_var

    def _alpha_at(self, steps: Tensor) -> Tensor:
        """Return alpha(m) of the equation above, 0-dim."""
        alpha = self.scheduled("alpha")
        assert alpha is not None
        return alpha if self.power is None else steps.to(alpha.dtype) ** -self.power

    def fused_spec(self, layout: Layout) -> PerChannelSpec:
        """Return the same equations for the kernels."""
        frozen = self.has_running_stats and not self.training
        flags: dict[str, Any] = {"needs_moments": not frozen, "std": self.average == "std"}
        if not self.moves_running_stats or frozen:
            return per_channel_spec(self, {}, **flags)
        # Here the kernels move the statistics before they normalize, and by alpha in place of momentum.
        flags |= {"blend": True, "powers": self.power is not None, "detach": self.stat_grad == "none", "track": 1}
        spec = per_channel_spec(self, {"power": self.power or 1.0}, **flags)
        return replace(spec, counters=(self.updates, self.gap), rate=self.scheduled("alpha"))

    @property
    def preserves_eval(self) -> bool:
        """Whether evaluation is on statistics that were moved in; those of a batch have eps beside the root."""
        return self.track_running_stats or self.average == "var"

    @torch.no_grad()
    def monitor(self) -> dict[str, Tensor]:
        """Return alpha of the last batch, and how far its mean and std lay from the running ones, in running stds."""
        if not self.track_running_stats or not self.has_running_stats:
            return {}
        # A copy, for the monitor keeps the value and the schedule overwrites the tensor.
        alpha = self._alpha_at(self.updates.clamp_min(1)).clone()
        return {"alpha": alpha, "gap_mean": self.gap[0], "gap_std": self.gap[1]}

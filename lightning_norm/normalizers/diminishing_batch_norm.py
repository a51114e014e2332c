"""Diminishing batch normalization: running statistics, moved by a diminishing weight, also in training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_norm.layers.base import MomentNorm, Paper
from lightning_norm.layers.fused_specs import per_channel_spec
from lightning_norm.layers.scheduled import Scheduled
from lightning_norm.layers.translation import Translation
from lightning_norm.layers.variance import to_std, to_var
from lightning_norm.ops import torch_private
from lightning_norm.ops.compiled import snapshot
from lightning_norm.ops.fused.per_channel import PerChannelSpec
from lightning_norm.ops.layout import Layout, at_least_float32
from lightning_norm.ops.moments import Affine, Moments

TINY = torch.finfo(torch.float32).tiny


class DiminishingBatchNorm(MomentNorm):
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
        options: affine, track_running_stats, channel_dim, device, dtype: see :class:`MomentNorm`. There is no momentum.

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
    no_window = "it normalizes by its running statistics in training, which each batch has to move first"
    counters: ClassVar[tuple[str, ...]] = ("updates",)
    repr_arguments: ClassVar[tuple[str, ...]] = ("alpha", "power", "average", "stat_grad")
    updates: Tensor
    gap: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        alpha: Annotated[float, Scheduled(0, 1)] = 0.25,
        power: float | None = None,
        average: Literal["std", "var"] = "std",
        stat_grad: Literal["batch", "none"] = "batch",
        eps: float = 1e-5,
        affine: bool = True,
        track_running_stats: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if power is not None and not 0 < power < math.inf:
            raise ValueError(f"DiminishingBatchNorm: power must be a number > 0 or None, got {power!r}.")
        self.average, self.stat_grad = average, stat_grad
        options: dict[str, Any] = {"eps": eps, "affine": affine, "channel_dim": channel_dim}
        options |= {"track_running_stats": track_running_stats, "device": device, "dtype": dtype}
        super().__init__(num_features, momentum=None, **options)
        gap = torch.zeros(2, device=device, dtype=at_least_float32(dtype)) if track_running_stats else None
        self.register_buffer("gap", gap, persistent=False)
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

    def fused_spec(self, layout: Layout) -> PerChannelSpec:
        """Return the same equations for the kernels."""
        frozen = self.track_running_stats and not self.training
        flags: dict[str, Any] = {"needs_moments": not frozen, "std": self.average == "std"}
        if not self.track_running_stats or frozen:
            return per_channel_spec(self, {}, **flags)
        flags |= {"blend": True, "powers": self.power is not None, "detach": self.stat_grad == "none", "track": 1}
        spec = per_channel_spec(self, {"power": self.power or 1.0}, **flags)
        return replace(spec, counters=(self.updates, self.gap), rate=self.scheduled("alpha"))

    def _statistics(self, m: Moments) -> tuple[Tensor, Tensor]:
        """Return what to normalize by: the mean, and the standard deviation or the variance, each (1, C)."""
        if self.track_running_stats and not self.training:
            return self._running()
        batch = m.over_batch()
        mean, std_or_var = batch.mean, batch.var
        if self.average == "std":
            std_or_var = std_or_var.clamp_min(TINY).sqrt()  # the clamp cuts the infinite slope of the root at 0
        if not self.track_running_stats:
            return mean, std_or_var
        if self.stat_grad == "none":
            mean, std_or_var = mean.detach(), std_or_var.detach()
        steps = self._steps()
        # The gradient needs alpha and the old statistics, and the lines below overwrite the buffers they are read from.
        alpha, *old = snapshot(torch.where(steps == 1, 1, self._alpha_at(steps)), *self._running())
        batch_values = (mean, std_or_var)
        mixed = [alpha * new + (1 - alpha) * was.to(new.dtype) for new, was in zip(batch_values, old, strict=True)]
        self._move_average(mixed, batch_values, steps, self._usable(mean, batch.var, batch.count))
        return mixed[0], mixed[1]

    @torch_private.without_gradients
    def _move_average(self, mixed: list[Tensor], batch: tuple[Tensor, Tensor], steps: Tensor, usable: Tensor) -> None:
        """Write the moved statistics, and how far the batch lay from them, unless it has a NaN or an infinity."""
        was, now = ((s if self.average == "std" else s.sqrt()) for s in (mixed[1], batch[1]))
        gap = torch.stack([batch[0] - mixed[0], now - was]).abs() / (was + self.eps)
        news = [*mixed, steps, gap.flatten(1).mean(1)]
        for name, new in zip((*self.running_names, "updates", "gap"), news, strict=True):
            old: Tensor = getattr(self, name)
            if name != "gap" or not torch_private.is_captured(old):  # no state_dict holds it
                old.copy_(torch.where(usable, new.view_as(old).to(old.dtype), old))
        self.get_buffer("num_batches_tracked").add_(usable)

    def _running(self) -> tuple[Tensor, Tensor]:
        """Return the running mean, and the running standard deviation or variance, each (1, C)."""
        mean, std_or_var = (getattr(self, name).unsqueeze(0) for name in self.running_names)
        return mean, std_or_var

    def _steps(self) -> Tensor:
        """Return m of this batch: 1 for the first; 2 where statistics were moved in, which count as one."""
        return self.updates + 1 + ((self.updates == 0) & (self._running()[0] != 0).any())

    def _alpha_at(self, steps: Tensor) -> Tensor:
        """Return alpha(m) of the equation above, 0-dim."""
        alpha = self.scheduled("alpha")
        assert alpha is not None
        return alpha if self.power is None else steps.to(alpha.dtype) ** -self.power

    def running(self) -> Moments:
        """Return the running statistics as those of a BatchNorm: mean, and the variance that evaluates alike."""
        mean, std_or_var = self._running()
        return Moments(mean, std_or_var if self.average == "var" else to_var(std_or_var, self.eps), 1)

    @property
    def running_names(self) -> tuple[str, str]:
        """The second is the standard deviation, or with ``average="var"`` BatchNorm's own variance."""
        return "running_mean", f"running_{self.average}"

    @property
    def translations(self) -> tuple[Translation, ...]:
        """A BatchNorm's variance is held as a standard deviation, and that of another such layer as a variance."""
        std, var = (lambda t: to_std(t, self.eps)), (lambda t: to_var(t, self.eps))
        if self.average == "std":
            return (Translation("running_var", "running_std", std, var),)
        return (Translation("running_std", "running_var", var, std),)

    @property
    def preserves_eval(self) -> bool:
        """Whether evaluation is on statistics that were moved in; those of a batch have eps beside the root."""
        return self.track_running_stats or self.average == "var"

    @torch.no_grad()
    def monitor(self) -> dict[str, Tensor]:
        """Return alpha of the last batch, and how far its mean and std lay from the running ones, in running stds."""
        if not self.track_running_stats:
            return {}
        alpha = self._alpha_at(self.updates.clamp_min(1)).clone()
        return {"alpha": alpha, "gap_mean": self.gap[0], "gap_std": self.gap[1]}

    def extra_repr(self) -> str:  # noqa: D102
        return super().extra_repr().replace("momentum=None, ", "")

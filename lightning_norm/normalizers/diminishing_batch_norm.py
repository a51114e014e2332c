"""Diminishing batch normalization: running statistics, moved by a diminishing weight, also in training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_norm.layers.base import Paper
from lightning_norm.layers.blended import BlendedNorm
from lightning_norm.layers.declared import Unsupported
from lightning_norm.layers.fused_specs import per_channel_spec
from lightning_norm.layers.renormalized import renorm
from lightning_norm.layers.running_stats import moves_running_stats, running_buffers, trains_with_running_stats
from lightning_norm.layers.scheduled import Scheduled
from lightning_norm.ops.fused.per_channel import PerChannelSpec
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.moments import Affine, Moments
from lightning_norm.ops.vectors import Array

TINY = torch.finfo(torch.float32).tiny


class DiminishingBatchNorm(BlendedNorm):
    r"""Normalize by running statistics, in training as in evaluation; batch m moves them by alpha(m) first.

    .. math::
        y = \gamma \frac{x - \mu^{(m)}}{\sigma^{(m)} + \epsilon} + \beta, \qquad
        (\mu, \sigma)^{(m)} = \alpha^{(m)} (\mu_B, \sigma_B) + (1 - \alpha^{(m)}) (\mu, \sigma)^{(m-1)}

    Ma and Klabjan, TNNLS 2024, arXiv 1705.08011. Not to be confused with decorrelated batch normalization, also "DBN".

    When: batches too small or too varied for their own statistics. When not: to train better than BatchNorm at ordinary
    batch sizes, which it did not in this project's study (docs/evidence/dbn.md).

    Args:
        num_features: channels, the C of an input (N, C, *).
        alpha: weight of the new batch, 1 for its statistics alone.
        power: alpha(m) = 1 / m^power in place of ``alpha``, with the layer's own count m of batches; the published
            convergence proof wants more than 2, 2.001 say.
        average: "std", as published (eps beside the root), or "var" (eps inside the root, BatchNorm's own buffers).
        train_stats: what training normalizes by: "running", the moved statistics, or "batch", the batch's own, beside
            which the running ones move for evaluation alone.
        stat_grad: "renorm" is the gradient of BatchNorm at the value of the running statistics; "batch" lets the
            gradient pass through the new batch's part alone, "none" through no statistics, and both train worse
            than BatchNorm in docs/evidence/dbn.md.
        init: "first_batch" copies the first batch, whatever alpha; "zero_one" moves mean 0 and deviation 1 by alpha.
        eval_momentum: evaluate on an exponential average of the moved statistics, with this weight of the new ones;
            ``None`` evaluates on the last ones.
        eps: added to the standard deviation, or to the variance with ``average="var"``.
        options: affine, bias, track_running_stats, channel_dim, device, dtype: see :class:`MomentNorm`; no momentum.

    Raises:
        ValueError: alpha out of range, power not positive, an unknown word; an ``eval_momentum`` that would
            have no effect; a momentum, or an alpha where ``power`` rules, set on the layer.

    Differs from the paper: its analysis holds the statistics constant in the gradient, with which its own network
    hardly trains; here the gradient is BatchNorm's, and alpha = 1 with ``average="var"`` is BatchNorm in value and
    gradient. The first batch is copied, whatever alpha, unless statistics were moved in, which then count as the first.
    A batch's statistics are biased, so the buffers are.

    >>> DiminishingBatchNorm(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "dbn"
    paper = Paper("Ma and Klabjan", 2024, "Diminishing Batch Normalization", "arXiv 1705.08011")
    _of_batch_alone = True
    eval_uses_input_stats: ClassVar[bool] = False
    repr_arguments: ClassVar[tuple[str, ...]] = (
        "alpha",
        "power",
        "average",
        "train_stats",
        "stat_grad",
        "init",
        "eval_momentum",
    )

    def __init__(
        self,
        num_features: int,
        *,
        alpha: Annotated[float, Scheduled(0, 1, training_only=True)] = 0.25,
        power: float | None = None,
        average: Literal["std", "var"] = "std",
        train_stats: Literal["running", "batch"] = "running",
        stat_grad: Literal["renorm", "batch", "none"] = "renorm",
        init: Literal["first_batch", "zero_one"] = "first_batch",
        eval_momentum: Annotated[float | None, Scheduled(0, 1, training_only=True)] = None,
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
        if eval_momentum is not None and not track_running_stats:
            raise ValueError(
                "DiminishingBatchNorm: eval_momentum averages the running statistics, and this layer keeps none. "
                "Leave it out, or pass track_running_stats=True."
            )
        self.train_stats, self.stat_grad = train_stats, stat_grad
        options: dict[str, Any] = {"eps": eps, "affine": affine, "channel_dim": channel_dim}
        options |= {"track_running_stats": track_running_stats, "device": device, "dtype": dtype, "bias": bias}
        options |= {"virtual_batch_size": virtual_batch_size}
        super().__init__(num_features, average=average, init=init, momentum=None, **options)
        # In this order, for with a power no alpha can be set.
        self.alpha = alpha
        self.power = None if power is None else float(power)
        if eval_momentum is not None:
            self._add_blend()
        self.eval_momentum = eval_momentum

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "alpha" and self.__dict__.get("power") is not None:
            raise ValueError(f"DiminishingBatchNorm: power={self.power} rules alpha. Set power = None first.")
        if name == "momentum" and value is not None:
            raise ValueError("DiminishingBatchNorm has no momentum. Set alpha, the weight of the new batch.")
        if name == "eval_momentum" and (value is not None) != self.averages_blend:
            raise ValueError(
                f"DiminishingBatchNorm: eval_momentum = {value!r} would change which buffers there are. Build the "
                "layer with it: DiminishingBatchNorm(C, eval_momentum=0.1), say."
            )
        super().__setattr__(name, value)

    @property
    def unsupported(self) -> Unsupported:
        """Statistics cannot be re-estimated where training normalizes by them: they are a part of it."""
        trains_with_them = self.train_stats == "running"
        reason = "its running statistics are what it trains with, moved by alpha alone" if trains_with_them else ""
        return Unsupported(recalibration=reason)

    @property
    def gradient_is_exact(self) -> bool:
        """Whether training's gradient is that of the output, which holds no statistics constant."""
        return self.stat_grad == "batch" or (self.train_stats == "batch" and self.stat_grad == "renorm")

    def without_effect(self) -> dict[str, str]:
        """Return what a schedule would not change, and why."""
        averaged = {} if self.averages_blend else {"eval_momentum": "eval_momentum=None"}
        ruled = {} if self.power is None else {"alpha": f"power={self.power}"}
        return {**super().without_effect(), **averaged, **ruled}

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above."""
        if self.has_running_stats and not self.training:
            mean, std_or_var = running_buffers(self)
            return self.scaled(mean, self.scale_of(std_or_var))
        batch = m.over_batch()
        mean, std_or_var = batch.mean, self.std_or_var_of(batch.var)
        if not trains_with_running_stats(self):
            return self.scaled(mean, self.scale_of(std_or_var))
        constants = mean.detach(), std_or_var.detach()
        of_batch = constants if self.stat_grad == "none" else (mean, std_or_var)
        blends_gradient = self.train_stats == "running" and self.stat_grad == "batch"
        blend = self.blend(of_batch if blends_gradient else constants, batch)
        mean, std_or_var = of_batch if self.train_stats == "batch" else blend
        scale = self.scale_of(std_or_var)
        # By the batch's statistics themselves, BatchNorm's gradient is the ordinary one.
        if self.stat_grad != "renorm" or self.train_stats == "batch":
            return self.scaled(mean, scale)
        # The value of the blend, as a constant factor and offset on what the batch's statistics make of x.
        batch_scale = self.scale_of(of_batch[1])
        r, d = renorm((of_batch[0], batch_scale), (mean, scale))
        return self.scaled(of_batch[0], batch_scale * r, d)

    def std_of(self, var: Tensor) -> Tensor:
        """Return the root."""
        # The root of 0 has an infinite slope, and a channel that is constant must not get a gradient of NaN.
        return var.clamp_min(TINY).sqrt()

    def weight_at(self, steps: Tensor) -> Tensor:
        """Return alpha(m) of the equation above."""
        alpha = self.scheduled("alpha")
        assert alpha is not None
        # From the counter, which a checkpoint holds: a resumed run goes on with the alpha that it had reached.
        return alpha if self.power is None else steps.to(alpha.dtype) ** -self.power

    @property
    def renormalizes(self) -> bool:
        """Whether the gradient is that of BatchNorm at the value of the blend."""
        return self.train_stats == "running" and self.stat_grad == "renorm"

    def deviation_at_once(self, var: Array) -> tuple[Array, Array]:
        """Return sigma or its square, and the root of sigma (sigma + eps) where eps stands beside the root."""
        if self.average == "var":
            return var, np.sqrt(var + self._eps)
        std = np.sqrt(np.maximum(var, TINY))
        return std, np.sqrt(std * (std + self._eps))

    def fused_spec(self, layout: Layout) -> PerChannelSpec | None:
        """Return the same equations for the kernels, which write the blend whenever they compute it."""
        # Paused: these kernels would move what is to stand still.
        if trains_with_running_stats(self) and not moves_running_stats(self):
            return None
        frozen = self.has_running_stats and not self.training
        flags: dict[str, Any] = {"needs_moments": not frozen, "std": self.average == "std"}
        if not moves_running_stats(self) or frozen:
            return per_channel_spec(self, {}, **flags)
        # Here the kernels move the statistics before they normalize, and by alpha in place of momentum.
        blend = 2 if self.train_stats == "batch" else 3 if self.stat_grad == "renorm" else 1
        flags |= {"blend": blend, "powers": self.power is not None, "detach": self.stat_grad == "none", "track": 1}
        flags |= {"copies_first": self.init == "first_batch", "averages": self.averages_blend}
        spec = per_channel_spec(self, {"power": self.power or 1.0}, **flags)
        averaged = tuple(self.get_buffer(name) for name in self.running_names) if self.averages_blend else ()
        rate, average_rate = self.scheduled("alpha"), self.scheduled("eval_momentum")
        running = (*(self.get_buffer(name) for name in self.blend_names), *spec.running[2:])
        counters = (self.updates, self.gap, *averaged)
        return replace(spec, running=running, counters=counters, rate=rate, threshold=average_rate)

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
        alpha = self.weight_at(self.updates.clamp_min(1)).clone()
        return {"alpha": alpha, **self.measured_gap()}

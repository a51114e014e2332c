"""A normalizer whose running statistics are moved first and then normalize, in training as in evaluation."""

from __future__ import annotations

import math
import sys
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_norm.errors import FusionError
from lightning_norm.layers import on_cpu
from lightning_norm.layers.base import MomentNorm
from lightning_norm.layers.declared import ExtraBuffers, Unsupported
from lightning_norm.layers.inference import fused_without_variance, fuses
from lightning_norm.layers.running_stats import (
    count_batch,
    count_skipped,
    fits,
    is_usable,
    moves_running_stats,
    running_buffers,
    update_running,
    write,
)
from lightning_norm.layers.translation import Translation, std_of_var, var_of_std
from lightning_norm.ops import torch_private
from lightning_norm.ops.compiled import snapshot
from lightning_norm.ops.layout import Layout, at_least_float32
from lightning_norm.ops.moments import Affine, Moments
from lightning_norm.ops.native import Constants
from lightning_norm.ops.vectors import Array, changed

_NO_WINDOW = Unsupported(
    window="it normalizes by its running statistics in training, which each batch has to move first"
)


class BlendedNorm(MomentNorm):
    r"""Abstract: a batch is blended into the running statistics, and x is normalized by the blend.

    .. math:: (\mu, s)^{(m)} = a^{(m)} (\mu_B, s_B) + (1 - a^{(m)}) (\mu, s)^{(m-1)}

    with s a standard deviation or a variance. A subclass says in :meth:`weight_at` what the weight a of batch m is, and
    in :meth:`std_of` what a standard deviation is.

    Args:
        num_features: channels.
        average: "std" for running standard deviations, "var" for BatchNorm's running variances.
        init: "first_batch" copies the first batch, "zero_one" moves mean 0 and deviation 1 by its weight.
        options: see :class:`MomentNorm`.
    """

    extra_buffers: ClassVar[ExtraBuffers] = ExtraBuffers(("updates",), ("blend_mean", "blend_std", "blend_var"))
    _aten_on_cpu: ClassVar[bool] = True
    updates: Tensor
    gap: Tensor
    """How far the last batch's mean and deviation lay from the running ones, in running deviations, (2,)."""

    def __init__(
        self,
        num_features: int,
        *,
        average: str,
        init: str = "first_batch",
        **options: Any,
    ) -> None:
        # Before the base class, which names the buffers by it.
        self.average, self.init = average, init
        super().__init__(num_features, **options)
        # Not saved: it describes the last batch, and a resumed run does not continue from it. -1: not measured yet.
        gap = (
            torch.full((2,), -1.0, device=options.get("device"), dtype=at_least_float32(options.get("dtype")))
            if self.track_running_stats
            else None
        )
        self.register_buffer("gap", gap, persistent=False)

    @torch.no_grad()
    def measured_gap(self) -> dict[str, Tensor]:
        """Return how far the last batch's mean and std lay from the running ones; NaN before the first batch."""
        gap = torch.where(self.gap >= 0, self.gap, torch.nan)
        return {"gap_mean": gap[0], "gap_std": gap[1]}

    def _add_blend(self) -> None:
        """Register the buffers of a blend that the running statistics average."""
        for name, running in zip(("blend_mean", f"blend_{self.average}"), self.running_names, strict=True):
            self.register_buffer(name, self.get_buffer(running).clone())

    @property
    def averages_blend(self) -> bool:
        """Whether the blend has buffers of its own, and the running statistics average it."""
        return "blend_mean" in self._buffers

    @property
    def unsupported(self) -> Unsupported:
        """No window: in training it normalizes by its running statistics."""
        return _NO_WINDOW

    @property
    def train_uses_running_stats(self) -> bool:
        """Always, as long as they move."""
        return moves_running_stats(self)

    @property
    def running_var(self) -> Tensor | None:
        """The running variance, with ``average="var"``; with "std" there is none.

        Raises:
            AttributeError: there is none.
            FusionError: there is none, and code outside of this package is about to fuse the layer as a BatchNorm.
        """
        if "running_var" in self._buffers:
            return self._buffers["running_var"]
        if not torch.compiler.is_compiling() and fused_without_variance(self, frame := sys._getframe(1)):
            raise FusionError(fuses(self, frame))
        raise AttributeError(f"{type(self).__name__} has no running_var")  # torch's own message comes in its place

    @property
    def running_names(self) -> tuple[str, str]:
        """The second is the standard deviation, or with ``average="var"`` BatchNorm's own variance."""
        return "running_mean", f"running_{self.average}"

    @property
    def blend_names(self) -> tuple[str, str]:
        """Names of the buffers that each batch is blended into: the running ones, or those that they average."""
        return ("blend_mean", f"blend_{self.average}") if self.averages_blend else self.running_names

    @property
    def _translations(self) -> tuple[Translation, ...]:
        """A BatchNorm's variance becomes a standard deviation, and that of another such layer a variance."""
        form = std_of_var if self.average == "std" else var_of_std
        return (form(self.eps), *(form(self.eps, "blend") for _ in range(self.averages_blend)))

    def reset_running_stats(self) -> None:
        """Set means to 0, deviations to 1 and counters to 0."""
        super().reset_running_stats()
        self._copy_to_blend()

    def _copy_to_blend(self) -> None:
        """Begin the blend anew from the running statistics."""
        if self.averages_blend and self.has_running_stats:
            with torch.no_grad():
                for name, running in zip(self.blend_names, self.running_names, strict=True):
                    self.get_buffer(name).copy_(self.get_buffer(running))

    def take_from(self, source: torch.nn.Module) -> None:
        """Take over Parameters and running statistics; a layer without a blend gives its running statistics for it."""
        super().take_from(source)
        if not getattr(source, "averages_blend", False):
            self._copy_to_blend()

    def _taken_names(self, source: torch.nn.Module) -> tuple[str, ...]:
        blend = self.blend_names if getattr(source, "averages_blend", False) and self.averages_blend else ()
        return (*super()._taken_names(source), *blend)

    def _translate(self, state_dict: dict[str, Any], prefix: str, strict: bool = True) -> None:
        super()._translate(state_dict, prefix, strict)
        # A file without a blend continues from its running statistics.
        for name, running in zip(self.blend_names, self.running_names, strict=True):
            if self.averages_blend and prefix + running in state_dict:
                state_dict.setdefault(prefix + name, state_dict[prefix + running])

    def running_target(self, m: Moments) -> tuple[Tensor, Tensor]:
        """Return the mean and the biased deviation or variance that the running statistics move towards."""
        return m.mean, self.std_or_var_of(m.var)

    def steps(self) -> Tensor:
        """Return the number of this batch: 1 for the first; 2 where statistics were moved in, which count as one."""
        # A mean of exactly 0 in every channel is what a new layer has, and hardly what training leaves.
        return self.updates + 1 + ((self.updates == 0) & (running_buffers(self, self.blend_names)[0] != 0).any())

    def scaled(self, mean: Tensor, scale: Tensor, shift: Tensor | None = None) -> Affine:
        """Return the map gamma (scale (x - mean) + shift) + beta."""
        if self.weight is not None:
            gamma = self.weight.to(scale.dtype)
            scale, shift = scale * gamma, None if shift is None else shift * gamma
        bias = self.bias
        return Affine(mean, scale, bias if shift is None else shift if bias is None else shift + bias.to(shift.dtype))

    def std_or_var_of(self, var: Tensor) -> Tensor:
        """Return what is averaged, given a variance."""
        return self.std_of(var) if self.average == "std" else var

    def std_of(self, var: Tensor) -> Tensor:
        """Return the standard deviation that is averaged, beside which eps stands."""
        raise NotImplementedError(f"{type(self).__name__} must define std_of(self, var: Tensor) -> Tensor.")

    def weight_at(self, steps: Tensor) -> Tensor:
        """Return the weight of the batch of this number in the blend, 0-dim."""
        raise NotImplementedError(f"{type(self).__name__} must define weight_at(self, steps: Tensor) -> Tensor.")

    def copies(self, steps: Tensor) -> Tensor:
        """Tell whether the batch of this number is copied, whatever its weight, as a 0-dim tensor."""
        return steps == (1 if self.init == "first_batch" else 0)

    def scale_of(self, std_or_var: Tensor) -> Tensor:
        """Return one over the deviation, with its eps."""
        return 1 / (std_or_var + self.eps) if self.average == "std" else (std_or_var + self.eps).rsqrt()

    def blend(self, batch: tuple[Tensor, Tensor], m: Moments) -> tuple[Tensor, Tensor]:
        """Return the statistics after this batch, and move them, unless they are paused or wait for a window's end.

        Args:
            batch: its mean and standard deviation or variance, (1, C), with a graph, which passes through its part of
                what is returned.
            m: the moments they come from.
        """
        if not moves_running_stats(self):
            return self._blended(batch)[0]
        if self._accumulator is None:
            return self.move(batch, m.count)
        blend = self._blended(batch)[0]
        update_running(self, Moments(m.mean, m.var, m.count))
        return blend

    def _blended(self, batch: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Return a batch's statistics blended into the old ones, the batch's number, and whether it is copied."""
        steps = self.steps()
        alpha, copies = self.weight_at(steps), self.copies(steps)
        # The gradient needs alpha and the old statistics, and whoever moves these overwrites the buffers.
        alpha, *old = snapshot(torch.where(copies, 1, alpha), *running_buffers(self, self.blend_names))
        # The old statistics are constants, so the gradient passes through the new batch's part alone.
        mean, std_or_var = (alpha * new + (1 - alpha) * was.to(new.dtype) for new, was in zip(batch, old, strict=True))
        return (mean, std_or_var), steps, copies

    def move(
        self, batch: tuple[Tensor, Tensor], count: int | Tensor, enough: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Move the statistics by a batch's mean and standard deviation or variance, (1, C), and return the result.

        Args:
            batch: with a graph, which passes through its part of what is returned.
            count: elements behind each.
            enough: whether there is a batch at all, 0-dim.
        """
        blend, steps, copies = self._blended(batch)
        if enough is None:
            usable = is_usable(self, *batch, count)
        else:
            # What no batch brought is neither used nor counted as skipped.
            finite = fits(self, *batch)
            count_skipped(self, enough & ~finite)
            usable = enough & finite
        weight = self.scheduled("eval_momentum") if self.averages_blend else None
        weight = None if weight is None else torch.where(copies, 1, weight)
        self.write_blend(blend, batch, steps, usable, weight)
        return blend

    @property
    def renormalizes(self) -> bool:
        """Whether the batch's statistics normalize x, and a constant factor and offset bring it to the others."""
        return False

    def limits(self) -> tuple[float, float]:
        """Return the limits of that factor and of that offset."""
        return math.inf, math.inf

    moves_first = True
    """The others are the statistics with this batch, and not those before it."""

    def _on_cpu(self, x: Tensor, layout: Layout) -> Tensor | None:
        """Return y of torch's batch normalization, whose weight and bias bring it to the other statistics."""
        return on_cpu.renormalized(self, x, layout) if self.renormalizes and moves_running_stats(self) else None

    def renormalize_at_once(self, mean: Array, var: Array) -> Constants | None:
        """Move the statistics by those of a batch, and return how x is normalized, where values may be read back.

        What :meth:`algebra` does in many operations that a graph can hold. ``None`` where a value is not finite; then
        nothing has moved.

        Args:
            mean: of the batch, (C,) in float64.
            var: likewise.
        """
        std_or_var, root = self.deviation_at_once(var)
        if not math.isfinite(std_or_var.dot(std_or_var)):
            return None
        tensors: dict[str, Any] = self._buffers
        buffers = [tensors[name] for name in self.blend_names]
        running = [buffer.numpy() for buffer in buffers]
        counter, batches = tensors["updates"], tensors["num_batches_tracked"]
        updates = int(counter.item())
        steps = updates + 1 + (updates == 0 and bool(running[0].any()))
        counter.fill_(steps)
        if batches is not None:
            batches.add_(1)
        batch = np.empty((2, len(mean)))
        batch[0], batch[1] = mean, std_or_var
        was = blend = batch
        if steps > 1 or self.init != "first_batch":
            alpha = self.weight_at(counter).item()
            was = np.empty_like(batch)
            was[0], was[1] = running
            blend = alpha * batch + (1 - alpha) * was
        running[0][...], running[1][...] = blend
        (other, of_other) = blend if self.moves_first else was
        scale = self._scale_at_once(of_other)
        d = (batch[0] - other) * scale
        r_max, d_max = self.limits()
        if r_max < math.inf or d_max < math.inf:
            batch_scale = self._scale_at_once(std_or_var)
            scale = np.minimum(np.maximum(scale, batch_scale / r_max), batch_scale * r_max)
            d = np.minimum(np.maximum(d, -d_max), d_max)
        self._write_gap(batch, blend)
        changed(*buffers, tensors["gap"])
        return Constants(batch[0], root, scale, d)

    def _write_gap(self, batch: Array, blend: Array) -> None:
        """Write how far a batch lies from the blend, (2, C) each, in deviations of this one."""
        if self.average == "var":
            batch, blend = (np.stack((t[0], np.sqrt(t[1]))) for t in (batch, blend))
        deviation = blend[1] + self._eps
        deviation *= len(deviation)
        self.gap.numpy()[...] = np.abs(batch - blend).dot(1 / deviation)

    def deviation_at_once(self, var: Array) -> tuple[Array, Array]:
        """Return :meth:`std_or_var_of` a variance, and the root of V as :func:`native.standardize` takes it."""
        raise NotImplementedError(f"{type(self).__name__} must define deviation_at_once(self, var: Array).")

    def _scale_at_once(self, std_or_var: Array) -> Array:
        """Return :meth:`scale_of` an array."""
        deviation: Array = std_or_var + self._eps
        return 1 / (deviation if self.average == "std" else np.sqrt(deviation))

    def _move_by_window(self, m: Moments) -> None:
        self.move(self.running_target(m), m.count, (torch.as_tensor(m.count) > 1).all())

    @torch_private.without_gradients
    def write_blend(
        self,
        blend: tuple[Tensor, Tensor],
        batch: tuple[Tensor, Tensor],
        steps: Tensor,
        usable: Tensor,
        weight: Tensor | None = None,
    ) -> None:
        """Write the moved statistics, and how far the batch lay from them, if a 0-dim ``usable`` is true.

        Args:
            blend: the new mean, and standard deviation or variance, (1, C).
            batch: the same two of the batch.
            steps: the number of this batch.
            usable: the batch has neither a NaN nor an infinity.
            weight: of the blend in the running statistics, where those average it.
        """
        # The gap is measured in standard deviations, whichever of the two is stored.
        was, now = ((s if self.average == "std" else s.sqrt()) for s in (blend[1], batch[1]))
        gap = torch.stack([batch[0] - blend[0], now - was]).abs() / (was + self.eps)
        values = dict(zip(self.blend_names, blend, strict=True))
        if weight is not None:
            for name, new in zip(self.running_names, blend, strict=True):
                old = self.get_buffer(name)
                values[name] = torch.lerp(old, new.reshape(-1).to(old.dtype), weight.to(old.dtype))
        for name, new in {**values, "updates": steps, "gap": gap.flatten(1).mean(1)}.items():
            # No state_dict holds the gap, so that it may not be passed to a function that is transformed.
            if name != "gap" or not torch_private.is_captured(self.gap):
                write(getattr(self, name), new, usable)
        count_batch(self, usable)

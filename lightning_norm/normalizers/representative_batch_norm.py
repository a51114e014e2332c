"""Representative batch normalization: centering and scaling rectified by each sample's own mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_norm.layers import on_cpu
from lightning_norm.layers.base import MomentNorm, Paper
from lightning_norm.layers.fused_specs import per_channel_spec
from lightning_norm.layers.published_files import PublishedEntries, PublishedLayer, channels_of_one_layer
from lightning_norm.ops.fused.per_channel import GATES, PerChannelSpec
from lightning_norm.ops.layout import Layout, stat_dtype
from lightning_norm.ops.moments import Affine, Moments


class RepresentativeBatchNorm(MomentNorm):
    r"""Let each sample's own mean K strengthen or weaken it before the statistics are taken, and gate it after.

    .. math::
        x_c = x + w_m K(x), \quad x_s = \frac{x_c - \mu}{\sqrt{\sigma^2 + \epsilon}}, \quad
        y = \gamma\, x_s\, g(w_v K(x_s) + w_b) + \beta, \qquad g = \mathrm{sigmoid}

    with mu, sigma of x_c over the batch and K the mean over the positions of a sample and channel. ``center_weight``
    w_m and ``scale_weight`` w_v start at 0, ``scale_bias`` w_b at 1, each (C,). Gao et al., CVPR 2021.

    When: where the samples of a batch differ much, at hardly any cost. When not: if the layer must be folded for
    inference, or on 1x1 maps, where centering is undone by the normalization.

    Args:
        num_features: channels, the C of an input (N, C, *).
        rectify: the rectifications, out of "center" and "scale"; without both the layer is BatchNorm.
        gate_init: "unit" divides the gate by its starting value, so that the layer starts as BatchNorm; "paper" does
            not, and starts with outputs of sigmoid(1) = 0.731 times the size.
        options: eps, momentum, affine, bias, track_running_stats, channel_dim, device, dtype: see :class:`MomentNorm`.

    Raises:
        ValueError: an unknown rectification or ``gate_init``.

    Differs from the paper: the unit gate; the input is never written to (the published code adds to it in place); the
    second mean K(x_s) is ((1 + w_m) K(x) - mu) / sigma and needs no pass of its own.

    >>> RepresentativeBatchNorm(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "rbn"
    paper = Paper(
        "Gao et al.", 2021, "Representative Batch Normalization with Feature Calibration", "CVPR 2021, 8669-8679"
    )
    extra_parameters: ClassVar[dict[str, str]] = {"center_weight": "C", "scale_weight": "C", "scale_bias": "C"}
    repr_arguments: ClassVar[tuple[str, ...]] = ("rectify", "gate_init")
    evaluation_arguments: ClassVar[tuple[str, ...]] = ("rectify", "gate_init")
    rectifications: ClassVar[dict[str, dict[str, float]]] = {
        "center": {"center_weight": 0.0},
        "scale": {"scale_weight": 0.0, "scale_bias": 1.0},
    }
    """Each rectification's parameters, the weight before the bias, and their starting values."""

    center_weight: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        rectify: Sequence[str] = ("center", "scale"),
        gate_init: Literal["unit", "paper"] = "unit",
        **options: Any,
    ) -> None:
        who, known = type(self).__name__, tuple(self.rectifications)
        if set(rectify) - set(known):
            raise ValueError(f"{who}: rectify must be a list out of {known}, got {rectify!r}.")
        # In the order of the table, whatever order was typed: repr, checkpoints and graphs are then the same.
        self.rectify, self.gate_init = tuple(k for k in known if k in rectify), gate_init
        super().__init__(num_features, **options)
        for part, starts in self.rectifications.items():
            self._add_parameters(options, **dict.fromkeys(starts, (num_features,) if part in self.rectify else None))

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above, around each sample's own mean, where no digit is lost."""
        return self._rectified(m, lambda batch: (self.track(batch), None))

    def _on_cpu(self, x: Tensor, layout: Layout) -> Tensor | None:
        """Return the same equation with a backward pass that is written out."""
        starts = [[*self.rectifications[part].values()] for part in self.rectify if part != "center"]
        unit = math.prod([1 + math.exp(-start) for _, start in starts]) if self.gate_init == "unit" else 1.0
        return on_cpu.rectified(self, x, layout, unit, self._chooser())

    def _chooser(self) -> Callable[[Tensor, Moments], bool] | None:
        """Return what tells, given x and its moments, whether the batch's statistics are taken; ``None`` for always."""
        return None

    def fused_spec(self, layout: Layout) -> PerChannelSpec | None:
        """Return the same equations for the kernels."""
        # A rectification with a bias is a gate; centering has a weight alone.
        gated = {part: starts for part, starts in self.rectifications.items() if len(starts) == 2}
        unit = {f"unit_{part}": 1 + math.exp(-list(starts.values())[-1]) for part, starts in gated.items()}
        numbers = unit if self.gate_init == "unit" else {}
        spec = per_channel_spec(self, numbers, needs_moments=True, **dict.fromkeys(self.rectify, True))
        return replace(spec, gates=tuple(getattr(self, name, None) for name in GATES))

    def _rectified(self, m: Moments, statistics: Callable[[Moments], tuple[Moments, Tensor | None]]) -> Affine:
        """Return the affine map of the equation above, given what chooses mu and sigma.

        Args:
            m: moments of x.
            statistics: from the batch's moments of x_c, (1, C), to those that are mu and sigma, and perhaps an offset
                that is added to x_s.
        """
        w_m = self.center_weight
        # K(x_c) = (1 + w_m) K(x), since the mean of w_m K(x) over positions is itself.
        k_c = m.mean if w_m is None else torch.addcmul(m.mean, m.mean, w_m.to(m.mean.dtype))
        batch, offset = statistics(Moments(k_c, m.var, m.count, m.ranks).over_batch())
        scale = (batch.var.to(m.mean.dtype) + self.eps).rsqrt()
        # K(x_s) follows from K(x_c) without a pass over x, because standardization is affine.
        k_s = scale * (k_c - batch.mean).to(scale.dtype)
        if offset is not None:
            k_s = k_s + offset.to(scale.dtype)
        # x_s = scale * (x - K(x)) + K(x_s), so both factors of the rest of the equation act on scale and K(x_s).
        gain = self._gain(m.mean, k_s)
        if gain is not None:
            scale, k_s = scale * gain, k_s * gain
        if self.weight is not None:
            scale, k_s = (t * self.weight.to(scale.dtype) for t in (scale, k_s))
        return Affine(m.mean, scale, k_s if self.bias is None else k_s + self.bias.to(scale.dtype))

    def _gain(self, k: Tensor, k_s: Tensor) -> Tensor | None:
        """Return the product of the gates, given K(x) and K(x_s), each (N, C); ``None`` for 1."""
        return self._gate("scale", k_s) if "scale" in self.rectify else None

    def _gate(self, part: str, k: Tensor | None = None) -> Tensor:
        """Return sigmoid(w * k + b), at k = 0 without ``k``; over its starting value with ``gate_init="unit"``."""
        w, b = (getattr(self, name) for name in self.rectifications[part])
        k = b.new_zeros(()) if k is None else k
        # sigmoid(-100) is as far off, relative, as its argument, absolute.
        wide = stat_dtype(k)
        gate = torch.addcmul(b.to(wide), k.to(wide), w.to(wide)).sigmoid()
        if self.gate_init == "unit":
            # The starting weight is 0, so every gate starts at the sigmoid of its starting bias.
            _, bias = self.rectifications[part].values()
            gate = gate * (1 + math.exp(-bias))
        return gate.to(k.dtype)

    @property
    def preserves_eval(self) -> bool:
        """Whether every gate starts at 1."""
        return self.gate_init == "unit" or set(self.rectify) <= {"center"}

    @classmethod
    def read_published(cls, entries: PublishedEntries) -> PublishedLayer | None:
        """Return the authors' gate, which starts at sigmoid(1)."""
        names = ("center_weight", "scale_weight", "scale_bias")
        known = (channels_of_one_layer(entries.get(name)) for name in names)
        channels = next((c for c in known if c is not None), None)
        if channels is None:
            return None
        tensors = {name: entries.per_channel(name, channels) for name in ("weight", "bias", *names)}
        arguments = {"rectify": ("center", "scale"), "gate_init": "paper"}
        return PublishedLayer(channels, arguments, {**tensors, **entries.running_stats(channels)})

    @torch.no_grad()
    def monitor(self) -> dict[str, Tensor]:
        """Return the means over the channels: of the centering weight, and of each gate and its slope at K = 0."""
        weights = {f"weight_{part}": getattr(self, f"{part}_weight").mean() for part in self.rectify}
        gates = {f"gate_{part}": self._gate(part).mean() for part in self.rectify if part != "center"}
        return {**weights, **gates}

    def start_values(self) -> dict[str, float | Tensor]:
        """Return the starting values of the rectifications."""
        return {name: start for starts in self.rectifications.values() for name, start in starts.items()}

"""BNET: batch normalization with a depthwise convolution in place of the scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_norm.errors import CheckpointError
from lightning_norm.layers import on_cpu
from lightning_norm.layers.base import Paper
from lightning_norm.layers.convolved import ConvolvedNorm, centre_taps
from lightning_norm.layers.declared import declared
from lightning_norm.layers.fused_specs import mixture_spec
from lightning_norm.layers.published_files import SOURCES, PublishedEntries, PublishedLayer, PublishedNames
from lightning_norm.layers.translation import Translation, renamed
from lightning_norm.ops import depthwise
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.layout import Layout, at_least_float32
from lightning_norm.ops.moments import Affine, Moments, mixture
from lightning_norm.ops.sparsestmax import without_entry


class BNET(ConvolvedNorm):
    r"""Normalize by the batch, then recover with a k x k convolution of each channel in place of a scale.

    .. math::
        \hat{x} = \frac{x - \mu_B}{\sqrt{\sigma^2_B + \epsilon}}, \qquad
        y_{ncij} = \sum_{u,v} W_{cuv}\,\hat{x}_{n,c,i+u,j+v} + b_c

    with zeros around the normalized map, that is the channel's mean around x, so borders are exact. ``kernel`` is W and
    ``bias`` b; there is no ``weight``. With k = 1 it is batch normalization. Xu et al., TPAMI 2023, arXiv
    2011.14150.

    When: the last normalization of each residual block of a convolutional network. When not: where the receptive field
    of the network must stay as it is.

    Args:
        num_features: channels, the C of an input (N, C, *).
        kernel_size: k, odd.
        spatial_dims: axes of the kernel: 1, 2 or 3. A map with fewer is one of size 1 along the last ones, where only
            the kernel's middle acts; of a map with more, the first ones are separate maps.
        statistics: what x is normalized by: "bn", the batch; "in", each sample and channel; "sn", a learned mixture of
            instance, layer and batch statistics as in :class:`SwitchableNorm`, with its two weights.
        init: "dirac" starts as batch normalization; "zero" starts at nothing, as published, for the end of a residual
            branch.
        affine: learn ``bias``; the kernel is always there.
        options: eps, momentum, track_running_stats, channel_dim, device, dtype: see :class:`MomentNorm`.

    Raises:
        ValueError: an even kernel size; spatial_dims, statistics or init out of their choices.

    Differs from the paper: the default start is a Dirac kernel with the BatchNorm's weight as centre tap, which keeps
    what a trained network computes (the published start is zero).

    >>> BNET(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "bnet"
    paper = Paper(
        "Xu et al.", 2023, "BNET: Batch Normalization With Enhanced Linear Transformation", "arXiv 2011.14150"
    )
    repr_arguments: ClassVar[tuple[str, ...]] = (*ConvolvedNorm.repr_arguments, "statistics")
    mean_weight: nn.Parameter
    var_weight: nn.Parameter

    def __init__(
        self,
        num_features: int,
        *,
        kernel_size: int = 3,
        spatial_dims: Literal[1, 2, 3] = 2,
        init: Literal["dirac", "zero"] = "dirac",
        statistics: Literal["bn", "sn", "in"] = "bn",
        **options: Any,
    ) -> None:
        self.statistics = statistics
        if statistics == "in":
            # Running statistics that nobody reads would still be saved, synchronized and shown.
            options["track_running_stats"] = False
        kernel: dict[str, Any] = {"kernel_size": kernel_size, "spatial_dims": spatial_dims, "init": init}
        super().__init__(num_features, **kernel, **options)
        if statistics == "sn":
            self._add_parameters(options, mean_weight=(3,), var_weight=(3,))

    @declared(True)
    def train_uses_batch_stats(self) -> bool:
        """Whether the batch's statistics take part."""
        return self.statistics != "in"

    @property
    def _of_batch_alone(self) -> bool:
        """Whether the batch's statistics are the only ones; of tokens the axes are moved for the convolution."""
        return self.statistics == "bn" and self.channel_dim == 1

    @declared(False)
    def eval_uses_input_stats(self) -> bool:
        """Whether any statistics but the batch's take part, which alone have running ones."""
        return self.statistics != "bn"

    @declared(ConvolvedNorm.extra_parameters)
    def extra_parameters(self) -> dict[str, str]:
        """The kernel, and the weights of a mixture."""
        weights = {"mean_weight": "3", "var_weight": "3"} if self.statistics == "sn" else {}
        return {**ConvolvedNorm.extra_parameters, **weights}

    def _kind_of_evaluation(self) -> dict[str, Any]:
        """Return that of the normalizer before the convolution, whose weight is the centre tap of the kernel."""
        mixture = {"choices": ["in", "ln", "bn"], "correction": 0, "sparse": False, "per_token": False}
        # A file of "bn" alone is taken by every layer.
        key = "bnet" if self.statistics == "bn" else self.statistics
        return {"key": key, **(mixture if key == "sn" else {})}

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map from x to the normalized map; the convolution of the base class follows."""
        # No weight and no bias here: the convolution has both, and brings scale and shift.
        if self.statistics == "in":
            return Affine(m.mean, (m.var + self.eps).rsqrt())
        batch = self.track(m.over_batch())
        if self.statistics == "bn":
            return Affine(batch.mean, (batch.var + self.eps).rsqrt())
        # Instance, layer and batch, in the order of the weights.
        mixed = (m, m.over_channels(), batch)
        w, v = (self._importance(t.to(m.mean.dtype), m.count) for t in (self.mean_weight, self.var_weight))
        mean, var = mixture(w, [s.mean for s in mixed]), mixture(v, [s.var for s in mixed])
        return Affine(mean, (var + self.eps).rsqrt())

    def _on_cpu(self, x: Tensor, layout: Layout) -> Tensor | None:
        """Return y of torch's batch normalization where there are no positions: the kernel's middle is the weight."""
        if self.statistics != "bn" or len(layout.shape) > 2:
            return None
        return on_cpu.batch_norm(
            self, x, layout, depthwise.with_spatial_axes(self.kernel, 0).reshape(-1).contiguous(), self.bias
        )

    @staticmethod
    def _importance(logits: Tensor, count: int | Tensor = 2) -> Tensor:
        """Return the weights of instance, layer and batch statistics; a map of one element has no instance's."""
        logits = logits.to(at_least_float32(logits.dtype))
        # The variance of one element is 0, and would pull the mixture towards it.
        if isinstance(count, int) and count == 1:
            return without_entry(lambda z: torch.softmax(z, 0), logits, 0)
        return torch.softmax(logits, 0)

    def fused_spec(self, layout: Layout) -> MixtureSpec | None:
        """Return the equation of the normalized map for the kernels, whose convolution knows no mixture's weights."""
        if self.statistics == "sn":
            return None
        # The bias belongs to the convolution, which the kernels apply in the same pass.
        return replace(mixture_spec(self, (self.statistics,)), weight=None, bias=None)

    def statistic_size(self, n: int, size: int) -> int:
        """Return the elements behind the batch statistics, or behind those of a sample."""
        return size if self.statistics == "in" else n * size

    def start_values(self) -> dict[str, float | Tensor]:
        """Return those of the kernel, and equal weights for the statistics."""
        return {**super().start_values(), "mean_weight": 1.0, "var_weight": 1.0}

    @torch.no_grad()
    def monitor(self) -> dict[str, Tensor]:
        """Return the part of the kernels' energy that lies outside their centre taps, and the mean norm of a kernel."""
        shown = super().monitor()
        for name, logits in (("mean", self.mean_weight), ("var", self.var_weight)) if self.statistics == "sn" else ():
            shown |= {f"{name}_{k}": w for k, w in zip(("in", "ln", "bn"), self._importance(logits), strict=True)}
        return shown

    @property
    def preserves_eval(self) -> bool:
        """Whether it normalizes by the batch, and the kernel starts as a Dirac."""
        return self.init == "dirac" and self.statistics == "bn"

    @property
    def _translations(self) -> tuple[Translation, ...]:
        """The authors' names; and a BatchNorm's weight is the centre taps, which ``init="zero"`` leaves behind."""
        weight = Translation("weight", "kernel", self.dirac, centre_taps, swapped=self.init == "dirac")
        return renamed("bnconv.weight", "kernel"), renamed("bnconv.bias", "bias"), weight

    published_names: ClassVar[PublishedNames] = PublishedNames(
        layers={
            r"\bbnet(\d+)\b": r"bn\1",  # ImageNet
            r"\bbnconv(\d+)\b": r"bn\1.bnconv",  # an older format, for detection: the convolution beside its layer
        }
    )

    @classmethod
    def read_published(cls, entries: PublishedEntries) -> PublishedLayer | None:
        """Return the size of the kernel."""
        if "bnconv.weight" not in entries:
            return None
        shape = tuple(getattr(entries["bnconv.weight"], "shape", ()))
        c, axes, k = (*shape, 0)[0], len(shape) - 2, (*shape, 0)[-2]
        kernel = entries.take("bnconv.weight", (c, 1, *(k,) * max(axes, 1)))
        if axes not in (1, 2, 3) or k % 2 == 0:
            raise CheckpointError(f"bnconv.weight has the shape {shape}, expected (C, 1, k, k) with an odd k")
        tensors = {"kernel": kernel, "bias": entries.take("bnconv.bias", (c,)), **entries.running_stats(c)}
        return PublishedLayer(c, {"kernel_size": k, "spatial_dims": axes}, tensors, SOURCES[axes])

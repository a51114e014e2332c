"""IBN: instance statistics for the first share of the channels, batch statistics for the rest."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_norm.layers import on_cpu
from lightning_norm.layers.base import MomentNorm, Paper
from lightning_norm.layers.fused_specs import constant, mixture_spec
from lightning_norm.ops import native
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.moments import Affine, Moments


class IBN(MomentNorm):
    r"""Normalize the first channels by each sample's own statistics, the others by those of the batch.

    .. math::
        y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta, \qquad
        (\mu, \sigma^2) = \begin{cases} (\mu_{nc}, \sigma^2_{nc}) & c < \lfloor rC \rfloor \\
        (\mu_B, \sigma^2_B) & \text{otherwise} \end{cases}

    with mu_nc, sigma_nc over the positions of one sample and channel, and mu_B, sigma_B over the batch per channel. Pan
    et al., ECCV 2018, arXiv 1807.09441.

    When: images whose appearance (color, contrast, style) will be another than in training, in the shallow layers of a
    network. When not: in the last stage, whose channels tell classes apart by their strength, on maps of one element,
    or if the layer must be folded for inference.

    Args:
        num_features: channels, the C of an input (N, C, *).
        ratio: r, from 0 (batch normalization) to 1 (instance normalization).
        options: eps, momentum, affine, track_running_stats, channel_dim, device, dtype: see :class:`MomentNorm`.

    Raises:
        ValueError: a ratio outside of [0, 1]; in training, one element per sample and channel.

    Differs from the paper: one layer and not two side by side. Weight, bias and running statistics have all C channels,
    so that a BatchNorm's checkpoint loads and a swap moves its tensors; the running statistics of the first channels
    follow the batch and are never used.

    >>> IBN(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "ibn"
    paper = Paper(
        "Pan et al.",
        2018,
        "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net",
        "arXiv 1807.09441",
    )
    repr_arguments: ClassVar[tuple[str, ...]] = ("ratio",)
    evaluation_arguments: ClassVar[tuple[str, ...]] = ("ratio",)

    def __init__(self, num_features: int, *, ratio: float = 0.5, **options: Any) -> None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"IBN: ratio must be a number from 0 (batch) to 1 (instance), got {ratio!r}.")
        self.ratio = float(ratio)
        super().__init__(num_features, **options)

    @property
    def instance_channels(self) -> int:
        """Number of channels with instance statistics: C times the ratio, rounded down as in the published code."""
        return int(self.num_features * self.ratio)

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above."""
        # Tracked for all channels, though the first ones never read theirs: the buffers stay those of a BatchNorm.
        batch, k = self.track(m.over_batch()), self.instance_channels
        pairs = ((m.mean, batch.mean), (m.var, batch.var))
        # Of the batch there is one row, which every sample of it shares.
        joined = (
            torch.cat([instance[:, :k], of_batch.to(instance.dtype).expand_as(instance)[:, k:]], 1)
            for instance, of_batch in pairs
        )
        return self.standardize(*joined)

    def _on_cpu(self, x: Tensor, layout: Layout) -> Tensor | None:
        """Return y of torch's group and batch normalization, each of all channels: less than a copy of x would cost."""
        k = self.instance_channels
        if k == 0 or not native.takes(x) or not x.is_contiguous():
            return None
        instance = on_cpu.group_norm(self, x, layout, self.num_features, self.weight, self.bias)
        batch = None if instance is None else on_cpu.batch_norm(self, x, layout, self.weight, self.bias)
        return None if instance is None or batch is None else torch.cat([instance[:, :k], batch[:, k:]], 1)

    def fused_spec(self, layout: Layout) -> MixtureSpec | None:
        """Return the same equation for the kernels: of two normalized outputs the one or the other, by weights 0 and 1.

        The instance's statistics are to them those of groups of one channel. With eps = 0 the output that does not
        count may be infinite, and infinity times 0 is no number.
        """
        if self.eps == 0:
            return None
        # Made anew each time: a buffer would be a key that no BatchNorm's checkpoint has.
        device = next((t.device for t in (*self.parameters(), *self.buffers())), None)
        c, k = self.num_features, self.instance_channels
        batch = constant((c, k), device, lambda where: (torch.arange(c, device=where) >= k).float())
        return mixture_spec(self, ("bn", "ln"), w=batch, outputs=True, num_groups=self.num_features)

    @property
    def preserves_eval(self) -> bool:
        """Whether no channel has instance statistics."""
        return self.instance_channels == 0

    def evaluates_on_running_stats(self) -> bool:
        """Tell whether no channel has instance statistics: batch normalization."""
        return self.track_running_stats and self.instance_channels == 0

    @torch.no_grad()
    def monitor(self) -> dict[str, Tensor]:
        """Return the mean magnitude of gamma over the instance's and over the batch's channels."""
        if self.weight is None:
            return {}
        parts = self.weight.abs().tensor_split([self.instance_channels])
        return {f"gamma_{k}": part.mean() for k, part in zip(("in", "bn"), parts, strict=True) if len(part)}

    def statistic_size(self, n: int, size: int) -> int:
        """Return the elements per sample and channel; those of the batch without instance statistics."""
        return n * size if self.instance_channels == 0 else min(size, n * size)

"""Instance normalization: each sample's own statistics, per channel."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_norm.layers import on_cpu
from lightning_norm.layers.base import MomentNorm, Paper
from lightning_norm.layers.fused_specs import mixture_spec
from lightning_norm.layers.inference import share_parameters
from lightning_norm.layers.scheduled import Scheduled
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.moments import Affine, Moments


class InstanceNorm(MomentNorm):
    r"""Normalize each channel of each sample by its own mean and variance.

    .. math:: y = \gamma \frac{x - \mu_{nc}}{\sqrt{\sigma^2_{nc} + \epsilon}} + \beta

    Equal to ``torch.nn.InstanceNorm1d/2d/3d``, but for ``affine``, which is on by default as in every layer of this
    package. The arguments have torch's order. Ulyanov et al. 2016, arXiv 1607.08022.

    Args:
        num_features: channels, the C of an input (N, C, *).
        track_running_stats: keep the mean over samples of mean and unbiased variance, and evaluate on it; off by
            default.
        momentum: of these.
        eps, affine, device, dtype, channel_dim, bias: see :class:`MomentNorm`.

    Raises:
        ValueError: one element per sample and channel.

    >>> InstanceNorm(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "in"
    paper = Paper("Ulyanov et al.", 2016, "Instance Normalization", "arXiv 1607.08022")
    train_uses_batch_stats: ClassVar[bool] = False
    _includes_between_var: ClassVar[bool] = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Annotated[float | None, Scheduled(0, 1, training_only=True)] = 0.1,
        affine: bool = True,
        track_running_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        # Named here for the sake of torch's order; the base class takes them by keyword.
        options |= {"eps": eps, "momentum": momentum, "affine": affine, "track_running_stats": track_running_stats}
        super().__init__(num_features, device=device, dtype=dtype, **options)

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above."""
        # torch's InstanceNorm evaluates on running statistics where it keeps some; so does ``track``.
        sample = self.track(m)
        return self.standardize(sample.mean, sample.var)

    def _on_cpu(self, x: Tensor, layout: Layout) -> Tensor | None:
        """Return y of torch's group normalization with a group for each channel, where nothing else is kept."""
        if self.track_running_stats or self.has_running_stats:
            return None
        y = on_cpu.group_norm(self, x, layout, self.num_features, self.weight, self.bias)
        return on_cpu.mixture(self, x, layout, ("in",)) if y is None else y

    def fused_spec(self, layout: Layout) -> MixtureSpec | None:
        """Return the same equation for the kernels, unless it keeps running statistics."""
        return None if self.track_running_stats or self.has_running_stats else mixture_spec(self, ("in",))

    def running_target(self, m: Moments) -> tuple[Tensor, Tensor]:
        """Return the mean over samples of mean and unbiased variance."""
        # The average over samples, as torch has it: without the variance between their means, which pooling would add.
        zero = m.var * 0
        mean = Moments(m.mean, zero, m.each(), m.ranks).over_batch().mean
        return mean, Moments(m.unbiased().var, zero, m.each(), m.ranks).over_batch().mean

    def evaluates_on_running_stats(self) -> bool:
        """Tell whether running statistics are kept."""
        return self.has_running_stats

    def plain(self, dims: int | None = None) -> nn.Module | None:
        """Return torch's InstanceNorm, or BatchNorm where running statistics are kept."""
        kind = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}.get(dims or 0)
        # With running statistics evaluation is a fixed map, which is a BatchNorm.
        if self.has_running_stats or kind is None or self.channel_dim != 1:
            return super().plain(dims)
        return share_parameters(self, kind(self.num_features, eps=self.eps, affine=True))

    def statistic_size(self, n: int, size: int) -> int:
        """Return the elements per sample and channel."""
        return size

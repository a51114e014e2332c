"""Batch normalization: the statistics of the whole batch, per channel."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from lightning_norm.layers import on_cpu
from lightning_norm.layers.base import MomentNorm, Paper
from lightning_norm.layers.fused_specs import mixture_spec
from lightning_norm.layers.scheduled import Scheduled
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.moments import Affine, Moments


class BatchNorm(MomentNorm):
    r"""Normalize each channel by the mean and variance of the batch; evaluate on running statistics.

    .. math:: y = \gamma \frac{x - \mu_B}{\sqrt{\sigma^2_B + \epsilon}} + \beta

    The baseline on this package's engine, equal to ``torch.nn.BatchNorm1d/2d/3d`` in values, gradients, running
    statistics and ``state_dict``. Ioffe and Szegedy 2015, arXiv 1502.03167.

    The arguments have torch's order.

    Args:
        num_features: channels, the C of an input (N, C, *).
        eps, momentum, affine, track_running_stats, device, dtype, channel_dim, bias: see :class:`MomentNorm`.
        virtual_batch_size: see :class:`MomentNorm`.

    >>> BatchNorm(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "bn"
    paper = Paper("Ioffe and Szegedy", 2015, "Batch Normalization", "arXiv 1502.03167")
    _of_batch_alone = True
    eval_uses_input_stats: ClassVar[bool] = False
    _aten_on_cpu: ClassVar[bool] = True
    preserves_eval = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Annotated[float | None, Scheduled(0, 1, training_only=True)] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        # Named here for the sake of torch's order; the base class takes them by keyword.
        options |= {"eps": eps, "momentum": momentum, "affine": affine, "track_running_stats": track_running_stats}
        super().__init__(num_features, device=device, dtype=dtype, **options)

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above."""
        # In evaluation ``track`` returns the running statistics, so one equation serves both modes.
        batch = self.track(m.over_batch())
        return self.standardize(batch.mean, batch.var)

    def _on_cpu(self, x: Tensor, layout: Layout) -> Tensor | None:
        """Return y of torch's batch normalization, which is the same function."""
        return on_cpu.batch_norm(self, x, layout, self.weight, self.bias)

    def fused_spec(self, layout: Layout) -> MixtureSpec:
        """Return the same equation for the kernels."""
        return mixture_spec(self, ("bn",))

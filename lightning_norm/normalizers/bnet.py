"""BNET: batch normalization with a depthwise convolution in place of the scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from lightning_norm.errors import CheckpointError
from lightning_norm.layers.base import Paper
from lightning_norm.layers.convolved import ConvolvedNorm, centre_taps
from lightning_norm.layers.fused_specs import mixture_spec
from lightning_norm.layers.published_files import SOURCES, PublishedEntries, PublishedLayer
from lightning_norm.layers.translation import Translation, renamed
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.moments import Affine, Moments


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
        init: "dirac" starts as batch normalization; "zero" starts at nothing, as published, for the end of a residual
            branch.
        affine: learn ``bias``; the kernel is always there.
        options: eps, momentum, track_running_stats, channel_dim, device, dtype: see :class:`MomentNorm`.

    Raises:
        ValueError: an even kernel size, or spatial_dims or init out of their choices.

    Differs from the paper: the default start is a Dirac kernel with the BatchNorm's weight as centre tap, which keeps
    what a trained network computes (the published start is zero).

    >>> BNET(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "bnet"
    paper = Paper(
        "Xu et al.", 2023, "BNET: Batch Normalization With Enhanced Linear Transformation", "arXiv 2011.14150"
    )
    eval_uses_input_stats: ClassVar[bool] = False

    def __init__(
        self,
        num_features: int,
        *,
        kernel_size: int = 3,
        spatial_dims: Literal[1, 2, 3] = 2,
        init: Literal["dirac", "zero"] = "dirac",
        **options: Any,
    ) -> None:
        kernel: dict[str, Any] = {"kernel_size": kernel_size, "spatial_dims": spatial_dims, "init": init}
        super().__init__(num_features, **kernel, **options)

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map from x to the normalized map; the convolution of the base class follows."""
        # No weight and no bias here: the convolution has both, and brings scale and shift.
        batch = self.track(m.over_batch())
        return Affine(batch.mean, (batch.var + self.eps).rsqrt())

    def fused_spec(self, layout: Layout) -> MixtureSpec:
        """Return the equation of the normalized map for the kernels."""
        # The bias belongs to the convolution, which the kernels apply in the same pass.
        return replace(mixture_spec(self, ("bn",)), weight=None, bias=None)

    @property
    def preserves_eval(self) -> bool:
        """Whether the kernel starts as a Dirac."""
        return self.init == "dirac"

    @property
    def translations(self) -> tuple[Translation, ...]:
        """The authors' names; and a BatchNorm's weight is the centre taps, which ``init="zero"`` leaves behind."""
        weight = Translation("weight", "kernel", self.dirac, centre_taps, swapped=self.init == "dirac")
        return renamed("bnconv.weight", "kernel"), renamed("bnconv.bias", "bias"), weight

    published_renames: ClassVar[dict[str, str]] = {
        r"\bbnet(\d+)\b": r"bn\1",  # ImageNet
        r"\bbnconv(\d+)\b": r"bn\1.bnconv",  # an older format, for detection: the convolution beside its layer
    }

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

"""BNET: batch normalization whose last step is a depthwise convolution in place of a scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_norm.layers.base import MomentNorm, Paper
from lightning_norm.layers.fused_specs import mixture_spec
from lightning_norm.layers.inference import BATCH_NORMS, batch_norm
from lightning_norm.layers.translation import Translation, renamed
from lightning_norm.ops.compiled import GRAPH_KEY
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.layout import Layout, at_least_float32
from lightning_norm.ops.moments import Affine, Moments


class BNET(MomentNorm):
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
    extra_parameters: ClassVar[dict[str, str]] = {"kernel": "C*kernel_size**spatial_dims"}
    repr_arguments: ClassVar[tuple[str, ...]] = ("kernel_size", "spatial_dims", "init")
    kernel: nn.Parameter

    def __init__(
        self,
        num_features: int,
        *,
        kernel_size: int = 3,
        spatial_dims: Literal[1, 2, 3] = 2,
        init: Literal["dirac", "zero"] = "dirac",
        **options: Any,
    ) -> None:
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"BNET: kernel_size must be an odd int, got {kernel_size!r}: an even one has no centre and shrinks "
                "the map. Type kernel_size=3."
            )
        self.kernel_size, self.spatial_dims, self.init = kernel_size, spatial_dims, init
        super().__init__(num_features, **options)
        self.weight = None
        self._add_parameters(options, kernel=(num_features, 1, *(kernel_size,) * spatial_dims))

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map from x to the normalized map."""
        batch = self.track(m.over_batch())
        return Affine(batch.mean, (batch.var + self.eps).rsqrt())

    def fused_spec(self, layout: Layout) -> MixtureSpec:
        """Return the equation of the normalized map for the kernels."""
        return replace(mixture_spec(self, ("bn",)), weight=None, bias=None)

    def depthwise_conv(self) -> tuple[Tensor, Tensor | None]:
        """Return W and b."""
        return self.kernel, self.bias

    @property
    def preserves_eval(self) -> bool:
        """Whether the kernel starts as a Dirac."""
        return self.init == "dirac"

    @property
    def translations(self) -> tuple[Translation, ...]:
        """A BatchNorm's weight is the centre taps; with ``init="zero"`` a swap leaves it behind."""
        weight = Translation("weight", "kernel", self._dirac, self._centre, swapped=self.init == "dirac")
        return renamed("bnconv.weight", "kernel"), renamed("bnconv.bias", "bias"), weight  # the authors' names first

    def eval_affine(self) -> Affine | None:
        """Return the map that the layer is in evaluation, if its kernels are their centre taps alone."""
        taps, middle = self.kernel.detach().flatten(1).cpu().double(), self.kernel[0].numel() // 2
        normalized = super().eval_affine()
        if normalized is None or taps.abs().sum(1).ne(taps[:, middle].abs()).any():
            return None
        shift = torch.zeros_like(normalized.center) if self.bias is None else self.bias.detach().cpu().double()
        return Affine(normalized.center, normalized.scale * taps[:, middle], shift)

    def plain(self, dims: int | None = None) -> nn.Module | None:
        """Return torch's BatchNorm, followed by a depthwise convolution unless the kernels are their centre taps."""
        found = super().plain(dims)
        conv = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}.get(dims or 0)
        fits = self.channel_dim == 1 and self.has_running_stats and dims == self.spatial_dims + 2
        if found is not None or conv is None or not fits:
            return found
        normalized = super().eval_affine()
        assert normalized is not None
        c = self.num_features
        kind: dict[str, Any] = {"device": self.kernel.device, "dtype": self.kernel.dtype}
        kind |= {"padding": self.kernel_size // 2, "groups": c, "bias": self.bias is not None}
        depthwise_conv = conv(c, c, self.kernel_size, **kind)
        depthwise_conv.weight, depthwise_conv.bias = self.kernel, self.bias
        shift = torch.zeros_like(normalized.center)
        return nn.Sequential(
            batch_norm(self, Affine(normalized.center, normalized.scale, shift), BATCH_NORMS[self.spatial_dims + 2]),
            depthwise_conv,
        )

    def freeze_kernel(self) -> None:
        """Train kernel and bias no longer, as the authors do after 60 of 100 epochs of a ResNet-101."""
        self.__dict__.pop(GRAPH_KEY, None)
        for p in (self.kernel, self.bias):
            if p is not None:
                p.requires_grad_(False)

    @torch.no_grad()
    def monitor(self) -> dict[str, Tensor]:
        """Return the share of the kernels' energy outside their centre taps, and the mean norm of a kernel."""
        kernel = self.kernel.to(at_least_float32(self.kernel.dtype)).flatten(1)
        energy, centre = kernel.square().sum(), kernel[:, kernel.shape[1] // 2].square().sum()
        off = (energy - centre) / energy.clamp_min(torch.finfo(kernel.dtype).tiny)
        return {"off_center": off, "kernel_norm": kernel.norm(dim=1).mean()}

    def start_values(self) -> dict[str, float | Tensor]:
        """Return a Dirac for the kernel, or 0 with ``init="zero"``."""
        ones = self.kernel.detach().new_ones(self.num_features) if "kernel" in self._parameters else torch.empty(0)
        return {"kernel": 0.0 if self.init == "zero" else self._dirac(ones)}

    def _dirac(self, centre: Tensor) -> Tensor:
        """Return kernels of zeros with these centre taps."""
        kernel = centre.new_zeros(centre.numel(), self.kernel_size**self.spatial_dims)
        kernel[:, kernel.shape[1] // 2] = centre.reshape(-1)
        return kernel.view(-1, 1, *(self.kernel_size,) * self.spatial_dims)

    def _centre(self, kernel: Tensor) -> Tensor:
        """Return the centre taps, (C,)."""
        taps = kernel.flatten(1)
        return taps[:, taps.shape[1] // 2].clone()

    def arguments_that_fit(self, name: str, tensor: Tensor) -> str:
        """Return the arguments of a checkpoint's kernel."""
        if name != "kernel" or tensor.dim() < 3 or tensor.shape[0] != self.num_features:
            return ""
        return f"kernel_size={tensor.shape[-1]}, spatial_dims={tensor.dim() - 2} for it"

"""A normalizer with a depthwise convolution behind it: its parameters, and what the two are together in evaluation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_norm.layers.base import MomentNorm
from lightning_norm.layers.inference import BATCH_NORMS, batch_norm
from lightning_norm.ops.compiled import GRAPH_KEY
from lightning_norm.ops.layout import at_least_float32
from lightning_norm.ops.moments import Affine


class ConvolvedNorm(MomentNorm):
    r"""Abstract: the normalized map goes through a convolution of each channel; ``bias`` is that of the convolution.

    .. math:: y_{nc} = W_c * s\,(x_{nc} - c) + b_c, \qquad (c, s) = \mathrm{algebra}(\mu_{nc}, \sigma^2_{nc})

    The algebra of a subclass says how x is normalized, without weight and bias. Around the normalized map lie zeros.

    Args:
        num_features: channels.
        kernel_size: size of the kernel along each axis, odd.
        spatial_dims: axes of the kernel: 1, 2 or 3.
        init: "dirac" for kernels that are 1 in their middle and 0 elsewhere, "zero" for zeros.
        options: see :class:`MomentNorm`.

    Raises:
        ValueError: an even kernel size.
    """

    extra_parameters: ClassVar[dict[str, str]] = {"kernel": "C*kernel_size**spatial_dims"}
    repr_arguments: ClassVar[tuple[str, ...]] = ("kernel_size", "spatial_dims", "init")
    kernel: nn.Parameter

    def __init__(self, num_features: int, *, kernel_size: int, spatial_dims: int, init: str, **options: Any) -> None:
        kernel_size = int(kernel_size)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"{type(self).__name__}: kernel_size must be an odd int, got {kernel_size!r}: an even one has no "
                "centre and shrinks the map. Type kernel_size=3."
            )
        self.kernel_size, self.spatial_dims, self.init = kernel_size, spatial_dims, init
        super().__init__(num_features, **options)
        # The kernel scales already, so a weight would be a second scale of the same map.
        self.weight = None
        self._add_parameters(options, kernel=(num_features, 1, *(kernel_size,) * spatial_dims))

    def depthwise_conv(self) -> tuple[Tensor, Tensor | None]:
        """Return kernel and bias."""
        return self.kernel, self.bias

    def dirac(self, centre: Tensor) -> Tensor:
        """Return kernels of zeros with these centre taps, (C,) -> (C, 1, *)."""
        kernel = centre.new_zeros(centre.numel(), self.kernel_size**self.spatial_dims)
        # With an odd size along each axis, the middle tap is also the middle of the flat kernel.
        kernel[:, kernel.shape[1] // 2] = centre.reshape(-1)
        return kernel.view(-1, 1, *(self.kernel_size,) * self.spatial_dims)

    def start_values(self) -> dict[str, float | Tensor]:
        """Return Diracs for the kernel, or 0 with ``init="zero"``."""
        # The first call comes before there is a kernel.
        ones = self.kernel.detach().new_ones(self.num_features) if "kernel" in self._parameters else torch.empty(0)
        return {"kernel": 0.0 if self.init == "zero" else self.dirac(ones)}

    def freeze_kernel(self) -> None:
        """Train kernel and bias no longer."""
        # Whether a parameter requires a gradient is a property that compiled graphs are made for.
        self.__dict__.pop(GRAPH_KEY, None)
        for p in (self.kernel, self.bias):
            if p is not None:
                p.requires_grad_(False)

    def eval_affine(self) -> Affine | None:
        """Return the map that the layer is in evaluation, if its kernels are their centre taps alone."""
        taps = self.kernel.detach().cpu().double()
        centre = centre_taps(taps)
        normalized = super().eval_affine()
        # Any other tap mixes neighbouring positions, which no map per channel does.
        if normalized is None or taps.flatten(1).abs().sum(1).ne(centre.abs()).any():
            return None
        shift = torch.zeros_like(normalized.center) if self.bias is None else self.bias.detach().cpu().double()
        return Affine(normalized.center, normalized.scale * centre, shift)

    def eval_parts(self, dims: int | None = None) -> tuple[Affine, nn.Module | None] | None:
        """Return the map that normalizes, and behind it the convolution unless the kernels are their centre taps."""
        parts = super().eval_parts(dims)
        fits = self.channel_dim == 1 and self.has_running_stats and dims == self.spatial_dims + 2
        normalized = super().eval_affine() if fits else None
        if parts is not None or normalized is None:
            return parts
        # The bias is added behind the convolution, which has it as its own.
        return Affine(normalized.center, normalized.scale, torch.zeros_like(normalized.center)), self._torch_conv()

    def plain(self, dims: int | None = None) -> nn.Module | None:
        """Return torch's BatchNorm, followed by a depthwise convolution unless the kernels are their centre taps."""
        normalized, convolution = self.eval_parts(dims) or (None, None)
        if normalized is None or convolution is None:
            return super().plain(dims)
        return nn.Sequential(batch_norm(self, normalized, BATCH_NORMS[self.spatial_dims + 2]), convolution)

    def _torch_conv(self) -> nn.Module:
        """Return the convolution as torch's layer, with this layer's parameters."""
        kind, c = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[self.spatial_dims], self.num_features
        where: dict[str, Any] = {"device": self.kernel.device, "dtype": self.kernel.dtype}
        # One group per channel makes it depthwise; half a kernel of zeros around the map keeps its size.
        options: dict[str, Any] = {"padding": self.kernel_size // 2, "groups": c, "bias": self.bias is not None}
        conv = kind(c, c, self.kernel_size, **options, **where)
        conv.weight, conv.bias = self.kernel, self.bias
        return conv

    @torch.no_grad()
    def monitor(self) -> dict[str, Tensor]:
        """Return the part of the kernels' energy that lies outside their centre taps, and the mean norm of a kernel."""
        kernel = self.kernel.to(at_least_float32(self.kernel.dtype)).flatten(1)
        energy, centre = kernel.square().sum(), centre_taps(kernel).square().sum()
        # 0 where the layer is batch normalization still. Kernels of zeros have no energy to divide by.
        off = (energy - centre) / energy.clamp_min(torch.finfo(kernel.dtype).tiny)
        return {"off_center": off, "kernel_norm": kernel.norm(dim=1).mean()}

    def _arguments_that_fit(self, name: str, tensor: Tensor) -> str:
        """Return the arguments of a checkpoint's kernel."""
        if name != "kernel" or tensor.dim() < 3 or tensor.shape[0] != self.num_features:
            return ""
        return f"kernel_size={tensor.shape[-1]}, spatial_dims={tensor.dim() - 2} for it"


def centre_taps(kernel: Tensor) -> Tensor:
    """Return the tap in the middle of each kernel, (C, *) -> (C,).

    >>> centre_taps(torch.tensor([[[0.0, 2.0, 1.0]]]))
    tensor([2.])
    """
    taps = kernel.flatten(1)
    return taps[:, taps.shape[1] // 2].clone()

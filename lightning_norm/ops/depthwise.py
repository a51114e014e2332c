"""The depthwise convolution of BNET's recovery step: its one home, for a fused kernel to replace.

A map is (N, C, *), a kernel (C, 1, *) with one odd size per spatial axis, and the map is padded with zeros to its own
size. An odd kernel flipped along every axis is the transpose of the convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

LONGEST = 7
"""Taps along an axis that the fused kernels unroll."""


def fit(kernel: Tensor, spatial: int) -> Tensor:
    """Give a kernel as many spatial axes as the map has.

    A map with fewer is one of size 1 along the last ones, where only the kernel's middle acts; of a map with more, the
    first ones are separate maps.
    """
    for _ in range(kernel.dim() - 2 - spatial):
        kernel = kernel.select(-1, kernel.shape[-1] // 2)
    for _ in range(spatial - (kernel.dim() - 2)):
        kernel = kernel.unsqueeze(2)
    return kernel


def on_kernels(kernel: Tensor) -> bool:
    """Tell whether the fused kernels know a convolution: of one or two axes, of at most seven taps along each."""
    return kernel.dim() in (3, 4) and max(kernel.shape[2:]) <= LONGEST


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel with its kernel; the result has the memory format of x."""
    if x.dim() == 2:
        y = x * kernel.squeeze(1)
        return y if bias is None else y + bias
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        y = torch.ops.lightning_norm.depthwise(x, kernel, bias)
    else:
        y = _convolve(x, kernel, bias)
    return y


def transposed(dy: Tensor, kernel: Tensor) -> Tensor:
    """Return the gradient of x, given that of ``convolve(x, kernel)``."""
    return convolve(dy, kernel.flip(tuple(range(2, kernel.dim()))))


def kernel_gradients(dy: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of kernel and bias, given that of ``convolve(x, kernel, bias)``."""
    if x.dim() == 2:
        return (dy * x).sum(0).unsqueeze(1), dy.sum(0)
    _, dkernel, dbias = torch.ops.aten.convolution_backward(
        dy, x, kernel, [x.shape[1]], *_geometry(kernel), False, [0] * (x.dim() - 2), x.shape[1], [False, True, True]
    )
    return dkernel, dbias


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    zeros = [0] * (x.dim() - 2)  # aten's own name is the one that autocast does not know
    y: Tensor = torch.ops.aten.convolution(x, kernel, bias, *_geometry(kernel), False, zeros, x.shape[1])
    like = torch.empty_like(x)
    return y if y.stride() == like.stride() else like.copy_(y)


def _geometry(kernel: Tensor) -> tuple[list[int], list[int], list[int]]:
    """Return stride, padding and dilation."""
    ones = [1] * (kernel.dim() - 2)
    return ones, [size // 2 for size in kernel.shape[2:]], ones


# Opaque to the compiler, which would turn every map to channels_last and back around a convolution.
torch.library.define("lightning_norm::depthwise", "(Tensor x, Tensor kernel, Tensor? bias) -> Tensor")
torch.library.impl("lightning_norm::depthwise", "CompositeExplicitAutograd", _convolve)
torch.library.register_fake("lightning_norm::depthwise", lambda x, kernel, bias: torch.empty_like(x))

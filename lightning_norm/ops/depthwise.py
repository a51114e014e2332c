"""The depthwise convolution behind BNET's normalization, in plain PyTorch, and whether the kernels know it.

A map is (N, C, *), a kernel (C, 1, *) with one odd size per spatial axis, and the map is padded with zeros to its own
size. An odd kernel flipped along every axis is the transpose of the convolution.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_norm.ops import torch_private
from lightning_norm.ops.fused import operators

LONGEST = 7
"""Taps along an axis that the fused kernels unroll."""
LARGEST = 1 << 25
"""Positions of a map at most, for a grid has at most 65535 programs along its second axis."""


def with_spatial_axes(kernel: Tensor, spatial: int) -> Tensor:
    """Give a kernel as many spatial axes as the map has.

    A map with fewer axes is one of size 1 along the missing last ones, where only the middle of the kernel meets an
    element. A map with more is a stack of separate maps along its first axes.
    """
    for _ in range(kernel.dim() - 2 - spatial):
        # The other taps meet only the zeros around the map.
        kernel = kernel.select(-1, torch_private.static_shape(kernel)[-1] // 2)
    for _ in range(spatial - (kernel.dim() - 2)):
        kernel = kernel.unsqueeze(2)
    return kernel


def on_kernels(kernel: Tensor, size: int) -> bool:
    """Return whether the kernels know a convolution: one or two axes, at most seven taps along each, maps that fit."""
    return kernel.dim() in (3, 4) and max(kernel.shape[2:]) <= LONGEST and size <= LARGEST


def unrolled(x: Tensor, kernel: Tensor) -> bool:
    """Return whether a compiled graph should write the sum over taps out; the compiler makes one loop of it.

    For contiguous maps of some width that is faster than oneDNN, which turns a map to a format of its own and back. Ask
    in the forward pass: a gradient that is being traced does not show its memory format.
    """
    # Narrow maps and large kernels are left to oneDNN.
    known = x.is_cpu and x.dim() > 2 and x.is_contiguous() and x.shape[-1] >= 12 and kernel[0].numel() <= 49
    return known and torch_private.in_graph()


def convolve(
    x: Tensor, kernel: Tensor, bias: Tensor | None = None, *, unroll: bool = False, recorded: bool = False
) -> Tensor:
    """Convolve each channel with its kernel; the result has the memory format of x, unless it is ``recorded``."""
    if unroll:
        # One term per tap: its weight times the map, moved by the tap.
        start = x.new_zeros(()) if bias is None else _per_channel(bias, x)
        weights, windows = kernel.flatten(2).unbind(2), _windows(x, kernel)
        return sum((_per_channel(w, x) * window for w, window in zip(weights, windows, strict=True)), start)
    if x.dim() == 2:
        # Without spatial axes the kernel has one tap, which is a scale.
        y = x * kernel.squeeze(1)
        return y if bias is None else y + bias
    if recorded:
        return _convolution(x, kernel, bias)
    if not torch_private.in_graph():
        return _convolve(x, kernel, bias)
    # As an operator the compiler leaves it alone, see the end of this file.
    opaque: Tensor = torch.ops.lightning_norm.depthwise(x, kernel, bias)
    return opaque


def transposed(dy: Tensor, kernel: Tensor, *, unroll: bool = False) -> Tensor:
    """Return the gradient of x, given that of ``convolve(x, kernel)``."""
    return convolve(dy, kernel.flip(tuple(range(2, kernel.dim()))), unroll=unroll)


def kernel_gradients(dy: Tensor, x: Tensor, kernel: Tensor, *, unroll: bool = False) -> tuple[Tensor, Tensor]:
    """Return the gradients of kernel and bias, given that of ``convolve(x, kernel, bias)``."""
    over = tuple(range(2, x.dim()))
    if unroll:
        taps = [(dy * window).sum(over).sum(0) for window in _windows(x, kernel)]
        return torch.stack(taps, 1).view(kernel.shape), dy.sum(over).sum(0)
    if not over:
        return (dy * x).sum(0).unsqueeze(1), dy.sum(0)
    # As an operator where a compiler traces, for the reason at the end of this file.
    run = torch.ops.lightning_norm.depthwise_kernel_gradients if torch_private.in_graph() else _kernel_gradients
    dkernel, dbias = run(dy, x, kernel)
    return dkernel, dbias


def _windows(x: Tensor, kernel: Tensor) -> Iterator[Tensor]:
    """Yield what each tap sees of x and the zeros around it."""
    edged = torch.ops.lightning_norm.edged(x, [size // 2 for size in reversed(kernel.shape[2:]) for _ in (0, 1)])
    for at in itertools.product(*(range(size) for size in kernel.shape[2:])):
        window = edged
        for axis, start in enumerate(at, 2):
            window = window.narrow(axis, start, x.shape[axis])
        yield window


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(-1, *(1,) * (x.dim() - 2))


def _kernel_gradients(dy: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    _, dkernel, dbias = torch.ops.aten.convolution_backward(
        dy, x, kernel, [x.shape[1]], *_geometry(kernel), False, [0] * (x.dim() - 2), x.shape[1], [False, True, True]
    )
    return dkernel, dbias


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    y = _convolution(x, kernel, bias)
    # oneDNN may choose another memory format than that of x, which the output has to keep.
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


def _convolution(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    # aten.convolution and not conv2d: autocast, which would narrow the map, knows the second name only.
    zeros, groups = [0] * (x.dim() - 2), torch_private.static_shape(kernel)[0]
    y: Tensor = torch.ops.aten.convolution(x, kernel, bias, *_geometry(kernel), False, zeros, groups)
    return y


def _geometry(kernel: Tensor) -> tuple[list[int], list[int], list[int]]:
    """Return stride, padding and dilation."""
    ones = [1] * (kernel.dim() - 2)
    return ones, [size // 2 for size in torch_private.static_shape(kernel)[2:]], ones


# Operators that the compiler does not look into: it would turn every map to another memory format and back around a
# convolution, and compute a padded map anew for each tap.
operators.define(
    {
        "depthwise": "(Tensor x, Tensor kernel, Tensor? bias) -> Tensor",
        "depthwise_kernel_gradients": "(Tensor dy, Tensor x, Tensor kernel) -> (Tensor, Tensor)",
        "edged": "(Tensor x, int[] sizes) -> Tensor",
    },
    {"depthwise": _convolve, "depthwise_kernel_gradients": _kernel_gradients, "edged": torch.constant_pad_nd},
    {
        "depthwise": lambda x, kernel, bias: torch.empty_like(x),
        "depthwise_kernel_gradients": lambda dy, x, kernel: (
            torch.empty_like(kernel),
            kernel.new_empty(kernel.shape[0]),
        ),
        "edged": torch.constant_pad_nd,
    },
    ("CompositeExplicitAutograd",),
)

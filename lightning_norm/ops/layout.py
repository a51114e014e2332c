"""Which axis of x is the channel axis, and how an (N, C) tensor meets x. No copy is ever made here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The axes of one input.

    Args:
        shape: shape of x.
        channel_dim: the channel axis, 1 or the last.
        n: samples.
        c: channels.
        reduced: the axes that a (sample, channel) pair owns.
        size: elements of x behind each (sample, channel), the S of the docs.
    """

    shape: tuple[int, ...]
    channel_dim: int
    n: int
    c: int
    reduced: tuple[int, ...]
    size: int

    def spread(self, t: Tensor) -> Tensor:
        """View an (N, C), (1, C), (N, 1) or (1, 1) tensor so that it broadcasts against x."""
        wide = [1] * len(self.shape)
        wide[0], wide[self.channel_dim] = t.shape
        return t.reshape(wide)


def layout_of(x: Tensor, num_features: int, channel_dim: int = 1, who: str = "normalize") -> Layout:
    """Check an input and describe its axes.

    Accepts (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W), and with ``channel_dim=-1`` (N, ..., C).

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: wrong rank, channel count or channel_dim, or no element per channel.
    """
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        came = f"{x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{who} expects a floating-point tensor, got {came}. Convert it first: x.float().")
    if channel_dim not in (1, -1):
        raise ValueError(f"{who}: channel_dim must be 1 (images) or -1 (tokens), got {channel_dim}.")
    shape = tuple(x.shape)
    if not 2 <= len(shape) <= 5:
        remedy = "A single sample needs a batch axis: x.unsqueeze(0)."
        if len(shape) > 5:
            remedy = f"Merge axes: x.flatten({'4' if channel_dim == 1 else '1, -2'})."
        raise ValueError(
            f"{who} expects (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W), "
            f"got {len(shape)} dimensions: {shape}. {remedy}"
        )
    dim = 1 if channel_dim == 1 else len(shape) - 1
    if shape[dim] != num_features:
        hint = ""
        other = 1 if channel_dim == -1 else len(shape) - 1
        if shape[other] == num_features:
            hint = f" Axis {other} has {num_features}: pass channel_dim={1 if other == 1 else -1}."
        raise ValueError(
            f"{who} has num_features={num_features}, but axis {dim} of input {shape} has {shape[dim]}.{hint}"
        )
    reduced = tuple(d for d in range(1, len(shape)) if d != dim)
    size = 1
    for d in reduced:
        size *= shape[d]
    if size == 0:
        raise ValueError(f"{who}: input {shape} has no element per channel. Check the size of the feature map.")
    return Layout(shape, dim, shape[0], num_features, reduced, size)


def at_least_float32(dtype: torch.dtype | None) -> torch.dtype:
    """Return ``dtype``, or float32 where that is narrower; the default dtype for ``None``."""
    return torch.float64 if (dtype or torch.get_default_dtype()) == torch.float64 else torch.float32


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return t in ``dtype``, itself where it is: for what an autograd function returns.

    There the Dynamo of torch 2.11 loses the gradient, without a word, of a tensor that ``to`` was asked of for nothing.
    """
    return t if t.dtype == dtype else t.to(dtype)


def stat_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of x's means: float64 for float32 inputs where the device has it, else at least float32."""
    if x.dtype == torch.float32 and x.device.type == "mps":
        return torch.float32
    return torch.float64 if x.dtype == torch.float32 else at_least_float32(x.dtype)

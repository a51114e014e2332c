"""Which axis of x is the channel axis, how an (N, C) tensor broadcasts against x, and the dtypes of statistics.

Nothing here copies x: channels-last inputs and transposed views are read as they lie in memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_norm.errors import counted
from lightning_norm.ops import torch_private


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

    def broadcast_to_input(self, t: Tensor) -> Tensor:
        """View an (N, C), (1, C), (N, 1) or (1, 1) tensor so that it broadcasts against x."""
        shape = [1] * len(self.shape)
        shape[0], shape[self.channel_dim] = t.shape
        return t.reshape(shape)

    def count(self, x: Tensor) -> int | Tensor:
        """Return ``size``, for Moments."""
        return self.size

    @property
    def is_one_sample(self) -> bool:
        """Whether the whole batch counts as one sample of all its positions."""
        return self.reduced[:1] == (0,)

    def as_one_sample(self) -> Layout:
        """Return the layout in which the whole batch is one sample."""
        n = self.shape[0]
        return Layout(self.shape, self.channel_dim, 1, self.c, (0, *self.reduced), self.size * n)

    def of_samples(self, t: Tensor) -> Tensor:
        """Return what was reduced over ``reduced`` as (N, C): of one sample it has no axis yet."""
        return t.view(1, -1) if self.is_one_sample else t


class TracedLayout(Layout):
    """The axes of an input of ``torch.jit.trace``, whose graph takes any number of samples and maps of any size."""

    def broadcast_to_input(self, t: Tensor) -> Tensor:
        """View a tensor as :class:`Layout` does, with the number of samples left open."""
        shape = [1] * len(self.shape)
        # -1 stays open in the graph; the number of channels is fixed by the layer.
        shape[0], shape[self.channel_dim] = -1, torch_private.static_shape(t)[1]
        return t.reshape(shape)

    def count(self, x: Tensor) -> int | Tensor:
        """Return the size as a tensor that follows the input."""
        # Multiplied in the graph, so that maps of another size have another count there.
        count = torch.ones((), dtype=stat_dtype(x))
        for d in self.reduced:
            count = count * x.shape[d]
        return count


def layout_of(x: Tensor, num_features: int, channel_dim: int = 1, who: str = "normalize") -> Layout:
    """Check an input, (N, C, *) or with ``channel_dim=-1`` (N, *, C), and describe its axes; messages name ``who``.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: wrong rank, channel count or channel_dim, or no element per channel.
    """
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point or channel_dim not in (1, -1):
        raise _refusal(x, channel_dim, who)
    traced = torch_private.tracing_state() is not None
    shape = torch_private.static_shape(x) if traced else tuple(x.shape)
    dims = len(shape)
    axis = 1 if channel_dim == 1 else dims - 1
    if not 2 <= dims <= 5 or shape[axis] != num_features or 0 in shape[1:]:
        raise ValueError(f"{who}{_wrong_shape(shape, axis, num_features)}")
    reduced = tuple(d for d in range(1, dims) if d != axis)
    size = 1
    for d in reduced:  # not math.prod, which torch.compile cannot trace
        size *= shape[d]
    return (TracedLayout if traced else Layout)(shape, axis, shape[0], num_features, reduced, size)


def _refusal(x: object, channel_dim: int, who: str) -> Exception:
    if isinstance(x, Tensor) and x.dtype.is_floating_point:
        return ValueError(f"{who}: channel_dim must be 1 (images) or -1 (tokens), got {channel_dim}.")
    if isinstance(x, Tensor):
        came, remedy = f"{x.dtype} tensor", "x.dequantize()" if x.is_quantized else "x.float()"
    else:
        came, remedy = type(x).__name__, "torch.as_tensor(x).float()"
    # What float() would make of a complex tensor has lost a half of it.
    hint = "" if isinstance(x, Tensor) and x.is_complex() else f" Convert it first: {remedy}."
    return TypeError(f"{who} expects a floating-point tensor, got {came}.{hint}")


def _wrong_shape(shape: tuple[int, ...], axis: int, num_features: int) -> str:
    if not 2 <= len(shape) <= 5:
        return f" expects {_wrong_rank(shape, axis)}"
    if shape[axis] != num_features:
        return f" has {_wrong_channels(shape, axis, num_features)}"
    return f": input {shape} has no element per channel. Check the size of the feature map."


def _wrong_rank(shape: tuple[int, ...], axis: int) -> str:
    remedy = "A single sample needs a batch axis: x.unsqueeze(0)."
    if len(shape) > 5:
        # Which axes may be merged depends on where the channels are.
        remedy = f"Merge axes: x.flatten({'4' if axis == 1 else '1, -2'})."
    return (
        f"(N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W), got {counted(len(shape), 'dimension')}: {shape}. {remedy}"
    )


def _wrong_channels(shape: tuple[int, ...], axis: int, num_features: int) -> str:
    # Images given to a layer for tokens, or the reverse, is the usual mistake.
    other = len(shape) - 1 if axis == 1 else 1
    hint = f" Axis {other} has {num_features}: pass channel_dim={1 if other == 1 else -1}."
    message = f"num_features={num_features}, but axis {axis} of input {shape} has {shape[axis]}."
    return message + hint if shape[other] == num_features else message


def at_least_float32(dtype: torch.dtype | None) -> torch.dtype:
    """Return ``dtype``, or float32 where that is narrower; the default dtype for ``None``."""
    return torch.float64 if (dtype or torch.get_default_dtype()) == torch.float64 else torch.float32


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return t in ``dtype``, or t itself: in torch 2.11 a compiled autograd function loses the gradient of ``t.to``."""
    return t if t.dtype == dtype else t.to(dtype)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return the context in which autocast rounds nothing of x; a cheap one where it is off."""
    on = not x.is_meta and torch.is_autocast_enabled(x.device.type)  # which knows no meta device
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()


def stat_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of x's means: float64 for float32 inputs where the device has it, else at least float32."""
    has_float64 = x.device.type != "mps"  # Apple's GPUs have none
    return torch.float64 if x.dtype == torch.float32 and has_float64 else at_least_float32(x.dtype)

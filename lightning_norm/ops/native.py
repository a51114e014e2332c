"""ATen's own normalizations, for the normalizers that are the same function: on the CPU nothing else is as fast.

They subtract no mean before they scale, which loses digits where a mean is large against its standard deviation. Both
come out beside y, so that this is looked at afterwards; the caller then normalizes anew by the passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_norm.ops import eager, torch_private
from lightning_norm.ops.eager import SMALL_MEAN
from lightning_norm.ops.layout import Layout

LEAST_SCALE = 1e-18
"""One over the standard deviation below which the variance may not be a finite number in float32."""

PLAIN = (Tensor, torch.nn.Parameter)
WIDE = (torch.float32, torch.float64)


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Tell whether ATen computes with x and the layer's tensors what the passes do, at the same precision.

    That is so in float32 and float64, all tensors alike, where x lies dense in one of torch's two memory formats and
    nobody but autograd looks at the operations.
    """
    dtype = x.dtype
    return (
        type(x) in PLAIN
        and dtype in WIDE
        and not torch_private.is_transformed()  # first of all: a trace would note what is asked of x below
        and eager.may_read_back(x)
        and all([t is None or (t.dtype == dtype and t.is_cpu) for t in others])  # noqa: C419  a generator takes longer
        and (x.is_contiguous() or _is_channels_last(x))
    )


def batch_norm(
    x: Tensor,
    layout: Layout,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: tuple[Tensor, Tensor] | None = None,
    momentum: float = 0.0,
) -> Tensor | None:
    """Return x normalized by the statistics of the batch, (N, C, *) or dense tokens (N, *, C).

    Args:
        x: the input; :func:`takes` it.
        layout: of x.
        weight: (C,).
        bias: (C,).
        eps: added to the variance.
        running: mean and variance, which move towards those of the batch.
        momentum: by how much.

    Returns:
        y; ``None``, and nothing has moved, where digits would be lost or a statistic is not finite.
    """
    # Of tokens each is a sample.
    tokens = layout.channel_dim != 1
    rows = x.view(-1, layout.c) if tokens else x
    # In copies, and written only once it is known that they are finite: a backward pass needs none of the buffers.
    moved = (None, None) if running is None else (running[0].clone(), running[1].clone())
    # torch's stub takes it for an operator that gets its results' tensors.
    y, mean, scale = torch.native_batch_norm(rows, weight, bias, *moved, True, momentum, eps)  # type: ignore[call-arg,arg-type]
    if not _is_exact(mean, scale) or scale.min().item() < LEAST_SCALE:
        return None
    if running is not None:
        for old, new in zip(running, moved, strict=True):
            old.copy_(new)  # type: ignore[arg-type]  # both are there
    return y.view(layout.shape) if tokens else y


def group_norm(
    x: Tensor, layout: Layout, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """Return x, (N, C, *), normalized by the statistics of each sample's groups; ``None`` if digits would be lost."""
    y, mean, scale = torch.native_group_norm(x, weight, bias, layout.n, layout.c, layout.size, groups, eps)
    return y if _is_exact(mean, scale) else None


def _is_exact(mean: Tensor, scale: Tensor) -> bool:
    """Tell whether all means are small against their standard deviations; written so that NaN is not."""
    return (mean * scale).abs_().max().item() <= SMALL_MEAN


def _is_channels_last(x: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return last is not None and x.is_contiguous(memory_format=last)

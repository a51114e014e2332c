"""The passes in plain PyTorch: the CPU path, what torch.compile traces, and the oracle of the kernels.

Precision. For float32 inputs the (N, C) means are float64, unless |mean| / std is small, because 1000 +- 1 rounded to
float32 already costs more than nn.BatchNorm2d loses in all. Products with x are rounded once: eager code goes through
fused multiply-adds (``addcmul``, ATen's evaluation-mode batch norm), a compiled CPU graph computes in float64
registers, for Inductor fuses none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_norm.ops import torch_private
from lightning_norm.ops.layout import Layout, at_least_float32, cast, stat_dtype

SMALL_MEAN = 8.0
"""|mean| / std up to which scale * x + offset loses no digits against scale * (x - mean) + shift."""


def moments(x: Tensor, layout: Layout, recorded: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per (sample, channel), each (N, C).

    Where each operation is ``recorded``, looked at or differentiated, no value is read back and nothing is overwritten.
    """
    if not layout.reduced or (layout.size == 1 and not recorded):
        return _moments_of_one(x)
    keep = recorded or is_recording()
    if not keep and x.dtype == torch.float32 and may_read_back(x) and x.numel() <= FEW:
        var, mean = (layout.of_samples(t) for t in torch.var_mean(x, layout.reduced, correction=0))
        if is_small(mean, var):
            return mean, var
    if not keep and layout.size * layout.c >= FEW and (fast := _moments_of_rows(x, layout)) is not None:
        return fast
    rough_mean = layout.of_samples(x.mean(layout.reduced, dtype=at_least_float32(x.dtype)))
    # In float64 and for half inputs the statistics are as wide as they will get, and the mean is exact enough.
    wide = stat_dtype(x) == rough_mean.dtype
    if wide or (not recorded and may_read_back(x)):
        var = _mean_square(x, rough_mean, layout, keep)
        # A small mean keeps its digits, and float32 halves the work of the algebra.
        if wide or is_small(rough_mean, var):
            return rough_mean, var
    return _refined(rough_mean, x - layout.broadcast_to_input(rough_mean), layout, keep)


FEW = 1 << 13
"""Elements of x up to which the number of operations counts, one in place of five, and not what each of them takes."""


def is_small(mean: Tensor, var: Tensor) -> bool:
    """Tell whether means are small against their standard deviations, and all of them finite."""
    return torch.addcmul(var, mean, mean, value=-(SMALL_MEAN**-2)).min().item() >= 0


def _moments_of_rows(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor] | None:
    """Return the moments of channels that lie next to each other; ``None`` where they do not, or would lose digits."""
    rows = channels_last_rows(x, layout) if may_read_back(x) and x.dtype in (torch.float32, torch.float64) else None
    if rows is None:
        return None
    # ATen sums them in vectors, for one sample at a time.
    of_samples = [torch.batch_norm_update_stats(sample, None, None, 0.0) for sample in rows.unbind()]
    mean, var = (torch.stack(statistic) for statistic in zip(*of_samples, strict=True))
    return (mean, var) if x.dtype == torch.float64 or is_small(mean, var) else None


def _moments_of_one(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the moments where each (sample, channel) has one element: itself and 0."""
    # A copy, for the mean is an output of an autograd function and must not be x itself.
    mean = x.flatten(1).to(stat_dtype(x), copy=True)
    return mean, torch.zeros_like(mean, dtype=at_least_float32(x.dtype))


def _refined(rough_mean: Tensor, u: Tensor, layout: Layout, keep: bool) -> tuple[Tensor, Tensor]:
    """Return the moments of x, its mean in float64, given a float32 mean and u = x - that."""
    # The rough mean is off by its rounding. What is left over is so small that its own mean is exact enough in float32.
    residual_mean = layout.of_samples(u.mean(layout.reduced))
    square = layout.of_samples((u * u if keep else u.mul_(u)).mean(layout.reduced))
    var = (square - residual_mean.square()).clamp_min(0)
    return rough_mean.double() + residual_mean, var


def apply(
    x: Tensor, center: Tensor, scale: Tensor, shift: Tensor, layout: Layout, mean_is_small: bool = False
) -> Tensor:
    """Return y = scale * (x - center) + shift, a fresh tensor in x's dtype and memory format.

    Center, scale and shift are (N, C), or have 1 in place of either. Where ``mean_is_small``, x need not be centered
    first, which saves a temporary of its size.
    """
    if not mean_is_small or is_recording():
        return apply_centered(x, center, scale, shift, layout, is_recording())
    scale = cast(scale, x.dtype)  # which is float32
    return affine(x, scale, cast(torch.addcmul(shift, scale, center, value=-1), x.dtype), layout, recorded=False)


def apply_centered(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor, layout: Layout, recorded: bool) -> Tensor:
    """Return scale * (x - center) + shift for a mean that may be large against the standard deviation.

    Args:
        x: the input.
        center: (N, C), or 1 in place of either; likewise ``scale`` and ``shift``.
        scale: what multiplies.
        shift: what is added.
        layout: of x.
        recorded: as for :func:`moments`.
    """
    u = _widened(x)
    if u.dtype == center.dtype:
        centered = u - layout.broadcast_to_input(center)
        return cast(affine(centered, scale.to(u.dtype), shift.to(u.dtype), layout, recorded), x.dtype)
    pivot, scale = center.to(at_least_float32(u.dtype)), scale.to(at_least_float32(u.dtype))
    # The pivot is the center as x's dtype can hold it. What rounding took from it goes into the offset.
    offset = (shift + scale * (pivot - center)).to(scale.dtype)
    return cast(affine(u - layout.broadcast_to_input(pivot), scale, offset, layout, recorded), x.dtype)


def reduce(dy: Tensor, x: Tensor, pivot: Tensor, layout: Layout, mean_is_small: bool = False) -> tuple[Tensor, Tensor]:
    """Sum of dy and of dy * (x - pivot) per (sample, channel), each (N, C) in the dtype of ``pivot``."""
    recorded = is_recording(dy)
    # A vector (N, C) has nothing to sum over, and torch takes no axes for all axes.
    if not layout.reduced:
        return dy.to(pivot.dtype), (x - pivot) * dy
    if mean_is_small and not recorded:
        # A small pivot loses no digits here, and x need not be centered.
        total, dot = sums(dy, x, layout)
        return total, torch.addcmul(dot, pivot, total, value=-1)
    total = layout.of_samples(dy.sum(layout.reduced, dtype=pivot.dtype))
    if recorded:
        return total, layout.of_samples(((x - layout.broadcast_to_input(pivot)) * dy).sum(layout.reduced))
    dots = [(u - p).mul_(dy_part).sum(layout.reduced) for u, dy_part, p in in_parts(x, dy, pivot, layout=layout)]
    return total, _joined(dots, layout)


def combine(
    dy: Tensor, scale: Tensor, x: Tensor, mean: Tensor, dmean: Tensor | None, dvar: Tensor | None, layout: Layout
) -> Tensor:
    """Return dx = scale * dy + dmean / S + (2 * dvar / S) * (x - mean), in x's dtype."""
    # A compiled graph has no fused multiply-add on the CPU, and float64 registers cost it nothing.
    dy, u = _widened(dy), _widened(x)
    dtype = at_least_float32(u.dtype)
    scale = layout.broadcast_to_input(scale.to(dtype))
    offset = None if dmean is None else dmean.to(dtype) / layout.size
    # The variance of one element is constant.
    if dvar is None or layout.size == 1:
        dx = dy * scale if offset is None else torch.addcmul(layout.broadcast_to_input(offset), dy, scale)
        return dx.to(x.dtype)
    slope = dvar.to(dtype) * (2 / layout.size)
    pivot = mean.to(dtype)
    if pivot.dtype != mean.dtype:
        # x is centered by the rounded mean; what rounding took is the same for all positions, so the offset can hold
        # it.
        rounding = slope * (pivot - mean).to(dtype)
        offset = rounding if offset is None else offset + rounding
    elif not is_recording(dy, dmean, dvar) and x.dtype == dtype == torch.float32 and x.is_cpu:
        # A mean in float32 is a small one, see ``moments``: x need not be centered, which saves a pass.
        around_zero = slope * pivot if offset is None else torch.addcmul(offset, slope, pivot, value=-1)
        return combined(dy, scale, x, None, slope, around_zero if offset is not None else around_zero.neg_(), layout)
    offset = torch.zeros_like(slope) if offset is None else offset
    if is_recording(dy, dmean, dvar):
        u = u - layout.broadcast_to_input(pivot)
        through_moments = u * layout.broadcast_to_input(slope) + layout.broadcast_to_input(offset)
        return torch.addcmul(through_moments, dy, scale).to(x.dtype)
    return combined(dy, scale, x, pivot, slope, offset, layout)


def combined(
    dy: Tensor, scale: Tensor, x: Tensor, pivot: Tensor | None, slope: Tensor, offset: Tensor, layout: Layout
) -> Tensor:
    """Return scale * dy + slope * (x - pivot) + offset, a few samples at a time; without a pivot, around 0."""
    # What comes through the statistics is small against scale * dy, so only the rounding of the last step matters.
    dx, dtype = torch.empty_like(x), slope.dtype
    fields = (slope, offset, scale) if pivot is None else (slope, offset, scale, pivot)
    if pivot is None and (x.numel() <= FEW or channels_last_rows(x, layout) is not None):
        # Vectors of channels take one coefficient each: two operations, which lose more time in parts than caches save.
        slope, offset = layout.broadcast_to_input(slope), layout.broadcast_to_input(offset)
        return torch.addcmul(offset, x, slope, out=dx).addcmul_(dy, scale)
    for part, dy_part, dx_part, k, o, s, *p in in_parts(x, dy, dx, *fields, layout=layout):
        if p:
            u = torch.sub(part, p[0], out=dx_part) if part.dtype == dtype else part - p[0]
            u.mul_(k).add_(o)
        else:
            u = torch.mul(part, k, out=dx_part).add_(o)
        u.addcmul_(dy_part, s)
        if u.dtype != dx.dtype:
            dx_part.copy_(u)
    return dx


PART = 1 << 18
"""Elements of x that are worked on at a time: with what is made of them, they fit into the cache of one core."""


def may_read_back(x: Tensor) -> bool:
    """Whether the values of x's statistics may decide how to go on: on the CPU alone, for it would wait for a GPU."""
    return x.is_cpu and not torch.compiler.is_compiling() and x.numel() > 0


def affine(u: Tensor, scale: Tensor, offset: Tensor, layout: Layout, recorded: bool) -> Tensor:
    """Return scale * u + offset, with one rounding per element."""
    if not recorded and u.numel() > FEW and _is_one_row_per_channel(u, scale, layout):
        # torch's batch norm in evaluation, with mean 0, variance 1 and eps 0, is a fused multiply-add over whole rows.
        scale, offset = _one_per_row(scale, layout), _one_per_row(offset, layout)
        zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
        rows = u.view(1, scale.numel(), -1)
        y = torch.batch_norm(rows, scale, offset, zeros, ones, False, 0.0, 0.0, False)
        # Autograd refuses an in-place operation, such as the ReLU of most networks, on a view that an autograd function
        # returned; ``data`` shares the memory and is no view.
        return y.view(layout.shape).data
    return torch.addcmul(layout.broadcast_to_input(offset), u, layout.broadcast_to_input(scale))


def sums(dy: Tensor, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Sum of dy and of dy * x per (sample, channel), each (N, C), where nothing is recorded and no mean is large."""
    if x.numel() > FEW and dy.is_contiguous() and _is_one_row_per_channel(x, dy, layout) and _can_leave_out_dx():
        # Group norm's parameter gradients, each row a group: both sums in one pass and no temporary.
        rows = layout.n * layout.c
        zeros, ones = x.new_zeros(1, rows), x.new_ones(1, rows)
        dy, x, needs_gradient = dy.view(1, rows, -1), x.view(1, rows, -1), [False, True, True]
        _, dot, total = torch.ops.aten.native_group_norm_backward(
            dy, x, zeros, ones, None, 1, rows, layout.size, rows, needs_gradient
        )
        return total.view(layout.n, layout.c), dot.view(layout.n, layout.c)
    x_rows, dy_rows = channels_last_rows(x, layout), channels_last_rows(dy, layout)
    if x_rows is not None and dy_rows is not None:
        return _sums_of_rows(x_rows, dy_rows, layout)
    total = layout.of_samples(dy.sum(layout.reduced))
    return total, _joined([(u * dy_part).sum(layout.reduced) for u, dy_part in in_parts(x, dy, layout=layout)], layout)


def _sums_of_rows(x: Tensor, dy: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return both sums, of (N, S, C), while a part of x and dy is in a cache."""
    found: list[tuple[Tensor, Tensor]] = []
    product: Tensor | None = None
    for u, dy_part in in_parts(x, dy, layout=layout):
        # Each product takes the place of the last, which is in the cache; the last part may be smaller.
        product = u * dy_part if product is None else torch.mul(u, dy_part, out=product[: len(u)])
        found.append((dy_part.sum(1), product.sum(1)))
    if len(found) == 1:
        return found[0]
    total, dot = (torch.cat(parts) for parts in zip(*found, strict=True))
    return total, dot


def channels_last_rows(x: Tensor, layout: Layout) -> Tensor | None:
    """Return x as (N, S, C) where its channels lie next to each other, on the CPU; ``None`` where they do not."""
    if layout.channel_dim == 1:
        if x.is_contiguous():
            return None
        x = x.movedim(1, -1)
    return x.view(layout.n, layout.size, layout.c) if x.is_cpu and x.dim() > 2 and x.is_contiguous() else None


def _is_one_row_per_channel(x: Tensor, statistic: Tensor, layout: Layout) -> bool:
    """Whether ATen's CPU kernels can take x as (1, N * C, S): every (sample, channel) a channel of its own."""
    plain = x.is_cpu and x.dtype == statistic.dtype
    return plain and layout.channel_dim == 1 and x.is_contiguous() and x.numel() > 0 and not layout.is_one_sample


def _one_per_row(t: Tensor, layout: Layout) -> Tensor:
    """Return a tensor that broadcasts to (N, C) as (N * C,)."""
    return t.expand(layout.n, layout.c).reshape(-1)


@functools.cache
def _can_leave_out_dx() -> bool:
    """Whether group norm's backward can leave out dx. In torch 2.11 it raises."""
    x = torch.ones(1, 1, 2)
    statistic = x[0, :, :1]
    try:
        torch.ops.aten.native_group_norm_backward(x, x, statistic, statistic, None, 1, 1, 2, 1, [False, True, True])
    except RuntimeError:
        return False
    return True


def _widened(x: Tensor) -> Tensor:
    """Return x in float64 in a compiled CPU graph, where it costs registers and no memory; elsewhere x itself."""
    return x.double() if torch.compiler.is_compiling() and x.is_cpu and x.dtype == torch.float32 else x


def _mean_square(x: Tensor, mean: Tensor, layout: Layout, recorded: bool) -> Tensor:
    """Mean of (x - mean)^2 per (sample, channel)."""
    if recorded:
        return layout.of_samples((x - layout.broadcast_to_input(mean)).square().mean(layout.reduced))
    sums = []
    for part, pivot in in_parts(x, mean, layout=layout):
        u = part - pivot
        sums.append(u.mul_(u).sum(layout.reduced))
    return _joined(sums, layout).div_(layout.size)


def _joined(sums: list[Tensor], layout: Layout) -> Tensor:
    """Return the sums of parts as those of x, (N, C)."""
    if layout.is_one_sample:
        return layout.of_samples(torch.stack(sums).sum(0))
    return torch.cat(sums) if len(sums) > 1 else sums[0]


def in_parts(x: Tensor, *others: Tensor, layout: Layout) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of a few samples each: so many that what is made of them stays in a cache of the processor.

    Args:
        x: the input.
        others: tensors like x, or (N, C), (1, C), (N, 1) or (1, 1), which are then shaped to broadcast against x.
        layout: of x.
    """
    others = tuple(t if t.dim() > 2 or t.shape == x.shape else layout.broadcast_to_input(t) for t in others)
    if not x.is_cpu or x.numel() <= 2 * PART:
        yield (x, *others)
        return
    samples = max(1, PART * x.shape[0] // x.numel())
    for start in range(0, x.shape[0], samples):
        stop = start + samples
        yield tuple(t[start:stop] if t.shape[0] > 1 else t for t in (x, *others))


def is_recording(*gradients: Tensor | None) -> bool:
    """Whether operations are recorded, by autograd or a compiler, or a gradient is more than it seems to be.

    Then nothing may be overwritten: what has no tangents, or no batch, has no room for those of what multiplies it.
    """
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    # Forward passes of autograd functions pass none: while operations are looked at, those functions do not run.
    return recorded or (bool(gradients) and (torch_private.is_transformed() or torch_private.is_batched(*gradients)))


def recorded_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], dy: Tensor, need: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of ``function(*inputs)`` that are needed, in operations that autograd records."""
    wanted = [t for t, needed in zip(inputs, need, strict=False) if needed and t is not None]
    with torch.enable_grad():
        found = iter(torch.autograd.grad(function(*inputs), wanted, dy, create_graph=True))
    return [next(found) if needed and t is not None else None for t, needed in zip(inputs, need, strict=False)]

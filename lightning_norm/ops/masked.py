"""normalize(x, algebra) where some positions are padding: neither read by a statistic nor changed by one.

With m = 1 where a position of x counts and 0 where it is padding, and n the positions that count in a sample,

    mean = sum(m x) / n,    var = sum(m (x - mean)^2) / n,    y = m (scale * (x - center) + shift)
    dx = m (scale * dy + dmean / n + (2 * dvar / n) * (x - mean))

A sample without any position has the mean 0, the variance 1 and the count 0, with which it weighs nothing where samples
are pooled. The two autograd nodes are those of :mod:`lightning_norm.ops.normalize`, and exchange gradients as they do;
both read x with zeros for padding, so that a NaN in it is gone before anything is summed. The passes are plain PyTorch:
the kernels know one count for all samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_norm.ops import depthwise, eager, torch_private
from lightning_norm.ops.layout import Layout, at_least_float32, stat_dtype, without_autocast
from lightning_norm.ops.moments import Moments
from lightning_norm.ops.normalize import Call, Passes, activated, carrier_grad, check_ending, field_gradients, run


@dataclass(frozen=True)
class Mask:
    """Which positions of an input count.

    Args:
        valid: true where a position counts, (N, 1, *) or with the channels last (N, *, 1).
        weights: the same as 1 and 0 in x's dtype, in float32 at least.
        count: how many of each sample do, (N, 1).
    """

    valid: Tensor
    weights: Tensor
    count: Tensor

    def zeroed(self, t: Tensor) -> Tensor:
        """Return t with zeros for padding, whatever it holds there; likewise its gradient."""
        if not eager.may_read_back(t) or torch_private.is_transformed() or torch_private.is_batched(t):
            return torch.where(self.valid, t, t.new_zeros(()))
        if torch.is_grad_enabled() and t.requires_grad:
            zeroed: Tensor = _Zeroed.apply(t, self)
            return zeroed
        # A product is twice as fast as a choice, and leaves a NaN or an infinity only where there was one.
        product = t * self.weights.to(t.dtype)
        if bool(product.sum(dtype=self.weights.dtype).isfinite()):
            return product
        return torch.where(self.valid, t, t.new_zeros(()))


class _Zeroed(torch.autograd.Function):
    """:meth:`Mask.zeroed`, and the same of the gradient."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, mask: Mask) -> Tensor:
        ctx.mask = mask
        # The nodes below read what comes out and send no gradient this way.
        ctx.set_materialize_grads(False)
        return mask.zeroed(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        return None if grads[0] is None else ctx.mask.zeroed(grads[0]), None


def mask_of(valid: Tensor, x: Tensor, layout: Layout) -> Mask:
    """Return the mask of x, given which positions count, in a shape that broadcasts against x with one channel.

    Of bool or as :attr:`Mask.weights`, from which a compiled CPU graph makes the other in its vector registers: a load
    of bool is none of a vector.
    """
    # As numbers, by which sums and gradients are multiplied.
    weights = valid.to(at_least_float32(x.dtype))
    valid = valid if valid.dtype == torch.bool else valid != 0
    sizes = [1 if d == layout.channel_dim else size for d, size in enumerate(layout.shape)]
    count = valid.expand(-1, *sizes[1:]).flatten(1).sum(1, keepdim=True, dtype=stat_dtype(x))
    return Mask(valid, weights, count)


def run_masked(x: Tensor, zeroed: Tensor, call: Call, mask: Mask) -> Tensor:
    """Do what :func:`lightning_norm.ops.normalize.run` does, by the positions that count; y is 0 elsewhere.

    The residual is added to that and the activation follows.

    Args:
        x: the input.
        zeroed: x with zeros for padding.
        call: how to normalize.
        mask: which positions count.

    Raises:
        ValueError: as :func:`lightning_norm.ops.normalize.normalize`.
        RuntimeError: ``backend="triton"``.
    """
    check_ending(x, call.activation, call.residual)
    if call.backend == "triton":
        raise RuntimeError("backend='triton' cannot take a mask: its kernels count all positions. Type backend='auto'.")
    with without_autocast(x):
        y = _normalize(x, zeroed, call, mask) if call.depthwise_conv is None else _convolved(x, zeroed, call, mask)
    return activated(y, call.activation, call.residual)


def _convolved(x: Tensor, zeroed: Tensor, call: Call, mask: Mask) -> Tensor:
    """Return the depthwise convolution of the normalized map, which sees zeros for padding as it does at a border."""
    assert call.depthwise_conv is not None
    kernel, bias = call.depthwise_conv
    kernel = depthwise.with_spatial_axes(kernel, len(call.layout.reduced)).to(at_least_float32(x.dtype))
    bias = None if bias is None else bias.to(kernel.dtype)
    # Rounded to half only after the convolution, as without a mask.
    normalized = _normalize(x.to(kernel.dtype), zeroed.to(kernel.dtype), replace(call, depthwise_conv=None), mask)
    last = call.layout.channel_dim != 1
    # A convolution takes its channels on the second axis: a view of tokens has them there.
    normalized = normalized.movedim(-1, 1) if last else normalized
    y = depthwise.convolve(normalized, kernel, bias, recorded=torch_private.is_transformed())
    return mask.zeroed(y.movedim(1, -1) if last else y).to(x.dtype)


def _normalize(x: Tensor, zeroed: Tensor, call: Call, mask: Mask) -> Tensor:
    plain = replace(call, activation="none", residual=None, fused_spec=None)
    if call.moments is not None:
        # The statistics are not those of x, so that its padding has to be kept out of y alone.
        return mask.zeroed(run(zeroed, plain))
    if torch_private.is_transformed():
        moments = Moments(*masked_moments(zeroed, mask, call.layout, recorded=True), mask.count, call.ranks)
        fields = call.algebra(moments).fields(call.layout.n, call.layout.c)
        return mask.zeroed(eager.apply_centered(zeroed, *fields, call.layout, recorded=True))
    # A tensor of the size of x, in which y is written: memory that was never touched costs more than a pass over it.
    scratch: list[Tensor] = []
    alias, mean, var, carrier = _MaskedMoments.apply(
        x, zeroed, mask.valid, mask.weights, mask.count, call.layout, scratch
    )
    small = x.dtype == torch.float32 == mean.dtype and call.layout.size > 1 and x.is_cpu
    fields = call.algebra(Moments(mean, var, mask.count, call.ranks)).fields(call.layout.n, call.layout.c)
    y: Tensor = _MaskedApply.apply(
        alias, carrier, zeroed, *fields, mask.valid, mask.weights, mask.count, call.layout, small, scratch
    )
    return y


def masked_moments(
    x: Tensor, mask: Mask, layout: Layout, recorded: bool = False, scratch: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the positions that count, each (N, C), of an x with zeros for padding.

    In the dtypes, and with the precision, of :func:`lightning_norm.ops.eager.moments`.

    Args:
        x: the input.
        mask: of x.
        layout: of x.
        recorded: every operation is looked at or differentiated.
        scratch: gets a tensor of the size of x that is free again, where the mean is small.
    """
    mean_dtype, var_dtype = stat_dtype(x), at_least_float32(x.dtype)
    if not layout.reduced:
        mean = x.to(mean_dtype, copy=True)
        return mean, torch.zeros_like(mean, dtype=var_dtype) + (mask.count == 0)
    keep = recorded or eager.is_recording()
    count = mask.count.clamp_min(1).to(var_dtype)
    rough_mean = x.sum(layout.reduced, dtype=var_dtype) / count
    one_if_empty = (mask.count == 0).to(var_dtype)
    wide = mean_dtype == var_dtype
    if wide or (not recorded and eager.may_read_back(x)):
        u = _centered(x, rough_mean, mask, layout, keep)
        var = _sum_of_squares(u, layout, keep) / count
        # As without a mask: a small mean keeps its digits in float32.
        if wide or bool((rough_mean.square() <= eager.SMALL_MEAN**2 * var).all()):
            if scratch is not None and not wide and not keep:
                scratch.append(u)
            return rough_mean, var + one_if_empty
    u = _centered(x, rough_mean, mask, layout, keep)
    # What the rounding of the rough mean left over is small, and its own mean exact enough in float32.
    residual_mean = u.sum(layout.reduced) / count
    var = (_sum_of_squares(u, layout, keep) / count - residual_mean.square()).clamp_min(0)
    return rough_mean.to(mean_dtype) + residual_mean, var + one_if_empty


def _centered(x: Tensor, mean: Tensor, mask: Mask, layout: Layout, keep: bool) -> Tensor:
    u = x - layout.broadcast_to_input(mean)
    return u * mask.weights if keep else u.mul_(mask.weights)


def _sum_of_squares(u: Tensor, layout: Layout, keep: bool) -> Tensor:
    """Sum of u * u per (sample, channel); u is overwritten unless ``keep``."""
    return (u * u if keep else u.mul_(u)).sum(layout.reduced)


def _combine(
    dy: Tensor,
    scale: Tensor,
    x: Tensor,
    mean: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    mask: Mask,
    layout: Layout,
) -> Tensor:
    """Return dx of the equation above, given a dy with zeros for padding, which may be overwritten."""
    small = x.dtype == torch.float32 == mean.dtype and layout.size > 1 and eager.may_read_back(x)
    if small and dmean is not None and dvar is not None and not eager.is_recording(dy, dmean, dvar):
        # The mean is small: x need not be centered, and is 0 where it is padding.
        count = mask.count.clamp_min(1)
        slope = dvar * (2 / count)
        offset, slope, scale = (t.to(dy.dtype) for t in (dmean / count - slope * mean, slope, scale))
        scale, slope, offset = (layout.broadcast_to_input(t) for t in (scale, slope, offset))
        return dy.mul_(scale).addcmul_(x, slope).addcmul_(mask.weights, offset)
    dtype = at_least_float32(x.dtype)
    out, x, dy = x.dtype, x.to(dtype), dy.to(dtype)
    scale, count = layout.broadcast_to_input(scale.to(dtype)), mask.count.clamp_min(1).to(dtype)
    offset = torch.zeros_like(mean, dtype=dtype) if dmean is None else dmean.to(dtype) / count
    if dvar is None or not layout.reduced:
        return torch.addcmul(layout.broadcast_to_input(offset) * mask.weights, dy, scale).to(out)
    slope, pivot = dvar.to(dtype) * (2 / count), mean.to(dtype)
    if pivot.dtype != mean.dtype:
        offset = offset + slope * (pivot - mean).to(dtype)
    u = x - layout.broadcast_to_input(pivot)
    slope, offset = layout.broadcast_to_input(slope), layout.broadcast_to_input(offset)
    if eager.is_recording(dy, dmean, dvar):
        return torch.addcmul(torch.addcmul(offset, u, slope) * mask.weights, dy, scale).to(out)
    return u.mul_(slope).add_(offset).mul_(mask.weights).addcmul_(dy, scale).to(out)


class _MaskedMoments(torch.autograd.Function):
    """First node: x -> (x_alias, mean, var, scale_carrier); its backward writes dx."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        zeroed: Tensor,
        valid: Tensor,
        weights: Tensor,
        count: Tensor,
        layout: Layout,
        scratch: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var = masked_moments(zeroed, Mask(valid, weights, count), layout, scratch=scratch)
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(zeroed, mean, valid, weights, count)
        return x.view_as(x), mean, var, torch.zeros_like(mean)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dmean, dvar, scale = grads
        x, mean, *mask = ctx.saved_tensors
        if dy is None or scale is None:
            dy, scale = torch.zeros_like(x), torch.zeros_like(mean)
        dx = _combine(dy, scale, x, mean, dmean, dvar, Mask(*mask), ctx.layout)
        return dx, None, None, None, None, None, None


class _MaskedApply(torch.autograd.Function):
    """Second node: y = m (scale * (x - center) + shift), of an x with zeros for padding."""

    @staticmethod
    def forward(
        ctx: Any,
        x_alias: Tensor,
        scale_carrier: Tensor,
        x: Tensor,
        center: Tensor,
        scale: Tensor,
        shift: Tensor,
        valid: Tensor,
        weights: Tensor,
        count: Tensor,
        layout: Layout,
        mean_is_small: bool,
        scratch: list[Tensor],
    ) -> Tensor:
        ctx.how = Passes(layout, mean_is_small=mean_is_small)
        ctx.carrier_dtype, ctx.shift_like = scale_carrier.dtype, (shift.shape, shift.dtype)
        ctx.save_for_backward(x, center, scale, valid, weights, count)
        if scratch:
            scale = scale.to(x.dtype)
            # In the memory that the moments have left; the mean is small, so scale * x + offset loses no digit.
            offset = torch.addcmul(shift, scale, center, value=-1).to(x.dtype)
            y = torch.mul(x, layout.broadcast_to_input(scale), out=scratch.pop())
            y.add_(layout.broadcast_to_input(offset))
        else:
            y = eager.apply(x, center, scale, shift, layout, mean_is_small)
        # Padding, which is 0 in x, is finite in y where these are: then a product does, in place.
        if eager.may_read_back(x) and bool((shift - scale * center).isfinite().all()):
            return y.mul_(weights.to(y.dtype))
        return torch.where(valid, y, y.new_zeros(()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, center, scale, *mask = ctx.saved_tensors
        need, dy = ctx.needs_input_grad, Mask(*mask).zeroed(grads[0])
        fields = field_gradients(ctx, eager, dy, x, center, scale) if any(need[3:6]) else (None, None, None)
        return dy if need[0] else None, carrier_grad(ctx, scale), None, *fields, None, None, None, None, None, None

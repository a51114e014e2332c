"""normalize(x, algebra) where some positions are padding: neither read by a statistic nor changed by one.

With m = 1 where a position of x counts and 0 where it is padding, and n the positions that count in a sample,

    mean = sum(m x) / n,    var = sum(m (x - mean)^2) / n,    y = m (scale * (x - center) + shift)
    dx = m (scale * dy + dmean / n + (2 * dvar / n) * (x - mean))

A sample without any position has the mean 0, the variance 1 and the count 0, with which it weighs nothing where samples
are pooled. The two autograd nodes are those of :mod:`lightning_norm.ops.normalize`, and exchange gradients as they do;
both put zeros for padding before anything is summed, so that a NaN in it is gone. The passes are plain PyTorch: the
kernels know one count for all samples. In eager CPU code they make no more tensors of the size of x than those without
a mask, for memory that was never touched costs more than a pass over it: x itself is kept and not its copy with zeros,
and one pass over it tells whether a product with 0 will do.
"""

from __future__ import annotations

import math
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


@dataclass
class Bound:
    """The largest absolute value of x, padding included; infinite where it is not known, or x holds a NaN."""

    value: float = math.inf

    def look(self, x: Tensor) -> None:
        """Read x, in eager CPU code and in a dtype that the statistics have as well."""
        if eager.may_read_back(x) and not eager.is_recording() and x.dtype == at_least_float32(x.dtype):
            # Both at once: one reading of x, and no tensor of absolute values.
            low, high = torch.aminmax(x)
            value = max(-float(low), float(high))
            self.value = value if value == value else math.inf

    def allows(self, x: Tensor, factor: Tensor, term: Tensor) -> bool:
        """Tell whether factor * x + term is finite everywhere, so that a product with 0 is 0."""
        if not math.isfinite(self.value):
            return False
        # A bound of each product and of the sum, and not their values: x is not read again.
        largest = [float(torch.linalg.vector_norm(t, math.inf)) for t in (factor, term)]
        return largest[0] * self.value + largest[1] < torch.finfo(x.dtype).max  # and not for a NaN


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
    count = weights.flatten(1).sum(1, keepdim=True, dtype=stat_dtype(x))
    # Along an axis on which it has size 1, an entry of the mask is that of all positions.
    times = layout.size * valid.shape[0] // max(valid.numel(), 1)
    return Mask(valid, weights, count if times == 1 else count * times)


def run_masked(x: Tensor, call: Call, mask: Mask) -> Tensor:
    """Do what :func:`lightning_norm.ops.normalize.run` does, by the positions that count; y is 0 elsewhere.

    The residual is added to that and the activation follows.

    Args:
        x: the input.
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
        y = _normalize_masked(x, call, mask) if call.depthwise_conv is None else _convolved(x, call, mask)
    return activated(y, call.activation, call.residual)


def _convolved(x: Tensor, call: Call, mask: Mask) -> Tensor:
    """Return the depthwise convolution of the normalized map, which sees zeros for padding as it does at a border."""
    assert call.depthwise_conv is not None
    kernel, bias = call.depthwise_conv
    kernel = depthwise.with_spatial_axes(kernel, len(call.layout.reduced)).to(at_least_float32(x.dtype))
    bias = None if bias is None else bias.to(kernel.dtype)
    # Rounded to half only after the convolution, as without a mask.
    normalized = _normalize_masked(x.to(kernel.dtype), replace(call, depthwise_conv=None), mask)
    last = call.layout.channel_dim != 1
    # A convolution takes its channels on the second axis: a view of tokens has them there.
    normalized = normalized.movedim(-1, 1) if last else normalized
    # The operator that a compiled graph has for it elsewhere knows no gradient: here the convolution is differentiated.
    recorded = torch_private.is_transformed() or torch.compiler.is_compiling()
    y = depthwise.convolve(normalized, kernel, bias, recorded=recorded)
    return mask.zeroed(y.movedim(1, -1) if last else y).to(x.dtype)


def _normalize_masked(x: Tensor, call: Call, mask: Mask) -> Tensor:
    plain = replace(call, activation="none", residual=None, fused_spec=None)
    if call.moments is not None:
        # The statistics are not those of x, so that its padding has to be kept out of y and of the gradients alone.
        return mask.zeroed(run(mask.zeroed(x), plain))
    layout = call.layout
    if torch_private.is_transformed():
        zeroed = mask.zeroed(x)
        moments = Moments(*masked_moments(zeroed, mask, layout, recorded=True), mask.count, call.ranks)
        return mask.zeroed(
            eager.apply_centered(zeroed, *call.algebra(moments).fields(layout.n, layout.c), layout, recorded=True)
        )
    tensors, bound = (mask.valid, mask.weights, mask.count), Bound()
    alias, mean, var, carrier = _MaskedMoments.apply(x, *tensors, layout, bound)
    small = x.dtype == torch.float32 == mean.dtype and layout.size > 1 and x.is_cpu
    fields = call.algebra(Moments(mean, var, mask.count, call.ranks)).fields(layout.n, layout.c)
    y: Tensor = _MaskedApply.apply(alias, carrier, x, *fields, *tensors, Passes(layout, mean_is_small=small), bound)
    return y


def masked_moments(x: Tensor, mask: Mask, layout: Layout, recorded: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the positions that count, each (N, C), of an x with zeros for padding.

    In the dtypes, and with the precision, of :func:`lightning_norm.ops.eager.moments`.

    Args:
        x: the input.
        mask: of x.
        layout: of x.
        recorded: every operation is looked at or differentiated.
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


def _moments_of_finite(x: Tensor, mask: Mask, layout: Layout) -> tuple[Tensor, Tensor] | None:
    """Return :func:`masked_moments` of an x whose padding is finite; ``None`` where the mean is not small."""
    count = mask.count.clamp_min(1).to(x.dtype)
    u = x * mask.weights
    mean = u.sum(layout.reduced) / count
    var = u.sub_(layout.broadcast_to_input(mean)).mul_(mask.weights).mul_(u).sum(layout.reduced) / count
    wide = x.dtype == stat_dtype(x)
    if wide or bool((mean.square() <= eager.SMALL_MEAN**2 * var).all()):
        return mean, var + (mask.count == 0).to(x.dtype)
    return None


def _combine(
    dy: Tensor,
    scale: Tensor,
    x: Tensor,
    mean: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    mask: Mask,
    layout: Layout,
    bound: Bound,
) -> Tensor:
    """Return dx of the equation above, given a dy with zeros for padding, which may be overwritten."""
    small = x.dtype == torch.float32 == mean.dtype and layout.size > 1 and eager.may_read_back(x)
    if small and dmean is not None and dvar is not None and not eager.is_recording(dy, dmean, dvar):
        # The mean is small: x need not be centered.
        count = mask.count.clamp_min(1)
        slope = dvar * (2 / count)
        offset, slope, scale = (t.to(dy.dtype) for t in (dmean / count - slope * mean, slope, scale))
        scale, factor, term = (layout.broadcast_to_input(t) for t in (scale, slope, offset))
        if bound.allows(x, slope, offset):
            return dy.mul_(scale).addcmul_(x, factor).add_(term).mul_(mask.weights)
        return dy.mul_(scale).addcmul_(mask.zeroed(x), factor).addcmul_(mask.weights, term)
    dtype = at_least_float32(x.dtype)
    out, x, dy = x.dtype, mask.zeroed(x).to(dtype), dy.to(dtype)
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


class _MaskedPasses:
    """The sums of :func:`lightning_norm.ops.eager.reduce` over the positions that count.

    Args:
        mask: of x.
        bound: of x.
    """

    def __init__(self, mask: Mask, bound: Bound) -> None:
        self.mask, self.bound = mask, bound
        self.zeroed_dy: Tensor | None = None

    def reduce(
        self, dy: Tensor, x: Tensor, pivot: Tensor, layout: Layout, mean_is_small: bool
    ) -> tuple[Tensor, Tensor]:
        """Return both sums, each (N, C), and keep a dy with zeros for padding."""
        if math.isfinite(self.bound.value) and not eager.is_recording(dy):
            product = dy * self.mask.weights
            total, dot = eager.reduce(product, x, pivot, layout, mean_is_small)
            # A NaN or an infinity in the padding of dy is one in its sum.
            if math.isfinite(torch.linalg.vector_norm(total, math.inf)):
                self.zeroed_dy = product
                return total, dot
        self.zeroed_dy = self.mask.zeroed(dy)
        return eager.reduce(self.zeroed_dy, self.mask.zeroed(x), pivot, layout, mean_is_small)


class _MaskedMoments(torch.autograd.Function):
    """First node: x -> (x_alias, mean, var, scale_carrier); its backward writes dx."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, valid: Tensor, weights: Tensor, count: Tensor, layout: Layout, bound: Bound
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mask = Mask(valid, weights, count)
        bound.look(x)
        moments = _moments_of_finite(x, mask, layout) if math.isfinite(bound.value) and layout.reduced else None
        mean, var = masked_moments(mask.zeroed(x), mask, layout) if moments is None else moments
        ctx.layout, ctx.bound = layout, bound
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, valid, weights, count)
        return x.view_as(x), mean, var, torch.zeros_like(mean)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dmean, dvar, scale = grads
        x, mean, *mask = ctx.saved_tensors
        if dy is None or scale is None:
            dy, scale = torch.zeros_like(x), torch.zeros_like(mean)
        dx = _combine(dy, scale, x, mean, dmean, dvar, Mask(*mask), ctx.layout, ctx.bound)
        return dx, None, None, None, None, None


class _MaskedApply(torch.autograd.Function):
    """Second node: y = m (scale * (x - center) + shift). The dy that it sends on is 0 where x is padding."""

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
        how: Passes,
        bound: Bound,
    ) -> Tensor:
        ctx.how, ctx.bound = how, bound
        ctx.carrier_dtype, ctx.shift_like = scale_carrier.dtype, (shift.shape, shift.dtype)
        ctx.save_for_backward(x, center, scale, valid, weights, count)
        y = eager.apply(x, center, scale, shift, how.layout, how.mean_is_small)
        if bound.allows(x, scale, shift - scale * center):
            return y.mul_(weights.to(y.dtype))
        return torch.where(valid, y, y.new_zeros(()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, center, scale, *tensors = ctx.saved_tensors
        mask, need = Mask(*tensors), ctx.needs_input_grad
        passes = _MaskedPasses(mask, ctx.bound)
        fields = field_gradients(ctx, passes, dy, x, center, scale) if any(need[3:6]) else (None, None, None)
        zeroed = mask.zeroed(dy) if passes.zeroed_dy is None else passes.zeroed_dy
        return zeroed if need[0] else None, carrier_grad(ctx, scale), None, *fields, *(None,) * 5

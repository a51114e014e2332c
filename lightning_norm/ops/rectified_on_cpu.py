"""Rectified batch normalization on the CPU: one autograd function, whose backward pass is written out.

With k the mean of a sample and channel, mu and V those of k (1 + w_m) over the batch, r = 1 / sqrt(V + eps), and the
gates g = sigmoid(w_v r f + w_b) and h = sigmoid(w_a k + b_a), each times a constant,

    f = (1 + w_m) k - mu; s = gamma g h r; y = s (x - k + f) + beta

Left to autograd that is a hundred operations on (N, C) numbers, and of (N, C) inputs more than ten tensors of the size
of x are kept. ``_plainly`` says the same in operations that autograd records, for what is differentiated once more. As
in :mod:`lightning_norm.ops.mixture_on_cpu`, all is in float64 where a mean is large.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_norm.ops import eager
from lightning_norm.ops.layout import Layout, cast
from lightning_norm.ops.mixture_on_cpu import applied, combined, pooled, sums
from lightning_norm.ops.moments import Moments

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rectified:
    """What is computed at one input.

    Args:
        layout: of x.
        eps: inside the root.
        factor: what the gates are multiplied with.
        track: is called with mean and variance of each sample and channel, the variance ``None`` where it is 0, and
            those of the batch, (1, C); where it returns false, the batch is not what normalizes x.
    """

    layout: Layout
    eps: float
    factor: float
    track: Callable[[Tensor, Tensor | None, Pair], bool] | None = None


class Parameters(NamedTuple):
    """Gamma, beta, w_m, w_v, w_b, w_a and b_a, (C,); ``None`` for what a layer does not have."""

    weight: Tensor | None
    bias: Tensor | None
    center_weight: Tensor | None
    scale_weight: Tensor | None
    scale_bias: Tensor | None
    affine_weight: Tensor | None
    affine_bias: Tensor | None


def normalize(x: Tensor, how: Rectified, parameters: Parameters) -> Tensor | None:
    """Return y; ``None`` where other statistics than the batch's are to normalize x."""
    with torch.no_grad():
        measured = _measured(x.detach(), how.layout, parameters.center_weight)
        if how.track is not None and not how.track(*measured):
            return None
    y: Tensor = _Rectified.apply(x, how, measured, *parameters)
    return y


class _Rectified(torch.autograd.Function):
    """y from x and its statistics, and all gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, how: Rectified, measured: tuple[Tensor, Tensor | None, Pair], *tensors: Tensor | None
    ) -> Tensor:
        p, layout, (mean, var, batch) = Parameters(*tensors), how.layout, measured
        equations = _Equations(how, p, mean, batch)
        ctx.how = how
        # Of one element the mean is the element itself: nothing of the size of x is kept beside x.
        kept = (None,) if var is None else (mean, *equations.known)
        ctx.save_for_backward(x, *p, *batch, *kept)
        lag = equations.far - mean
        offset = equations.scale * lag if p.bias is None else torch.addcmul(p.bias, equations.scale, lag)
        return applied(x, mean, equations.scale, offset, layout, var is None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        how, (dy,), need = ctx.how, grads, ctx.needs_input_grad
        x, *tensors = ctx.saved_tensors
        p, batch, (mean, *known) = Parameters(*tensors[:7]), tensors[7:9], tensors[9:]
        if eager.is_recording(dy):
            found = eager.recorded_gradients(functools.partial(_plainly, how), (x, *p), dy, (need[0], *need[3:]))
            return found[0], None, None, *found[1:]
        layout = how.layout
        if flat := mean is None:
            mean = cast(x.view(layout.n, layout.c), batch[0].dtype)
        equations = _Equations(how, p, mean, batch, known)
        total, dot = sums(dy, x, mean, layout, flat)
        slope, offset, of_parameters = equations.gradients(total, dot)
        dx = combined(dy, x, mean, equations.scale, slope, offset, layout, flat) if need[0] else None
        of_parameters = [
            None if given is None or t is None else cast(t, given.dtype)
            for given, t in zip(p, of_parameters, strict=True)
        ]
        return dx, None, None, *of_parameters


def _measured(x: Tensor, layout: Layout, w: Tensor | None) -> tuple[Tensor, Tensor | None, Pair]:
    """Return mean and variance of each (sample, channel), and those of the centered x over the batch.

    The variance is ``None`` where a mean is one element. All of them are in float64 where a mean is large.
    """
    mean, var = (x.view(layout.n, layout.c), None) if layout.size == 1 else eager.moments(x, layout)
    if var is not None:
        var = cast(var, mean.dtype)
    batch = pooled(_centered(mean, w), var, 0)
    # Of one element normalization undoes centering, whose weight has a gradient of what eps leaves over.
    if var is None and x.dtype == torch.float32 and (w is not None or not eager.is_small(*batch)):
        return _measured(x.double(), layout, w)
    return mean, var, batch


def _centered(mean: Tensor, w: Tensor | None) -> Tensor:
    return mean if w is None else torch.addcmul(mean, mean, w)


class _Equations:
    """The equations of one input, on (N, C) numbers, and their adjoints.

    Args:
        how: what is computed.
        p: the parameters.
        mean: of each sample and channel.
        batch: mean and variance of the centered x.
        known: what an earlier call has kept.
    """

    def __init__(
        self, how: Rectified, p: Parameters, mean: Tensor, batch: Pair, known: list[Tensor] | tuple[Tensor, ...] = ()
    ) -> None:
        self.how, self.p, self.mean = how, p, mean
        # What belongs to whole channels is few numbers, and is rounded once.
        root = (batch[1].double() + how.eps).rsqrt_()
        base = root * how.factor
        self.root, weighted = cast(root, mean.dtype), base if p.weight is None else base * p.weight
        if not known:
            far = _centered(mean, p.center_weight) - batch[0]
            gates = []
            if p.scale_weight is not None and p.scale_bias is not None:
                gates.append(torch.addcmul(p.scale_bias, far, self.root * p.scale_weight).sigmoid_())
            if p.affine_weight is not None and p.affine_bias is not None:
                gates.append(torch.addcmul(p.affine_bias, mean, p.affine_weight).sigmoid_())
            known = far, *gates
        self.known = self.far, *self.gates = known
        self.gain = self.gates[0] * self.gates[1] if len(self.gates) > 1 else self.gates[0] if self.gates else None
        self.base, self.scale = (cast(t, mean.dtype) for t in (base, weighted))
        if self.gain is not None:
            self.scale = self.scale * self.gain

    def gradients(self, total: Tensor, dot: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Return slope and offset of what reaches x through its statistics, and the gradients of all parameters.

        Args:
            total: the sum of dy per sample and channel.
            dot: that of dy * x.
        """
        p, layout, root, mean, far = self.p, self.how.layout, self.root, self.mean, self.far
        at_scale = torch.addcmul(dot, far - mean, total)  # sum of dy (x - k + f), the gradient of the scale
        dweight = ((at_scale if self.gain is None else at_scale * self.gain) * self.base).sum(0)
        # The gradients of the logarithms of the scale and of r.
        at_log = at_scale.mul_(self.scale)
        at_root = at_log.sum(0, keepdim=True)
        at_lag = self.scale * total
        gates, found = list(self.gates), Parameters(dweight, total.sum(0), *[None] * 5)
        # y = s (x - k + f): what f gets, the mean k gets with the other sign.
        dfar, dmean = at_lag, at_lag.neg()
        if p.scale_weight is not None:
            at_gate = torch.addcmul(at_log, at_log, gates.pop(0), value=-1)
            slope = root * p.scale_weight
            dslope = (at_gate * far).sum(0, keepdim=True)
            at_root = torch.addcmul(at_root, slope, dslope)
            dfar = torch.addcmul(at_lag, at_gate, slope)
            found = found._replace(scale_weight=(dslope * root).view(-1), scale_bias=at_gate.sum(0))
        if p.affine_weight is not None:
            at_gate = torch.addcmul(at_log, at_log, gates.pop(), value=-1)
            dmean.addcmul_(at_gate, p.affine_weight)
            found = found._replace(affine_weight=(at_gate * mean).sum(0), affine_bias=at_gate.sum(0))
        # 2 dL/dV, over the samples.
        of_var = at_root.mul_(root).mul_(root).mul_(-1 / layout.n)
        # Through the batch's mean and variance, as in batch normalization of N numbers for each channel.
        dcentered = (dfar - dfar.mean(0, keepdim=True)).addcmul_(far, of_var)
        dmean += dcentered
        if p.center_weight is not None:
            dmean.addcmul_(dcentered, p.center_weight)
            found = found._replace(center_weight=(dcentered * mean).sum(0))
        # A map of one element is its own mean: all that it gets is constant, and has no slope.
        if layout.size == 1:
            return of_var.zero_(), dmean, list(found)
        slope = of_var.mul_(1 / layout.size)
        return slope, dmean.mul_(1 / layout.size).addcmul_(mean, slope, value=-1), list(found)


def _plainly(how: Rectified, x: Tensor, *tensors: Tensor | None) -> Tensor:
    """Return y in plain differentiable PyTorch."""
    p, layout = Parameters(*tensors), how.layout
    m = Moments(*eager.moments(x, layout, recorded=True), layout.size)
    centered = m.mean if p.center_weight is None else m.mean * (1 + p.center_weight)
    batch = Moments(centered, m.var, m.count).over_batch()
    far, root = centered - batch.mean, (batch.var + how.eps).rsqrt()
    scale = root * how.factor
    if p.scale_weight is not None and p.scale_bias is not None:
        scale = scale * (p.scale_bias + p.scale_weight * root * far).sigmoid()
    if p.affine_weight is not None and p.affine_bias is not None:
        scale = scale * (p.affine_bias + p.affine_weight * m.mean).sigmoid()
    scale = scale if p.weight is None else scale * p.weight
    shift = scale * far if p.bias is None else torch.addcmul(p.bias, scale, far)
    return eager.apply_centered(x, m.mean, scale, shift, layout, recorded=True)

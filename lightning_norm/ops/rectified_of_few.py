"""What :mod:`lightning_norm.ops.rectified_on_cpu` says, for so few samples and channels that operations cost the most.

The (N, C) numbers are NumPy's, and sums over samples are products with vectors: see
:mod:`lightning_norm.ops.mixture_of_few`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_norm.ops import eager
from lightning_norm.ops import rectified_on_cpu as many
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.mixture_of_few import Pair, arrays_of, pooled
from lightning_norm.ops.mixture_on_cpu import applied, combined, sums
from lightning_norm.ops.vectors import Array, array_of, is_small, quiet, tensor_of


def normalize(x: Tensor, how: many.Rectified, parameters: many.Parameters) -> Tensor | None:
    """Return what :func:`rectified_on_cpu.normalize` does."""
    layout, w = how.layout, parameters.center_weight
    with quiet(), torch.no_grad():
        own, var = (x.detach(), None) if layout.size == 1 else eager.moments(x.detach(), layout)
        mean, variances = arrays_of(own, var, layout)
        exact = mean.astype(np.float64, copy=False)
        batch = pooled(exact if w is None else exact * (1 + array_of(w).astype(np.float64)), variances, 0)
        # Of one element normalization undoes centering, whose weight has a gradient of what eps leaves over.
        if var is None and (w is not None or not is_small(*batch)):
            mean = exact
        if how.track is not None and not how.track(own.view(mean.shape), var, batch):
            return None
    y: Tensor = _Rectified.apply(x, how, (own, var, mean, batch), *parameters)
    return y


class _Rectified(torch.autograd.Function):
    """y from x and its statistics, and all gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, how: many.Rectified, measured: tuple[Tensor, Tensor | None, Array, Pair], *tensors: Any
    ) -> Tensor:
        own, var, mean, batch = measured
        with quiet():
            # Numbers of channels: next to nothing beside x.
            ctx.equations = equations = _Equations(how, tensors, batch, mean.dtype)
            # Of one element the mean is the element itself: nothing of the size of x is kept beside x.
            ctx.save_for_backward(x, *tensors, None if var is None else own)
            far, scale, _ = equations.numbers(mean)
            y = scale * far
            if var is not None:
                y -= scale * mean
            if equations.p.bias is not None:
                y += equations.p.bias
            if var is None:
                return tensor_of(y, x.dtype).view(x.shape).data
            return applied(x, own, torch.from_numpy(scale), torch.from_numpy(y), how.layout, flat=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        equations, (dy,), need = ctx.equations, grads, ctx.needs_input_grad
        x, *tensors, own = ctx.saved_tensors
        layout: Layout = equations.how.layout
        if eager.is_recording(dy):
            plainly = functools.partial(many.plainly, equations.how)
            found = eager.recorded_gradients(plainly, (x, *tensors), dy, (need[0], *need[3:]))
            return found[0], None, None, *found[1:]
        with quiet():
            mean = arrays_of(x if own is None else own, None, layout)[0].astype(equations.dtype, copy=False)
            if own is None:
                total, dot = array_of(dy).reshape(mean.shape).astype(mean.dtype, copy=False), None
            else:
                total, dot = (t.numpy() for t in sums(dy, x, own, layout, flat=False))
            scale, at_lag, dmean, slope, of_parameters = equations.gradients(mean, total, dot)
            dx = None
            if need[0] and own is None:
                dx = tensor_of(dmean, x.dtype).view(x.shape)
            elif need[0]:
                dmean -= at_lag
                dmean *= 1 / layout.size
                dmean -= mean * slope
                fields = [torch.from_numpy(t) for t in (scale, slope, dmean)]
                dx = combined(dy, x, own, fields[0], fields[1], fields[2], layout, flat=False)
            gradients = [
                tensor_of(t, x.dtype) if needed and t is not None else None
                for needed, t in zip(need[3:], of_parameters, strict=True)
            ]
        return dx, None, None, *gradients


class _Parameters(NamedTuple):
    """As :class:`rectified_on_cpu.Parameters`, or their gradients."""

    weight: Array | None
    bias: Array | None
    center_weight: Array | None = None
    scale_weight: Array | None = None
    scale_bias: Array | None = None
    affine_weight: Array | None = None
    affine_bias: Array | None = None


class _Equations:
    """The equations of one input and their adjoints; what is kept of them for the backward pass is (C,).

    Args:
        how: what is computed.
        parameters: as in :class:`rectified_on_cpu.Parameters`.
        batch: mean and variance of the centered x, (C,) in float64.
        dtype: of all (N, C) numbers.
    """

    def __init__(self, how: many.Rectified, parameters: Any, batch: Pair, dtype: Any) -> None:
        self.how, self.dtype = how, dtype
        self.p = p = _Parameters(*[None if t is None else array_of(t) for t in parameters])
        # What belongs to whole channels is few numbers, and is rounded once.
        self.root = 1 / np.sqrt(batch[1] + how.eps)
        self.base = self.root * how.factor
        self.weighted = (self.base if p.weight is None else self.base * p.weight).astype(dtype)
        self.mean = batch[0].astype(dtype)
        self.centering = None if p.center_weight is None else np.add(p.center_weight, 1, dtype=np.float64).astype(dtype)
        self.slope = None if p.scale_weight is None else (self.root * p.scale_weight).astype(dtype)
        self.affine = None if p.affine_weight is None else p.affine_weight.astype(dtype)

    def numbers(self, mean: Array) -> tuple[Array, Array, list[Array]]:
        """Return f, the scale and the gates, given the mean of each sample and channel."""
        far = mean - self.mean if self.centering is None else mean * self.centering
        if self.centering is not None:
            far -= self.mean
        gates: list[Array] = []
        if self.slope is not None:
            gates.append(_sigmoid(far * self.slope, self.p.scale_bias))
        if self.affine is not None:
            gates.append(_sigmoid(mean * self.affine, self.p.affine_bias))
        scale = np.ones_like(mean) if not gates else gates[0] * gates[1] if gates[1:] else gates[0].copy()
        scale *= self.weighted
        return far, scale, gates

    def gradients(
        self, mean: Array, total: Array, dot: Array | None
    ) -> tuple[Array, Array, Array, Array, tuple[Array | None, ...]]:
        """Return the scale, the gradient of f, that of the means, the slope by which x gets more, those of parameters.

        Args:
            mean: of each sample and channel.
            total: the sum of dy per sample and channel.
            dot: that of dy * x; ``None`` where x is the mean. The gradient of the means is that of x then; it lacks
                what they get as a part of ``x - mean``, that of f with the other sign.
        """
        n, size, (far, scale, gates) = len(mean), self.how.layout.size, self.numbers(mean)
        rows = np.ones(n, mean.dtype)
        # The sum of dy (x - k + f), the gradient of the scale.
        at_scale = far * total if dot is None else dot + (far - mean) * total
        gain = gates[0] * gates[1] if gates[1:] else gates[0] if gates else None
        found = _Parameters(rows.dot(at_scale if gain is None else at_scale * gain) * self.base, rows.dot(total))
        # The gradients of the logarithms of the scale and of r; y = s (x - k + f).
        at_log, at_lag = np.multiply(at_scale, scale, out=at_scale), scale * total
        at_root = rows.dot(at_log).astype(np.float64)
        dfar, dmean = at_lag.copy(), None
        if self.slope is not None:
            at_gate = at_log - at_log * gates[0]
            dslope = rows.dot(at_gate * far)
            at_root += self.slope * dslope
            dfar += at_gate * self.slope
            found = found._replace(scale_weight=dslope * self.root, scale_bias=rows.dot(at_gate))
        if self.affine is not None:
            at_gate = at_log - at_log * gates[-1]
            dmean = at_gate * self.affine
            found = found._replace(affine_weight=rows.dot(at_gate * mean), affine_bias=rows.dot(at_gate))
        # 2 dL/dV, over the samples: through the batch's mean and variance, as in batch normalization of N numbers.
        of_var = at_root * self.root**2 * (-1 / n)
        dfar -= rows.dot(dfar) * (1 / n)
        dfar += far * of_var.astype(mean.dtype)
        if self.centering is not None:
            found = found._replace(center_weight=rows.dot(dfar * mean))
            dfar *= self.centering
        dmean = dfar if dmean is None else np.add(dmean, dfar, out=dmean)
        return scale, at_lag, dmean, (of_var * (1 / size)).astype(mean.dtype)[None], found


def _sigmoid(t: Array, bias: Array | None) -> Array:
    """Return sigmoid(t + bias), in place: torch has vector code for it."""
    if bias is not None:
        t += bias
    torch.from_numpy(t).sigmoid_()
    return t

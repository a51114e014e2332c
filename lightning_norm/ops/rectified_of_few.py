"""What :mod:`lightning_norm.ops.rectified_on_cpu` says of (N, C) inputs, so small that operations cost the most.

All numbers are NumPy's, and sums over samples are products with vectors: see :mod:`lightning_norm.ops.mixture_of_few`.
With x its own mean, y = s f + beta.
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
from lightning_norm.ops.mixture_of_few import Pair, pooled
from lightning_norm.ops.vectors import FEW, Array, array_of, is_small, quiet, sums_along, tensor_of

MOST = 4 * FEW
"""Elements of x up to which this is faster."""


def normalize(x: Tensor, how: many.Rectified, parameters: many.Parameters) -> Tensor | None:
    """Return what :func:`rectified_on_cpu.normalize` does."""
    layout, w = how.layout, parameters.center_weight
    with quiet():
        numbers = array_of(x).reshape(layout.n, layout.c)
        exact = numbers.astype(np.float64, copy=False)
        batch = pooled(exact if w is None else exact * np.add(array_of(w), 1, dtype=np.float64), 0)
        if how.track is not None and not how.track(x.detach().view(layout.n, layout.c), None, batch):
            return None
        # Normalization undoes centering, whose weight has a gradient of what eps leaves over.
        wide = w is not None or not is_small(*batch)
    y: Tensor = _Rectified.apply(x, how, batch, exact if wide else numbers, *parameters)
    return y


class _Rectified(torch.autograd.Function):
    """y from x and its statistics, and all gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: many.Rectified, batch: Pair, numbers: Array, *tensors: Any) -> Tensor:
        with quiet():
            # Numbers of channels: next to nothing beside x.
            ctx.equations = equations = _Equations(how, tensors, batch, numbers.dtype)
            ctx.save_for_backward(x, *tensors)
            far, scale, _ = equations.numbers(numbers)
            far *= scale
            if equations.p.bias is not None:
                far += equations.p.bias
            return tensor_of(far, x.dtype).view(x.shape).data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        equations, (dy,), need = ctx.equations, grads, ctx.needs_input_grad
        x, *tensors = ctx.saved_tensors
        if eager.is_recording(dy):
            plainly = functools.partial(many.plainly, equations.how)
            found = eager.recorded_gradients(plainly, (x, *tensors), dy, (need[0], *need[4:]))
            return found[0], None, None, None, *found[1:]
        layout: Layout = equations.how.layout
        with quiet():
            numbers, of_y = (
                array_of(t).reshape(layout.n, layout.c).astype(equations.dtype, copy=False) for t in (x, dy)
            )
            dx, of_parameters = equations.gradients(numbers, of_y)
            gradients = [
                tensor_of(t, x.dtype) if needed and t is not None else None
                for needed, t in zip(need[4:], of_parameters, strict=True)
            ]
            return tensor_of(dx, x.dtype).view(x.shape) if need[0] else None, None, None, None, *gradients


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

    def numbers(self, x: Array) -> tuple[Array, Array, list[Array]]:
        """Return f, the scale and the gates."""
        far = x - self.mean if self.centering is None else x * self.centering
        if self.centering is not None:
            far -= self.mean
        gates: list[Array] = []
        if self.slope is not None:
            gates.append(_sigmoid(far * self.slope, self.p.scale_bias))
        if self.affine is not None:
            gates.append(_sigmoid(x * self.affine, self.p.affine_bias))
        scale = np.ones_like(x) if not gates else gates[0] * gates[1] if gates[1:] else gates[0].copy()
        scale *= self.weighted
        return far, scale, gates

    def gradients(self, x: Array, dy: Array) -> tuple[Array, tuple[Array | None, ...]]:
        """Return the gradients of x and of the parameters."""
        far, scale, gates = self.numbers(x)
        # The gradient of the scale.
        at_scale = far * dy
        gain = gates[0] * gates[1] if gates[1:] else gates[0] if gates else None
        dweight = sums_along(at_scale if gain is None else at_scale * gain, 0) * self.base
        found = _Parameters(dweight, sums_along(dy, 0))
        # The gradients of the logarithms of the scale and of r.
        at_log, dfar = np.multiply(at_scale, scale, out=at_scale), scale * dy
        at_root, dx = sums_along(at_log, 0).astype(np.float64), None
        if self.slope is not None:
            at_gate = at_log - at_log * gates[0]
            dslope = sums_along(at_gate * far, 0)
            at_root += self.slope * dslope
            dfar += at_gate * self.slope
            found = found._replace(scale_weight=dslope * self.root, scale_bias=sums_along(at_gate, 0))
        if self.affine is not None:
            at_gate = at_log - at_log * gates[-1]
            dx = at_gate * self.affine
            found = found._replace(affine_weight=sums_along(at_gate * x, 0), affine_bias=sums_along(at_gate, 0))
        # Through the batch's mean and variance: 2 dL/dV is -r^2 / N times the gradient of the logarithm of r.
        dfar -= sums_along(dfar, 0) * (1 / len(x))
        dfar += far * (at_root * self.root**2 * (-1 / len(x))).astype(x.dtype)
        if self.centering is not None:
            found = found._replace(center_weight=sums_along(dfar * x, 0))
            dfar *= self.centering
        return dfar if dx is None else np.add(dx, dfar, out=dx), found


def _sigmoid(t: Array, bias: Array | None) -> Array:
    """Return sigmoid(t + bias), in place: torch has vector code for it."""
    if bias is not None:
        t += bias
    torch.from_numpy(t).sigmoid_()
    return t

"""What :mod:`lightning_norm.ops.mixture_on_cpu` says of (N, C) inputs, so small that operations cost the most.

All numbers are NumPy's, and sums over samples or channels are products with vectors. Maps take as long by either.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_norm.ops import eager
from lightning_norm.ops import mixture_on_cpu as many
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.vectors import FEW, Array, array_of, is_small, quiet, sums_along, tensor_of

Pair = tuple[Array, Array]
"""Mean and variance, of each channel (C,) or of each sample (N,), in float64; or slope and offset of them."""


def takes(layout: Layout, most: int = FEW) -> bool:
    """Tell whether an input is flat and has no more elements than ``most``."""
    return layout.size == 1 and layout.n * layout.c <= most and layout.c <= FEW


def normalize(
    x: Tensor,
    how: many.Mixture,
    weight: Tensor | None,
    bias: Tensor | None,
    w: Tensor | None = None,
    v: Tensor | None = None,
) -> Tensor:
    """Return what :func:`mixture_on_cpu.normalize` does."""
    y: Tensor = _Mixture.apply(x, weight, bias, w, v, how)
    return y


class _Mixture(torch.autograd.Function):
    """y from x and its statistics, and all gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        w: Tensor | None,
        v: Tensor | None,
        how: many.Mixture,
    ) -> Tensor:
        with quiet():
            numbers = array_of(x).reshape(how.layout.n, how.layout.c)
            exact = numbers.astype(np.float64, copy=False)
            batch = pooled(exact, 0) if "bn" in how.statistics else None
            layer = pooled(exact, 1) if "ln" in how.statistics else None
            if how.track is not None and batch is not None:
                how.track(*batch)
            # In float64 where a mean is large.
            small = all(is_small(*pair) for pair in (batch, layer) if pair is not None)
            equations = _equations(how, weight, w, v, numbers if small else exact, batch, layer)
            # Numbers of rows and columns: next to nothing beside x.
            ctx.how, ctx.weights, ctx.pooled, ctx.dtype = how, equations.weights, (batch, layer), equations.x.dtype
            ctx.save_for_backward(x, weight, bias, w, v)
            return tensor_of(equations.y(bias), x.dtype).view(x.shape).data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        how, (dy,), need = ctx.how, grads, ctx.needs_input_grad
        x, weight, bias, w, v = ctx.saved_tensors
        if eager.is_recording(dy):
            plainly = functools.partial(many.plainly, how)
            return (*eager.recorded_gradients(plainly, (x, weight, bias, w, v), dy, need), None)
        with quiet():
            numbers, total = (
                array_of(t).reshape(how.layout.n, how.layout.c).astype(ctx.dtype, copy=False) for t in (x, dy)
            )
            batch, layer = ctx.pooled
            equations = _equations(how, weight, w, v, numbers, batch, layer, ctx.weights)
            dgamma, dw, dv = equations.of_parameters(total)
            dx = tensor_of(equations.dx(total), x.dtype).view(x.shape) if need[0] else None
            found = zip(need[1:], (dgamma, sums_along(total, 0) if need[2] else None, dw, dv), strict=False)
            of_parameters = [tensor_of(t, x.dtype) if needed and t is not None else None for needed, t in found]
        return dx, *of_parameters, None


def pooled(x: Array, axis: int) -> Pair:
    """Return mean and variance along one axis."""
    size = x.shape[axis]
    mean = sums_along(x, axis) / size
    apart = x - (mean if axis == 0 else mean[:, None])
    apart *= apart
    return mean, sums_along(apart, axis) / size


class _Equations:
    """What both kinds of mixtures have in common.

    Args:
        how: what is mixed.
        weight: gamma, (C,).
        x: the input, (N, C), in the dtype of all such numbers.
    """

    scale: Array
    weights: Sequence[Sequence[float]] = ()
    through_batch: Pair | None = None
    """What reaches x through the statistics of the batch."""
    through_layer: Pair | None = None
    """Likewise of each sample."""

    def __init__(self, how: many.Mixture, weight: Tensor | None, x: Array) -> None:
        self.how, self.gamma, self.x = how, None if weight is None else array_of(weight), x

    def y(self, bias: Tensor | None) -> Array:
        """Return y, given beta, (C,)."""
        raise NotImplementedError

    def of_parameters(self, dy: Array) -> tuple[Array | None, ...]:
        """Return the gradients of gamma and of the mixture's parameters, given that of y."""
        raise NotImplementedError

    def dx(self, dy: Array) -> Array:
        """Return dx, after :meth:`of_parameters`."""
        dx: Array = self._spread(0) * self.x
        dx += self.scale * dy
        dx += self._spread(1)
        return dx

    def _spread(self, i: int) -> Array:
        """Return the slope, or for 1 the offset, of all statistics."""
        batch, layer = self.through_batch, self.through_layer
        row, column = None if batch is None else self.row(batch[i]), None if layer is None else self.column(layer[i])
        found = column if row is None else row if column is None else row + column
        assert found is not None
        return found

    def row(self, t: Array) -> Array:
        """Return numbers of each channel, (1, C)."""
        return t.astype(self.x.dtype)[None]

    def column(self, t: Array) -> Array:
        """Return numbers of each sample, (N, 1)."""
        return t.astype(self.x.dtype)[:, None]


class _OfStatistics(_Equations):
    """Statistics are mixed.

    Args:
        how: what is mixed.
        weight: gamma, (C,).
        params: the logits of means and of variances; ``None`` for a single statistic.
        x: the input.
        batch: mean and variance of each channel.
        layer: of each sample.
        weights: those of means and of variances, where they are known.
    """

    def __init__(
        self,
        how: many.Mixture,
        weight: Tensor | None,
        params: tuple[Tensor | None, Tensor | None],
        x: Array,
        batch: Pair | None,
        layer: Pair | None,
        weights: Sequence[Sequence[float]],
    ) -> None:
        super().__init__(how, weight, x)
        self.params = params
        self.terms: dict[str, Any] = {"bn": batch, "ln": layer}
        self.weights = weights or [[1.0] if t is None else many.softmax(t, how.entries) for t in params]
        self.center, root = (self._mixed(i) for i in (0, 1))
        self.root = np.divide(1, np.sqrt(root, out=root), out=root)
        self.scale = self.root if self.gamma is None else self.root * self.gamma

    def _mixed(self, i: int) -> Array:
        """Return the mixed mean, or for 1 the mixed variance and eps; a new array."""
        mixed: Array | None = None
        for k, weight in zip(self.how.statistics, self.weights[i], strict=True):
            part: Array = self.terms[k][i] * weight
            if i and mixed is None:
                part += self.how.eps
            part = self.row(part) if k == "bn" else self.column(part)
            mixed = part if mixed is None else mixed + part
        assert mixed is not None
        return mixed

    def y(self, bias: Tensor | None) -> Array:
        """Return y, given beta, (C,)."""
        y: Array = self.x - self.center
        y *= self.scale
        if bias is not None:
            y += array_of(bias)
        return y

    def of_parameters(self, dy: Array) -> tuple[Array | None, ...]:
        """Return the gradients of gamma and of the logits."""
        at_root = self.x - self.center
        at_root *= dy
        at_root *= self.root
        # The gradient of the mixed mean, negated, and that of the mixed variance, times -2.
        f, e = self.scale * dy, self.scale * self.root * at_root
        # What a statistic gets is a sum over all elements behind it.
        self.given = {k: [sums_along(t, axis) for t in (f, e)] for k, axis in _AXES.items() if k in self.how.statistics}
        through = {k: self._through(k, i) for i, k in enumerate(self.how.statistics)}
        self.through_batch, self.through_layer = through.get("bn"), through.get("ln")
        return sums_along(at_root, 0), self._of_logits(0), self._of_logits(1)

    def _through(self, k: str, i: int) -> Pair:
        """Return slope and offset of what reaches x through one statistic."""
        (f, e), mean, count = self.given[k], self.terms[k][0], self.x.shape[_AXES[k]]
        slope = e * (-self.weights[1][i] / count)
        return slope, f * (-self.weights[0][i] / count) - slope * mean

    def _of_logits(self, i: int) -> Array | None:
        """Return the gradient of the logits of means, or for 1 of variances; 0 for entries that take no part."""
        logits, weights = self.params[i], self.weights[i]
        if logits is None:
            return None
        # Of the weights, each times its weight: a softmax needs no others.
        pairs = zip(weights, self.how.statistics, strict=True)
        given = [w * (-0.5 if i else -1.0) * self.given[k][i].dot(self.terms[k][i]) for w, k in pairs]
        inner, whole = sum(given), np.zeros(len(logits))
        for at, w, g in zip(self.how.entries, weights, given, strict=True):
            whole[at] = g - w * inner
        return whole


_AXES = {"bn": 0, "ln": 1}


class _OfOutputs(_Equations):
    """Normalized outputs of the batch and of each sample are mixed, by iota (C,)."""

    def __init__(
        self, how: many.Mixture, weight: Tensor | None, iota: Array, x: Array, batch: Pair, layer: Pair
    ) -> None:
        super().__init__(how, weight, x)
        self.iota, self.means = iota, (batch[0], layer[0])
        self.roots = [1 / np.sqrt(var + how.eps) for _, var in (batch, layer)]
        of_batch, factor = (t if self.gamma is None else t * self.gamma for t in (iota, 1 - iota))
        # y = of_batch r_b (x - mu_b) + factor r_l (x - mu_l) + beta
        self.of_batch, self.factor = of_batch * self.roots[0], self.row(factor)
        self.scale = self.column(self.roots[1]) * self.factor
        self.scale += self.row(self.of_batch)

    def y(self, bias: Tensor | None) -> Array:
        """Return y, given beta, (C,)."""
        offset = -self.of_batch * self.means[0]
        y: Array = self.scale * self.x
        y -= self.column(self.roots[1] * self.means[1]) * self.factor
        y += self.row(offset if bias is None else offset + array_of(bias))
        return y

    def of_parameters(self, dy: Array) -> tuple[Array | None, ...]:
        """Return the gradients of gamma and of iota."""
        (mean, row_mean), (root, row_root), dot, factor = self.means, self.roots, dy * self.x, self.factor[0]
        # Of dy times each normalized output, the sums over the samples and over the channels.
        total = sums_along(dy, 0)
        q = (sums_along(dot, 0) - mean * total) * root
        weights = (t.astype(dy.dtype) for t in (row_root, row_root * row_mean))
        of_dot, of_total = (sums_along(t, 0, w) for t, w in zip((dot, dy), weights, strict=True))
        q_of_rows = of_dot - of_total
        f = sums_along(dy, 1, factor)
        e = (sums_along(dot, 1, factor) - row_mean * f) * row_root**3
        n, c = dy.shape
        slope = self.of_batch * q * root * (-1 / n)
        self.through_batch = slope, self.of_batch * total * (-1 / n) - slope * mean
        slope = e * (-1 / c)
        self.through_layer = slope, f * row_root * (-1 / c) - slope * row_mean
        diota, dgamma = q - q_of_rows, self.iota * q + (1 - self.iota) * q_of_rows
        return dgamma, diota if self.gamma is None else diota * self.gamma, None


def _equations(
    how: many.Mixture,
    weight: Tensor | None,
    w: Tensor | None,
    v: Tensor | None,
    x: Array,
    batch: Pair | None,
    layer: Pair | None,
    weights: Sequence[Sequence[float]] = (),
) -> _Equations:
    if how.outputs:
        assert w is not None
        assert batch is not None
        assert layer is not None
        return _OfOutputs(how, weight, array_of(w).astype(np.float64), x, batch, layer)
    return _OfStatistics(how, weight, (w, v), x, batch, layer, weights)

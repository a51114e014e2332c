"""What :mod:`lightning_norm.ops.mixture_on_cpu` says, for so few samples and channels that operations cost most of it.

The (N, C) numbers are NumPy's, and sums over samples or channels are products with vectors.
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
from lightning_norm.ops.vectors import Array, array_of, is_small, quiet, tensor_of

FEW = 1 << 13
"""(N, C) numbers up to which this is faster. From some more on, NumPy would take threads of its own for a product."""

Pair = tuple[Array, Array]


def takes(layout: Layout) -> bool:
    """Tell whether an input has so few samples and channels."""
    return layout.n * layout.c <= FEW


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
        layout = how.layout
        with quiet():
            own, own_var = (x, None) if layout.size == 1 else eager.moments(x, layout)
            mean, var = arrays_of(own, own_var, layout)
            exact = mean.astype(np.float64, copy=False)
            batch = pooled(exact, var, 0) if "bn" in how.statistics else None
            layer = pooled(exact, var, 1) if "ln" in how.statistics else None
            if how.track is not None and batch is not None:
                how.track(*batch)
            # Of several elements ``moments`` has decided it.
            if var is None and not all(is_small(*pair) for pair in (batch, layer) if pair is not None):
                mean = exact
            equations = _equations(how, weight, w, v, (mean, var), batch, layer)
            # Numbers of rows and columns: next to nothing beside x.
            ctx.how, ctx.weights, ctx.pooled, ctx.dtype = how, equations.weights, (batch, layer), mean.dtype
            # Of one element the mean is the element itself: nothing of the size of x is kept beside x.
            ctx.save_for_backward(x, weight, bias, w, v, None if var is None else own, own_var)
            if var is None:
                return tensor_of(equations.of_flat(bias), x.dtype).view(x.shape).data
            scale, offset = (torch.from_numpy(t) for t in (equations.scale, equations.offset(bias)))
            return many.applied(x, own, scale, offset, layout, flat=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        how, (dy,), need = ctx.how, grads, ctx.needs_input_grad
        x, weight, bias, w, v, own, own_var = ctx.saved_tensors
        if eager.is_recording(dy):
            plainly = functools.partial(many.plainly, how)
            return (*eager.recorded_gradients(plainly, (x, weight, bias, w, v), dy, need), None)
        with quiet():
            mean, var = arrays_of(x if own is None else own, own_var, how.layout)
            (batch, layer), own_terms = ctx.pooled, (mean.astype(ctx.dtype, copy=False), var)
            equations = _equations(how, weight, w, v, own_terms, batch, layer, ctx.weights)
            if own is None:
                total, dot = array_of(dy).reshape(mean.shape).astype(ctx.dtype, copy=False), None
            else:
                total, dot = (t.numpy() for t in many.sums(dy, x, own, how.layout, flat=False))
            dgamma, dw, dv = equations.of_parameters(total, dot)
            dx = None
            if need[0] and own is None:
                dx = tensor_of(equations.through_flat(total), x.dtype).view(x.shape)
            elif need[0]:
                scale, slope, offset = (torch.from_numpy(t) for t in (equations.scale, *equations.through()))
                dx = many.combined(dy, x, own, scale, slope, offset, how.layout, flat=False)
            dbias = np.ones(len(total), total.dtype).dot(total) if need[2] else None
            found = zip(need[1:], (dgamma, dbias, dw, dv), strict=False)
            of_parameters = [tensor_of(t, x.dtype) if needed and t is not None else None for needed, t in found]
            return dx, *of_parameters, None


def arrays_of(mean: Tensor, var: Tensor | None, layout: Layout) -> tuple[Array, Array | None]:
    """Return mean and variance of each (sample, channel), the latter ``None`` where a mean is one element."""
    means = mean.detach().numpy().reshape(layout.n, layout.c)
    return means, None if var is None else var.numpy().astype(means.dtype, copy=False)


def pooled(mean: Array, var: Array | None, dim: int) -> Pair:
    """Return mean and variance along one axis by the law of total variance, in float64."""
    size = mean.shape[dim]
    share = np.full(size, 1 / size)
    center = share.dot(mean) if dim == 0 else mean.dot(share)
    apart = mean - (center if dim == 0 else center[:, None])
    apart *= apart
    if var is not None:
        apart += var
    return center, share.dot(apart) if dim == 0 else apart.dot(share)


class _Equations:
    """What both kinds of mixtures have in common.

    Args:
        how: what is mixed.
        weight: gamma, (C,).
        mean: of each (sample, channel), in the dtype of all (N, C) numbers.
    """

    scale: Array
    weights: Sequence[Sequence[float]] = ()
    through_batch: Pair | None = None
    """Slope and offset of what reaches x through the statistics of the batch, (C,)."""
    through_layer: Pair | None = None
    """Likewise of each sample, (N,)."""

    def __init__(self, how: many.Mixture, weight: Tensor | None, mean: Array) -> None:
        self.how, self.gamma, self.mean = how, None if weight is None else array_of(weight), mean

    def offset(self, bias: Tensor | None) -> Array:
        """Return y at x = 0, given beta, (C,)."""
        raise NotImplementedError

    def of_flat(self, bias: Tensor | None) -> Array:
        """Return y where x is the mean."""
        raise NotImplementedError

    def of_parameters(self, total: Array, dot: Array | None) -> tuple[Array | None, ...]:
        """Return the gradients of gamma and of the mixture's parameters.

        Args:
            total: the sum of dy per (sample, channel).
            dot: of dy * x; ``None`` where x is the mean.
        """
        raise NotImplementedError

    def through(self) -> Pair:
        """Return slope and offset of what reaches x through the statistics, (N, C)."""
        slope, offset = (self._spread(i) for i in (0, 1))
        return slope, offset

    def through_flat(self, total: Array) -> Array:
        """Return dx where x is the mean."""
        dx: Array = self._spread(0) * self.mean
        dx += self.scale * total
        dx += self._spread(1)
        return dx

    def _spread(self, i: int) -> Array:
        """Return the slope, or for 1 the offset, as numbers of rows and columns."""
        batch, layer = self.through_batch, self.through_layer
        row, column = None if batch is None else self.row(batch[i]), None if layer is None else self.column(layer[i])
        found = column if row is None else row if column is None else row + column
        assert found is not None
        return found

    def row(self, t: Array) -> Array:
        """Return numbers of each channel, (1, C)."""
        return t.astype(self.mean.dtype)[None]

    def column(self, t: Array) -> Array:
        """Return numbers of each sample, (N, 1)."""
        return t.astype(self.mean.dtype)[:, None]

    def ones(self, axis: int) -> Array:
        """Return the vector whose product is the sum along an axis."""
        return np.ones(self.mean.shape[axis], self.mean.dtype)

    def count(self, k: str) -> int:
        """Return the elements of x behind a statistic."""
        layout = self.how.layout
        return layout.size * {"in": 1, "bn": layout.n, "ln": layout.c}[k]


class _OfStatistics(_Equations):
    """Statistics are mixed.

    Args:
        how: what is mixed.
        weight: gamma, (C,).
        params: the logits of means and of variances; ``None`` for a single statistic.
        own: mean and variance of each (sample, channel).
        batch: of each channel.
        layer: of each sample.
        weights: those of means and of variances, where they are known.
    """

    def __init__(
        self,
        how: many.Mixture,
        weight: Tensor | None,
        params: tuple[Tensor | None, Tensor | None],
        own: tuple[Array, Array | None],
        batch: Pair | None,
        layer: Pair | None,
        weights: Sequence[Sequence[float]],
    ) -> None:
        super().__init__(how, weight, own[0])
        self.params = params
        self.terms: dict[str, Any] = {"in": own, "bn": batch, "ln": layer}
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
            part = part if k == "in" else self.row(part) if k == "bn" else self.column(part)
            mixed = part if mixed is None else mixed + part
        assert mixed is not None
        return mixed

    def offset(self, bias: Tensor | None) -> Array:
        """Return y at x = 0, given beta, (C,)."""
        product: Array = self.scale * self.center
        return -product if bias is None else array_of(bias) - product

    def of_flat(self, bias: Tensor | None) -> Array:
        """Return y where x is the mean."""
        y: Array = self.mean - self.center
        y *= self.scale
        if bias is not None:
            y += array_of(bias)
        return y

    def of_parameters(self, total: Array, dot: Array | None) -> tuple[Array | None, ...]:
        """Return the gradients of gamma and of the logits."""
        if dot is None:
            at_root = self.mean - self.center
            at_root *= total
        else:
            at_root = dot - self.center * total
        at_root *= self.root
        # The gradient of the mixed mean, negated, and that of the mixed variance, times -2.
        f, e = self.scale * total, self.scale * self.root * at_root
        rows, columns = self.ones(0), self.ones(1)
        # What a statistic gets is a sum over all elements behind it.
        self.given = {"in": (f, e)}
        if "bn" in self.how.statistics:
            self.given["bn"] = rows.dot(f), rows.dot(e)
        if "ln" in self.how.statistics:
            self.given["ln"] = f.dot(columns), e.dot(columns)
        through = {k: self._through(k, i) for i, k in enumerate(self.how.statistics) if k != "in"}
        self.through_batch, self.through_layer = through.get("bn"), through.get("ln")
        return rows.dot(at_root), self._of_logits(0), self._of_logits(1)

    def _through(self, k: str, i: int) -> Pair:
        """Return slope and offset of what reaches x through one statistic."""
        (f, e), (mean, _), count = self.given[k], self.terms[k], self.count(k)
        slope = e * (-self.weights[1][i] / count)
        return slope, f * (-self.weights[0][i] / count) - slope * mean

    def _of_logits(self, i: int) -> Array | None:
        """Return the gradient of the logits of means, or for 1 of variances; 0 for entries that take no part."""
        logits, weights = self.params[i], self.weights[i]
        if logits is None:
            return None
        # Of the weights, each times its weight: a softmax needs no others.
        pairs = zip(weights, self.how.statistics, strict=True)
        given = [w * (-0.5 if i else -1.0) * self.given[k][i].ravel().dot(self.terms[k][i].ravel()) for w, k in pairs]
        inner, whole = sum(given), np.zeros(len(logits))
        for at, w, g in zip(self.how.entries, weights, given, strict=True):
            whole[at] = g - w * inner
        return whole

    def through(self) -> Pair:
        """Return slope and offset of what reaches x through the statistics, (N, C)."""
        if "in" not in self.how.statistics:
            return super().through()
        slope, offset = self._through("in", self.how.statistics.index("in"))
        if len(self.how.statistics) > 1:
            slope += self._spread(0)
            offset += self._spread(1)
        return slope, offset


class _OfOutputs(_Equations):
    """Normalized outputs of the batch and of each sample are mixed, by iota (C,)."""

    def __init__(
        self, how: many.Mixture, weight: Tensor | None, iota: Array, mean: Array, batch: Pair, layer: Pair
    ) -> None:
        super().__init__(how, weight, mean)
        self.iota, self.means = iota, (batch[0], layer[0])
        self.roots = [1 / np.sqrt(var + how.eps) for _, var in (batch, layer)]
        of_batch, factor = (t if self.gamma is None else t * self.gamma for t in (iota, 1 - iota))
        # y = of_batch r_b (x - mu_b) + factor r_l (x - mu_l) + beta
        self.of_batch = of_batch * self.roots[0]
        self.factor = self.row(factor)
        self.scale = self.column(self.roots[1]) * self.factor
        self.scale += self.row(self.of_batch)

    def offset(self, bias: Tensor | None) -> Array:
        """Return y at x = 0, given beta, (C,)."""
        of_batch = -self.of_batch * self.means[0]
        offset: Array = self.column(self.roots[1] * -self.means[1]) * self.factor
        offset += self.row(of_batch if bias is None else of_batch + array_of(bias))
        return offset

    def of_flat(self, bias: Tensor | None) -> Array:
        """Return y where x is the mean."""
        y: Array = self.scale * self.mean
        y += self.offset(bias)
        return y

    def of_parameters(self, total: Array, dot: Array | None) -> tuple[Array | None, ...]:
        """Return the gradients of gamma and of iota."""
        dot = total * self.mean if dot is None else dot
        (mean, row_mean), (root, row_root), rows, factor = self.means, self.roots, self.ones(0), self.factor[0]
        # Of dy times each normalized output, the sums over the samples and over the channels.
        of_total = rows.dot(total)
        q = (rows.dot(dot) - mean * of_total) * root
        scaled = row_root.astype(total.dtype)
        q_of_rows = scaled.dot(dot) - (scaled * row_mean).astype(total.dtype).dot(total)
        f = total.dot(factor)
        e = (dot.dot(factor) - row_mean * f) * row_root**3
        for name, center, f_of, e_of, k in (
            ("through_batch", mean, self.of_batch * of_total, self.of_batch * q * root, "bn"),
            ("through_layer", row_mean, f * row_root, e, "ln"),
        ):
            slope = e_of * (-1 / self.count(k))
            setattr(self, name, (slope, f_of * (-1 / self.count(k)) - slope * center))
        diota = q - q_of_rows
        dgamma = self.iota * q + (1 - self.iota) * q_of_rows
        return dgamma, diota if self.gamma is None else diota * self.gamma, None


def _equations(
    how: many.Mixture,
    weight: Tensor | None,
    w: Tensor | None,
    v: Tensor | None,
    own: tuple[Array, Array | None],
    batch: Pair | None,
    layer: Pair | None,
    weights: Sequence[Sequence[float]] = (),
) -> _Equations:
    if how.outputs:
        assert w is not None
        assert batch is not None
        assert layer is not None
        return _OfOutputs(how, weight, array_of(w).astype(np.float64), own[0], batch, layer)
    return _OfStatistics(how, weight, (w, v), own, batch, layer, weights)

"""Mixtures of instance, layer and batch statistics on the CPU: one autograd function, whose backward is written out.

Left to autograd, the algebra of such a layer is a hundred small operations, which take longer than the passes over all
but large inputs, and on (N, C) inputs it keeps a dozen tensors of the size of x. Here x and the statistics are kept.
With c and V the mixed mean and variance of a sample and channel, and r = 1 / sqrt(V + eps),

    y = gamma r (x - c) + beta; dL/dc = -gamma r sum(dy), dL/dV = -gamma r^3 sum(dy (x - c)) / 2

or, where normalized outputs are mixed, with iota in place of the weights,

    y = gamma (iota x^_bn + (1 - iota) x^_ln) + beta

A pooled mean mu and variance V of n (sample, channel) pairs, of S elements each, send to every element of theirs

    (dL/dmu + 2 dL/dV (x - mu)) / (n S)

which is affine in x: so dx = scale dy + slope x + offset, and no (N, C) number but these three needs the deviations of
means. All is written around x = 0, in float64 where a mean is large.

``_plainly`` says the same in operations that autograd records, for what is differentiated once more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_norm.ops import eager
from lightning_norm.ops.layout import Layout, cast
from lightning_norm.ops.moments import Affine, Moments, mixture

Pair = tuple[Tensor, Tensor]
"""Mean and variance, or their gradients."""


@dataclass(frozen=True)
class Mixture:
    """What is mixed at one input.

    Args:
        layout: of x.
        statistics: out of "in", "ln" and "bn", in the order of their weights.
        eps: inside the root.
        entries: of the parameters w and v that are the weights of ``statistics``, as logits of a softmax.
        outputs: normalized outputs of "bn" and "ln" are mixed, by iota (C,) in w.
        track: is called with mean and variance of the batch, (1, C).
    """

    layout: Layout
    statistics: tuple[str, ...]
    eps: float
    entries: tuple[int, ...] = ()
    outputs: bool = False
    track: Callable[[Tensor, Tensor], None] | None = None


def normalize(
    x: Tensor,
    how: Mixture,
    weight: Tensor | None,
    bias: Tensor | None,
    w: Tensor | None = None,
    v: Tensor | None = None,
) -> Tensor:
    """Return y, given gamma and beta (C,) and the parameters of the mixture, which a single statistic has not."""
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
        how: Mixture,
    ) -> Tensor:
        mean, var, batch, layer = _measured(x, how)
        if how.track is not None and batch is not None:
            how.track(*batch)
        equations = _equations(how, weight, w, v, (mean, var), batch, layer)
        ctx.how, ctx.weights = how, equations.weights
        # Of one element the mean is the element itself: nothing of the size of x is kept beside x.
        kept = (None, None, ()) if var is None else (mean, var, equations.mixed)
        pairs = *(batch or (None, None)), *(layer or (None, None))
        ctx.save_for_backward(x, weight, bias, w, v, *kept[:2], *pairs, *kept[2])
        return applied(x, mean, equations.scale, equations.offset(bias), how.layout, var is None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        how, (dy,), need = ctx.how, grads, ctx.needs_input_grad
        x, weight, bias, w, v, mean, var, *pairs = ctx.saved_tensors
        if eager.is_recording(dy):
            plainly = functools.partial(_plainly, how)
            return (*eager.recorded_gradients(plainly, (x, weight, bias, w, v), dy, need), None)
        (batch, layer), mixed = (None if m is None else (m, u) for m, u in (pairs[:2], pairs[2:4])), pairs[4:]
        if flat := mean is None:
            mean = cast(x.view(how.layout.n, how.layout.c), next(p[0].dtype for p in (batch, layer) if p is not None))
        equations = _equations(how, weight, w, v, (mean, var), batch, layer, ctx.weights, tuple(mixed))
        total, dot = sums(dy, x, mean, how.layout, flat)
        dgamma, dw, dv = equations.of_parameters(total, dot)
        dx = (
            combined(dy, x, mean, equations.scale, *equations.through_statistics(), how.layout, flat)
            if need[0]
            else None
        )
        found = zip(need[1:], (dgamma, total.sum(0), dw, dv), strict=False)
        of_parameters = [cast(t, x.dtype) if needed and t is not None else None for needed, t in found]
        return dx, *of_parameters, None


def _measured(x: Tensor, how: Mixture) -> tuple[Tensor, Tensor | None, Pair | None, Pair | None]:
    """Return mean and variance of each (sample, channel), of the batch, and of each sample.

    The variance is ``None`` where a mean is one element. All of them are in float64 where a mean is large.
    """
    layout = how.layout
    mean, var = (x.view(layout.n, layout.c), None) if layout.size == 1 else eager.moments(x, layout)
    if var is not None:
        var = cast(var, mean.dtype)
    batch, layer = (pooled(mean, var, dim) if k in how.statistics else None for dim, k in ((0, "bn"), (1, "ln")))
    # Of several elements ``moments`` has decided it.
    may_lose_digits = var is None and x.dtype == torch.float32
    if may_lose_digits and not all(eager.is_small(*pair) for pair in (batch, layer) if pair is not None):
        return _measured(x.double(), how)
    return mean, var, batch, layer


def pooled(mean: Tensor, var: Tensor | None, dim: int) -> Pair:
    """Return mean and variance along one axis by the law of total variance."""
    pooled = mean.mean(dim, keepdim=True)
    # Around the pooled mean: a difference of squares would lose the digits of a large one.
    apart = mean - pooled
    square = apart.square_() if var is None else torch.addcmul(var, apart, apart)
    return pooled, square.mean(dim, keepdim=True)


def applied(x: Tensor, mean: Tensor, scale: Tensor, offset: Tensor, layout: Layout, flat: bool) -> Tensor:
    """Return y = scale * x + offset, given the mean of each (sample, channel)."""
    if flat:
        # No view, which autograd would refuse to change in place.
        return cast(torch.addcmul(offset, scale, mean), x.dtype).view(x.shape).data
    if mean.dtype == x.dtype:
        return eager.affine(x, scale, offset, layout, recorded=False)
    return eager.apply_centered(x, mean, scale, torch.addcmul(offset, scale, mean), layout, recorded=False)


def sums(dy: Tensor, x: Tensor, mean: Tensor, layout: Layout, flat: bool) -> Pair:
    """Return the sums of dy and of dy * x, (N, C) in the dtype of the mean."""
    if flat:
        total = cast(dy.reshape(mean.shape), mean.dtype)
        return total, total * mean
    if mean.dtype == x.dtype:
        return eager.sums(dy, x, layout)
    pivot = cast(mean, x.dtype)
    total, dot = (t.to(mean.dtype) for t in eager.reduce(dy, x, pivot, layout))
    return total, torch.addcmul(dot, pivot.to(mean.dtype), total)


def combined(
    dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, slope: Tensor, offset: Tensor, layout: Layout, flat: bool
) -> Tensor:
    """Return dx = scale * dy + slope * x + offset."""
    if flat:
        dx = torch.addcmul(torch.addcmul(offset, slope, mean), scale, cast(dy.reshape(mean.shape), mean.dtype))
        return cast(dx, x.dtype).view(x.shape)
    pivot = None
    if mean.dtype != x.dtype:
        pivot = cast(mean, x.dtype)
        offset = torch.addcmul(offset, slope, pivot.to(mean.dtype))
    scale, slope, offset = (cast(t, x.dtype) for t in (scale, slope, offset))
    return eager.combined(dy, layout.broadcast_to_input(scale), x, pivot, slope, offset, layout)


class _OfStatistics:
    """Statistics are mixed: their equations on (N, C) numbers.

    Args:
        how: what is mixed.
        weight: gamma, (C,).
        params: the logits of means and of variances; ``None`` for a single statistic.
        terms: mean and variance of each statistic.
        weights: those of means and of variances, where they are known.
        mixed: likewise the mixed mean, and one over the mixed deviation.
    """

    def __init__(
        self,
        how: Mixture,
        weight: Tensor | None,
        params: tuple[Tensor | None, Tensor | None],
        terms: Sequence[Pair],
        weights: Sequence[Sequence[float]] = (),
        mixed: tuple[Tensor, ...] = (),
    ) -> None:
        self.how, self.params, self.terms = how, params, terms
        self.weights = weights or [[1.0] if t is None else _softmax(t, how.entries) for t in params]
        if not mixed:
            center, var = (_mix(w, t) for w, t in zip(self.weights, zip(*terms, strict=True), strict=True))
            mixed = center, (var + how.eps).rsqrt_()
        self.mixed = self.center, self.root = mixed
        self.scale = self.root if weight is None else self.root * weight

    def offset(self, bias: Tensor | None) -> Tensor:
        """Return y at x = 0, given beta, (C,)."""
        return _minus(bias, self.scale, self.center)

    def of_parameters(self, total: Tensor, dot: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of gamma and of the logits, given the sums of dy and of dy * x."""
        at_root = torch.addcmul(dot, self.center, total, value=-1).mul_(self.root)
        # The gradient of the mixed mean, negated, and that of the mixed variance, times -2.
        f, e = self.scale * total, self.scale * self.root * at_root
        axes = {"bn": 0, "ln": 1}
        # What a statistic gets is a sum over all elements behind it.
        self.through = []
        for k, (mean, _) in zip(self.how.statistics, self.terms, strict=True):
            df, de = (t.sum(axes[k], keepdim=True) if k in axes else t for t in (f, e))
            self.through.append((mean, df, de))
        return at_root.sum(0), *self._of_logits()

    def _of_logits(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of the logits; 0 for entries that take no part."""
        found: list[Tensor | None] = []
        for i, (logits, weights) in enumerate(zip(self.params, self.weights, strict=True)):
            if logits is None:
                found.append(None)
                continue
            # Of the weights, each times its weight: a softmax needs no others.
            pairs = zip(self.through, self.terms, strict=True)
            given = [(t[i + 1] * term[i]).sum().item() * (-1.0, -0.5)[i] for t, term in pairs]
            given = [w * g for w, g in zip(weights, given, strict=True)]
            inner, whole = sum(given), [0.0] * len(logits)
            for at, w, g in zip(self.how.entries, weights, given, strict=True):
                whole[at] = g - w * inner
            found.append(torch.tensor(whole, dtype=logits.dtype))
        return tuple(found)

    def through_statistics(self) -> Pair:
        """Return slope and offset of what reaches x through the statistics."""
        return _slope_and_offset(self.through, self.weights, self.how.layout)


class _OfOutputs:
    """Normalized outputs of the batch and of each sample are mixed, by iota (C,); as :class:`_OfStatistics`."""

    mixed: tuple[Tensor, ...] = ()
    weights: Sequence[Sequence[float]] = ((1.0, 1.0), (1.0, 1.0))

    def __init__(self, how: Mixture, weight: Tensor | None, iota: Tensor, terms: Sequence[Pair]) -> None:
        self.how, self.gamma, self.iotas, self.means = how, weight, (iota, 1 - iota), [mean for mean, _ in terms]
        self.roots = [(var + how.eps).rsqrt_() for _, var in terms]
        factors = self.iotas if weight is None else tuple(part * weight for part in self.iotas)
        self.parts = [root * factor for root, factor in zip(self.roots, factors, strict=True)]
        self.scale = self.parts[0] + self.parts[1]

    def offset(self, bias: Tensor | None) -> Tensor:
        """Return y at x = 0, given beta, (C,)."""
        return _minus(_minus(bias, self.parts[0], self.means[0]), self.parts[1], self.means[1])

    def of_parameters(self, total: Tensor, dot: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of gamma and of iota, given the sums of dy and of dy * x."""
        of_batch = total.sum(0, keepdim=True), dot.sum(0, keepdim=True)
        self.through, of_channels = [], []
        sums = of_batch, (total, dot)
        for axis, (t, d), mean, root, part in zip((0, 1), sums, self.means, self.roots, self.parts, strict=True):
            q = torch.addcmul(d, mean, t, value=-1).mul_(root)
            f, e = part * t, part * q
            if axis:
                f, e = f.sum(1, keepdim=True), e.sum(1, keepdim=True)
            self.through.append((mean, f, e.mul_(root)))
            of_channels.append(q.sum(0))
        dgamma = torch.addcmul(of_channels[0] * self.iotas[0], of_channels[1], self.iotas[1])
        diota = of_channels[0].sub_(of_channels[1])
        return dgamma, diota if self.gamma is None else diota * self.gamma, None

    def through_statistics(self) -> Pair:
        """Return slope and offset of what reaches x through the statistics."""
        return _slope_and_offset(self.through, self.weights, self.how.layout)


def _equations(
    how: Mixture,
    weight: Tensor | None,
    w: Tensor | None,
    v: Tensor | None,
    own: tuple[Tensor, Tensor | None],
    batch: Pair | None,
    layer: Pair | None,
    weights: Sequence[Sequence[float]] = (),
    mixed: tuple[Tensor, ...] = (),
) -> _OfStatistics | _OfOutputs:
    known: dict[str, Any] = {"in": own, "bn": batch, "ln": layer}
    terms = [known[k] for k in how.statistics]
    if how.outputs:
        assert w is not None
        return _OfOutputs(how, weight, w, terms)
    return _OfStatistics(how, weight, (w, v), terms, weights, mixed)


def _slope_and_offset(
    through: Sequence[tuple[Tensor, Tensor, Tensor]], weights: Sequence[Sequence[float]], layout: Layout
) -> Pair:
    """Return what reaches x through statistics, slope * x + offset.

    Args:
        through: the mean of each statistic, the gradient of the mixed mean, negated, and that of the mixed variance,
            times -2, each summed to the shape of the mean.
        weights: of the means and of the variances in the mixture.
        layout: of x.
    """
    slope = offset = None
    # The few numbers of rows and columns first.
    for (mean, f, e), w, v in sorted(zip(through, *weights, strict=True), key=lambda one: one[0][0].numel()):
        # Elements of x behind the statistic.
        count = layout.n * layout.c // mean.numel() * layout.size
        slope = e * (-v / count) if slope is None else torch.add(slope, e, alpha=-v / count)
        offset = f * (-w / count) if offset is None else torch.add(offset, f, alpha=-w / count)
        offset.addcmul_(e, mean, value=v / count)
    assert slope is not None
    assert offset is not None
    return slope, offset


def _minus(t: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return t - a * b."""
    return (a * b).neg_() if t is None else torch.addcmul(t, a, b, value=-1)


def _mix(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """Return the mean of terms by weights of sum 1, the few numbers of rows and columns first."""
    (so_far, mixed), *rest = sorted(zip(weights, terms, strict=True), key=lambda pair: pair[1].numel())
    for weight, term in rest:
        so_far += weight
        mixed = torch.lerp(mixed, term, weight / so_far if so_far else 0.0)
    return mixed


def _softmax(logits: Tensor, entries: tuple[int, ...]) -> list[float]:
    """Return the softmax of some entries, as numbers."""
    # A handful of numbers: as Python's they take less time than one operation of torch's.
    values = logits.tolist()
    top = max([values[i] for i in entries])
    powers = [math.exp(values[i] - top) for i in entries]
    total = sum(powers)
    return [p / total for p in powers]


def _plainly(
    how: Mixture, x: Tensor, weight: Tensor | None, bias: Tensor | None, w: Tensor | None, v: Tensor | None
) -> Tensor:
    """Return y in plain differentiable PyTorch."""
    layout = how.layout
    m = Moments(*eager.moments(x, layout, recorded=True), layout.size)
    known = {"in": m, "bn": m.over_batch(), "ln": m.over_channels()}
    gamma = m.mean.new_ones(1, 1) if weight is None else weight.to(m.mean.dtype)
    if how.outputs:
        assert w is not None
        iota = w.to(gamma.dtype)
        of_parts = (("bn", iota), ("ln", 1 - iota))
        parts = [gamma * part * (known[name].var + how.eps).rsqrt() for name, part in of_parts]
        shift = parts[0] * (m.mean - known["bn"].mean) + parts[1] * (m.mean - known["ln"].mean)
        affine = Affine(m.mean, parts[0] + parts[1], shift if bias is None else shift + bias)
    else:
        one, entries = m.mean.new_ones(1), list(how.entries)
        of_mean, of_var = (one if t is None else torch.softmax(t.to(one.dtype)[entries], 0) for t in (w, v))
        mean = mixture(of_mean, [known[k].mean for k in how.statistics])
        var = mixture(of_var, [known[k].var for k in how.statistics])
        affine = Affine(mean, gamma * (var + how.eps).rsqrt(), bias)
    return eager.apply_centered(x, *affine.fields(layout.n, layout.c), layout, recorded=True)

"""Mixtures of instance, layer and batch statistics on the CPU: one autograd function, whose backward is written out.

Left to autograd, the algebra of such a layer is a hundred small operations, which take longer than the passes over all
but large inputs, and on (N, C) inputs it keeps a dozen tensors of the size of x. Here x and the statistics are kept.
With c and V the mixed mean and variance of a sample and channel, and r = 1 / sqrt(V + eps),

    y = gamma r (x - c) + beta; dL/dc = -gamma r sum(dy), dL/dV = -gamma r^3 sum(dy (x - c)) / 2

or, where normalized outputs are mixed, with iota in place of the weights,

    y = gamma (iota x^_bn + (1 - iota) x^_ln) + beta

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
    x: Tensor, how: Mixture, weight: Tensor | None, bias: Tensor | None, w: Tensor, v: Tensor | None = None
) -> Tensor:
    """Return y, given gamma and beta (C,) and the parameters of the mixture."""
    y: Tensor = _Mixture.apply(x, weight, bias, w, v, how)
    return y


class _Mixture(torch.autograd.Function):
    """y from x and its statistics, and all gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, w: Tensor, v: Tensor | None, how: Mixture
    ) -> Tensor:
        mean, var, batch, layer = _measured(x, how)
        if how.track is not None and batch is not None:
            how.track(*batch)
        ctx.how = how
        # Of one element the mean is the element itself: no copy of x is kept.
        kept = None if how.layout.size == 1 else mean
        ctx.save_for_backward(x, weight, bias, w, v, kept, var, *(batch or (None, None)), *(layer or (None, None)))
        return _Equations(how, x, weight, w, v, mean, var, batch, layer).output(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        how, (dy,) = ctx.how, grads
        x, weight, bias, w, v, mean, var, *pairs = ctx.saved_tensors
        if eager.is_recording(dy):
            plainly = functools.partial(_plainly, how)
            return (*eager.recorded_gradients(plainly, (x, weight, bias, w, v), dy, ctx.needs_input_grad), None)
        batch, layer = (None if mean is None else (mean, var) for mean, var in (pairs[:2], pairs[2:]))
        mean = x.view(how.layout.n, how.layout.c) if mean is None else mean
        return (*_Equations(how, x, weight, w, v, mean, var, batch, layer).gradients(dy, ctx.needs_input_grad), None)


def _measured(x: Tensor, how: Mixture) -> tuple[Tensor, Tensor | None, Pair | None, Pair | None]:
    """Return mean and variance of each (sample, channel), of the batch, and of each sample.

    The variance is ``None`` where a mean is one element. What is pooled is in float64 where a mean is large.
    """
    layout = how.layout
    mean, var = (x.view(layout.n, layout.c), None) if layout.size == 1 else eager.moments(x, layout)
    dims = ((0, "bn"), (1, "ln"))
    batch, layer = (_pooled(mean, var, dim, mean.dtype) if k in how.statistics else None for dim, k in dims)
    # Of several elements ``moments`` has decided it.
    if var is None and not all(eager.is_small(*pair) for pair in (batch, layer) if pair is not None):
        batch, layer = (_pooled(mean, var, dim, torch.float64) if k in how.statistics else None for dim, k in dims)
    return mean, var, batch, layer


def _pooled(mean: Tensor, var: Tensor | None, dim: int, dtype: torch.dtype) -> Pair:
    """Return mean and variance along one axis by the law of total variance."""
    pooled = mean.mean(dim, keepdim=True, dtype=dtype)
    apart = (mean - pooled).square_()
    return pooled, (apart if var is None else apart + var).mean(dim, keepdim=True)


class _Equations:
    """The equations of one input, on (N, C) numbers, and their adjoints."""

    def __init__(
        self,
        how: Mixture,
        x: Tensor,
        weight: Tensor | None,
        w: Tensor,
        v: Tensor | None,
        mean: Tensor,
        var: Tensor | None,
        batch: Pair | None,
        layer: Pair | None,
    ) -> None:
        self.how, self.x, self.gamma, self.params = how, x, weight, (w, v)
        self.flat, self.mean, self.var, self.batch, self.layer = var is None, mean, var, batch, layer
        dtype = x.dtype
        self.shift: Tensor | None = None
        if how.outputs:
            assert batch is not None
            assert layer is not None
            pairs = (batch, layer)
            self.roots = [cast((var + how.eps).rsqrt_(), dtype) for _, var in pairs]
            # Gamma times the part of either output, and how far the mean lies from either center.
            self.parts = [self.roots[0] * w, (1 - w) * self.roots[1]]
            if weight is not None:
                self.parts = [part * weight for part in self.parts]
            self.apart = [cast(mean - center, dtype) for center, _ in pairs]
            self.center, self.scale = mean, self.parts[0] + self.parts[1]
            self.shift = torch.addcmul(self.parts[0] * self.apart[0], self.parts[1], self.apart[1])
            return
        self.weights = [_softmax(t, how.entries) for t in (w, v) if t is not None]
        # Each is there if its name is among the statistics.
        self.terms: dict[str, Any] = {"in": (mean, var), "bn": batch, "ln": layer}
        means, variances = zip(*[self.terms[k] for k in how.statistics], strict=True)
        self.center = _mix(self.weights[0], means)
        self.root = cast(_mix(self.weights[1], variances).add_(how.eps).rsqrt_(), dtype)
        self.scale = self.root if weight is None else self.root * weight

    def output(self, bias: Tensor | None) -> Tensor:
        """Return y."""
        x, shift = self.x, self.shift
        if bias is not None:
            shift = bias.view(1, -1) if shift is None else shift + bias
        if not self.flat:
            shift = self.scale.new_zeros(1, 1) if shift is None else shift
            return eager.apply(x, self.center, self.scale, shift, self.how.layout, self._is_narrow)
        if self.how.outputs:
            # x is its mean, around which nothing is left but the shift.
            assert shift is not None
            y = shift
        else:
            u = cast(self.mean - self.center, x.dtype)
            y = u.mul_(self.scale) if shift is None else torch.addcmul(shift, u, self.scale)
        # No view, which autograd would refuse to change in place.
        return y.view(x.shape).data

    @property
    def _is_narrow(self) -> bool:
        return self.x.dtype == torch.float32 == self.mean.dtype

    def gradients(self, dy: Tensor, need: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, gamma, beta, w and v."""
        layout, x = self.how.layout, self.x
        total, dot = self._sums(dy)
        dbeta = total.sum(0) if need[2] else None
        of_equations = self._of_outputs if self.how.outputs else self._of_statistics
        dgamma, dw, dv, dbatch, dlayer, dmean, dvar = of_equations(total, dot, need)
        if not need[0]:
            return None, dgamma, dbeta, dw, dv
        for dim, pooled, d in ((0, self.batch, dbatch), (1, self.layer, dlayer)):
            if pooled is not None:
                # Of the law of total variance, whose mean sends no gradient through the deviations.
                df, de = (t / self.mean.shape[dim] for t in d)
                apart = cast(self.mean - pooled[0], x.dtype)
                dmean = torch.addcmul(df if dmean is None else dmean + df, apart, de, value=2)
                dvar = de if dvar is None else dvar + de
        if self.flat:
            dx = torch.addcmul(dmean, total, self.scale).view(x.shape)
        else:
            dx = eager.combine(dy, self.scale, x, self.mean, dmean, dvar, layout)
        return dx, dgamma, dbeta, dw, dv

    def _sums(self, dy: Tensor) -> Pair:
        """Return the sums of dy and of dy * (x - center), (N, C) in the dtype of x."""
        if self.flat:
            dy = dy.reshape(self.mean.shape)
            return dy, dy * cast(self.mean - self.center, dy.dtype)
        pivot = cast(self.center, self.x.dtype)
        total, dot = eager.reduce(dy, self.x, pivot, self.how.layout, self._is_narrow)
        if pivot.dtype != self.center.dtype:
            # What rounding took from the center.
            dot = torch.addcmul(dot, cast(pivot - self.center, dot.dtype), total)
        return total, dot

    def _of_statistics(self, total: Tensor, dot: Tensor, need: tuple[bool, ...]) -> tuple[Any, ...]:
        how, wide = self.how, self.center.dtype
        f = (self.scale * total).neg_()
        at_root = self.root * dot
        e = (self.scale * self.root * -0.5) * at_root
        dgamma = at_root.sum(0) if need[1] else None
        # In float64 where means are large: a softmax sees differences of these sums.
        sums: dict[str, Pair] = {"in": (f, e)}
        for k, dim in (("bn", 0), ("ln", 1)):
            if k in how.statistics:
                sums[k] = f.sum(dim, keepdim=True, dtype=wide), e.sum(dim, keepdim=True, dtype=wide)
        gradients = _of_softmaxes(self, sums) if need[3] or need[4] else (None, None)
        spread: dict[str, Any] = {"bn": None, "ln": None, "in": (None, None)}
        for k, w, v in zip(how.statistics, *self.weights, strict=True):
            spread[k] = tuple(cast(s * weight, f.dtype) for s, weight in zip(sums[k], (w, v), strict=True))
        return dgamma, *gradients, spread["bn"], spread["ln"], *spread["in"]

    def _of_outputs(self, total: Tensor, dot: Tensor, need: tuple[bool, ...]) -> tuple[Any, ...]:
        # Sums of dy * (x - center) around the center of either output, over its deviation.
        at_root = [torch.addcmul(dot, apart, total) * root for apart, root in zip(self.apart, self.roots, strict=True)]
        iota, _ = self.params
        dgamma = torch.addcmul(at_root[0] * iota, at_root[1], 1 - iota).sum(0) if need[1] else None
        diota = (at_root[0] - at_root[1]).sum(0) if need[3] else None
        if diota is not None and self.gamma is not None:
            diota = diota * self.gamma
        pairs = []
        for dim, (part, root, q) in enumerate(zip(self.parts, self.roots, at_root, strict=True)):
            f, e = (part * total).sum(dim, keepdim=True), (part * root * q).sum(dim, keepdim=True)
            pairs.append((f.neg_(), e.mul_(-0.5)))
        return dgamma, diota, None, *pairs, None, None


def _mix(weights: list[float], terms: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum of terms, the few numbers of rows and columns first."""
    (weight, term), *rest = sorted(zip(weights, terms, strict=True), key=lambda pair: pair[1].numel())
    total = term * weight
    for weight, term in rest:
        total = torch.add(total, term, alpha=weight)
    return total


def _softmax(logits: Tensor, entries: tuple[int, ...]) -> list[float]:
    """Return the softmax of some entries, as numbers."""
    values = logits.tolist()
    top = max([values[i] for i in entries])
    powers = [math.exp(values[i] - top) for i in entries]
    total = sum(powers)
    return [p / total for p in powers]


def _of_softmaxes(equations: _Equations, sums: dict[str, Pair]) -> list[Tensor]:
    """Return the gradients of both logits, given those of the statistics; 0 for entries that take no part."""
    names, entries = equations.how.statistics, equations.how.entries
    # One value is read back for all.
    products = [sums[k][i] * equations.terms[k][i] for i in (0, 1) for k in names]
    of_weights = torch.stack([product.sum() for product in products]).tolist()
    found = []
    for i, (logits, weights) in enumerate(zip(equations.params, equations.weights, strict=True)):
        assert logits is not None
        values = of_weights[i * len(names) : (i + 1) * len(names)]
        inner = sum([w * g for w, g in zip(weights, values, strict=True)])
        whole = [0.0] * len(logits)
        for at, w, g in zip(entries, weights, values, strict=True):
            whole[at] = w * (g - inner)
        found.append(torch.tensor(whole, dtype=logits.dtype))
    return found


def _plainly(
    how: Mixture, x: Tensor, weight: Tensor | None, bias: Tensor | None, w: Tensor, v: Tensor | None
) -> Tensor:
    """Return y in plain differentiable PyTorch."""
    layout = how.layout
    m = Moments(*eager.moments(x, layout, recorded=True), layout.size)
    known = {"in": m, "bn": m.over_batch(), "ln": m.over_channels()}
    gamma = m.mean.new_ones(1, 1) if weight is None else weight.to(m.mean.dtype)
    if how.outputs:
        iota = w.to(gamma.dtype)
        of_parts = (("bn", iota), ("ln", 1 - iota))
        parts = [gamma * part * (known[name].var + how.eps).rsqrt() for name, part in of_parts]
        shift = parts[0] * (m.mean - known["bn"].mean) + parts[1] * (m.mean - known["ln"].mean)
        affine = Affine(m.mean, parts[0] + parts[1], shift if bias is None else shift + bias)
    else:
        assert v is not None
        entries = list(how.entries)
        of_mean, of_var = (torch.softmax(t.to(m.mean.dtype)[entries], 0) for t in (w, v))
        mean = mixture(of_mean, [known[k].mean for k in how.statistics])
        var = mixture(of_var, [known[k].var for k in how.statistics])
        affine = Affine(mean, gamma * (var + how.eps).rsqrt(), bias)
    return eager.apply_centered(x, *affine.fields(layout.n, layout.c), layout, recorded=True)

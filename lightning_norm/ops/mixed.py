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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_norm.ops import eager
from lightning_norm.ops.layout import Layout
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
        layout = how.layout
        # Of one element the mean is the element itself: no copy of x is made or kept.
        mean, var = (None, None) if layout.size == 1 else eager.moments(x, layout)
        of = x.view(layout.n, layout.c) if mean is None else mean
        batch = _pooled(of, var, 0) if "bn" in how.statistics else None
        layer = _pooled(of, var, 1) if "ln" in how.statistics else None
        if how.track is not None and batch is not None:
            how.track(*batch)
        ctx.how = how
        ctx.save_for_backward(x, weight, bias, w, v, mean, var, *(batch or (None, None)), *(layer or (None, None)))
        return _Equations(how, x, weight, w, v, mean, var, batch, layer).output(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        how, (dy,) = ctx.how, grads
        x, weight, bias, w, v, mean, var, *pairs = ctx.saved_tensors
        if eager.is_recording(dy):
            return (*_recorded_gradients(dy, how, (x, weight, bias, w, v), ctx.needs_input_grad), None)
        batch, layer = ((a, b) if a is not None else None for a, b in (pairs[:2], pairs[2:]))
        return (*_Equations(how, x, weight, w, v, mean, var, batch, layer).gradients(dy, ctx.needs_input_grad), None)


class _Equations:
    """The equations of one input, on (N, C) numbers, and their adjoints."""

    def __init__(
        self,
        how: Mixture,
        x: Tensor,
        weight: Tensor | None,
        w: Tensor,
        v: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        batch: Pair | None,
        layer: Pair | None,
    ) -> None:
        self.how, self.x, self.gamma, self.params = how, x, weight, (w, v)
        self.flat, self.var, self.batch, self.layer = mean is None, var, batch, layer
        n, c = how.layout.n, how.layout.c
        self.mean = x.view(n, c) if mean is None else mean
        # What is pooled is met in this dtype: where means are large, they keep their digits.
        self.wide = torch.float64 if self.flat else self.mean.dtype
        if how.outputs:
            assert batch is not None
            assert layer is not None
            # Gamma times the part of either output, and how far the mean lies from either center.
            self.roots = [(s[1] + how.eps).rsqrt_().to(x.dtype) for s in (batch, layer)]
            gamma = w.new_ones(()) if weight is None else weight
            self.parts = [self.roots[0] * w, (1 - w) * self.roots[1]]
            self.apart = [(self.mean - s[0].to(self.wide)).to(x.dtype) for s in (batch, layer)]
            self.center = self.mean
            self.scale = (self.parts[0] + self.parts[1]) * gamma
            self.shift = torch.addcmul(self.parts[0] * self.apart[0], *(t[1] for t in (self.parts, self.apart))) * gamma
            return
        self.weights = [_softmax(t, how.entries) for t in (w, v) if t is not None]
        terms = {"in": (self.mean, var), "bn": batch, "ln": layer}
        means, variances = zip(*(terms[k] for k in how.statistics), strict=True)
        self.center = _mix(self.weights[0], means, self.wide)
        self.root = (_mix(self.weights[1], variances, x.dtype) + how.eps).rsqrt_()
        self.scale = self.root if weight is None else self.root * weight
        self.shift = None

    def output(self, bias: Tensor | None) -> Tensor:
        """Return y."""
        x, shift = self.x, self.shift
        if bias is not None:
            shift = bias.view(1, -1) if shift is None else shift + bias
        if not self.flat:
            shift = self.scale.new_zeros(1, 1) if shift is None else shift
            return eager.apply(x, self.center, self.scale, shift, self.how.layout, self._is_small)
        if self.how.outputs:
            # x is its mean, around which nothing is left but the shift.
            return shift.view(x.shape)  # type: ignore[union-attr]  # outputs have one
        u = (self.mean - self.center).to(x.dtype)
        return (u.mul_(self.scale) if shift is None else torch.addcmul(shift, u, self.scale)).view(x.shape)

    @property
    def _is_small(self) -> bool:
        return self.x.dtype == torch.float32 == self.mean.dtype

    def gradients(self, dy: Tensor, need: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, gamma, beta, w and v."""
        layout, x = self.how.layout, self.x
        total, dot = self._sums(dy)
        dbeta = total.sum(0) if need[2] else None
        dgamma, dw, dv, dbatch, dlayer, own = (self._of_outputs if self.how.outputs else self._of_statistics)(total, dot, need)
        dmean, dvar = own
        for dim, pooled, d in ((0, self.batch, dbatch), (1, self.layer, dlayer)):
            if pooled is not None and need[0]:
                # Of the law of total variance: its mean sends no gradient through the deviations.
                size = self.mean.shape[dim]
                apart = (self.mean - pooled[0].to(self.wide)).to(x.dtype)
                df, de = ((t / size).to(x.dtype) for t in d)
                dmean = torch.addcmul(df if dmean is None else dmean + df, apart, de, value=2)
                dvar = de if dvar is None else dvar + de
        dx = None
        if need[0] and self.flat:
            dx = torch.addcmul(dmean, dy.reshape(dmean.shape), self.scale).view(x.shape)
        elif need[0]:
            dvar = dvar.expand(layout.n, layout.c)
            dx = eager.combine(dy, self.scale, x, self.mean, dmean, dvar, layout)
        return dx, dgamma, dbeta, dw, dv

    def _sums(self, dy: Tensor) -> Pair:
        """Return the sums of dy and of dy * (x - center), (N, C) in the dtype of x."""
        if self.flat:
            dy = dy.reshape(self.mean.shape)
            return dy, dy * (self.mean - self.center).to(dy.dtype)
        pivot = self.center.to(self.x.dtype)
        total, dot = eager.reduce(dy, self.x, pivot, self.how.layout, self._is_small)
        if pivot.dtype != self.center.dtype:
            # What rounding took from the center.
            dot = torch.addcmul(dot, (pivot - self.center).to(dot.dtype), total)
        return total, dot

    def _of_statistics(self, total: Tensor, dot: Tensor, need: tuple[bool, ...]) -> tuple[Any, ...]:
        how, (w, v) = self.how, self.weights
        f = (self.scale * total).neg_()
        at_root = self.root * dot
        e = (self.scale * self.root * -0.5) * at_root
        dgamma = at_root.sum(0) if need[1] else None
        # In float64: a softmax sees differences of these sums, which are small where all means are large.
        sums: dict[str, Pair] = {"in": (f, e)}
        for k, dim in (("bn", 0), ("ln", 1)):
            if k in how.statistics:
                sums[k] = f.sum(dim, keepdim=True, dtype=torch.float64), e.sum(dim, keepdim=True, dtype=torch.float64)
        terms = {"in": (self.mean, self.var), "bn": self.batch, "ln": self.layer}
        dw, dv = (
            _softmax_vjp(t, how.entries, weights, [_dot(sums[k][i], terms[k][i]) for k in how.statistics]) if needed else None
            for i, (t, weights, needed) in enumerate(zip(self.params, self.weights, need[3:5], strict=True))
        )
        at = {k: i for i, k in enumerate(how.statistics)}
        spread = {k: (sums[k][0] * w[i], sums[k][1] * v[i]) for k, i in at.items()}
        return dgamma, dw, dv, spread.get("bn"), spread.get("ln"), spread.get("in", (None, None))

    def _of_outputs(self, total: Tensor, dot: Tensor, need: tuple[bool, ...]) -> tuple[Any, ...]:
        # Sums of dy * (x - center) around the center of either output.
        around = [torch.addcmul(dot, apart, total) for apart in self.apart]
        at_root = [root * q for root, q in zip(self.roots, around, strict=True)]
        iota, _ = self.params
        gamma = 1.0 if self.gamma is None else self.gamma
        dgamma = (at_root[0] * iota + at_root[1] * (1 - iota)).sum(0) if need[1] else None
        diota = ((at_root[0] - at_root[1]) * gamma).sum(0) if need[3] else None
        pairs = []
        for dim, (part, root, q) in enumerate(zip(self.parts, self.roots, at_root, strict=True)):
            s = part * gamma
            pairs.append(((s * total).sum(dim, keepdim=True).neg_(), (s * root * q).sum(dim, keepdim=True).mul_(-0.5)))
        return dgamma, diota, None, *pairs, (None, None)


def _pooled(mean: Tensor, var: Tensor | None, dim: int) -> Pair:
    """Return mean and variance along one axis by the law of total variance, in float64."""
    pooled = mean.mean(dim, keepdim=True, dtype=torch.float64)
    apart = (mean - (pooled if var is None else pooled.to(mean.dtype))).square_()
    return pooled, (apart if var is None else apart + var).mean(dim, keepdim=True, dtype=torch.float64)


def _mix(weights: list[float], terms: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the weighted sum of terms, the few numbers of rows and columns first."""
    (weight, term), *rest = sorted(zip(weights, terms, strict=True), key=lambda pair: pair[1].numel())
    total = term.to(dtype) * weight
    for weight, term in rest:
        total = torch.add(total, term.to(dtype), alpha=weight)
    return total


def _dot(gradient: Tensor, term: Tensor) -> Tensor:
    return (gradient * term).sum(dtype=torch.float64)


def _softmax(logits: Tensor, entries: tuple[int, ...]) -> list[float]:
    """Return the softmax of some entries, as numbers."""
    values = logits.tolist()
    top = max(values[i] for i in entries)
    powers = [math.exp(values[i] - top) for i in entries]
    return [p / sum(powers) for p in powers]


def _softmax_vjp(logits: Tensor, entries: tuple[int, ...], weights: list[float], gradients: list[Tensor]) -> Tensor:
    """Return the gradient of the logits, given those of the weights; 0 for the other entries."""
    values = torch.stack(gradients).tolist()
    inner = sum(w * g for w, g in zip(weights, values, strict=True))
    whole = [0.0] * logits.numel()
    for i, w, g in zip(entries, weights, values, strict=True):
        whole[i] = w * (g - inner)
    return torch.tensor(whole, dtype=logits.dtype)


def _recorded_gradients(
    dy: Tensor, how: Mixture, inputs: tuple[Tensor | None, ...], need: tuple[bool, ...]
) -> list[Tensor | None]:
    """Return the gradients in operations that autograd records."""
    wanted = [t for t, needed in zip(inputs, need, strict=False) if needed and t is not None]
    with torch.enable_grad():
        y = _plainly(how, *inputs)  # type: ignore[arg-type]  # x and w are there
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(found) if needed and t is not None else None for t, needed in zip(inputs, need, strict=False)]


def _plainly(
    how: Mixture, x: Tensor, weight: Tensor | None, bias: Tensor | None, w: Tensor, v: Tensor | None
) -> Tensor:
    """Return y in plain differentiable PyTorch."""
    layout = how.layout
    m = Moments(*eager.moments(x, layout, recorded=True), layout.size)
    known = {"in": m, "bn": m.over_batch(), "ln": m.over_channels()}
    gamma = m.mean.new_ones(1, 1) if weight is None else weight.to(m.mean.dtype)
    if how.outputs:
        parts = [
            gamma * k * (known[name].var + how.eps).rsqrt() for name, k in (("bn", w.to(gamma.dtype)), ("ln", 1 - w.to(gamma.dtype)))
        ]
        shift = parts[0] * (m.mean - known["bn"].mean) + parts[1] * (m.mean - known["ln"].mean)
        affine = Affine(m.mean, parts[0] + parts[1], shift if bias is None else shift + bias)
    else:
        assert v is not None
        entries = list(how.entries)
        mixing = [torch.softmax(t.to(m.mean.dtype)[entries], 0) for t in (w, v)]
        statistics = [known[k] for k in how.statistics]
        mean, var = (mixture(k, [getattr(s, name) for s in statistics]) for k, name in zip(mixing, ("mean", "var"), strict=True))
        affine = Affine(mean, gamma * (var + how.eps).rsqrt(), bias)
    return eager.apply_centered(x, *affine.fields(layout.n, layout.c), layout, recorded=True)

"""Moments and Affine: the vocabulary every normalizer is written in.

Six words, used everywhere in this package:

* *Moments*: mean and biased variance, one pair per (sample, channel) or pooled over several of them.
* *Affine*: ``y = scale * (x - center) + shift``.
* *algebra*: a normalizer's own few lines, from Moments to Affine.
* *layout*: which axis of ``x`` is the channel axis and which are reduced.
* *moments* (the pass): one read of ``x`` that yields the Moments.
* *apply*: one read of ``x`` that writes ``y``.

Variances are pooled by the law of total variance and never as E[x^2] - E[x]^2, which loses every digit at mean/std =
1e4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_norm.errors import counted
from lightning_norm.ops import torch_private
from lightning_norm.ops.layout import at_least_float32, cast, stat_dtype
from lightning_norm.ops.sync import Ranks

ShapeOf = Callable[[Tensor], tuple[int, ...]]


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance, each broadcastable to (N, C).

    Args:
        mean: (N, C), or (1, C), (N, 1), (K, C) once pooled. Float64 where x is float32.
        var: biased variance, same shape as ``mean``, never negative.
        count: number of elements of x behind each entry; a tensor once ranks were pooled, and (N, 1) where the samples
            of a batch differ in it, as with a mask: each then weighs by its count where samples are pooled.
        ranks: the ranks that ``over_batch`` pools with; ``None`` for this process alone.
        of_batch: whether the whole batch was measured as one sample: ``over_batch`` has nothing left to pool.
    """

    mean: Tensor
    var: Tensor
    count: int | Tensor
    ranks: Ranks | None = None
    of_batch: bool = False

    def over_channels(self, num_groups: int = 1) -> Moments:
        """Pool the channels of each sample: all of them, (N, C) -> (N, 1), or those of each group, (N, C) -> (N, C).

        Args:
            num_groups: groups of consecutive channels; each channel gets the moments of its group.

        Raises:
            ValueError: ``num_groups`` does not divide the channels.
        """
        if num_groups > 1:
            return self._over_groups(num_groups)
        mean, var = _pool(self.mean, self.var, dim=1)
        return Moments(mean, var, self.count * self.mean.shape[1], self.ranks)

    def _over_groups(self, num_groups: int) -> Moments:
        _, c = torch_private.static_shape(self.mean)
        if c % num_groups:
            raise ValueError(
                f"cannot split {counted(c, 'channel')} into {counted(num_groups, 'group')}: groups must divide the "
                f"channels. Divisors of {c}: {[d for d in range(1, c + 1) if c % d == 0]}."
            )
        # No size of the batch is written into the views, so that a traced graph takes any.
        grouped = torch.unflatten(self.mean, 1, (num_groups, c // num_groups))
        pooled = _pool(grouped, torch.unflatten(self.var, 1, (num_groups, c // num_groups)), dim=2)
        # Each channel gets its group's moments, so that an algebra need not know the groups.
        mean, var = (t.expand_as(grouped).flatten(1) for t in pooled)
        return Moments(mean, var, self.count * (c // num_groups), self.ranks)

    def over_batch(self, weights: Tensor | None = None) -> Moments:
        """Pool the samples of the whole batch, over all ranks: (N, C) -> (1, C).

        The only way to meet other samples, and the only collective: call it unconditionally, the same number of times
        on every rank.

        Args:
            weights: (N, K) soft or hard assignment of each sample to K sets; the result is then (K, C).
        """
        if weights is not None or self.ranks is not None or self._counts_samples():
            return self._over_sets(weights)
        if self.of_batch:
            return self
        mean, var = _pool(self.mean, self.var, dim=0)
        return Moments(mean, var, self.count * self.mean.shape[0])

    def _over_sets(self, weights: Tensor | None) -> Moments:
        if weights is None and self.ranks is None:
            # One set, in which each sample weighs by its count.
            total = self.count.sum(0, keepdim=True)  # type: ignore[union-attr]  # one for each sample
            mean, var = _pool(self.mean, self.var, 0, self.count / total.clamp_min(1))
            return Moments(mean, var, total)
        # Over ranks all samples are one set, so that an empty rank, whose mean is undefined, has the mass 0.
        weights = self.mean.new_ones(self.mean.shape[0], 1) if weights is None else weights.to(self.mean.dtype)
        count = self.count
        if self._counts_samples():
            weights, count = weights * count, 1
        mass = weights.sum(0).unsqueeze(1)  # (K, 1)
        weights = weights.t() / mass.clamp_min(torch.finfo(mass.dtype).tiny)  # (K, N), rows sum to one
        # No matmul: autocast would round the matrix product in its backward pass to half precision.
        mean = (weights.unsqueeze(2) * self.mean).sum(1)  # (K, C)
        between_var = (self.mean - mean.unsqueeze(1)).square()  # (K, N, C)
        var = (weights.unsqueeze(2) * (self.var + between_var)).sum(1).to(self.var.dtype)
        # Elements and not samples, for the maps of another rank may have another size.
        count = mass * count
        if self.ranks is not None:
            count, mean, var = self.ranks.pool(count, mean, var)
        return Moments(mean, var, count)

    def _counts_samples(self) -> bool:
        # In a graph of torch.jit.trace the one count of all samples is a tensor without axes.
        return isinstance(self.count, Tensor) and self.count.dim() == 2

    def each(self) -> int | Tensor:
        """Return the count with which every sample weighs alike: 1, and 0 for one without elements."""
        return (self.count > 0).to(self.mean.dtype) if self._counts_samples() else 1  # type: ignore[union-attr]

    def unbiased(self) -> Moments:
        """Return the same with unbiased variances, n / (n - 1) times the biased ones; those of one element stay 0."""
        one_less = self.count - 1
        one_less = one_less.clamp_min(1) if isinstance(one_less, Tensor) else max(one_less, 1)
        return Moments(self.mean, self.var * (self.count / one_less), self.count, self.ranks)


@dataclass(frozen=True)
class Affine:
    """``y = scale * (x - center) + shift``; each field broadcastable to (N, C).

    Args:
        center: what is subtracted.
        scale: what multiplies.
        shift: what is added; ``None`` for nothing.
    """

    center: Tensor
    scale: Tensor
    shift: Tensor | None = None

    def fields(self, n: int, c: int, shape_of: ShapeOf = Tensor.size) -> tuple[Tensor, Tensor, Tensor]:
        """Return center, scale and shift, each of two dimensions and broadcastable to (n, c).

        Where operations are traced, ``shape_of`` returns sizes that are no part of the graph.

        Raises:
            ValueError: a field cannot be broadcast to (n, c).
        """
        shift = self.scale.new_zeros(1, 1) if self.shift is None else self.shift
        # Missing dimensions are added in front, as broadcasting does: (C,) is (1, C).
        center, scale, shift = (t if t.dim() > 1 else t.reshape(1, -1) for t in (self.center, self.scale, shift))
        # A tensor of three axes is refused with the others: it would broadcast against x and mean something else.
        fits = [len(s) == 2 and s[0] in (1, n) and s[1] in (1, c) for s in map(shape_of, (center, scale, shift))]
        if not all(fits):
            raise ValueError(self._wrong_shape(("center", "scale", "shift")[fits.index(False)], n, c))
        return center, scale, shift

    def _wrong_shape(self, name: str, n: int, c: int) -> str:
        shapes = {k: None if v is None else tuple(v.shape) for k, v in vars(self).items()}
        return (
            f"algebra returned {name} of shape {shapes[name]}, which does not broadcast to (N, C) = ({n}, {c}). "
            f"All shapes: {shapes}."
        )


@torch.no_grad()
def to_std(var: Tensor, eps: float) -> Tensor:
    """Return the s with s + eps = sqrt(var + eps): evaluation stays what it was."""
    return (var.to(at_least_float32(var.dtype)) + eps).sqrt() - eps


@torch.no_grad()
def to_var(std: Tensor, eps: float) -> Tensor:
    """Return the v with sqrt(v + eps) = std + eps; 0 where it would be negative, for a BatchNorm has none below."""
    return ((std + eps).square() - eps).clamp_min(0)


def mixture(weights: Tensor, terms: list[Tensor]) -> Tensor:
    """Return the weighted sum of broadcastable tensors.

    Each is weighted before it is broadcast, so that an (N, 1) or (1, C) term costs no (N, C) product of its own.

    Args:
        weights: (K,) numbers.
        terms: K tensors; the result has the dtype of the first.
    """
    dtype = terms[0].dtype
    # The dtypes meet here: weights in float32 must not narrow means in float64.
    first, *rest = (term.to(dtype) * weight for term, weight in zip(terms, weights.to(dtype).unbind(), strict=True))
    return sum(rest, first)


def _pool(mean: Tensor, var: Tensor, dim: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if torch_private.is_transformed():
        return _pooled(mean, var, dim, weights)
    pooled: tuple[Tensor, Tensor] = _PoolMoments.apply(mean, var, dim, weights)
    return pooled


def _pooled(mean: Tensor, var: Tensor, dim: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the law of total variance along one axis, in plain differentiable PyTorch; weights have the sum 1."""
    # (N, C) numbers are few, so that exact sums cost nothing here.
    wide = stat_dtype(var)
    if weights is not None:
        return _pooled_by_weights(mean, var, dim, weights)
    pooled = mean.mean(dim, keepdim=True, dtype=wide)
    # Deviations and not squares of means: at mean / std = 1e4 the squares would agree in every digit.
    # A small difference has all its digits in float32 as well.
    between_var = (mean - cast(pooled, mean.dtype)).to(var.dtype).square()
    return pooled, (var + between_var).mean(dim, keepdim=True, dtype=wide)


def _pooled_by_weights(mean: Tensor, var: Tensor, dim: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    pooled = (mean * weights).sum(dim, keepdim=True)
    between_var = (mean - cast(pooled, mean.dtype)).to(var.dtype).square()
    return pooled, ((var + between_var) * weights).sum(dim, keepdim=True)


class _PoolMoments(torch.autograd.Function):
    """The law of total variance along one axis, which stays with size 1; the result in the dtype of means.

    The backward pass is written out: two operations on few numbers, each in the dtype of the input it belongs to.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, dim: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pooled, pooled_var = _pooled(mean, var, dim, weights)
        ctx.size, ctx.var_dtype = mean.shape[dim], var.dtype
        ctx.save_for_backward(mean, pooled, weights)
        return pooled, pooled_var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        mean, pooled, weights = ctx.saved_tensors
        dmean, dvar = (g / ctx.size if weights is None else g * weights for g in grads)
        # d var / d pooled is the mean of -2 (mean - pooled), which is zero: the pooled mean passes no gradient on.
        dtype = mean.dtype
        grad = torch.addcmul(dmean.to(dtype), 2 * dvar.to(dtype), mean - pooled.to(dtype))
        return grad, dvar.to(ctx.var_dtype).expand_as(mean), None, None

"""Normalizers whose equations also exist as Triton kernels: at most four launches forward and four backward.

A normalizer describes its equations as a :class:`MixtureSpec`; the kernels compute the same as its readable
``algebra``, and move its running statistics in the same launch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_norm.ops.fused import operators
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.sync import Ranks

ops = torch.ops.lightning_norm


@dataclass(frozen=True)
class Running:
    """Running statistics, and whether they stand in for the batch's.

    Args:
        mean: (C,).
        var: (C,).
        tracked: number of updates, 0-dim.
        skipped: number of updates left out, 0-dim.
        momentum: 0-dim; ``None`` for the average of all batches.
        frozen: evaluate on them, do not move them.
    """

    mean: Tensor
    var: Tensor
    tracked: Tensor
    skipped: Tensor
    momentum: Tensor | None
    frozen: bool


@dataclass(frozen=True)
class MixtureSpec:
    """Equations the kernels know.

    Args:
        statistics: which take part, in the order of ``w`` and ``v``: "in", "ln", "bn". "ln" is per group.
        eps: inside the root.
        weight: gamma, (C,).
        bias: beta, (C,).
        w: weights of the means, one per statistic, or iota (C,) with ``outputs``.
        v: weights of the variances.
        softmax: w and v are logits.
        outputs: mix the batch- and the layer-normalized output by w, not statistics.
        groups: of "ln".
        correction: 1 for unbiased variances within each sample.
        running: running statistics of "bn".
        group: name of the ranks that pool the batch's statistics; "" for this process alone.
    """

    statistics: tuple[str, ...]
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    w: Tensor | None = None
    v: Tensor | None = None
    softmax: bool = False
    outputs: bool = False
    groups: int = 1
    correction: int = 0
    running: Running | None = None
    group: str = ""

    def over(self, ranks: Ranks) -> MixtureSpec:
        """Return the same equations for a batch that lies on several ranks."""
        return replace(self, group=ranks.group) if "bn" in self.statistics else self

    def plan(self) -> list[int]:
        """Return the fields of ``kernels.launch_algebra.Plan``."""
        at = [self.statistics.index(s) if s in self.statistics else -1 for s in ("in", "ln", "bn")]
        frozen = self.running is not None and self.running.frozen
        track = 0
        if self.running is not None and not frozen:
            track = 2 if self.running.momentum is None else 1
        k = len(self.statistics) if self.w is not None and not self.outputs else 0
        own = not (frozen and self.statistics == ("bn",))
        return [
            int(own),
            *at,
            k,
            int(self.softmax),
            int(self.outputs),
            int(frozen),
            track,
            self.groups,
            self.correction,
        ]

    def normalize(self, x: Tensor, layout: Layout, activation: str, residual: Tensor | None) -> Tensor:
        """Return act(normalized x + residual), on the kernels."""
        held = (self.weight, self.bias, self.w, self.v)
        stats, running = self._coefficients(x, layout)
        y: Tensor = _Fused.apply(
            x, *held, residual, *stats, *running, layout.channel_dim, self.plan(), self.eps, activation, self.group
        )  # fmt: skip
        return y

    def recover(self, x: Tensor, layout: Layout, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """Return the depthwise convolution of the normalized x, on the kernels; without weight and bias of its own."""
        stats, running = self._coefficients(x, layout)
        y: Tensor = _Recovered.apply(x, kernel.contiguous(), bias, *stats, *running, self.plan(), self.eps, self.group)
        return y

    def _coefficients(self, x: Tensor, layout: Layout) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        plan, r = self.plan(), self.running
        held = (self.weight, self.bias, self.w, self.v)
        buffers = (None,) * 5 if r is None else (r.mean, r.var, r.tracked, r.skipped, r.momentum)
        coefficients = ops.coefficients_and_track if plan[8] else ops.coefficients
        stats = coefficients(
            x.detach(), *map(_detached, held), *buffers, layout.channel_dim, plan, self.eps, self.group
        )
        return stats, (r.mean, r.var) if r is not None and r.frozen else (None, None)


class _Fused(torch.autograd.Function):
    """y from x and its coefficients; all gradients at once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        w: Tensor | None,
        v: Tensor | None,
        residual: Tensor | None,
        own: Tensor,
        batch: Tensor,
        layer: Tensor,
        coef: Tensor,
        total: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        channel_dim: int,
        plan: list[int],
        eps: float,
        activation: str,
        group: str,
    ) -> Tensor:
        kept = residual if activation != "none" else None  # without an activation its gradient is dy
        ctx.save_for_backward(x, weight, bias, w, v, kept, own, batch, layer, coef, total, mean, var)
        ctx.channel_dim, ctx.plan, ctx.eps, ctx.activation, ctx.group = channel_dim, plan, eps, activation, group
        y: Tensor = ops.apply(x, coef, channel_dim, activation, residual)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operators.refuse_second_derivatives()
        (dy,) = grads
        x, weight, bias, w, v, kept, *stats, mean, var = ctx.saved_tensors
        need = ctx.needs_input_grad
        dx, *rest, dresidual = ops.gradients(
            dy, x, *stats, weight, w, v, mean, var, kept, ctx.channel_dim, ctx.plan, ctx.eps, ctx.activation, need[0],
            ctx.group,
        )  # fmt: skip
        given = (weight, bias, w, v)
        held = [g.to(t.dtype) if n and t is not None else None for g, t, n in zip(rest, given, need[1:5], strict=True)]
        if need[5] and kept is None:
            dresidual = dy
        return (dx if need[0] else None, *held, dresidual if need[5] else None, *(None,) * 12)


class _Recovered(torch.autograd.Function):
    """y = kernel * x^ + bias from x and the coefficients of x^; all gradients at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        *stats, mean, var, plan, eps, group = rest
        ctx.save_for_backward(x, kernel, bias, *stats, mean, var)
        ctx.plan, ctx.eps, ctx.group = plan, eps, group
        y: Tensor = ops.recover(x, stats[3], kernel, bias)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operators.refuse_second_derivatives()
        x, kernel, bias, *stats, mean, var = ctx.saved_tensors
        need, (dy,) = ctx.needs_input_grad, grads
        dx, dkernel, dbias = ops.recover_gradients(
            dy, x, *stats, kernel, mean, var, ctx.plan, ctx.eps, need[0], ctx.group
        )
        held = (dkernel.to(kernel.dtype) if need[1] else None, dbias.to(bias.dtype) if need[2] else None)
        return (dx if need[0] else None, *held, *(None,) * 10)


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()

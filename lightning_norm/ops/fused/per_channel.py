"""Equations in which each channel stands alone, on the kernels: four launches forward, three backward.

The operators take ``plan`` and ``numbers``, the fields of ``ChannelPlan`` and ``Numbers``.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_norm.kernels.per_channel.flags import ChannelPlan, Numbers
from lightning_norm.ops.fused import operators
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.sync import Ranks

ops = torch.ops.lightning_norm
GATES = ("center_weight", "scale_weight", "scale_bias", "affine_weight", "affine_bias", "gate_weight", "gate_bias")
PLAN = tuple(field.name for field in fields(ChannelPlan))
NUMBERS = {field.name: 0.0 if field.default is MISSING else field.default for field in fields(Numbers)}
_BUFFERS = dict(zip("abcdefgh", ("mean", "spread", "tracked", "skipped", *(f"more{i}" for i in range(4))), strict=True))
SCHEMAS = {
    name: "(Tensor x, Tensor? weight, Tensor? bias, Tensor?[] gates, Tensor? shares, "
    + ", ".join(f"Tensor{f'({letter}!)' if moves else ''}? {buffer}" for letter, buffer in _BUFFERS.items())
    + ", Tensor? rate, Tensor? threshold, int channel_dim, int[] plan, float[] numbers, str group) -> "
    f"({', '.join(['Tensor'] * 6)})"
    for name, moves in (("channels", False), ("channels_and_track", True))
}
SCHEMAS["channel_gradients"] = (
    "(Tensor dy, Tensor x, Tensor own, Tensor stats, Tensor coef, Tensor seen, Tensor batch, Tensor total, "
    "Tensor? weight, Tensor? bias, Tensor?[] gates, Tensor? shares, Tensor? residual, int channel_dim, int[] plan, "
    f"float[] numbers, str activation, bool need_dx, str group) -> ({', '.join(['Tensor'] * 11)})"
)


@dataclass(frozen=True)
class PerChannelSpec:
    """Equations the kernels know; see ``lightning_norm.kernels.channels``.

    Args:
        weight: gamma, (C,) or (K, C).
        bias: beta, likewise.
        plan: fields of ``ChannelPlan`` that are not 0.
        numbers: fields of ``Numbers``, of which ``eps`` must be given.
        gates: the parameters of the rectifications and of the contexts' gate, in the order of ``GATES``.
        shares: of each sample in each context, (N, K), where they are given; no gradient.
        running: mean, spread, number of updates, number of skipped ones.
        counters: see ``launch_channels.coefficients``.
        rate: momentum or alpha, 0-dim.
        threshold: of the condensation, 0-dim.
        group: name of the ranks that pool the batch's statistics; "" for this process alone.
    """

    weight: Tensor | None
    bias: Tensor | None
    plan: dict[str, int]
    numbers: dict[str, float]
    gates: tuple[Tensor | None, ...] = (None,) * 7
    shares: Tensor | None = None
    running: tuple[Tensor | None, ...] = (None,) * 4
    counters: tuple[Tensor | None, ...] = ()
    rate: Tensor | None = None
    threshold: Tensor | None = None
    group: str = ""

    def over(self, ranks: Ranks) -> PerChannelSpec | None:
        """Return the same equations for a batch that lies on several ranks; ``None`` with contexts or a threshold."""
        if self.plan.get("contexts") or self.plan.get("choose"):
            return None
        return replace(self, plan={**self.plan, "ranks": 1}, group=ranks.group)

    def fields(self) -> tuple[list[int], list[float]]:
        """Return plan and numbers as the operators take them."""
        plan = [int(self.plan.get(name, 0)) for name in PLAN]
        return plan, [float(self.numbers.get(name, default)) for name, default in NUMBERS.items()]

    def normalize(self, x: Tensor, layout: Layout, activation: str, residual: Tensor | None) -> Tensor:
        """Return act(normalized x + residual), on the kernels."""
        plan, numbers = self.fields()
        held = tuple(None if t is None else t.detach() for t in (self.weight, self.bias, *self.gates))
        counters = (*self.counters, *(None,) * (4 - len(self.counters)))
        op = ops.channels_and_track if self.plan.get("track") else ops.channels
        stats = op(
            x.detach(), *held[:2], list(held[2:]), self.shares, *self.running, *counters, self.rate, self.threshold,
            layout.channel_dim, plan, numbers, self.group,
        )  # fmt: skip
        y: Tensor = _Channels.apply(
            x, self.weight, self.bias, *self.gates, residual, *stats, self.shares, layout.channel_dim, plan, numbers,
            activation, self.group,
        )  # fmt: skip
        return y


class _Channels(torch.autograd.Function):
    """y from x and its coefficients; all gradients at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        held, (residual, *stats, shares, channel_dim, plan, numbers, activation, group) = rest[:9], rest[9:]
        kept = residual if activation != "none" else None  # without an activation its gradient is dy
        ctx.save_for_backward(x, *held, kept, *stats, shares)
        ctx.channel_dim, ctx.plan, ctx.numbers, ctx.activation, ctx.group = (
            channel_dim,
            plan,
            numbers,
            activation,
            group,
        )
        y: Tensor = ops.apply(x, stats[2], channel_dim, activation, residual)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operators.refuse_second_derivatives()
        x, *rest = ctx.saved_tensors
        (weight, bias, *gates), (kept, *stats, shares) = rest[:9], rest[9:]
        need, (dy,) = ctx.needs_input_grad, grads
        meet = (need[0] or need[3]) and not ChannelPlan(*ctx.plan).detach  # the batch's statistics have a gradient
        dx, *found, dresidual = ops.channel_gradients(
            dy, x, *stats, weight, bias, gates, shares, kept, ctx.channel_dim, ctx.plan, ctx.numbers, ctx.activation,
            need[0], ctx.group if meet else "",
        )  # fmt: skip
        back = [
            g.view(t.shape).to(t.dtype) if n and t is not None else None
            for g, t, n in zip(found, rest[:9], need[1:10], strict=True)
        ]
        if need[10] and kept is None:
            dresidual = dy
        return (dx if need[0] else None, *back, dresidual if need[10] else None, *(None,) * 12)


def _channels(x: Tensor, weight: Any, bias: Any, gates: Any, shares: Any, *args: Any) -> tuple[Tensor, ...]:
    from lightning_norm.kernels.per_channel.launch import coefficients

    *buffers, rate, threshold, channel_dim, plan, numbers, group = args
    return coefficients(
        x, weight, bias, gates, shares, buffers[:4], buffers[4:], rate, threshold, channel_dim, ChannelPlan(*plan),
        Numbers(*numbers), operators.over(group),
    )  # fmt: skip


def _gradients(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from lightning_norm.kernels.per_channel.launch import gradients

    own, stats, coef, seen, batch, total, weight, bias, gates, shares, residual, channel_dim, plan, numbers, *how = args
    activation, need_dx, group = how
    return gradients(
        dy, x, own, stats, coef, seen, batch, total, weight, bias, gates, shares, residual, channel_dim,
        ChannelPlan(*plan), Numbers(*numbers), activation, need_dx, operators.over(group),
    )  # fmt: skip


def _fake_channels(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    channel_dim, plan, _, group = args[-4:]
    held, n, c = ChannelPlan(*plan), x.shape[0], x.shape[channel_dim]
    coef = x.new_empty((3, n, c), dtype=torch.float32)
    own = torch.empty_like(coef) if held.own else coef.new_empty(0)
    total = coef.new_empty((1, 1 + 2 * c) if group else (0,), dtype=torch.float64)
    batch = coef.new_empty(3, c if group else 0)
    return own, coef.new_empty(held.lines, held.rows, c), coef, coef.new_empty(held.seen(n)), batch, total


def _fake_gradients(dy: Tensor, x: Tensor, own: Tensor, stats: Tensor, coef: Tensor, *args: Any) -> Any:
    gates, _, residual, _, plan, _, _, need_dx, _ = args[-9:]
    c, rows = coef.shape[2], ChannelPlan(*plan).rows
    dx, dresidual = operators.fake_input_gradients(x, coef, residual, need_dx)
    dgates = [coef.new_empty(0) if t is None else torch.empty_like(t, dtype=torch.float32) for t in gates]
    return dx, coef.new_empty(rows, c), coef.new_empty(rows, c), *dgates, dresidual


operators.define(
    SCHEMAS,
    {"channels": _channels, "channels_and_track": _channels, "channel_gradients": _gradients},
    {"channels": _fake_channels, "channels_and_track": _fake_channels, "channel_gradients": _fake_gradients},
)

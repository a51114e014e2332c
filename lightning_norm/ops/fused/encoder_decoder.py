"""Equations with encoder-decoders on the statistics, on the kernels: four launches forward, five backward.

The operators take ``plan``, the fields of ``lightning_norm.kernels.launch_coders.CoderPlan``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_norm.ops.fused import operators
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.sync import Ranks

ops = torch.ops.lightning_norm
_BUFFERS = ("running_mean", "running_var", "tracked", "skipped")
SCHEMAS = {
    name: "(Tensor x, Tensor[] coders, Tensor?[] gates, Tensor? weight, Tensor? bias, Tensor? noise, Tensor? share, "
    "int seed, "
    + ", ".join(f"Tensor{f'({a}!)' if moves else ''}? {t}" for a, t in zip("abcd", _BUFFERS))  # noqa: B905
    + ", Tensor? momentum, int channel_dim, int[] plan, float eps) -> (Tensor, Tensor, Tensor, Tensor)"
    for name, moves in (("coders", False), ("coders_and_track", True))
} | {
    "coder_gradients": "(Tensor dy, Tensor x, Tensor stats, Tensor hidden, Tensor coded, Tensor coef, Tensor[] coders, "
    "Tensor?[] gates, Tensor? weight, Tensor? noise, Tensor? share, int seed, Tensor? residual, int channel_dim, "
    "int[] plan, float eps, str activation, bool need_dx) -> (Tensor, Tensor[], Tensor)",
}


@dataclass(frozen=True)
class EncoderDecoderSpec:
    """Equations the kernels know; see ``lightning_norm.kernels.coders``.

    Args:
        weight: gamma, (C,).
        bias: beta, (C,).
        gates: lambda of mu, sigma, beta and gamma; the last two may be absent.
        coders: weight and bias of E_s, D_mu, D_sigma, E_r, D_beta and D_gamma.
        plan: fields of ``CoderPlan``.
        eps: inside the root.
        share: of the statistics that E_s does not see, 0-dim; ``None`` for none.
        running: mean, variance, number of updates, number of skipped ones, momentum.
    """

    weight: Tensor | None
    bias: Tensor | None
    gates: tuple[Tensor | None, ...]
    coders: tuple[Tensor, ...]
    plan: list[int]
    eps: float
    share: Tensor | None = None
    running: tuple[Tensor | None, ...] = (None,) * 5

    def over(self, ranks: Ranks) -> None:
        """Return ``None``: the one row of statistics would be that of all ranks, which the kernels do not ask for."""

    def normalize(self, x: Tensor, layout: Layout, activation: str, residual: Tensor | None) -> Tensor:
        """Return act(normalized x + residual), on the kernels."""
        dropped = self._noise(x, layout.c)
        gates, coders = ([None if t is None else t.detach() for t in held] for held in (self.gates, self.coders))
        weight, bias = (None if t is None else t.detach() for t in (self.weight, self.bias))
        op = ops.coders_and_track if self.plan[2] else ops.coders
        stats = op(
            x.detach(), coders, gates, weight, bias, *dropped, *self.running, layout.channel_dim, self.plan, self.eps
        )
        y: Tensor = _Coders.apply(
            x, self.weight, self.bias, *self.gates, *self.coders, residual, *stats, *dropped, layout.channel_dim,
            self.plan, self.eps, activation,
        )  # fmt: skip
        return y

    def _noise(self, x: Tensor, channels: int) -> tuple[Tensor | None, Tensor | None, int]:
        """Return noise, share and seed: the kernels draw by themselves, but for graphs, which would repeat a seed."""
        if self.share is None:
            return None, None, 0
        if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return torch.rand(2, channels, device=x.device), self.share, 0
        return None, self.share, int(torch.randint(1 << 31, (), device="cpu"))


class _Coders(torch.autograd.Function):
    """y from x and its coefficients; all gradients at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        held, (residual, *kept, seed, channel_dim, plan, eps, activation) = rest[:18], rest[18:]
        ctx.save_for_backward(x, *held, residual if activation != "none" else None, *kept)  # else its gradient is dy
        ctx.seed, ctx.channel_dim, ctx.plan, ctx.eps, ctx.activation = seed, channel_dim, plan, eps, activation
        y: Tensor = ops.apply(x, kept[3], channel_dim, activation, residual)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operators.refuse_second_derivatives()
        x, *held = ctx.saved_tensors
        held, (kept, *stats, noise, share) = held[:18], held[18:]
        need, (dy,) = ctx.needs_input_grad, grads
        dx, (dweight, dbias, dgates, *dcoders), dresidual = ops.coder_gradients(
            dy, x, *stats, held[6:], held[2:6], held[0], noise, share, ctx.seed, kept, ctx.channel_dim,
            ctx.plan, ctx.eps, ctx.activation, need[0],
        )  # fmt: skip
        back = [
            g.view(t.shape).to(t.dtype) if n and t is not None else None
            for g, t, n in zip((dweight, dbias, *dgates, *dcoders), held, need[1:19], strict=True)
        ]
        if need[19] and kept is None:
            dresidual = dy
        return (dx if need[0] else None, *back, dresidual if need[19] else None, *(None,) * 11)


def _coders(x: Tensor, coders: Any, gates: Any, weight: Any, bias: Any, *args: Any) -> tuple[Tensor, ...]:
    from lightning_norm.kernels.encoder_decoder.launch import CoderPlan, coefficients

    noise, share, seed, *running, channel_dim, plan, eps = args
    return coefficients(
        x, coders, gates, weight, bias, noise, share, seed, running, channel_dim, CoderPlan(*plan), eps
    )  # fmt: skip


def _gradients(dy: Tensor, x: Tensor, *args: Any) -> Any:
    from lightning_norm.kernels.encoder_decoder.launch import CoderPlan, gradients

    *stats, coders, gates, weight, noise, share, seed, residual, channel_dim, plan, eps, activation, need_dx = args
    own, hidden, coded, coef = stats
    return gradients(
        dy, x, (own, hidden, coded, coef), coders, gates, weight, noise, share, seed, residual, channel_dim,
        CoderPlan(*plan), eps, activation, need_dx,
    )  # fmt: skip


def _fake_coders(x: Tensor, coders: list[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channel_dim, plan, _ = args[-3:]
    n, c, h = x.shape[0], x.shape[channel_dim], coders[0].shape[0] + coders[6].shape[0]
    rows, coef = (1 if plan[0] else n), x.new_empty((3, n, c), dtype=torch.float32)
    return coef.new_empty(3, rows, c), coef.new_empty(2, rows, h), coef.new_empty(4, rows, c), coef


def _fake_gradients(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    coef, coders, residual, need_dx = args[3], args[4], args[10], args[-1]
    c = coef.shape[2]
    dx, dresidual = operators.fake_input_gradients(x, coef, residual, need_dx)
    held = [coef.new_empty(size) for size in (c, c, 4, *(p.shape for p in coders))]
    return dx, held, dresidual


operators.define(
    SCHEMAS,
    {"coders": _coders, "coders_and_track": _coders, "coder_gradients": _gradients},
    {"coders": _fake_coders, "coders_and_track": _fake_coders, "coder_gradients": _fake_gradients},
)

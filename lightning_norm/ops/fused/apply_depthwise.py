"""Normalization and the depthwise convolution behind it in one pass over x, on the kernels: bnet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_norm.kernels.mixture.flags import MixtureFlags, MixtureStatistics
from lightning_norm.ops.fused import operators
from lightning_norm.ops.fused.operators import from_numbers, to_numbers

ops = torch.ops.lightning_norm
SCHEMAS = {
    "apply_depthwise": "(Tensor x, Tensor affine, Tensor kernel, Tensor? bias) -> Tensor",
    "apply_depthwise_gradients": "(Tensor dy, Tensor x, Tensor moments, Tensor batch, Tensor layer, Tensor affine, "
    "Tensor rank_sums, Tensor kernel, Tensor? running_mean, Tensor? running_var, int[] flags, float eps, bool need_dx, "
    "str group) -> (Tensor, Tensor, Tensor)",
}


class _ApplyDepthwise(torch.autograd.Function):
    """y = bias + the convolution of scale * (x - pivot) + offset; one operator returns all gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        *stats, mean, var, flags, eps, group = rest
        ctx.save_for_backward(x, kernel, bias, *stats, mean, var)
        ctx.flags, ctx.eps, ctx.group = flags, eps, group
        y: Tensor = ops.apply_depthwise(x, MixtureStatistics(*stats).affine, kernel, bias)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operators.refuse_second_derivatives()
        x, kernel, bias, *stats, mean, var = ctx.saved_tensors
        need, (dy,) = ctx.needs_input_grad, grads
        # All three at once, since each of them reads dy and x.
        dx, dkernel, dbias = ops.apply_depthwise_gradients(
            dy, x, *stats, kernel, mean, var, to_numbers(ctx.flags), ctx.eps, need[0], ctx.group
        )
        return (
            dx if need[0] else None,
            dkernel.to(kernel.dtype) if need[1] else None,
            dbias.to(bias.dtype) if need[2] else None,
            *(None,) * 10,
        )


def apply_depthwise(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    stats: MixtureStatistics,
    running: tuple[Tensor | None, Tensor | None],
    flags: MixtureFlags,
    eps: float,
    group: str,
) -> Tensor:
    """Return the depthwise convolution of x, normalized by its statistics; ``running`` where these are frozen."""
    y: Tensor = _ApplyDepthwise.apply(x, kernel.contiguous(), bias, *stats, *running, flags, eps, group)
    return y


def _apply(x: Tensor, affine: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    # Here and not above: importing launches imports Triton, which need not be installed.
    from lightning_norm.kernels.depthwise import launch

    return launch.apply_depthwise(x, affine, kernel, bias)


def _gradients(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from lightning_norm.kernels.depthwise.launch import gradients

    stats, (kernel, mean, var, numbers, eps, need_dx, group) = MixtureStatistics(*args[:5]), args[5:]
    # A schema takes flags as a list of integers; see ``operators``.
    flags = from_numbers(MixtureFlags, numbers)
    return gradients(dy, x, stats, kernel, (mean, var), flags, eps, need_dx, operators.over_ranks(group))


def _fake_gradients(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    stats, kernel, need_dx = MixtureStatistics(*args[:5]), args[5], args[-2]
    dx = torch.empty_like(x) if need_dx else stats.affine.new_empty(0)
    return dx, torch.empty_like(kernel, dtype=torch.float32), stats.affine.new_empty(x.shape[1])


operators.define(
    SCHEMAS,
    {"apply_depthwise": _apply, "apply_depthwise_gradients": _gradients},
    {"apply_depthwise": lambda x, *args: torch.empty_like(x), "apply_depthwise_gradients": _fake_gradients},
)

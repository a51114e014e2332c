"""Equations in which each channel stands alone, on the kernels: rbn, ubn, dbn and cn.

At most five launches forward and five backward; four and three where nothing is gated by contexts or measured.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_norm.kernels.grid import samples_and_channels
from lightning_norm.kernels.per_channel.flags import PerChannelFlags, PerChannelNumbers
from lightning_norm.ops.fused import operators, recorded
from lightning_norm.ops.fused.operators import from_numbers, to_numbers
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.sync import Ranks

ops = torch.ops.lightning_norm
GATES = ("center_weight", "scale_weight", "scale_bias", "affine_weight", "affine_bias", "gate_weight", "gate_bias")
_BUFFERS = ("running_mean", "running_var", "tracked", "skipped", *(f"counter{i}" for i in range(4)))
# Twice, with buffers that the operator writes to, "(a!)", and without: see ``mixture``.
SCHEMAS = {
    name: "(Tensor x, Tensor? weight, Tensor? bias, Tensor?[] gates, Tensor? responsibilities, "
    + ", ".join(f"Tensor{f'({a}!)' if moves else ''}? {t}" for a, t in zip("abcdefgh", _BUFFERS, strict=True))
    + ", Tensor? rate, Tensor? threshold, Tensor? limit, int channel_dim, int[] flags, float[] numbers, str group) -> "
    f"({', '.join(['Tensor'] * 6)})"
    for name, moves in (("per_channel_affine", False), ("per_channel_affine_and_track", True))
}
SCHEMAS["per_channel_gradients"] = (
    "(Tensor dy, Tensor x, Tensor moments, Tensor stats, Tensor affine, Tensor survey_out, Tensor batch, "
    "Tensor rank_sums, Tensor? weight, Tensor? bias, Tensor?[] gates, Tensor? responsibilities, Tensor? residual, "
    "int channel_dim, int[] flags, float[] numbers, str activation, bool need_dx, str group) "
    f"-> ({', '.join(['Tensor'] * 11)})"
)


@dataclass(frozen=True)
class PerChannelSpec:
    """The equations of one layer, for one call.

    Args:
        weight: gamma, (C,) or (K, C).
        bias: beta, likewise.
        flags: which equations.
        numbers: their real numbers.
        gates: the parameters of the rectifications and of the contexts' gate, in the order of ``GATES``.
        responsibilities: of each context for each sample, (N, K), where they are known; they have no gradient.
        running: mean, variance (or deviation), number of updates, number of skipped ones.
        counters: see ``lightning_norm.kernels.per_channel.launch.affine_of``.
        rate: momentum or alpha, 0-dim.
        threshold: of the condensation, or of what ``affine_of`` says, 0-dim.
        limit: likewise.
        group: name of the ranks that pool the batch's statistics; "" for this process alone.
    """

    weight: Tensor | None
    bias: Tensor | None
    flags: PerChannelFlags
    numbers: PerChannelNumbers
    gates: tuple[Tensor | None, ...] = (None,) * 7
    responsibilities: Tensor | None = None
    running: tuple[Tensor | None, ...] = (None,) * 4
    counters: tuple[Tensor | None, ...] = ()
    rate: Tensor | None = None
    threshold: Tensor | None = None
    limit: Tensor | None = None
    group: str = ""

    draws: ClassVar[bool] = False

    def over(self, ranks: Ranks) -> PerChannelSpec | None:
        """Return the same equations for a batch that lies on several ranks; ``None`` with contexts or a threshold."""
        if self.flags.contexts or self.flags.condensed:
            return None
        return replace(self, flags=replace(self.flags, ranks=True), group=ranks.group)

    @functools.cached_property
    def kind(self) -> object:
        """What the launches depend on beside tensors."""
        return recorded.kind_of("per channel", self.flags, self.numbers)

    @property
    def _of_batch_alone(self) -> bool:
        """Whether no sample is looked at by itself."""
        f = self.flags
        return not (f.contexts or f.condensed or f.center or f.scale or f.affine or f.gate)

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """The tensors that may need a gradient."""
        return self.weight, self.bias, *self.gates

    @property
    def buffers(self) -> tuple[Tensor | None, ...]:
        """What else the forward launches read or move."""
        counters = (*self.counters, *(None,) * (4 - len(self.counters)))
        return self.responsibilities, *self.running, *counters, self.rate, self.threshold, self.limit

    @property
    def backward_buffers(self) -> tuple[Tensor | None, ...]:
        """What else the backward launches read."""
        return (self.responsibilities,)

    @functools.cached_property
    def moved(self) -> tuple[Tensor, ...]:
        """The running statistics and counters, in training."""
        return tuple(t for t in (*self.running, *self.counters) if t is not None) if self.flags.track else ()

    def of_call(self, x: Tensor) -> tuple[Any, ...]:
        """Return nothing: no call draws numbers."""
        return ()

    def launch_forward(
        self, x: Tensor, residual: Tensor | None, parameters: Any, buffers: Any, channel_dim: int, activation: str
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Launch the pass over x and the equations, and then apply; or all in one launch."""
        from lightning_norm.kernels.owner.launch import normalize_channels, owner_of, owns_channels
        from lightning_norm.kernels.passes.launch import apply
        from lightning_norm.kernels.per_channel.launch import affine_of

        (weight, bias, *gates), (responsibilities, *moved, rate, threshold, limit) = parameters, buffers
        # As for a mixture: one launch where maps are small and channels stand alone.
        owner = owner_of(x, channel_dim) if owns_channels(self.flags) else None
        if owner is not None:
            return normalize_channels(
                owner, x, residual, weight, bias, gates, responsibilities, moved[:4], moved[4:], rate, threshold, limit,
                self.flags, self.numbers, activation,
            )  # fmt: skip
        stats = affine_of(
            x, weight, bias, gates, responsibilities, moved[:4], moved[4:], rate, threshold, limit, channel_dim,
            self.flags, self.numbers,
        )  # fmt: skip
        return apply(x, stats[2], channel_dim, activation, residual), stats

    def launch_backward(
        self, dy: Tensor, x: Tensor, residual: Any, stats: Any, parameters: Any, buffers: Any, need_dx: bool, *how: Any
    ) -> tuple[Any, ...]:
        """Launch the backward pass."""
        from lightning_norm.kernels.owner.launch import channel_gradients, owner_of, owns_channels
        from lightning_norm.kernels.per_channel.launch import gradients

        (weight, bias, *gates), (channel_dim, activation) = parameters, how
        moments, of_channels, affine, survey_out, batch, rank_sums = stats
        owner = owner_of(x, channel_dim) if owns_channels(self.flags) else None
        if owner is not None:
            dx, *of_parameters, dresidual = channel_gradients(
                owner, dy, x, moments, of_channels, affine, weight, bias, gates, buffers[0], residual, self.flags,
                self.numbers, activation, need_dx,
            )  # fmt: skip
        else:
            dx, *of_parameters, dresidual = gradients(
                dy, x, moments, of_channels, affine, survey_out, batch, rank_sums, weight, bias, gates, buffers[0],
                residual, channel_dim, self.flags, self.numbers, activation, need_dx,
            )  # fmt: skip
        # The kernels write rows of C numbers; a parameter is (C,), or (K, C) with contexts.
        shaped = [g if t is None else g.view(t.shape) for g, t in zip(of_parameters, parameters, strict=True)]
        return dx, dresidual, shaped

    def operator_backward(
        self, dy: Tensor, x: Tensor, residual: Any, stats: Any, parameters: Any, buffers: Any, need_dx: bool, *how: Any
    ) -> tuple[Any, ...]:
        """Run the backward pass as one operator."""
        (weight, bias, *gates), (channel_dim, activation) = parameters, how
        dx, *of_parameters, dresidual = ops.per_channel_gradients(
            dy, x, *stats, weight, bias, gates, buffers[0], residual, channel_dim, to_numbers(self.flags),
            to_numbers(self.numbers), activation, need_dx, "",
        )  # fmt: skip
        return dx, dresidual, of_parameters

    def normalize(self, x: Tensor, layout: Layout, activation: str, residual: Tensor | None) -> Tensor:
        """Return act(normalized x + residual), on the kernels."""
        channel_dim = recorded.channel_dim_of(x, self, layout.channel_dim)
        # Recorded launches hold no collective, in which other ranks would have to meet as well.
        if not self.group and recorded.can_record(x, self, residual):
            return recorded.normalize(x, self, channel_dim, activation, residual)
        # Under an operator nothing is recorded: the autograd function below has the gradients.
        weight, bias, *gates = (None if t is None else t.detach() for t in (self.weight, self.bias, *self.gates))
        counters = (*self.counters, *(None,) * (4 - len(self.counters)))
        op = ops.per_channel_affine_and_track if self.flags.track else ops.per_channel_affine
        stats = op(
            x.detach(), weight, bias, gates, self.responsibilities, *self.running, *counters, self.rate,
            self.threshold, self.limit, channel_dim, to_numbers(self.flags), to_numbers(self.numbers),
            self.group,
        )  # fmt: skip
        y: Tensor = _PerChannel.apply(
            x, self.weight, self.bias, *self.gates, residual, *stats, self.responsibilities, channel_dim,
            self.flags, self.numbers, activation, self.group,
        )  # fmt: skip
        return y


class _PerChannel(torch.autograd.Function):
    """y from x and its statistics; one operator returns all gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        parameters, (residual, *stats, responsibilities, channel_dim, flags, numbers, activation, group) = (
            rest[:9],
            rest[9:],
        )
        # Without an activation the gradient of the residual is dy, and the residual itself is not needed.
        saved = residual if activation != "none" else None
        ctx.save_for_backward(x, *parameters, saved, *stats, responsibilities)
        ctx.channel_dim, ctx.flags, ctx.numbers = channel_dim, flags, numbers
        ctx.activation, ctx.group = activation, group
        _, _, affine, *_ = stats
        y: Tensor = ops.apply(x, affine, channel_dim, activation, residual)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operators.refuse_second_derivatives()
        x, *rest = ctx.saved_tensors
        parameters, (residual, *stats, responsibilities) = rest[:9], rest[9:]
        weight, bias, *gates = parameters
        need, (dy,) = ctx.needs_input_grad, grads
        # The ranks meet only where the batch's statistics have a gradient: for x, or for the weight of the centering.
        meet = (need[0] or need[3]) and not ctx.flags.detach
        dx, *gradients, dresidual = ops.per_channel_gradients(
            dy, x, *stats, weight, bias, gates, responsibilities, residual, ctx.channel_dim, to_numbers(ctx.flags),
            to_numbers(ctx.numbers), ctx.activation, need[0], ctx.group if meet else "",
        )  # fmt: skip
        gradients = [
            g.view(t.shape).to(t.dtype) if needed and t is not None else None
            for g, t, needed in zip(gradients, parameters, need[1:10], strict=True)
        ]
        # Without an activation the residual itself was not kept, and its gradient is dy.
        if need[10] and residual is None:
            dresidual = dy
        return (dx if need[0] else None, *gradients, dresidual if need[10] else None, *(None,) * 12)


def _affine(x: Tensor, weight: Any, bias: Any, gates: Any, responsibilities: Any, *args: Any) -> tuple[Tensor, ...]:
    from lightning_norm.kernels.per_channel.launch import affine_of

    *buffers, rate, threshold, limit, channel_dim, flags, numbers, group = args
    return affine_of(
        x, weight, bias, gates, responsibilities, buffers[:4], buffers[4:], rate, threshold, limit, channel_dim,
        from_numbers(PerChannelFlags, flags), from_numbers(PerChannelNumbers, numbers), operators.over_ranks(group),
    )  # fmt: skip


def _gradients(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from lightning_norm.kernels.per_channel.launch import gradients

    (moments, stats, affine, survey_out, batch, rank_sums, weight, bias, *rest) = args
    gates, responsibilities, residual, channel_dim, flags, numbers, activation, need_dx, group = rest
    return gradients(
        dy, x, moments, stats, affine, survey_out, batch, rank_sums, weight, bias, gates, responsibilities, residual,
        channel_dim, from_numbers(PerChannelFlags, flags), from_numbers(PerChannelNumbers, numbers), activation,
        need_dx, operators.over_ranks(group),
    )  # fmt: skip


def _fake_affine(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    channel_dim, ints, _, group = args[-4:]
    flags, (n, c) = from_numbers(PerChannelFlags, ints), samples_and_channels(x, channel_dim)
    affine = operators.per_sample_and_channel(x, channel_dim, 3)
    moments = torch.empty_like(affine[1:]) if flags.needs_moments else affine.new_empty(0)
    stats, survey_out = affine.new_empty(flags.num_statistics, flags.rows, c), affine.new_empty(flags.survey_size(n))
    rank_sums = affine.new_empty(operators.rank_sums_shape(group, c), dtype=torch.float64)
    return moments, stats, affine, survey_out, affine.new_empty(3, c if group else 0), rank_sums


def _fake_gradients(dy: Tensor, x: Tensor, moments: Tensor, stats: Tensor, affine: Tensor, *args: Any) -> Any:
    gates, _, residual, _, ints, _, _, need_dx, _ = args[-9:]
    c, rows = affine.shape[2], from_numbers(PerChannelFlags, ints).rows
    dx, dresidual = operators.fake_input_gradients(x, affine, residual, need_dx)
    dgates = [affine.new_empty(0) if t is None else torch.empty_like(t, dtype=torch.float32) for t in gates]
    return dx, affine.new_empty(rows, c), affine.new_empty(rows, c), *dgates, dresidual


operators.define(
    SCHEMAS,
    {
        "per_channel_affine": _affine,
        "per_channel_affine_and_track": _affine,
        "per_channel_gradients": _gradients,
    },
    {
        "per_channel_affine": _fake_affine,
        "per_channel_affine_and_track": _fake_affine,
        "per_channel_gradients": _fake_gradients,
    },
)

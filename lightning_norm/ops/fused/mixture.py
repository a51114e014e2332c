"""Mixtures of statistics on the kernels: bn, in, ln, gn, sn and bcn; at most four launches forward, four backward.

A normalizer describes its equations as a :class:`MixtureSpec`. The kernels compute the same as its readable
``algebra``, and move its running statistics in the same launches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_norm.kernels import grid
from lightning_norm.kernels.grid import samples_and_channels
from lightning_norm.kernels.mixture.flags import MixtureFlags, MixtureStatistics
from lightning_norm.ops.fused import operators, recorded
from lightning_norm.ops.fused.apply_depthwise import apply_depthwise
from lightning_norm.ops.fused.operators import from_numbers, to_numbers
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.sync import Ranks

ops = torch.ops.lightning_norm
_BUFFERS = ("running_mean", "running_var", "tracked", "skipped")
CONVOLVED = "_convolved"
"""Where a mixture holds the description of itself with the convolution that was behind it in the last call."""
_FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
# Twice, with buffers that the operator writes to, "(a!)", and without. A compiler may drop, or run again, only what
# writes to nothing.
SCHEMAS = {
    name: "(Tensor x, Tensor? weight, Tensor? bias, Tensor? w, Tensor? v, "
    + ", ".join(f"Tensor{f'({a}!)' if moves else ''}? {t}" for a, t in zip("abcd", _BUFFERS, strict=False))
    + f", Tensor? momentum, int channel_dim, int[] flags, float eps, str group) -> {_FIVE}"
    for name, moves in (("mixture_affine", False), ("mixture_affine_and_track", True))
}
SCHEMAS["mixture_gradients"] = (
    "(Tensor dy, Tensor x, Tensor moments, Tensor batch, Tensor layer, Tensor affine, Tensor rank_sums, "
    "Tensor? weight, Tensor? w, Tensor? v, Tensor? running_mean, Tensor? running_var, Tensor? residual, "
    "int channel_dim, int[] flags, float eps, str activation, bool need_dx, str group) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@dataclass(frozen=True)
class Running:
    """Running statistics of the batch.

    Args:
        mean: (C,).
        var: (C,).
        tracked: number of updates, 0-dim.
        skipped: number of updates left out because a statistic was NaN or infinite, 0-dim.
        momentum: 0-dim; ``None`` for the average of all batches.
    """

    mean: Tensor
    var: Tensor
    tracked: Tensor
    skipped: Tensor
    momentum: Tensor | None


@dataclass(frozen=True)
class MixtureSpec:
    """The equations of one layer, for one call.

    Args:
        flags: which equations.
        eps: inside the root.
        weight: gamma, (C,).
        bias: beta, (C,).
        w: weights of the means, one per statistic; iota (C,) with ``flags.outputs``, tau (C,) with ``threshold``.
        v: weights of the variances.
        running: running statistics of "bn".
        group: name of the ranks that pool the batch's statistics; "" for this process alone.
    """

    flags: MixtureFlags
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    w: Tensor | None = None
    v: Tensor | None = None
    running: Running | None = None
    group: str = ""

    draws: ClassVar[bool] = False

    def over(self, ranks: Ranks) -> MixtureSpec:
        """Return the same equations for a batch that lies on several ranks."""
        return replace(self, group=ranks.group) if self.flags.at_bn >= 0 else self

    @functools.cached_property
    def kind(self) -> object:
        """What the launches depend on beside tensors."""
        return recorded.kind_of("mixture", self.flags, self.eps)

    @property
    def _of_batch_alone(self) -> bool:
        """Whether no sample has statistics of its own."""
        return self.flags.at_in < 0 and self.flags.at_ln < 0

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """The tensors that may need a gradient."""
        return self.weight, self.bias, self.w, self.v

    @property
    def buffers(self) -> tuple[Tensor | None, ...]:
        """The running statistics."""
        r = self.running
        return (None,) * 5 if r is None else (r.mean, r.var, r.tracked, r.skipped, r.momentum)

    @property
    def backward_buffers(self) -> tuple[Tensor | None, ...]:
        """The running statistics where y depends on them."""
        return self._frozen()

    @functools.cached_property
    def moved(self) -> tuple[Tensor, ...]:
        """The running statistics and their counters, in training."""
        r = self.running
        return (r.mean, r.var, r.tracked, r.skipped) if r is not None and self.flags.track else ()

    def of_call(self, x: Tensor) -> tuple[Any, ...]:
        """Return the counters by which the programs of a cooperative launch meet, where that is switched on."""
        if not grid.COOPERATIVE:
            return ()
        from lightning_norm.kernels.cooperative.launch import arrivals

        return (arrivals(x),)

    def launch_forward(
        self, x: Tensor, residual: Tensor | None, parameters: Any, buffers: Any, channel_dim: int, activation: str
    ) -> tuple[Tensor, MixtureStatistics]:
        """Launch the pass over x and the equations, and then apply; or all in one launch."""
        from lightning_norm.kernels.cooperative import launch as cooperative
        from lightning_norm.kernels.mixture.launch import affine_of
        from lightning_norm.kernels.owner.launch import normalize_mixture, owner_of, owns_mixture
        from lightning_norm.kernels.passes.launch import apply

        weight, bias, w, v = parameters
        running, arrived, activation = buffers[:5], buffers[5:], self.flags.activation(activation)
        equations = self.flags, self.eps, activation
        # A small map whose channels stand alone takes one launch, where that is switched on.
        owner = owner_of(x, channel_dim) if owns_mixture(self.flags) else None
        if owner is not None:
            return normalize_mixture(owner, x, residual, weight, bias, running, *equations)
        held = cooperative.grid_for(x, channel_dim, self.flags) if arrived else None
        if held is not None:
            return cooperative.normalize(held, x, residual, weight, bias, w, v, running, arrived[0], *equations)
        stats = affine_of(x, weight, bias, w, v, running, channel_dim, self.flags, self.eps)
        return apply(x, stats.affine, channel_dim, activation, residual), stats

    def launch_backward(
        self, dy: Tensor, x: Tensor, residual: Any, stats: Any, parameters: Any, buffers: Any, need_dx: bool, *how: Any
    ) -> tuple[Any, ...]:
        """Launch the backward pass."""
        from lightning_norm.kernels.cooperative import launch as cooperative
        from lightning_norm.kernels.mixture.launch import gradients
        from lightning_norm.kernels.owner.launch import mixture_gradients, owner_of, owns_mixture

        (weight, _, w, v), (channel_dim, activation), known = parameters, how, MixtureStatistics(*stats)
        frozen, arrived = buffers[:2], buffers[2:]
        equations = self.flags, self.eps, self.flags.activation(activation), need_dx
        owner = owner_of(x, channel_dim) if owns_mixture(self.flags) else None
        held = cooperative.grid_for(x, channel_dim, self.flags) if arrived else None
        if owner is not None:
            dx, *of_parameters, dresidual = mixture_gradients(owner, dy, x, known, weight, residual, *equations)
        elif held is not None:
            dx, *of_parameters, dresidual = cooperative.gradients(
                held, dy, x, known, weight, w, v, residual, arrived[0], *equations
            )
        else:
            dx, *of_parameters, dresidual = gradients(
                dy, x, known, weight, w, v, frozen, residual, channel_dim, *equations
            )  # fmt: skip
        return dx, dresidual, of_parameters

    def operator_backward(
        self, dy: Tensor, x: Tensor, residual: Any, stats: Any, parameters: Any, buffers: Any, need_dx: bool, *how: Any
    ) -> tuple[Any, ...]:
        """Run the backward pass as one operator."""
        (weight, _, w, v), (channel_dim, activation) = parameters, how
        dx, *of_parameters, dresidual = ops.mixture_gradients(
            dy, x, *stats, weight, w, v, *buffers[:2], residual, channel_dim, to_numbers(self.flags), self.eps,
            self.flags.activation(activation), need_dx, "",
        )  # fmt: skip
        return dx, dresidual, of_parameters

    def normalize(self, x: Tensor, layout: Layout, activation: str, residual: Tensor | None) -> Tensor:
        """Return act(normalized x + residual), on the kernels."""
        channel_dim = recorded.channel_dim_of(x, self, layout.channel_dim)
        # Recorded launches hold no collective, in which other ranks would have to meet as well.
        if not self.group and recorded.can_record(x, self, residual):
            return recorded.normalize(x, self, channel_dim, activation, residual)
        y: Tensor = _Mixture.apply(
            x, self.weight, self.bias, self.w, self.v, residual, *self._statistics(x, channel_dim), *self._frozen(),
            channel_dim, self.flags, self.eps, self.flags.activation(activation), self.group,
        )  # fmt: skip
        return y

    def normalize_depthwise(self, x: Tensor, kernel: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
        """Return the depthwise convolution of the normalized x, on the kernels, of a spec without weight and bias."""
        depthwise = vars(self).get(CONVOLVED)
        if depthwise is None or depthwise.kernel is not kernel or depthwise.bias is not bias:
            # A copy, for two that know each other would outlive the layer until Python looks for cycles.
            depthwise = vars(self)[CONVOLVED] = RecordedDepthwise(replace(self), kernel, bias)
        if not self.group and recorded.can_record(x, depthwise) and kernel.is_contiguous():
            return recorded.normalize(x, depthwise, layout.channel_dim, "none", None)
        stats = self._statistics(x, layout.channel_dim)
        return apply_depthwise(x, kernel, bias, stats, self._frozen(), self.flags, self.eps, self.group)

    def _statistics(self, x: Tensor, channel_dim: int) -> MixtureStatistics:
        """Return the statistics of x, and move the running ones."""
        # The operator has no formula for gradients: the autograd functions have.
        parameters = (None if t is None else t.detach() for t in self.parameters)
        op = ops.mixture_affine_and_track if self.flags.track else ops.mixture_affine
        return MixtureStatistics(
            *op(x.detach(), *parameters, *self.buffers, channel_dim, to_numbers(self.flags), self.eps, self.group)
        )

    def _frozen(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the running statistics where y depends on them, for the backward pass."""
        r = self.running
        return (r.mean, r.var) if r is not None and self.flags.frozen else (None, None)


@dataclass(frozen=True)
class RecordedDepthwise:
    """A mixture and the depthwise convolution behind it, for ``lightning_norm.ops.fused.recorded``.

    Args:
        mixture: the normalization, without weight and bias.
        kernel: (C, 1, *).
        bias: (C,).
    """

    mixture: MixtureSpec
    kernel: Tensor
    bias: Tensor | None

    draws: ClassVar[bool] = False

    @functools.cached_property
    def kind(self) -> object:
        """What the launches depend on beside tensors."""
        return recorded.kind_of(self.mixture.kind, self.kernel.shape)

    @property
    def _of_batch_alone(self) -> bool:
        """Whether positions have no neighbours: never."""
        return False

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """The tensors that may need a gradient."""
        return self.kernel, self.bias

    @property
    def buffers(self) -> tuple[Tensor | None, ...]:
        """The running statistics."""
        return self.mixture.buffers

    @property
    def backward_buffers(self) -> tuple[Tensor | None, ...]:
        """The running statistics where y depends on them."""
        return self.mixture.backward_buffers

    @property
    def moved(self) -> tuple[Tensor, ...]:
        """The running statistics and their counters, in training."""
        return self.mixture.moved

    def of_call(self, x: Tensor) -> tuple[Any, ...]:
        """Return nothing: no call draws numbers."""
        return ()

    def launch_forward(
        self, x: Tensor, residual: None, parameters: Any, buffers: Any, channel_dim: int, activation: str
    ) -> tuple[Tensor, MixtureStatistics]:
        """Launch the pass over x and the equations, and then apply."""
        from lightning_norm.kernels.depthwise.launch import apply_depthwise as launch
        from lightning_norm.kernels.mixture.launch import affine_of

        flags, eps = self.mixture.flags, self.mixture.eps
        stats = affine_of(x, None, None, None, None, buffers, channel_dim, flags, eps)
        return launch(x, stats.affine, *parameters), stats

    def launch_backward(
        self, dy: Tensor, x: Tensor, residual: None, stats: Any, parameters: Any, buffers: Any, need_dx: bool, *how: Any
    ) -> tuple[Any, ...]:
        """Launch the backward pass."""
        from lightning_norm.kernels.depthwise.launch import gradients

        flags, eps = self.mixture.flags, self.mixture.eps
        dx, *of_parameters = gradients(
            dy, x, MixtureStatistics(*stats), parameters[0], buffers, flags, eps, need_dx
        )  # fmt: skip
        return dx, None, of_parameters

    def operator_backward(
        self, dy: Tensor, x: Tensor, residual: None, stats: Any, parameters: Any, buffers: Any, need_dx: bool, *how: Any
    ) -> tuple[Any, ...]:
        """Run the backward pass as one operator."""
        dx, *of_parameters = ops.apply_depthwise_gradients(
            dy, x, *stats, parameters[0], *buffers, to_numbers(self.mixture.flags), self.mixture.eps, need_dx, ""
        )
        return dx, None, of_parameters


class _Mixture(torch.autograd.Function):
    """y from x and its statistics; one operator returns all gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        w: Tensor | None,
        v: Tensor | None,
        residual: Tensor | None,
        moments: Tensor,
        batch: Tensor,
        layer: Tensor,
        affine: Tensor,
        rank_sums: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        channel_dim: int,
        flags: MixtureFlags,
        eps: float,
        activation: str,
        group: str,
    ) -> Tensor:
        # Without an activation the gradient of the residual is dy, and the residual itself is not needed.
        saved = residual if activation != "none" else None
        ctx.save_for_backward(x, weight, bias, w, v, saved, moments, batch, layer, affine, rank_sums, mean, var)
        ctx.channel_dim, ctx.flags, ctx.eps, ctx.activation, ctx.group = channel_dim, flags, eps, activation, group
        y: Tensor = ops.apply(x, affine, channel_dim, activation, residual)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operators.refuse_second_derivatives()
        (dy,) = grads
        x, weight, bias, w, v, residual, *stats, mean, var = ctx.saved_tensors
        need = ctx.needs_input_grad
        dx, *gradients, dresidual = ops.mixture_gradients(
            dy, x, *stats, weight, w, v, mean, var, residual, ctx.channel_dim, to_numbers(ctx.flags), ctx.eps,
            ctx.activation, need[0], ctx.group,
        )  # fmt: skip
        gradients = [
            g.to(t.dtype) if needed and t is not None else None
            for g, t, needed in zip(gradients, (weight, bias, w, v), need[1:5], strict=True)
        ]
        if need[5] and residual is None:
            dresidual = dy
        return (dx if need[0] else None, *gradients, dresidual if need[5] else None, *(None,) * 12)


def _affine(x: Tensor, weight: Any, bias: Any, w: Any, v: Any, *args: Any) -> tuple[Tensor, ...]:
    from lightning_norm.kernels.mixture.launch import affine_of

    *running, channel_dim, numbers, eps, group = args
    flags = from_numbers(MixtureFlags, numbers)
    return affine_of(
        x, weight, bias, w, v, tuple(running), channel_dim, flags, eps, operators.over_ranks(group)
    )  # fmt: skip


def _gradients(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from lightning_norm.kernels.mixture.launch import gradients

    stats, (weight, w, v, mean, var, residual, channel_dim, numbers, *rest) = MixtureStatistics(*args[:5]), args[5:]
    eps, activation, need_dx, group = rest
    return gradients(
        dy, x, stats, weight, w, v, (mean, var), residual, channel_dim, from_numbers(MixtureFlags, numbers), eps,
        activation, need_dx, operators.over_ranks(group),
    )  # fmt: skip


def _fake_affine(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    channel_dim, numbers, _, group = args[-4:]
    flags, (n, c) = from_numbers(MixtureFlags, numbers), samples_and_channels(x, channel_dim)
    affine = operators.per_sample_and_channel(x, channel_dim, flags.affine_rows)
    moments = torch.empty_like(affine[:2]) if flags.needs_moments else affine.new_empty(0)
    batch = affine.new_empty(3, c) if flags.pools_batch else affine.new_empty(0)
    layer = affine.new_empty(3, n, flags.num_groups) if flags.pools_layer else affine.new_empty(0)
    rank_sums = affine.new_empty(operators.rank_sums_shape(group, c), dtype=torch.float64)
    return moments, batch, layer, affine, rank_sums


def _fake_gradients(
    dy: Tensor, x: Tensor, moments: Tensor, batch: Tensor, layer: Tensor, affine: Tensor, *args: Any
) -> Any:
    residual, channel_dim, numbers, _, _, need_dx, _ = args[-7:]
    flags, (_, c) = from_numbers(MixtureFlags, numbers), samples_and_channels(x, channel_dim)
    dx, dresidual = operators.fake_input_gradients(x, affine, residual, need_dx)
    dw = affine.new_empty(flags.length_of_w(c))
    return dx, affine.new_empty(c), affine.new_empty(c), dw, affine.new_empty(flags.num_weights), dresidual


operators.define(
    SCHEMAS,
    {"mixture_affine": _affine, "mixture_affine_and_track": _affine, "mixture_gradients": _gradients},
    {"mixture_affine": _fake_affine, "mixture_affine_and_track": _fake_affine, "mixture_gradients": _fake_gradients},
)

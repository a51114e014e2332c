"""Encoder-decoders on the statistics, on the kernels: afn and asr; four launches forward, five backward."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_norm.kernels import launcher
from lightning_norm.kernels.encoder_decoder.flags import EncoderDecoderFlags
from lightning_norm.kernels.grid import samples_and_channels
from lightning_norm.ops.fused import operators, recorded
from lightning_norm.ops.fused.operators import from_numbers, to_numbers
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.sync import Ranks

ops = torch.ops.lightning_norm
_BUFFERS = ("running_mean", "running_var", "tracked", "skipped")
# Twice, with buffers that the operator writes to, "(a!)", and without: see ``mixture``.
SCHEMAS = {
    name: "(Tensor x, Tensor[] linears, Tensor?[] gates, Tensor? weight, Tensor? bias, Tensor? noise, "
    "Tensor? drop_prob, int seed, "
    + ", ".join(f"Tensor{f'({a}!)' if moves else ''}? {t}" for a, t in zip("abcd", _BUFFERS, strict=True))
    + ", Tensor? momentum, int channel_dim, int[] flags, float eps) -> (Tensor, Tensor, Tensor, Tensor)"
    for name, moves in (("encoder_decoder_affine", False), ("encoder_decoder_affine_and_track", True))
}
SCHEMAS["encoder_decoder_gradients"] = (
    "(Tensor dy, Tensor x, Tensor statistics, Tensor hidden, Tensor outputs, Tensor affine, Tensor[] linears, "
    "Tensor?[] gates, Tensor? weight, Tensor? noise, Tensor? drop_prob, int seed, Tensor? residual, int channel_dim, "
    "int[] flags, float eps, str activation, bool need_dx) -> (Tensor, Tensor[], Tensor)"
)


@dataclass(frozen=True)
class EncoderDecoderSpec:
    """The equations of one layer, for one call.

    Args:
        weight: gamma, (C,).
        bias: beta, (C,).
        gates: lambda of mu, sigma, beta and gamma; the last two may be absent.
        linears: weight and bias of the linear layers E_s, D_mu, D_sigma, E_r, D_beta and D_gamma.
        flags: which statistics.
        eps: inside the root.
        drop_prob: probability with which E_s does not see a statistic, 0-dim; ``None`` for none.
        running: mean, variance, number of updates, number of skipped ones, momentum.
    """

    weight: Tensor | None
    bias: Tensor | None
    gates: tuple[Tensor | None, ...]
    linears: tuple[Tensor, ...]
    flags: EncoderDecoderFlags
    eps: float
    drop_prob: Tensor | None = None
    running: tuple[Tensor | None, ...] = (None,) * 5

    draws: ClassVar[bool] = True

    def over(self, ranks: Ranks) -> None:
        """Return ``None``: the one row of statistics would be that of all ranks, which the kernels do not ask for."""

    @functools.cached_property
    def kind(self) -> object:
        """What the launches depend on beside tensors."""
        return recorded.kind_of("encoder decoder", self.flags, self.eps, *(t.shape for t in self.linears))

    @property
    def _of_batch_alone(self) -> bool:
        """Whether the networks see the one row of the batch's or the running statistics."""
        return self.flags.batch

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """The tensors that may need a gradient."""
        return self.weight, self.bias, *self.gates, *self.linears

    @property
    def buffers(self) -> tuple[Tensor | None, ...]:
        """The running statistics."""
        return self.running

    @property
    def backward_buffers(self) -> tuple[Tensor | None, ...]:
        """Nothing beside what is of the call: noise, probability and seed."""
        return ()

    @functools.cached_property
    def moved(self) -> tuple[Tensor, ...]:
        """The running statistics and their counters, in training."""
        return tuple(t for t in self.running[:4] if t is not None) if self.flags.track else ()

    def of_call(self, x: Tensor) -> tuple[Any, ...]:
        """Return noise, probability and seed of the dropout."""
        noise, drop_prob, seed = self._dropout(x)
        return noise, drop_prob, launcher.Number(seed)

    def launch_forward(
        self, x: Tensor, residual: Tensor | None, parameters: Any, buffers: Any, channel_dim: int, activation: str
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Launch the pass over x and the equations, and then apply."""
        from lightning_norm.kernels.encoder_decoder.launch import affine_of
        from lightning_norm.kernels.passes.launch import apply

        weight, bias, gates, linears = parameters[0], parameters[1], parameters[2:6], parameters[6:]
        *running, noise, drop_prob, seed = buffers
        stats = affine_of(
            x, linears, gates, weight, bias, noise, drop_prob, seed, running, channel_dim, self.flags, self.eps
        )
        return apply(x, stats[3], channel_dim, activation, residual), stats

    def launch_backward(
        self, dy: Tensor, x: Tensor, residual: Any, stats: Any, parameters: Any, buffers: Any, need_dx: bool, *how: Any
    ) -> tuple[Any, ...]:
        """Launch the backward pass."""
        from lightning_norm.kernels.encoder_decoder.launch import gradients

        weight, gates, linears, (channel_dim, activation) = parameters[0], parameters[2:6], parameters[6:], how
        noise, drop_prob, seed = buffers
        dx, (dweight, dbias, dgates, *dlinears), dresidual = gradients(
            dy, x, stats, linears, gates, weight, noise, drop_prob, seed, residual, channel_dim, self.flags, self.eps,
            activation, need_dx,
        )  # fmt: skip
        # Each gate is a single number, in a tensor of one axis.
        return dx, dresidual, [dweight, dbias, *dgates[:4].unsqueeze(1).unbind(), *dlinears]

    def operator_backward(
        self, dy: Tensor, x: Tensor, residual: Any, stats: Any, parameters: Any, buffers: Any, need_dx: bool, *how: Any
    ) -> tuple[Any, ...]:
        """Run the backward pass as one operator."""
        weight, gates, linears, (channel_dim, activation) = parameters[0], parameters[2:6], parameters[6:], how
        noise, drop_prob, seed = buffers
        dx, (dweight, dbias, dgates, *dlinears), dresidual = ops.encoder_decoder_gradients(
            dy, x, *stats, linears, gates, weight, noise, drop_prob, int(seed), residual, channel_dim,
            to_numbers(self.flags), self.eps, activation, need_dx,
        )  # fmt: skip
        return dx, dresidual, [dweight, dbias, *dgates, *dlinears]

    def normalize(self, x: Tensor, layout: Layout, activation: str, residual: Tensor | None) -> Tensor:
        """Return act(normalized x + residual), on the kernels."""
        channel_dim = recorded.channel_dim_of(x, self, layout.channel_dim)
        if recorded.can_record(x, self, residual):
            return recorded.normalize(x, self, channel_dim, activation, residual)
        dropout = self._dropout(x)
        # The operator has no formula for gradients: the autograd function below has.
        linears = [t.detach() for t in self.linears]
        weight, bias, *gates = (None if t is None else t.detach() for t in (self.weight, self.bias, *self.gates))
        op = ops.encoder_decoder_affine_and_track if self.flags.track else ops.encoder_decoder_affine
        stats = op(
            x.detach(), linears, gates, weight, bias, *dropout, *self.running, channel_dim,
            to_numbers(self.flags), self.eps,
        )  # fmt: skip
        y: Tensor = _EncoderDecoder.apply(
            x, self.weight, self.bias, *self.gates, *self.linears, residual, *stats, *dropout, channel_dim,
            self.flags, self.eps, activation,
        )  # fmt: skip
        return y

    def _dropout(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, int]:
        """Return noise, probability and seed: the kernels draw from a seed, but for graphs, which would repeat it."""
        if self.drop_prob is None:
            return None, None, 0
        if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return torch.rand(2, self.linears[0].shape[1], device=x.device), self.drop_prob, 0
        # In place, which takes half the time of torch.randint.
        return None, self.drop_prob, int(launcher.EMPTY_STRIDED[0]((), (), torch.int64).random_(1 << 31))


class _EncoderDecoder(torch.autograd.Function):
    """y from x and its statistics; one operator returns all gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        parameters, (residual, *saved, seed, channel_dim, flags, eps, activation) = rest[:18], rest[18:]
        # Without an activation the gradient of the residual is dy, and the residual itself is not needed.
        ctx.save_for_backward(x, *parameters, residual if activation != "none" else None, *saved)
        ctx.seed, ctx.channel_dim, ctx.flags, ctx.eps, ctx.activation = seed, channel_dim, flags, eps, activation
        _, _, _, affine, *_ = saved
        y: Tensor = ops.apply(x, affine, channel_dim, activation, residual)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operators.refuse_second_derivatives()
        x, *rest = ctx.saved_tensors
        parameters, (residual, *stats, noise, drop_prob) = rest[:18], rest[18:]
        weight, _, gates, linears = parameters[0], parameters[1], parameters[2:6], parameters[6:]
        need, (dy,) = ctx.needs_input_grad, grads
        dx, (dweight, dbias, dgates, *dlinears), dresidual = ops.encoder_decoder_gradients(
            dy, x, *stats, linears, gates, weight, noise, drop_prob, ctx.seed, residual, ctx.channel_dim,
            to_numbers(ctx.flags), ctx.eps, ctx.activation, need[0],
        )  # fmt: skip
        gradients = [
            g.view(t.shape).to(t.dtype) if needed and t is not None else None
            for g, t, needed in zip((dweight, dbias, *dgates, *dlinears), parameters, need[1:19], strict=True)
        ]
        if need[19] and residual is None:
            dresidual = dy
        return (dx if need[0] else None, *gradients, dresidual if need[19] else None, *(None,) * 11)


def _affine(x: Tensor, linears: Any, gates: Any, weight: Any, bias: Any, *args: Any) -> tuple[Tensor, ...]:
    from lightning_norm.kernels.encoder_decoder.launch import affine_of

    noise, drop_prob, seed, *running, channel_dim, numbers, eps = args
    flags = from_numbers(EncoderDecoderFlags, numbers)
    return affine_of(x, linears, gates, weight, bias, noise, drop_prob, seed, running, channel_dim, flags, eps)


def _gradients(dy: Tensor, x: Tensor, *args: Any) -> Any:
    from lightning_norm.kernels.encoder_decoder.launch import gradients

    (statistics, hidden, outputs, affine), (linears, gates, weight, noise, drop_prob, seed, *rest) = args[:4], args[4:]
    residual, channel_dim, numbers, eps, activation, need_dx = rest
    return gradients(
        dy, x, (statistics, hidden, outputs, affine), linears, gates, weight, noise, drop_prob, seed, residual,
        channel_dim, from_numbers(EncoderDecoderFlags, numbers), eps, activation, need_dx,
    )  # fmt: skip


def _fake_affine(x: Tensor, linears: list[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channel_dim, numbers, _ = args[-3:]
    (n, c), h = samples_and_channels(x, channel_dim), linears[0].shape[0] + linears[6].shape[0]
    # One row for the statistics of the batch, else one for each sample.
    rows = 1 if from_numbers(EncoderDecoderFlags, numbers).batch else n
    affine = operators.per_sample_and_channel(x, channel_dim, 3)
    return affine.new_empty(3, rows, c), affine.new_empty(2, rows, h), affine.new_empty(4, rows, c), affine


def _fake_gradients(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    affine, linears, residual, need_dx = args[3], args[4], args[10], args[-1]
    c = affine.shape[2]
    dx, dresidual = operators.fake_input_gradients(x, affine, residual, need_dx)
    return dx, [affine.new_empty(size) for size in (c, c, 4, *(p.shape for p in linears))], dresidual


operators.define(
    SCHEMAS,
    {
        "encoder_decoder_affine": _affine,
        "encoder_decoder_affine_and_track": _affine,
        "encoder_decoder_gradients": _gradients,
    },
    {
        "encoder_decoder_affine": _fake_affine,
        "encoder_decoder_affine_and_track": _fake_affine,
        "encoder_decoder_gradients": _fake_gradients,
    },
)

"""Launches of the equations in ``coders``: from x to the coefficients of apply, and from dy to all gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_norm.kernels.encoder_decoder.backward import vjp_affine, vjp_decode, vjp_encode
from lightning_norm.kernels.encoder_decoder.forward import decode, encode
from lightning_norm.kernels.grid import BUSY, Grid, cdiv, grid_of, power
from lightning_norm.kernels.passes.launch import input_gradients, moment_parts, on, sum_parts

BLOCK = 256
"""Numbers that one program takes at once where it moves the running statistics or adds parts of gates."""

Optional = Tensor | None


@dataclass(frozen=True)
class CoderPlan:
    """Which statistics, in integers, for they pass through an operator's schema.

    Args:
        batch: one row of statistics, not one per sample.
        frozen: it is the running one.
        track: 0 leaves the running statistics, 1 moves them by the momentum, 2 averages all batches.
    """

    batch: int
    frozen: int
    track: int


@dataclass(frozen=True)
class Tiles:
    """How the rows, hidden units and channels of a launch are cut.

    Args:
        r: rows of a tile.
        h: hidden units of a tile.
        c: channels of a tile.
        across: blocks of rows.
        units: blocks of hidden units, of E_s and of E_r.
        along: blocks of channels.
        spans: of channels, whose sums are added where they are read: until about ``BUSY`` programs run.
        span: channels of a span, whole tiles.
    """

    r: int
    h: int
    c: int
    across: int
    units: tuple[int, int]
    along: int
    spans: int
    span: int

    @property
    def blocks(self) -> dict[str, int]:
        """Return the compile-time arguments."""
        return {"R_BLOCK": self.r, "H_BLOCK": self.h, "C_BLOCK": self.c}


def tiles_of(rows: int, channels: int, units: tuple[int, int], r: int, h: int, c: int) -> Tiles:
    """Return tiles of at most ``r`` rows, ``h`` hidden units and ``c`` channels; a dot takes 16 of each, or more."""
    least = 1 if rows == 1 else 16
    r, h, c = (max(least, min(power(n), most)) for n, most in ((rows, r), (max(units), h), (channels, c)))
    across, blocks = cdiv(rows, r), (cdiv(units[0], h), cdiv(units[1], h))
    spans = 1
    while spans < 4 and spans * across * sum(blocks) < BUSY and spans * 128 < channels:
        spans *= 2
    return Tiles(r, h, c, across, blocks, cdiv(channels, c), spans, cdiv(cdiv(channels, spans), c) * c)


def coefficients(
    x: Tensor,
    coders: Sequence[Tensor],
    gates: Sequence[Optional],
    weight: Optional,
    bias: Optional,
    noise: Optional,
    share: Optional,
    seed: int,
    running: Sequence[Optional],
    channel_dim: int,
    plan: CoderPlan,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return statistics (3, R, C), hidden units (2, R, H), decoders' ends (4, R, C), pivot, scale, offset (3, N, C).

    Args:
        x: the input.
        coders: weight and bias of E_s, D_mu, D_sigma, E_r, D_beta and D_gamma.
        gates: lambda of mu, sigma, beta and gamma; the last two may be absent.
        weight: gamma.
        bias: beta.
        noise: (2, C), uniform in [0, 1); ``None`` where it is drawn from ``seed``.
        share: where the noise is below it, a statistic is dropped before E_s, 0-dim; ``None`` drops nothing.
        seed: of the noise, below 2^31.
        running: mean, variance, the two counters and the momentum; moved if ``plan.track``.
        channel_dim: the channel axis.
        plan: the statistics.
        eps: inside the root.
    """
    grid, units, rows = _sizes(x, coders, channel_dim, plan)
    out, deep = (16, 64) if rows == 1 else (32, 16)  # of a result, and of what is summed
    e, d = (tiles_of(rows, grid.c, units, *most) for most in ((32, out, deep), (16, deep, out)))
    coef = torch.empty(3, grid.n, grid.c, device=x.device, dtype=torch.float32)
    parts, merge = coef, False
    if not plan.frozen:
        parts, merge = moment_parts(x, grid), grid.parts > 1
    own = parts.view(3, grid.n, grid.c) if not merge and not plan.batch else coef.new_empty(3, rows, grid.c)
    sums, hidden = coef.new_empty(e.spans, 2, rows, sum(units)), coef.new_empty(2, rows, sum(units))
    coded = coef.new_empty(4, rows, grid.c)
    mean, var, tracked, skipped, momentum = _given(running, coef)
    coders = [p.contiguous() for p in coders]
    size, count = (grid.n, rows, grid.c, *units), grid.n * grid.size
    place = (grid.parts, grid.sample_stride, grid.part_stride, grid.piece, grid.length, grid.fold)
    with on(x):
        encode[(e.across, sum(e.units), e.spans)](
            *parts, mean, var, *_given((noise, share), coef), coders[0], coders[6], own, sums, *size, e.span, *place,
            seed, int(noise is None), eps, BATCH=bool(plan.batch), FROZEN=bool(plan.frozen), MERGE=merge,
            DROP=share is not None, N_BLOCK=min(power(grid.n), 16), num_warps=4, **e.blocks,
        )  # fmt: skip
        decode[(d.across, d.along)](
            sums, own, coders[1], coders[7], *coders[2:6], *coders[8:], *_given((*gates, weight, bias), coef), mean,
            var, tracked, skipped, momentum, hidden, coded, coef, *size, eps, count / max(count - 1, 1),
            BATCH=bool(plan.batch), TRACK=plan.track, GATED=gates[2] is not None, WEIGHT=weight is not None,
            BIAS=bias is not None, SPANS=e.spans, N_BLOCK=min(power(grid.n), 32), T_BLOCK=BLOCK, num_warps=4,
            **d.blocks,
        )  # fmt: skip
    return own, hidden, coded, coef


def gradients(
    dy: Tensor,
    x: Tensor,
    stats: tuple[Tensor, Tensor, Tensor, Tensor],
    coders: Sequence[Tensor],
    gates: Sequence[Optional],
    weight: Optional,
    noise: Optional,
    share: Optional,
    seed: int,
    residual: Optional,
    channel_dim: int,
    plan: CoderPlan,
    eps: float,
    activation: str,
    need_dx: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the gradient of x, those of weight, bias, the four gates together and the coders, and the residual's.

    ``stats`` is what ``coefficients`` returned.
    """
    grid, units, rows = _sizes(x, coders, channel_dim, plan)
    most = (16, 32, 16), (32, 32, 32), (16, 32 if rows == 1 else 16, 32)
    a, d, e = (tiles_of(rows, grid.c, units, *each) for each in most)
    own, hidden, coded, coef = stats
    parts = sum_parts(dy, x, coef, grid, activation, residual)
    dweight, dbias, dgates = coef.new_empty(grid.c), coef.new_empty(grid.c), coef.new_empty(4)
    back = [torch.empty_like(p, dtype=torch.float32, memory_format=torch.contiguous_format) for p in coders]
    coders = [p.contiguous() for p in coders]
    ends, direct, line = torch.empty_like(coded), coef.new_empty(2, rows, grid.c), torch.empty_like(coef[:2])
    sums, parted = coef.new_empty(d.spans, 2, rows, sum(units)), coef.new_empty(4, a.along)
    lines = 0 if plan.frozen else e.across * e.along
    jobs = max(h * (d.across * d.spans + d.along) for h in d.units)
    n_block, size = min(power(grid.n), 32), (rows, grid.c)
    with on(x):
        vjp_affine[(a.along,)](
            *parts, own, coded, *_given((weight, *gates), coef), dweight, dbias, *(back[i] for i in (3, 5, 9, 11)),
            parted, ends, direct, grid.n, *size, grid.parts, grid.sample_stride, grid.part_stride, eps,
            BATCH=bool(plan.batch), MERGE=grid.parts > 1, GATED=gates[2] is not None, WEIGHT=weight is not None,
            N_BLOCK=n_block, R_BLOCK=a.r, C_BLOCK=a.c, num_warps=4,
        )  # fmt: skip
        vjp_decode[(jobs, 4)](
            ends, hidden, *(coders[i] for i in (2, 4, 8, 10)), *(back[i] for i in (2, 4, 8, 10)), sums, *size, *units,
            d.span, SPANS=d.spans, num_warps=4, **d.blocks,
        )  # fmt: skip
        vjp_encode[(lines + e.along * sum(e.units),)](
            sums, hidden, own, direct, parted, *_given((noise, share), coef), coders[0], coders[6],
            *(back[i] for i in (0, 1, 6, 7)), dgates, line, grid.n, *size, *units, lines, a.along, grid.size, seed,
            int(noise is None), eps, BATCH=bool(plan.batch), DROP=share is not None, SPANS=d.spans, N_BLOCK=n_block,
            T_BLOCK=BLOCK, num_warps=4, **e.blocks,
        )  # fmt: skip
    last = None if plan.frozen else line
    dx, dresidual = input_gradients(dy, x, coef, last, channel_dim, activation, residual, need_dx)
    return dx, [dweight, dbias, dgates, *back], dresidual


def _sizes(x: Tensor, coders: Sequence[Tensor], channel_dim: int, plan: CoderPlan) -> tuple[Grid, tuple[int, int], int]:
    """Return the grid, the hidden units of both encoders, and R."""
    grid = grid_of(x, channel_dim)
    return grid, (coders[0].shape[0], coders[6].shape[0]), 1 if plan.batch else grid.n


def _given(tensors: Sequence[Optional], other: Tensor) -> list[Tensor]:
    return [other if t is None else t for t in tensors]

"""Launches of the equations in ``coders``: from x to the coefficients of apply, and from dy to all gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_norm.kernels.blocks import BUSY, Grid, cdiv, grid_of, power
from lightning_norm.kernels.coders import decode, encode
from lightning_norm.kernels.coders_vjp import vjp_affine, vjp_decode, vjp_encode
from lightning_norm.kernels.launch import combine, moment_parts, on, sum_parts

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
    """Sizes of the matrices, and how they are cut.

    Args:
        rows: R.
        channels: C.
        units: hidden units of E_s and of E_r.
        r: rows of a tile.
        h: hidden units of a tile.
        c: channels of a tile.
        n: samples that are met at once where rows are pooled.
        spans: of channels, whose sums are added where they are read.
    """

    rows: int
    channels: int
    units: tuple[int, int]
    r: int
    h: int
    c: int
    n: int
    spans: int

    @property
    def across(self) -> int:
        """Return the blocks of rows."""
        return cdiv(self.rows, self.r)

    @property
    def along(self) -> int:
        """Return the blocks of channels."""
        return cdiv(self.channels, self.c)

    @property
    def hidden(self) -> tuple[int, int]:
        """Return the blocks of hidden units of each encoder."""
        return cdiv(self.units[0], self.h), cdiv(self.units[1], self.h)

    @property
    def span(self) -> int:
        """Return the channels of a span, whole tiles."""
        return cdiv(cdiv(self.channels, self.spans), self.c) * self.c

    @property
    def blocks(self) -> dict[str, int]:
        """Return the compile-time arguments that all kernels with matrices share."""
        return {"R_BLOCK": self.r, "H_BLOCK": self.h, "C_BLOCK": self.c}


def tiles_of(grid: Grid, batch: bool, units: tuple[int, int]) -> Tiles:
    """Return tiles of 1024 or 2048 numbers of a weight, and spans until about ``BUSY`` programs run."""
    rows, channels = (1 if batch else grid.n), grid.c
    least = 1 if rows == 1 else 16  # of each side of a dot
    r = 1 if rows == 1 else min(max(power(rows), least), 32)
    h, c = (max(least, min(power(size), most)) for size, most in ((max(units), 64 if rows == 1 else 32), (channels, 32)))
    jobs = cdiv(rows, r) * (cdiv(units[0], h) + cdiv(units[1], h))
    spans = 1
    while spans < (8 if rows == 1 else 4) and jobs * spans < BUSY and channels >= 4 * c * spans:
        spans *= 2
    return Tiles(rows, channels, units, r, h, c, min(power(grid.n), 32), spans)


def coefficients(
    x: Tensor,
    coders: Sequence[Tensor],
    gates: Sequence[Optional],
    weight: Optional,
    bias: Optional,
    noise: Optional,
    share: Optional,
    running: Sequence[Optional],
    channel_dim: int,
    plan: CoderPlan,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return statistics (3, R, C), hidden units (2, R, H), the decoders' ends (4, R, C), pivot, scale, offset (3, N, C).

    Args:
        x: the input.
        coders: weight and bias of E_s, D_mu, D_sigma, E_r, D_beta and D_gamma.
        gates: lambda of mu, sigma, beta and gamma; the last two may be absent.
        weight: gamma.
        bias: beta.
        noise: (2, C), uniform in [0, 1): what is below ``share`` is dropped before E_s; ``None`` drops nothing.
        share: 0-dim.
        running: mean, variance, the two counters and the momentum; moved if ``plan.track``.
        channel_dim: the channel axis.
        plan: the statistics.
        eps: inside the root.
    """
    grid, units = grid_of(x, channel_dim), (coders[0].shape[0], coders[6].shape[0])
    t = tiles_of(grid, bool(plan.batch), units)
    coef = torch.empty(3, grid.n, grid.c, device=x.device, dtype=torch.float32)
    parts, merge = coef, False
    if not plan.frozen:
        parts, merge = moment_parts(x, grid), grid.parts > 1
    own = parts.view(3, grid.n, grid.c) if not merge and not plan.batch else coef.new_empty(3, t.rows, grid.c)
    sums, hidden = coef.new_empty(t.spans, 2, t.rows, sum(units)), coef.new_empty(2, t.rows, sum(units))
    coded = coef.new_empty(4, t.rows, grid.c)
    mean, var, tracked, skipped, momentum = _given(running, coef)
    coders = [p.contiguous() for p in coders]
    count = grid.n * grid.size
    place = (grid.parts, grid.sample_stride, grid.part_stride, grid.piece, grid.length, grid.fold)
    with on(x):
        encode[(t.across, sum(t.hidden), t.spans)](
            *parts, mean, var, *_given((noise, share), coef), coders[0], coders[6], own, sums, grid.n, t.rows, grid.c,
            *units, t.span, *place, eps, BATCH=bool(plan.batch), FROZEN=bool(plan.frozen), MERGE=merge,
            DROP=noise is not None, N_BLOCK=t.n, num_warps=4, **t.blocks,
        )  # fmt: skip
        decode[(t.across, t.along)](
            sums, own, coders[1], coders[7], *coders[2:6], *coders[8:], *_given(gates, coef),
            *_given((weight, bias), coef), mean, var, tracked, skipped, momentum, hidden, coded, coef, grid.n, t.rows,
            grid.c, *units, eps, count / max(count - 1, 1), BATCH=bool(plan.batch), TRACK=plan.track,
            GATED=gates[2] is not None, WEIGHT=weight is not None, BIAS=bias is not None, SPANS=t.spans, N_BLOCK=t.n,
            T_BLOCK=BLOCK, num_warps=4, **t.blocks,
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
    grid, units = grid_of(x, channel_dim), (coders[0].shape[0], coders[6].shape[0])
    t = tiles_of(grid, bool(plan.batch), units)
    own, hidden, coded, coef = stats
    parts = sum_parts(dy, x, coef, grid, activation, residual)
    dweight, dbias, dgates = coef.new_empty(grid.c), coef.new_empty(grid.c), coef.new_empty(4)
    back = [torch.empty_like(p, dtype=torch.float32, memory_format=torch.contiguous_format) for p in coders]
    coders = [p.contiguous() for p in coders]
    ends, direct = torch.empty_like(coded), coef.new_empty(2, t.rows, grid.c)
    line, sums = torch.empty_like(coef[:2]), coef.new_empty(t.spans, 2, t.rows, sum(units))
    c_block = 16 if t.c >= 16 else t.c
    shares = cdiv(grid.c, c_block)
    parted = coef.new_empty(4, shares)
    lines = 0 if plan.frozen else t.across * t.along
    fewest = max(h * (t.across * t.spans + t.along) for h in t.hidden)
    size = (grid.n, t.rows, grid.c)
    with on(x):
        vjp_affine[(shares,)](
            *parts, own, coded, *_given((weight, *gates), coef), dweight, dbias, *(back[i] for i in (3, 5, 9, 11)),
            parted, ends, direct, *size, grid.parts, grid.sample_stride, grid.part_stride, eps, BATCH=bool(plan.batch),
            MERGE=grid.parts > 1, GATED=gates[2] is not None, WEIGHT=weight is not None, N_BLOCK=t.n, R_BLOCK=t.r,
            C_BLOCK=c_block, num_warps=4,
        )  # fmt: skip
        vjp_decode[(fewest, 4)](
            ends, hidden, *(coders[i] for i in (2, 4, 8, 10)), *(back[i] for i in (2, 4, 8, 10)), sums, *size[1:],
            *units, t.span, SPANS=t.spans, num_warps=4, **t.blocks,
        )  # fmt: skip
        vjp_encode[(lines + t.along * sum(t.hidden),)](
            sums, hidden, own, direct, parted, *_given((noise, share), coef), coders[0], coders[6],
            *(back[i] for i in (0, 1, 6, 7)), dgates, line, *size, *units, lines, shares, grid.size, eps,
            BATCH=bool(plan.batch), DROP=noise is not None, SPANS=t.spans, N_BLOCK=t.n, T_BLOCK=BLOCK, num_warps=4,
            **t.blocks,
        )  # fmt: skip
    dx, dresidual = coef.new_empty(0), None
    if need_dx or residual is not None:
        dx, dresidual = combine(dy, x, coef, None if plan.frozen else line, channel_dim, activation, residual)
    return dx, [dweight, dbias, dgates, *back], coef.new_empty(0) if dresidual is None else dresidual


def _given(tensors: Sequence[Optional], other: Tensor) -> list[Tensor]:
    return [other if t is None else t for t in tensors]

"""Launches of the encoder-decoders: from x to the affine map of apply, and from dy to all gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_norm.kernels.arguments import Moments, or_other, sums_in
from lightning_norm.kernels.encoder_decoder import flags as tuples
from lightning_norm.kernels.encoder_decoder.backward import vjp_affine, vjp_decode, vjp_encode
from lightning_norm.kernels.encoder_decoder.flags import EncoderDecoderFlags
from lightning_norm.kernels.encoder_decoder.forward import decode, encode
from lightning_norm.kernels.grid import BUSY, REGISTERS, Grid, cdiv, dense, grid_of, power
from lightning_norm.kernels.launcher import launch
from lightning_norm.kernels.mixture.flags import Running
from lightning_norm.kernels.passes.launch import device_of, input_gradients, moment_parts, sum_parts

BLOCK = 256
"""Numbers that one program takes at once where it moves the running statistics or adds parts of gates."""

Optional = Tensor | None


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
    # One row is summed without a dot.
    least = 1 if rows == 1 else 16
    r, h, c = (max(least, min(power(n), most)) for n, most in ((rows, r), (max(units), h), (channels, c)))
    across, blocks = cdiv(rows, r), (cdiv(units[0], h), cdiv(units[1], h))
    # Wide layers have few programs for much work: cut the channels.
    spans = 1
    while spans < 4 and spans * across * sum(blocks) < BUSY and spans * 128 < channels:
        spans *= 2
    return Tiles(r, h, c, across, blocks, cdiv(channels, c), spans, cdiv(cdiv(channels, spans), c) * c)


def affine_of(
    x: Tensor,
    linears: Sequence[Tensor],
    gates: Sequence[Optional],
    weight: Optional,
    bias: Optional,
    noise: Optional,
    drop_prob: Optional,
    seed: int,
    running: Sequence[Optional],
    channel_dim: int,
    flags: EncoderDecoderFlags,
    eps: float,
) -> tuples.EncoderDecoderStatistics:
    """Return the statistics of x, what the encoder-decoders make of them, and pivot, scale and offset of y.

    Args:
        x: the input.
        linears: weight and bias of E_s, D_mu, D_sigma, E_r, D_beta and D_gamma.
        gates: lambda of mu, sigma, beta and gamma; the last two may be absent.
        weight: gamma.
        bias: beta.
        noise: (2, C), uniform in [0, 1); ``None`` where it is drawn from ``seed``.
        drop_prob: probability with which E_s does not see a statistic, 0-dim; ``None`` drops nothing.
        seed: of the noise, below 2^31.
        running: mean, variance, the two counters and the momentum; moved if ``flags.track``.
        channel_dim: the channel axis.
        flags: which statistics.
        eps: inside the root.
    """
    grid, units, rows = _sizes(x, linears, channel_dim, flags)
    out, deep = (16, 64) if rows == 1 else (32, 16)  # of a result, and of what is summed
    # Tiles of ``encode`` and ``decode``.
    e, d = (tiles_of(rows, grid.c, units, *most) for most in ((32, out, deep), (16, deep, out)))
    affine = torch.empty(3, grid.n, grid.c, device=x.device, dtype=torch.float32)
    # Where nothing is measured, another tensor stands in for pointers that no kernel reads.
    parts, merge = Moments(*affine), False
    statistics = affine.new_empty(3, rows, grid.c)
    if not flags.frozen:
        # Those of each sample are what the encoders read, if they are not in parts.
        whole = affine.new_empty(3, grid.n, grid.c) if flags.batch else statistics
        parts, grid = moment_parts(x, grid, Moments(*whole))
        merge = grid.parts > 1
    sums, hidden = affine.new_empty(e.spans, 2, rows, sum(units)), affine.new_empty(2, rows, sum(units))
    outputs = affine.new_empty(4, rows, grid.c)
    stats = tuples.EncoderDecoderStatistics(statistics, hidden, outputs, affine)
    moving = Running(*or_other(running, affine))
    linears = [p.contiguous() for p in linears]
    size, count = (grid.n, grid.c, *units), grid.n * grid.size
    with device_of(x):
        launch(encode, e.across, sum(e.units), e.spans)(
            parts, moving, tuples.Encoders._make(or_other((noise, drop_prob, linears[0], linears[6]), affine)),
            statistics, sums, *size, e.span, *grid.moment_layout, seed if noise is None else -1, eps,
            FLAGS=tuples.Compiled(flags.batch, flags.frozen, merge=merge, drop=drop_prob is not None),
            TILE=tuples.Tile(e.r, e.h, e.c, min(power(grid.n), 16), 1), num_warps=4,
        )  # fmt: skip
        launch(decode, d.across, d.along)(
            sums, tuples.Decoders(linears[1], linears[7], *linears[2:6], *linears[8:]),
            tuples.Gates(*or_other(gates, affine)), *or_other((weight, bias), affine), moving, stats, *size, eps,
            count / max(count - 1, 1),
            FLAGS=tuples.Compiled(
                flags.batch, track=flags.track, gated=gates[2] is not None, weight=weight is not None,
                bias=bias is not None, spans=e.spans,
            ),
            TILE=tuples.Tile(d.r, d.h, d.c, min(power(grid.n), 32), BLOCK), num_warps=4,
        )  # fmt: skip
    return stats


def gradients(
    dy: Tensor,
    x: Tensor,
    stats: tuple[Tensor, ...],
    linears: Sequence[Tensor],
    gates: Sequence[Optional],
    weight: Optional,
    noise: Optional,
    drop_prob: Optional,
    seed: int,
    residual: Optional,
    channel_dim: int,
    flags: EncoderDecoderFlags,
    eps: float,
    activation: str,
    need_dx: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the gradients of x, of [weight, bias, the four gates together, each linear layer's], and of the residual.

    ``stats`` is what ``affine_of`` returned.
    """
    grid, units, rows = _sizes(x, linears, channel_dim, flags)
    most = (16, 32, 16), (32, 32, 32), (16, 32 if rows == 1 else 16, 32)
    # Tiles of the three launches.
    a, d, e = (tiles_of(rows, grid.c, units, *each) for each in most)
    stats = tuples.EncoderDecoderStatistics(*stats)
    affine = stats.affine
    # Once for both passes that read them.
    dy, residual = dense(dy, x), None if residual is None else dense(residual, x)
    parts, grid = sum_parts(dy, x, affine, grid, activation, residual)
    dweight, dbias, dgates = affine.new_empty(grid.c), affine.new_empty(grid.c), affine.new_empty(4)
    back = [torch.empty_like(p, dtype=torch.float32, memory_format=torch.contiguous_format) for p in linears]
    linears = [p.contiguous() for p in linears]
    doutputs, dx_affine = torch.empty_like(stats.outputs), torch.empty_like(affine[:2])
    direct = affine.new_empty(2, rows, grid.c)
    sums, gate_parts = affine.new_empty(d.spans, 2, rows, sum(units)), affine.new_empty(4, a.along)
    # Frozen statistics have no gradient: no programs for them.
    # Programs for the hidden units' sums, then for the weights' tiles, of the larger decoder.
    statistics_jobs = 0 if flags.frozen else e.across * e.along
    jobs = max(h * (d.across * d.spans + d.along) for h in d.units)
    n_block = min(power(grid.n), 32)
    with device_of(x):
        launch(vjp_affine, a.along)(
            sums_in(parts), stats, affine if weight is None else weight, tuples.Gates(*or_other(gates, affine)),
            tuples.AffineGradients(dweight, dbias, back[3], back[5], back[9], back[11], gate_parts, doutputs, direct),
            grid.n, grid.c, *grid.partial_layout, eps,
            FLAGS=tuples.Compiled(
                flags.batch, merge=grid.parts > 1, gated=gates[2] is not None, weight=weight is not None
            ),
            TILE=tuples.Tile(a.r, 1, a.c, n_block, 1), num_warps=4, maxnreg=REGISTERS["vjp_affine"],
        )  # fmt: skip
        launch(vjp_decode, jobs, 4)(
            doutputs, stats.hidden, *(linears[i] for i in (2, 4, 8, 10)), *(back[i] for i in (2, 4, 8, 10)), sums,
            rows, grid.c, *units, d.span, SPANS=d.spans, num_warps=4, **d.blocks,
        )  # fmt: skip
        launch(vjp_encode, statistics_jobs + e.along * sum(e.units))(
            sums, stats, direct, gate_parts,
            tuples.Encoders._make(or_other((noise, drop_prob, linears[0], linears[6]), affine)),
            tuples.EncoderGradients(back[0], back[1], back[6], back[7], dgates, dx_affine), grid.n, grid.c, *units,
            statistics_jobs, a.along, grid.size, seed if noise is None else -1, eps,
            FLAGS=tuples.Compiled(flags.batch, drop=drop_prob is not None, spans=d.spans),
            TILE=tuples.Tile(e.r, e.h, e.c, n_block, BLOCK), num_warps=4,
        )  # fmt: skip
    last = None if flags.frozen else dx_affine
    dx, dresidual = input_gradients(dy, x, affine, last, channel_dim, activation, residual, need_dx)
    return dx, [dweight, dbias, dgates, *back], dresidual


def _sizes(
    x: Tensor, linears: Sequence[Tensor], channel_dim: int, flags: EncoderDecoderFlags
) -> tuple[Grid, tuple[int, int], int]:
    """Return the grid, the hidden units of both encoders, and R."""
    grid = grid_of(x, channel_dim)
    return grid, (linears[0].shape[0], linears[6].shape[0]), 1 if flags.batch else grid.n

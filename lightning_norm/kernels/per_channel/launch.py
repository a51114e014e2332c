"""Launches of the equations in ``channels``: from x to the coefficients of apply, and from dy to all gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_norm.kernels.grid import BUSY, REGISTERS, TILE, Grid, cdiv, grid_of, power
from lightning_norm.kernels.passes.launch import input_gradients, moment_parts, on, sum_parts
from lightning_norm.kernels.per_channel.backward import channels_vjp, gate_logits_vjp, gate_vjp
from lightning_norm.kernels.per_channel.condensation import directions
from lightning_norm.kernels.per_channel.flags import ChannelPlan, Numbers
from lightning_norm.kernels.per_channel.forward import channels_of, pool_channels
from lightning_norm.kernels.per_channel.running_stats import commit, survey
from lightning_norm.kernels.ranks.launch import Sum, empty_gradient, pool_ranks, pool_ranks_gradient

BLOCK = 1024
"""Numbers that a program of ``survey`` and ``commit`` takes at once."""

Optional = Tensor | None


def coefficients(
    x: Tensor,
    weight: Optional,
    bias: Optional,
    gates: Sequence[Optional],
    shares: Optional,
    running: Sequence[Optional],
    counters: Sequence[Optional],
    rate: Optional,
    threshold: Optional,
    channel_dim: int,
    plan: ChannelPlan,
    numbers: Numbers,
    over_ranks: Sum | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the moments of x, the statistics (7 or 9, K, C), (3, N, C) pivot, scale and offset, and what was surveyed.

    Then, with ``over_ranks``, U and V (3, C) of the batch on all ranks, and what these added up. A share may be empty.

    Args:
        x: the input.
        weight: gamma.
        bias: beta.
        gates: weight of the centering, weight and bias of the scaling, of the affine gate and of the contexts' gate.
        shares: of each sample in each context, (N, K).
        running: mean, spread, number of updates, number of skipped ones; moved if ``plan.track``.
        counters: with ``blend``, batches and the two gaps; with ``choose``, the last condensation and three counters;
            with contexts, the running share of each.
        rate: momentum or alpha.
        threshold: of the condensation.
        channel_dim: the channel axis.
        plan: the equations.
        numbers: their numbers.
        over_ranks: adds up over the ranks.
    """
    grid = grid_of(x, channel_dim)
    coef = torch.empty(3, grid.n, grid.c, device=x.device, dtype=torch.float32)
    own, seen = coef.new_empty(0), coef.new_empty(plan.seen(grid.n))
    stats = coef.new_empty(plan.lines, plan.rows, grid.c)
    batch, total = coef.new_zeros(3, grid.c if plan.ranks else 0), coef.new_empty(0, dtype=torch.float64)
    parts, merge = coef, False
    if grid.n == 0:
        parts, own = torch.zeros_like(batch), torch.empty_like(coef)
    elif plan.own:
        parts, merge = moment_parts(x, grid), grid.parts > 1
        own = parts.view(3, grid.n, grid.c) if not merge else torch.empty_like(coef)
    place = (grid.parts, grid.sample_stride, grid.part_stride, grid.piece, grid.length, grid.fold)
    mean, spread, tracked, skipped = (coef if t is None else t for t in running)
    more = [coef if t is None else t for t in counters]
    last = more[3] if plan.choose else coef
    k = power(plan.rows)
    tile = _tile(grid, plan, 1024)
    blocks = cdiv(grid.c, tile["C_BLOCK"])
    if over_ranks is not None:
        with on(x):
            if grid.n:
                pool_channels[(blocks,)](
                    *parts, coef if gates[0] is None else gates[0], batch, grid.n, grid.c, *place, MERGE=merge,
                    CENTER=bool(plan.center), num_warps=4, **tile,
                )  # fmt: skip
        total = pool_ranks(batch, grid.n * grid.size, over_ranks)
    with on(x):
        if plan.surveys:
            survey[((grid.n if plan.looks else 0) + 1,)](
                *parts, *(coef if t is None else t for t in gates[5:]), mean, spread, tracked, last, more[0], seen,
                grid.n, grid.c, plan.rows, *place, plan.min_updates, plan.max_skip, LOOK=plan.looks, MERGE=merge,
                NORM=plan.choose > 0, GATE=bool(plan.gate), MOVE=plan.moves, CONTEXTS=bool(plan.contexts),
                KNOWN=running[0] is not None, K_BLOCK=k, BLOCK=min(power(grid.c), BLOCK // k),
                num_warps=4, maxnreg=REGISTERS["survey"],
            )  # fmt: skip
        found = _found(x, seen, grid, plan) if plan.choose else coef
        held, stride = _shares(shares, seen, grid.n, plan)
        given = [coef if t is None else t for t in (held, weight, bias, *gates[:5])]
        rate = coef if rate is None else rate
        channels_of[(blocks,)](
            *parts, *given, mean, spread, tracked, skipped, more[0], more[0], *more, rate,
            coef if threshold is None else threshold, seen, found, batch, total, own, stats, coef, grid.n,
            grid.n * grid.c, grid.c, plan.rows, stride, found.numel(), *place, numbers.eps, numbers.least,
            numbers.power, numbers.unit_scale, numbers.unit_affine, MERGE=merge, FROZEN=bool(plan.frozen),
            BLEND=bool(plan.blend), POWER=bool(plan.powers), DETACH=bool(plan.detach), CHOOSE=plan.choose,
            MOVE=plan.track * plan.moves, POOLED=bool(plan.pooled), RANKS=bool(plan.ranks), WEIGHT=weight is not None,
            BIAS=bias is not None, num_warps=4, maxnreg=REGISTERS["channels_of"], **tile, **plan.constants(),
        )  # fmt: skip
        if plan.blend:
            commit[(1,)](
                stats, mean, spread, tracked, skipped, *more[:2], rate, grid.c, numbers.eps, numbers.power,
                STD=bool(plan.std), POWER=bool(plan.powers), RANKS=bool(plan.ranks), BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return own, stats, coef, seen, batch, total


def _found(x: Tensor, seen: Tensor, grid: Grid, plan: ChannelPlan) -> Tensor:
    """Return the parts of the squared length of the sum of all directions, after one more read of x."""
    length = grid.c * grid.size
    align = 16 // x.element_size() if length % (16 // x.element_size()) == 0 else 1
    block = max(min(TILE, power(cdiv(length, 2 * BUSY))), 256)
    found = seen.new_empty(cdiv(length, block))
    inverse = seen[2 + 3 * plan.rows + grid.n :]
    directions[(found.numel(),)](x, inverse, found, grid.n, length // align, ALIGN=align, BLOCK=block, num_warps=4)
    return found


def _shares(shares: Optional, seen: Tensor, n: int, plan: ChannelPlan) -> tuple[Optional, int]:
    """Return the share of each sample in each context, and how far apart those of two samples lie."""
    if plan.pooled:
        return seen[2 + 2 * plan.rows :], 0
    return seen[2 + 3 * plan.rows + n :] if plan.gate else shares, plan.rows


def gradients(
    dy: Tensor,
    x: Tensor,
    own: Tensor,
    stats: Tensor,
    coef: Tensor,
    seen: Tensor,
    batch: Tensor,
    total: Tensor,
    weight: Optional,
    bias: Optional,
    gates: Sequence[Optional],
    shares: Optional,
    residual: Optional,
    channel_dim: int,
    plan: ChannelPlan,
    numbers: Numbers,
    activation: str,
    need_dx: bool,
    over_ranks: Sum | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, weight, bias, the seven gate parameters and the residual; ``over_ranks`` to meet."""
    grid = grid_of(x, channel_dim)
    if grid.n == 0:
        zero = empty_gradient(batch, total, over_ranks)[None]
        dgates = [coef.new_empty(0) if t is None else torch.zeros_like(t, dtype=torch.float32) for t in gates]
        maps = input_gradients(dy, x, coef, None, channel_dim, activation, residual, need_dx)
        return maps[0], zero, zero.clone(), *dgates, maps[1]
    parts = sum_parts(dy, x, coef, grid, activation, residual)
    dweight, dbias = coef.new_empty(plan.rows, grid.c), coef.new_empty(plan.rows, grid.c)
    dgates = [coef.new_empty(0) if t is None else torch.empty_like(t, dtype=torch.float32) for t in gates]
    line = coef.new_empty(2, grid.n, grid.c)
    tile = _tile(grid, plan, 512)
    blocks = cdiv(grid.c, tile["C_BLOCK"])
    dshares = coef.new_empty(blocks if plan.gate else 0, grid.n + 1, plan.rows)
    held, stride = _shares(shares, seen, grid.n, plan)
    given = [coef if t is None else t for t in (held, seen, weight, bias, *gates[:5])]
    by, centered = coef.new_empty(3, grid.c), coef.new_empty(grid.c)

    def vjp(ranks: int) -> None:
        channels_vjp[(blocks,)](
            *parts, coef, own, stats, *given, dweight, dbias, *dgates[:5], line, dshares, stats[-1], by, centered,
            grid.n, grid.n * grid.c, grid.c, plan.rows, stride, grid.parts, grid.sample_stride, grid.part_stride,
            grid.size, numbers.least, numbers.unit_scale, numbers.unit_affine, MERGE=grid.parts > 1,
            STD_OF_VAR=bool(plan.std and not plan.frozen), RENORM=plan.choose == 3, GATE=bool(plan.gate), RANKS=ranks,
            WEIGHT=weight is not None, BIAS=bias is not None, num_warps=4, **tile, **plan.constants(),
        )  # fmt: skip

    with on(x):
        vjp(0 if over_ranks is None else 1)
        if over_ranks is not None:
            pool_ranks_gradient(by, batch, total, grid.n * grid.size, over_ranks)
            vjp(2)
        if plan.gate:
            dlogits = coef.new_empty(grid.n, plan.rows)
            k = tile["K_BLOCK"]
            gate_logits_vjp[(grid.n,)](
                dshares, held, dlogits, grid.n, plan.rows, blocks, K_BLOCK=k, BLOCK=min(power(blocks), BLOCK // k),
                num_warps=4,
            )  # fmt: skip
            gate_vjp[(blocks,)](
                dlogits, coef, own, gates[5], *dgates[5:], line, grid.n, grid.n * grid.c, grid.c, plan.rows, grid.size,
                num_warps=4, **tile,
            )  # fmt: skip
    maps = input_gradients(dy, x, coef, line if plan.own else None, channel_dim, activation, residual, need_dx)
    return maps[0], dweight, dbias, *dgates, maps[1]


def _tile(grid: Grid, plan: ChannelPlan, most: int) -> dict[str, int]:
    """Return tiles of samples, contexts and channels of at most ``most`` elements, in many programs."""
    k = power(plan.rows)
    n = max(1, min(power(grid.n), 32, most // k))
    return {"N_BLOCK": n, "K_BLOCK": k, "C_BLOCK": max(1, min(power(grid.c), most // (n * k), 16))}

"""Launches of the equations: from x to the coefficients of apply, and from dy to all gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_norm.kernels.grid import REGISTERS, Grid, cdiv, grid_of, power
from lightning_norm.kernels.mixture.backward import vjp_mix, vjp_pool
from lightning_norm.kernels.mixture.forward import mix, pool
from lightning_norm.kernels.passes.launch import input_gradients, moment_parts, on, sum_parts
from lightning_norm.kernels.ranks.launch import Sum, empty_gradient, pool_ranks, pool_ranks_gradient

BLOCK = 256
"""(n, c) pairs of a program."""


@dataclass(frozen=True)
class Plan:
    """Which equations, in numbers, for they pass through an operator's schema.

    Args:
        own: the moments of x are needed.
        at_in: place of the instance in w and v; -1 if it takes no part.
        at_ln: of the layer or group.
        at_bn: of the batch.
        k: length of w and v; 0 where nothing is mixed.
        softmax: w and v are logits.
        outputs: outputs are mixed, and w is iota.
        frozen: the batch's statistics are the running ones.
        track: 0 leaves the running statistics, 1 moves them by ``momentum``, 2 averages all batches.
        groups: of the layer's statistics.
        correction: 1 for unbiased variances within each sample.
    """

    own: int
    at_in: int
    at_ln: int
    at_bn: int
    k: int
    softmax: int
    outputs: int
    frozen: int
    track: int
    groups: int
    correction: int

    def constants(self) -> dict[str, object]:
        """Return the compile-time arguments that all kernels share."""
        return {
            "OWN": bool(self.own), "IN": self.at_in, "LN": self.at_ln, "BN": self.at_bn, "K": self.k,
            "SOFTMAX": bool(self.softmax), "OUTPUTS": bool(self.outputs), "FROZEN": bool(self.frozen),
        }  # fmt: skip


def coefficients(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    w: Tensor | None,
    v: Tensor | None,
    running: tuple[Tensor | None, ...],
    channel_dim: int,
    plan: Plan,
    eps: float,
    over_ranks: Sum | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the moments of x, statistics of batch and groups, (3, N, C) pivot, scale and offset, and ranks' sums.

    ``running`` holds the running mean and variance, the two counters and the momentum; moved if ``plan.track``. With
    ``over_ranks`` the batch is that of all ranks, and this one's share of it may be empty.
    """
    grid = grid_of(x, channel_dim)
    number = grid.n * grid.c
    coef = torch.empty(3, grid.n, grid.c, device=x.device, dtype=torch.float32)
    batch, layer, own = coef.new_empty(0), coef.new_empty(0), coef.new_empty(0)
    total = coef.new_empty(0, dtype=torch.float64)
    parts, merge = coef, False
    factor = grid.size / max(grid.size - 1, 1) if plan.correction else 1.0
    place = (grid.parts, grid.sample_stride, grid.part_stride, grid.piece, grid.length, grid.fold)
    if grid.n == 0:
        own, batch, layer = torch.empty_like(coef), coef.new_zeros(3, grid.c), coef.new_empty(3, 0, plan.groups)
    elif plan.own:
        parts, merge = moment_parts(x, grid), grid.parts > 1
        own = parts.view(3, grid.n, grid.c) if not merge else torch.empty_like(coef)
        pooled = plan.at_bn >= 0 and not plan.frozen
        if pooled:
            batch = coef.new_empty(3, grid.c)
        if plan.at_ln >= 0:
            layer = coef.new_empty(3, grid.n, plan.groups)
        tile = _tile(grid, plan, 1024)
        columns = cdiv(grid.c, tile["C_BLOCK"]) if pooled else 0
        jobs = columns + (cdiv(grid.n * plan.groups, tile["G_BLOCK"]) if plan.at_ln >= 0 else 0)
        if jobs:
            with on(x):
                pool[(jobs,)](
                    *parts, batch, layer, grid.n, grid.c, grid.n * plan.groups, grid.c // plan.groups, columns, *place,
                    factor, MERGE=merge, num_warps=4, **tile,
                )  # fmt: skip
    count = grid.n * grid.size
    unbias = 1.0 if plan.correction else count / max(count - 1, 1)
    if over_ranks is not None:
        total, unbias = pool_ranks(batch, count, over_ranks), float(not plan.correction)
    mean, var, tracked, skipped, momentum = (coef if t is None else t for t in running)
    hi, lo, spread = parts if plan.own and grid.n else coef
    with on(x):
        mix[(max(1, cdiv(number, BLOCK)),)](
            hi, lo, spread, batch, layer, total, *(coef if t is None else t for t in (weight, bias, w, v)), mean, var,
            tracked, skipped, momentum, own, coef, number, grid.c, grid.n * plan.groups, grid.c // plan.groups,
            *place, eps, factor, unbias, MERGE=merge, TRACK=plan.track, RANKS=over_ranks is not None,
            WEIGHT=weight is not None, BIAS=bias is not None, BLOCK=BLOCK, num_warps=4, **plan.constants(),
        )  # fmt: skip
    return own, batch, layer, coef, total


def gradients(
    dy: Tensor,
    x: Tensor,
    stats: tuple[Tensor, ...],
    weight: Tensor | None,
    w: Tensor | None,
    v: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    channel_dim: int,
    plan: Plan,
    eps: float,
    activation: str,
    need_dx: bool,
    over_ranks: Sum | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias, w, v and the residual; ``stats`` is what ``coefficients`` returned.

    With ``over_ranks`` the ranks meet if x needs a gradient: those of the parameters are this rank's own.
    """
    grid, coef = grid_of(x, channel_dim), stats[3]
    meet = over_ranks if need_dx else None
    if grid.n == 0:
        dweight, line = empty_gradient(stats[1], stats[4], meet), None
        dbias, dw, dv = dweight.clone(), coef.new_zeros(grid.c if plan.outputs else plan.k), coef.new_zeros(plan.k)
    else:
        parts = sum_parts(dy, x, coef, grid, activation, residual)
        place = (grid.parts, grid.sample_stride, grid.part_stride)
        *held, line = adjoint(x, parts, stats, weight, w, v, running, channel_dim, plan, eps, place, meet)
        dweight, dbias, dw, dv = held
    moving = plan.own or plan.k > 0
    maps = input_gradients(dy, x, coef, line if moving else None, channel_dim, activation, residual, need_dx)
    return maps[0], dweight, dbias, dw, dv, maps[1]


def adjoint(
    x: Tensor,
    parts: Tensor,
    stats: tuple[Tensor, ...],
    weight: Tensor | None,
    w: Tensor | None,
    v: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    channel_dim: int,
    plan: Plan,
    eps: float,
    place: tuple[int, int, int],
    over_ranks: Sum | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of weight, bias, w and v, and constant and slope (2, N, C), from the sums in ``parts``.

    ``place`` holds the number of parts, and the distances between two samples' and two parts' numbers.
    """
    grid = grid_of(x, channel_dim)
    own, batch, layer, coef, total = stats
    number, groups = grid.n * grid.c, grid.n * plan.groups
    tile = _tile(grid, plan, 512)
    columns = cdiv(grid.c, tile["C_BLOCK"])
    rows = cdiv(groups, tile["G_BLOCK"]) if plan.at_ln >= 0 else 0
    by_batch, by_layer = coef.new_empty(3, grid.c), coef.new_empty(2, groups if rows else 0)
    dweight, dbias = coef.new_empty(grid.c), coef.new_empty(grid.c)
    dw, dv = coef.new_empty(grid.c if plan.outputs else plan.k), coef.new_empty(plan.k)
    mixed = coef.new_empty(6, columns)
    line = coef.new_empty(2, grid.n, grid.c)
    factor = grid.size / max(grid.size - 1, 1) if plan.correction else 1.0
    given = tuple(coef if t is None else t for t in (weight, w, v, *running))
    common = {**plan.constants(), "MERGE": place[0] > 1, "WEIGHT": weight is not None, "num_warps": 4}
    per_group = grid.c // plan.groups
    with on(x):
        vjp_pool[(columns + rows,)](
            *parts, coef, own, batch, layer, *given, by_batch, by_layer, dweight, dbias, dw, mixed, grid.n, number,
            grid.c, groups, per_group, columns, *place, eps, factor, maxnreg=REGISTERS["vjp_pool"], **tile, **common,
        )  # fmt: skip
        if over_ranks is not None:
            pool_ranks_gradient(by_batch, batch, total, grid.n * grid.size, over_ranks)
        if plan.own or plan.k > 0:
            vjp_mix[(cdiv(number, BLOCK),)](
                *parts, coef, own, batch, layer, *given, by_batch, by_layer, mixed, dw, dv, line, grid.n, number,
                grid.c, groups, per_group, columns, *place, grid.size, eps, factor, BLOCK=BLOCK, **common,
            )  # fmt: skip
    return dweight, dbias, dw, dv, line


def _tile(grid: Grid, plan: Plan, most: int) -> dict[str, int]:
    """Return the tiles over which columns and rows of (N, C) are pooled, of at most ``most`` elements."""
    n, t = min(power(grid.n), 32), min(power(grid.c // plan.groups), most // 4)
    return {
        "N_BLOCK": n, "C_BLOCK": max(1, min(power(grid.c), most // n, 64)),
        "G_BLOCK": max(1, min(power(grid.n * plan.groups), most // t, 16)), "T_BLOCK": t,
    }  # fmt: skip

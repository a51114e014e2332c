"""Launches of the equations in ``channels``: from x to the coefficients of apply, and from dy to all gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_norm.kernels.blocks import BUSY, TILE, Grid, cdiv, grid_of, power
from lightning_norm.kernels.channels import channels_of, commit
from lightning_norm.kernels.channels_vjp import channels_vjp
from lightning_norm.kernels.condensation import decide, directions, norms
from lightning_norm.kernels.launch import combine, moment_parts, on, sum_parts

BLOCK = 1024
"""Numbers that the single program of ``commit`` and ``decide`` takes at once."""

Optional = Tensor | None


@dataclass(frozen=True)
class ChannelPlan:
    """Which equations, in integers, for they pass through an operator's schema.

    Args:
        own: the moments of x are needed.
        frozen: the statistics are the running ones.
        blend: they are mixed with the running ones by alpha.
        std: the spread is a standard deviation, with eps beside the root.
        powers: alpha follows from the number of batches.
        detach: no gradient passes through the batch's statistics.
        choose: 1 where running statistics replace those of a condensed batch, 2 where it only does not move them.
        track: 0 leaves the running statistics, 1 moves them by the momentum or alpha, 2 averages all batches.
        contexts: K; 0 for the whole batch.
        center: a sample's mean strengthens it.
        scale: the normalized mean gates it.
        affine: the mean gates it.
        min_updates: of the running statistics before a batch may count as condensed.
        max_skip: condensed batches in a row.
    """

    own: int
    frozen: int
    blend: int
    std: int
    powers: int
    detach: int
    choose: int
    track: int
    contexts: int
    center: int
    scale: int
    affine: int
    min_updates: int
    max_skip: int

    @property
    def rows(self) -> int:
        """Return the rows of the statistics: contexts, or 1."""
        return max(self.contexts, 1)

    def constants(self) -> dict[str, bool]:
        """Return the compile-time arguments that both directions share."""
        names = ("own", "std", "contexts", "center", "scale", "affine")
        return {name.upper(): bool(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class Numbers:
    """The real numbers of a plan.

    Args:
        eps: inside the root, or beside it.
        least: elements below which a context is drawn towards all samples.
        power: alpha(m) = 1 / m^power.
        unit_scale: what the gate of the normalized mean is multiplied by.
        unit_affine: what the gate of the mean is multiplied by.
    """

    eps: float
    least: float
    power: float
    unit_scale: float
    unit_affine: float


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the moments of x, the statistics (9, K, C), and (3, N, C) pivot, scale and offset.

    Args:
        x: the input.
        weight: gamma.
        bias: beta.
        gates: weight of the centering, weight and bias of the scaling and of the affine gate.
        shares: of each sample in each context, (N, K).
        running: mean, spread, number of updates, number of skipped ones; moved if ``plan.track``.
        counters: with ``blend``, batches and the two gaps; with ``choose``, the last condensation and three counters;
            with contexts, the running share of each.
        rate: momentum or alpha.
        threshold: of the condensation.
        channel_dim: the channel axis.
        plan: the equations.
        numbers: their numbers.
    """
    grid = grid_of(x, channel_dim)
    coef = torch.empty(3, grid.n, grid.c, device=x.device, dtype=torch.float32)
    stats, own = coef.new_empty(9, plan.rows, grid.c), coef.new_empty(0)
    parts, merge = coef, False
    if plan.own:
        parts, merge = moment_parts(x, grid), grid.parts > 1
        own = parts.view(3, grid.n, grid.c) if not merge else torch.empty_like(coef)
    place = (grid.parts, grid.sample_stride, grid.part_stride, grid.piece, grid.length, grid.fold)
    condensed = _condensed(x, parts, grid, counters, running[2], threshold, plan, merge) if plan.choose else coef
    mean, spread, tracked, skipped = (coef if t is None else t for t in running)
    more = [coef if t is None else t for t in counters]
    given = [coef if t is None else t for t in (shares, weight, bias, *gates)]
    tile, rate = _tile(grid, plan, 1024), coef if rate is None else rate
    common = {**plan.constants(), "BLEND": bool(plan.blend), "CHOOSE": plan.choose, "POWER": bool(plan.powers)}
    size = (grid.n, grid.n * grid.c, grid.c, plan.rows)
    with on(x):
        channels_of[(cdiv(grid.c, tile["C_BLOCK"]),)](
            *parts, *given, mean, spread, more[0], rate, condensed, own, stats, coef, *size, *place, numbers.eps,
            numbers.least, numbers.power, numbers.unit_scale, numbers.unit_affine, MERGE=merge,
            FROZEN=bool(plan.frozen), DETACH=bool(plan.detach), WEIGHT=weight is not None, BIAS=bias is not None,
            num_warps=4, **tile, **common,
        )  # fmt: skip
        if plan.track:
            commit[(1,)](
                stats, given[0], condensed, mean, spread, tracked, skipped, more[0], more[1], more[0], rate, grid.n,
                grid.c, plan.rows, numbers.eps, numbers.power, BLEND=bool(plan.blend), STD=bool(plan.std),
                POWER=bool(plan.powers), CHOOSE=plan.choose, CONTEXTS=bool(plan.contexts), AVERAGE=plan.track == 2,
                BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return own, stats, coef


def _condensed(
    x: Tensor,
    parts: Tensor,
    grid: Grid,
    counters: Sequence[Optional],
    tracked: Optional,
    threshold: Optional,
    plan: ChannelPlan,
    merge: bool,
) -> Tensor:
    """Return whether the batch is condensed, 1 or 0, after one more read of x."""
    inverse, condensed = parts.new_empty(grid.n), parts.new_empty(())
    length = grid.c * grid.size
    align = 16 // x.element_size() if length % (16 // x.element_size()) == 0 else 1
    block = max(min(TILE, power(cdiv(length, 2 * BUSY))), 256)
    jobs = cdiv(length, block)
    found = parts.new_empty(jobs)
    with on(x):
        norms[(grid.n,)](
            *parts, inverse, grid.c, grid.parts, grid.sample_stride, grid.part_stride, grid.piece, grid.length,
            grid.fold, MERGE=merge, BLOCK=min(power(grid.c), BLOCK), num_warps=4,
        )  # fmt: skip
        directions[(jobs,)](x, inverse, found, grid.n, length // align, ALIGN=align, BLOCK=block, num_warps=4)
        decide[(1,)](
            inverse, found, condensed, *counters, tracked, threshold, grid.n, jobs, plan.min_updates, plan.max_skip,
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return condensed


def gradients(
    dy: Tensor,
    x: Tensor,
    own: Tensor,
    stats: Tensor,
    coef: Tensor,
    weight: Optional,
    gates: Sequence[Optional],
    shares: Optional,
    residual: Optional,
    channel_dim: int,
    plan: ChannelPlan,
    numbers: Numbers,
    activation: str,
    need_dx: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, weight, bias, the five gate parameters and the residual."""
    grid = grid_of(x, channel_dim)
    parts = sum_parts(dy, x, coef, grid, activation, residual)
    dweight, dbias = coef.new_empty(plan.rows, grid.c), coef.new_empty(plan.rows, grid.c)
    dgates = [coef.new_empty(0 if t is None else grid.c) for t in gates]
    line = coef.new_empty(2, grid.n, grid.c)
    tile = _tile(grid, plan, 512)
    given = [coef if t is None else t for t in (shares, weight, *gates)]
    with on(x):
        channels_vjp[(cdiv(grid.c, tile["C_BLOCK"]),)](
            *parts, coef, own, stats, *given, dweight, dbias, *dgates, line, grid.n, grid.n * grid.c, grid.c,
            plan.rows, grid.parts, grid.sample_stride, grid.part_stride, grid.size, numbers.least, numbers.unit_scale,
            numbers.unit_affine, MERGE=grid.parts > 1, STD_OF_VAR=bool(plan.std and not plan.frozen),
            WEIGHT=weight is not None, num_warps=4, **tile, **plan.constants(),
        )  # fmt: skip
    dx, dresidual = coef.new_empty(0), None
    if need_dx or residual is not None:
        dx, dresidual = combine(dy, x, coef, line if plan.own else None, channel_dim, activation, residual)
    return dx, dweight, dbias, *dgates, coef.new_empty(0) if dresidual is None else dresidual


def _tile(grid: Grid, plan: ChannelPlan, most: int) -> dict[str, int]:
    """Return tiles of samples, contexts and channels of at most ``most`` elements, in many programs."""
    k = power(plan.rows)
    n = max(1, min(power(grid.n), 32, most // k))
    return {"N_BLOCK": n, "K_BLOCK": k, "C_BLOCK": max(1, min(power(grid.c), most // (n * k), 16))}

"""Launches of the per-channel family: from x to the affine map of apply, and from dy to all gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_norm.kernels.arguments import Moments, or_other, sums_in
from lightning_norm.kernels.grid import BUSY, REGISTERS, TILE, Grid, cdiv, dense, grid_of, power
from lightning_norm.kernels.launcher import launch
from lightning_norm.kernels.passes.launch import device_of, input_gradients, moment_parts, sum_parts
from lightning_norm.kernels.per_channel import flags as tuples
from lightning_norm.kernels.per_channel.backward import channels_vjp, gate_logits_vjp, gate_vjp
from lightning_norm.kernels.per_channel.condensation import directions
from lightning_norm.kernels.per_channel.flags import PerChannelFlags, PerChannelNumbers
from lightning_norm.kernels.per_channel.forward import channels_of, pool_channels
from lightning_norm.kernels.per_channel.running_stats import commit, survey
from lightning_norm.kernels.ranks.launch import AllReduce, empty_gradient, pool_ranks, pool_ranks_gradient

BLOCK = 1024
"""Numbers that a program of ``survey`` and ``commit`` takes at once."""

Optional = Tensor | None


def affine_of(
    x: Tensor,
    weight: Optional,
    bias: Optional,
    gates: Sequence[Optional],
    responsibilities: Optional,
    running: Sequence[Optional],
    counters: Sequence[Optional],
    rate: Optional,
    threshold: Optional,
    limit: Optional,
    channel_dim: int,
    flags: PerChannelFlags,
    numbers: PerChannelNumbers,
    over_ranks: AllReduce | None = None,
) -> tuples.PerChannelStatistics:
    """Return the statistics of x, and pivot, scale and offset of y; with ``over_ranks`` those of the whole batch.

    A rank may have no samples.

    Args:
        x: the input.
        weight: gamma.
        bias: beta.
        gates: weight of the centering, weight and bias of the scaling, of the affine gate and of the contexts' gate.
        responsibilities: of each context for each sample, (N, K).
        running: mean, variance (or deviation), number of updates, number of skipped ones; moved if ``flags.track``.
        counters: with ``blend``, batches and the two gaps, and what ``averages`` moves, mean and variance; with
            ``condensed``, the last condensation and three counters; with contexts, the prior of each.
        rate: momentum or alpha.
        threshold: of the condensation; with ``averages`` the rate of the average; of the factor with ``blend`` 4.
        limit: of the offset with ``blend`` 4.
        channel_dim: the channel axis.
        flags: which equations.
        numbers: their numbers.
        over_ranks: adds up over the ranks.
    """
    grid = grid_of(x, channel_dim)
    affine = torch.empty(3, grid.n, grid.c, device=x.device, dtype=torch.float32)
    moments, survey_out = affine.new_empty(0), affine.new_empty(flags.survey_size(grid.n))
    stats = affine.new_empty(flags.num_statistics, flags.rows, grid.c)
    batch, rank_sums = affine.new_zeros(3, grid.c if flags.ranks else 0), affine.new_empty(0, dtype=torch.float64)
    parts, merge = Moments(*affine), False
    # No samples on this rank: it adds nothing, and meets the others.
    if grid.n == 0:
        parts, moments = Moments(*torch.zeros_like(batch)), torch.empty_like(affine[1:])
    elif flags.needs_moments:
        # The mean is the pivot, and stored once.
        moments = torch.empty_like(affine[1:])
        parts, grid = moment_parts(x, grid, Moments(affine[0], *moments))
        merge = grid.parts > 1
    # The kernels want a tensor for every argument; of ``affine`` in the place of one they read nothing.
    state = state_of(running, counters, affine)
    tile = _tile(grid, flags, 1024)
    blocks = cdiv(grid.c, tile.c)
    compiled = flags.compiled(
        merge=merge, weight=weight is not None, bias=bias is not None, known=running[0] is not None
    )
    # With ranks U and V are pooled first, then summed, and read by the equations.
    if over_ranks is not None:
        with device_of(x):
            if grid.n:
                launch(pool_channels, blocks)(
                    parts, affine if gates[0] is None else gates[0], batch, grid.n, grid.c, *grid.moment_layout,
                    FLAGS=compiled, TILE=tile, num_warps=4,
                )  # fmt: skip
        rank_sums = pool_ranks(batch, grid.n * grid.size, over_ranks)
    with device_of(x):
        if flags.surveys:
            launch(survey, (grid.n if flags.surveys_samples else 0) + 1)(
                parts, *or_other(gates[5:], affine), state, survey_out, grid.n, grid.c, flags.rows,
                *grid.moment_layout, flags.min_updates, flags.max_skip, FLAGS=compiled, K_BLOCK=tile.k,
                BLOCK=min(power(grid.c), BLOCK // tile.k), num_warps=4, maxnreg=REGISTERS["survey"],
            )  # fmt: skip
        # Condensation takes one more read of x, behind the norms that ``survey`` leaves.
        direction_parts = _direction_parts(x, survey_out, grid, flags) if flags.condensed else affine
        used = _responsibilities(responsibilities, survey_out, grid.n, flags)
        learned = tuples.Learned(*or_other((used, weight, bias, *gates[:5]), affine))
        rates = tuples.Rates(*or_other((rate, threshold, limit), affine))
        out = tuples.PerChannelStatistics(moments, stats, affine, survey_out, batch, rank_sums)
        launch(channels_of, blocks)(
            parts, learned, state, rates, out, direction_parts, grid.n, grid.n * grid.c, grid.c, flags.rows,
            direction_parts.numel(), *grid.moment_layout, tuples.Numbers(**vars(numbers)), FLAGS=compiled, TILE=tile,
            num_warps=4, maxnreg=REGISTERS["channels_of"],
        )  # fmt: skip
        # Blended statistics move together, or not at all: one program looks at all channels.
        if flags.blend:
            launch(commit, 1)(
                stats, state, rates, grid.c, tuples.Numbers(**vars(numbers)), FLAGS=compiled, BLOCK=BLOCK, num_warps=4
            )  # fmt: skip
    return out


def state_of(running: Sequence[Optional], counters: Sequence[Optional], other: Tensor) -> tuples.State:
    """Return what moves with the batches, ``other`` where a layer has none.

    The four counters are those of a blend or of a condensation; the first is also the prior of contexts.
    """
    mean, var, tracked, skipped, *more = or_other((*running, *counters), other)
    return tuples.State._make((mean, var, tracked, skipped, *more, more[0], *more))


def _direction_parts(x: Tensor, survey_out: Tensor, grid: Grid, flags: PerChannelFlags) -> Tensor:
    """Return the parts of the squared length of the sum of all directions, after one more read of x."""
    length = grid.c * grid.size
    align = 16 // x.element_size() if length % (16 // x.element_size()) == 0 else 1
    # Two programs or more for each multiprocessor, of 256 positions at least.
    block = max(min(TILE, power(cdiv(length, 2 * BUSY))), 256)
    parts = survey_out.new_empty(cdiv(length, block))
    inverse = survey_out[2 + 3 * flags.rows + grid.n :]
    launch(directions, parts.numel())(x, inverse, parts, grid.n, length // align, ALIGN=align, BLOCK=block, num_warps=4)
    return parts


def _responsibilities(responsibilities: Optional, survey_out: Tensor, n: int, flags: PerChannelFlags) -> Optional:
    """Return each context's responsibility for each sample."""
    if flags.pooled:
        return survey_out[2 + 2 * flags.rows :]
    return survey_out[2 + 3 * flags.rows + n :] if flags.gate else responsibilities


def gradients(
    dy: Tensor,
    x: Tensor,
    moments: Tensor,
    stats: Tensor,
    affine: Tensor,
    survey_out: Tensor,
    batch: Tensor,
    rank_sums: Tensor,
    weight: Optional,
    bias: Optional,
    gates: Sequence[Optional],
    responsibilities: Optional,
    residual: Optional,
    channel_dim: int,
    flags: PerChannelFlags,
    numbers: PerChannelNumbers,
    activation: str,
    need_dx: bool,
    over_ranks: AllReduce | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, weight, bias, the seven gate parameters and the residual; ``over_ranks`` to meet."""
    grid = grid_of(x, channel_dim)
    if grid.n == 0:
        # No samples on this rank: it meets the others, and its gradients are zeros.
        zero = empty_gradient(batch, rank_sums, over_ranks)[None]
        dgates = [affine.new_empty(0) if t is None else torch.zeros_like(t, dtype=torch.float32) for t in gates]
        maps = input_gradients(dy, x, affine, None, channel_dim, activation, residual, need_dx)
        return maps[0], zero, zero.clone(), *dgates, maps[1]
    # Once for both passes that read them.
    dy, residual = dense(dy, x), None if residual is None else dense(residual, x)
    parts, grid = sum_parts(dy, x, affine, grid, activation, residual)
    dweight, dbias = affine.new_empty(flags.rows, grid.c), affine.new_empty(flags.rows, grid.c)
    dgates = [affine.new_empty(0) if t is None else torch.empty_like(t, dtype=torch.float32) for t in gates]
    dx_affine = affine.new_empty(2, grid.n, grid.c)
    tile = _tile(grid, flags, 512)
    blocks = cdiv(grid.c, tile.c)
    # A row more than samples, the first: what every sample's responsibility gets alike.
    dresponsibilities = affine.new_empty(blocks if flags.gate else 0, grid.n + 1, flags.rows)
    used = _responsibilities(responsibilities, survey_out, grid.n, flags)
    learned = tuples.Learned(*or_other((used, weight, bias, *gates[:5]), affine))
    dpooled, centered = affine.new_empty(3, grid.c), affine.new_empty(grid.c)
    given = tuples.PerChannelStatistics(moments, stats, affine, survey_out, batch, rank_sums)
    out = tuples.PerChannelGradients._make(
        (dweight, dbias, *dgates[:5], dx_affine, dresponsibilities, dpooled, centered)
    )

    def vjp(ranks: int) -> None:
        compiled = flags.compiled(merge=grid.parts > 1, weight=weight is not None, bias=bias is not None)
        launch(channels_vjp, blocks)(
            sums_in(parts), given, stats[-1], learned, out, grid.n, grid.n * grid.c, grid.c, flags.rows,
            *grid.partial_layout, grid.size, tuples.Numbers(**vars(numbers)), FLAGS=compiled._replace(ranks=ranks),
            TILE=tile, num_warps=4, maxnreg=REGISTERS["channels_vjp"],
        )  # fmt: skip

    with device_of(x):
        # The gradients of U and V go to the other ranks between two launches of the same kernel.
        vjp(0 if over_ranks is None else 1)
        if over_ranks is not None:
            pool_ranks_gradient(dpooled, rank_sums, over_ranks)
            vjp(2)
        # From the gradient of the responsibilities to the gate's parameters and dx.
        if flags.gate:
            dlogits = affine.new_empty(grid.n, flags.rows)
            launch(gate_logits_vjp, grid.n)(
                dresponsibilities, learned.responsibilities, dlogits, grid.n, flags.rows, blocks, K_BLOCK=tile.k,
                BLOCK=min(power(blocks), BLOCK // tile.k), num_warps=4,
            )  # fmt: skip
            launch(gate_vjp, blocks)(
                dlogits, affine, moments, gates[5], *dgates[5:], dx_affine, grid.n, grid.n * grid.c, grid.c, flags.rows,
                grid.size, N_BLOCK=tile.n, K_BLOCK=tile.k, C_BLOCK=tile.c, num_warps=4,
            )  # fmt: skip
    maps = input_gradients(
        dy, x, affine, dx_affine if flags.needs_moments else None, channel_dim, activation, residual, need_dx
    )
    return maps[0], dweight, dbias, *dgates, maps[1]


def _tile(grid: Grid, flags: PerChannelFlags, most: int) -> tuples.Tile:
    """Return tiles of samples, contexts and channels of at most ``most`` elements, in many programs."""
    # Few channels to a program: only many programs keep a GPU busy with (N, C) numbers.
    k = power(flags.rows)
    n = max(1, min(power(grid.n), 32, most // k))
    return tuples.Tile(n, k, max(1, min(power(grid.c), most // (n * k), 16)))

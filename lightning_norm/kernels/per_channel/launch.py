"""Launches of the per-channel family: from x to the affine map of apply, and from dy to all gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_norm.kernels.grid import BUSY, REGISTERS, TILE, Grid, cdiv, dense, grid_of, power
from lightning_norm.kernels.launcher import launch
from lightning_norm.kernels.passes.launch import device_of, input_gradients, moment_parts, sum_parts
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return moments of x, statistics (7 to 11, K, C), (3, N, C) pivot, scale and offset, and what was surveyed.

    The moments are (2, N, C): what rounding left of the mean, which is the pivot, and the variance.

    Then, with ``over_ranks``, U and V (3, C) of the batch on all ranks, and what these added up.
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
    parts, merge = tuple(affine), False
    # No samples on this rank: it adds nothing, and meets the others.
    if grid.n == 0:
        parts, moments = tuple(torch.zeros_like(batch)), torch.empty_like(affine[1:])
    elif flags.needs_moments:
        # The mean is the pivot, and stored once.
        moments = torch.empty_like(affine[1:])
        parts, grid = moment_parts(x, grid, (affine[0], *moments))
        merge = grid.parts > 1
    mean, running_var, tracked, skipped = (affine if t is None else t for t in running)
    # The kernels want a tensor for every argument; of ``affine`` in the place of one they read nothing.
    more = [affine if t is None else t for t in counters]
    # The fourth counter is that of condensed batches in a row.
    last = more[3] if flags.condensed else affine
    k = power(flags.rows)
    tile = _tile(grid, flags, 1024)
    blocks = cdiv(grid.c, tile["C_BLOCK"])
    # With ranks U and V are pooled first, then summed, and read by the equations.
    if over_ranks is not None:
        with device_of(x):
            if grid.n:
                launch(pool_channels, blocks)(
                    *parts, affine if gates[0] is None else gates[0], batch, grid.n, grid.c, *grid.moment_layout,
                    MERGE=merge, CENTER=flags.center, num_warps=4, **tile,
                )  # fmt: skip
        rank_sums = pool_ranks(batch, grid.n * grid.size, over_ranks)
    with device_of(x):
        if flags.surveys:
            launch(survey, (grid.n if flags.surveys_samples else 0) + 1)(
                *parts, *(affine if t is None else t for t in gates[5:]), mean, running_var, tracked, last, more[0],
                survey_out, grid.n, grid.c, flags.rows, *grid.moment_layout, flags.min_updates, flags.max_skip,
                LOOK=flags.surveys_samples, MERGE=merge, NORM=flags.condensed > 0, GATE=flags.gate,
                MOVE=flags.moves_with_channels, CONTEXTS=flags.contexts > 0, KNOWN=running[0] is not None, K_BLOCK=k,
                BLOCK=min(power(grid.c), BLOCK // k), num_warps=4, maxnreg=REGISTERS["survey"],
            )  # fmt: skip
        # Condensation takes one more read of x, behind the norms that ``survey`` leaves.
        direction_parts = _direction_parts(x, survey_out, grid, flags) if flags.condensed else affine
        responsibilities_used, stride = _responsibilities(responsibilities, survey_out, grid.n, flags)
        parameters = [affine if t is None else t for t in (responsibilities_used, weight, bias, *gates[:5])]
        rate, threshold = (affine if t is None else t for t in (rate, threshold))
        # The first counter is ``updates`` with blend and ``prior`` with contexts; all four are those of a condensation.
        launch(channels_of, blocks)(
            *parts, *parameters, mean, running_var, tracked, skipped, more[0], more[0], *more, rate, threshold,
            affine if limit is None else limit, survey_out, direction_parts, batch, rank_sums, moments, stats,
            affine, grid.n, grid.n * grid.c, grid.c, flags.rows, stride, direction_parts.numel(), *grid.moment_layout,
            numbers.eps, numbers.inner, numbers.least, numbers.power, numbers.unit_scale, numbers.unit_affine,
            MERGE=merge, FROZEN=flags.frozen, BLEND=flags.blend, COPY=flags.copies_first, POWER=flags.powers,
            DETACH=flags.detach, CONDENSED=flags.condensed, MOVE=flags.track * flags.moves_with_channels,
            POOLED=flags.pooled, RANKS=flags.ranks, WEIGHT=weight is not None, BIAS=bias is not None, num_warps=4,
            maxnreg=REGISTERS["channels_of"], **tile, **flags.constants(),
        )  # fmt: skip
        # Blended statistics move together, or not at all: one program looks at all channels.
        if flags.blend:
            launch(commit, 1)(
                stats, mean, running_var, tracked, skipped, *more, rate, threshold, grid.c, numbers.eps, numbers.inner,
                numbers.power, STD=flags.std, COPY=flags.copies_first, POWER=flags.powers, AVERAGE=flags.averages,
                RANKS=flags.ranks, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return moments, stats, affine, survey_out, batch, rank_sums


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


def _responsibilities(
    responsibilities: Optional, survey_out: Tensor, n: int, flags: PerChannelFlags
) -> tuple[Optional, int]:
    """Return each context's responsibility for each sample, and the distance between two samples'."""
    if flags.pooled:
        return survey_out[2 + 2 * flags.rows :], 0
    return survey_out[2 + 3 * flags.rows + n :] if flags.gate else responsibilities, flags.rows


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
    blocks = cdiv(grid.c, tile["C_BLOCK"])
    dresponsibilities = affine.new_empty(blocks if flags.gate else 0, grid.n + 1, flags.rows)
    responsibilities_used, stride = _responsibilities(responsibilities, survey_out, grid.n, flags)
    parameters = [affine if t is None else t for t in (responsibilities_used, survey_out, weight, bias, *gates[:5])]
    dpooled, centered = affine.new_empty(3, grid.c), affine.new_empty(grid.c)

    def vjp(ranks: int) -> None:
        launch(channels_vjp, blocks)(
            *parts, affine, moments, stats, *parameters, dweight, dbias, *dgates[:5], dx_affine, dresponsibilities,
            stats[-1], dpooled, centered, grid.n, grid.n * grid.c, grid.c, flags.rows, stride, grid.parts,
            grid.sample_stride, grid.part_stride, grid.size, numbers.inner, numbers.least, numbers.unit_scale,
            numbers.unit_affine, MERGE=grid.parts > 1, STD_OF_VAR=flags.std and not flags.frozen, RENORM=flags.renorm,
            GATE=flags.gate, RANKS=ranks, WEIGHT=weight is not None, BIAS=bias is not None, num_warps=4,
            maxnreg=REGISTERS["channels_vjp"], **tile, **flags.constants(),
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
            k = tile["K_BLOCK"]
            launch(gate_logits_vjp, grid.n)(
                dresponsibilities, responsibilities_used, dlogits, grid.n, flags.rows, blocks, K_BLOCK=k,
                BLOCK=min(power(blocks), BLOCK // k), num_warps=4,
            )  # fmt: skip
            launch(gate_vjp, blocks)(
                dlogits, affine, moments, gates[5], *dgates[5:], dx_affine, grid.n, grid.n * grid.c, grid.c, flags.rows,
                grid.size, num_warps=4, **tile,
            )  # fmt: skip
    maps = input_gradients(
        dy, x, affine, dx_affine if flags.needs_moments else None, channel_dim, activation, residual, need_dx
    )
    return maps[0], dweight, dbias, *dgates, maps[1]


def _tile(grid: Grid, flags: PerChannelFlags, most: int) -> dict[str, int]:
    """Return tiles of samples, contexts and channels of at most ``most`` elements, in many programs."""
    k = power(flags.rows)
    n = max(1, min(power(grid.n), 32, most // k))
    return {"N_BLOCK": n, "K_BLOCK": k, "C_BLOCK": max(1, min(power(grid.c), most // (n * k), 16))}

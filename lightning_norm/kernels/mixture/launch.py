"""Launches of the mixture family: from x to the affine map of apply, and from dy to all gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_norm.kernels.arguments import Moments, or_other, sums_in
from lightning_norm.kernels.grid import REGISTERS, Grid, cdiv, dense, grid_of, power
from lightning_norm.kernels.launcher import launch
from lightning_norm.kernels.mixture import flags as tuples
from lightning_norm.kernels.mixture.backward import vjp_mix, vjp_pool
from lightning_norm.kernels.mixture.flags import MixtureFlags, MixtureStatistics
from lightning_norm.kernels.mixture.forward import mix, pool
from lightning_norm.kernels.passes.launch import device_of, input_gradients, moment_parts, sum_parts
from lightning_norm.kernels.ranks.launch import AllReduce, empty_gradient, pool_ranks, pool_ranks_gradient

BLOCK = 256
"""(n, c) pairs of a program."""


def affine_of(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    w: Tensor | None,
    v: Tensor | None,
    running: tuple[Tensor | None, ...],
    channel_dim: int,
    flags: MixtureFlags,
    eps: float,
    over_ranks: AllReduce | None = None,
) -> MixtureStatistics:
    """Return the statistics of x, and pivot, scale and offset of y = scale * (x - pivot) + offset.

    ``running`` holds the running mean and variance, the two counters and the momentum; moved if ``flags.track``. With
    ``over_ranks`` the batch is that of all ranks, and this rank may have none of its samples.
    """
    grid = grid_of(x, channel_dim)
    number, stats = grid.n * grid.c, empty_statistics(x, grid, flags)
    affine, batch, layer = stats.affine, stats.batch, stats.layer
    # Where nothing is measured, another tensor stands in for pointers that no kernel reads.
    parts, merge, factor = Moments(*affine[:3]), False, factor_of(grid.size, flags)
    # No samples on this rank: it adds nothing, and meets the others.
    if grid.n == 0:
        batch.zero_()
    elif flags.needs_moments:
        # The mean is the pivot, and stored once.
        parts, grid = moment_parts(x, grid, Moments(affine[0], *stats.moments))
        merge = grid.parts > 1
        # One launch pools the batch's statistics (columns) and the groups' (rows).
        tile = tile_of(grid, flags, 1024)
        columns = cdiv(grid.c, tile.c) if flags.pools_batch else 0
        jobs = columns + (cdiv(grid.n * flags.num_groups, tile.g) if flags.pools_layer else 0)
        if jobs:
            with device_of(x):
                launch(pool, jobs)(
                    parts, batch, layer, grid.n, grid.c, grid.n * flags.num_groups, grid.c // flags.num_groups,
                    columns, *grid.moment_layout, factor, MERGE=merge, TILE=tile, num_warps=4,
                    maxnreg=REGISTERS["pool"],
                )  # fmt: skip
    # Across ranks the kernel knows the number of elements.
    unbias = unbias_of(grid.n * grid.size, flags) if over_ranks is None else float(not flags.correction)
    if over_ranks is not None:
        stats = stats._replace(rank_sums=pool_ranks(batch, grid.n * grid.size, over_ranks))
    parameters = tuples.Parameters(*or_other((weight, bias, w, v), affine))
    with device_of(x):
        launch(mix, max(1, cdiv(number, BLOCK)))(
            parts, stats, parameters, tuples.Running(*or_other(running, affine)), number, grid.c,
            grid.n * flags.num_groups, grid.c // flags.num_groups, *grid.moment_layout, eps, factor, unbias,
            FLAGS=flags.compiled(
                merge=merge, weight=weight is not None, bias=bias is not None, ranks=over_ranks is not None
            ),
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return stats


def gradients(
    dy: Tensor,
    x: Tensor,
    stats: MixtureStatistics,
    weight: Tensor | None,
    w: Tensor | None,
    v: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    channel_dim: int,
    flags: MixtureFlags,
    eps: float,
    activation: str,
    need_dx: bool,
    over_ranks: AllReduce | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias, w, v and the residual; ``stats`` is what ``affine_of`` returned.

    With ``over_ranks`` the ranks meet if x needs a gradient. Gradients of parameters are those of this rank's samples.
    """
    grid, affine = grid_of(x, channel_dim), stats.affine
    # Without a gradient of x nothing depends on other ranks' dy.
    meet = over_ranks if need_dx else None
    if grid.n == 0:
        dweight, dx_affine = empty_gradient(stats.batch, stats.rank_sums, meet), None
        dbias, dv = dweight.clone(), affine.new_zeros(flags.num_weights)
        dw = affine.new_zeros(flags.length_of_w(grid.c))
    else:
        # Once for both passes that read them.
        dy, residual = dense(dy, x), None if residual is None else dense(residual, x)
        parts, grid = sum_parts(dy, x, affine, grid, activation, residual)
        dweight, dbias, dw, dv, dx_affine = adjoint(
            x, parts, stats, weight, w, v, running, channel_dim, flags, eps, grid.partial_layout, meet
        )
    if not (flags.needs_moments or flags.num_weights > 0):
        dx_affine = None  # the statistics are constants: dx = scale * dy
    dx, dresidual = input_gradients(dy, x, affine, dx_affine, channel_dim, activation, residual, need_dx)
    return dx, dweight, dbias, dw, dv, dresidual


def adjoint(
    x: Tensor,
    parts: Tensor,
    stats: MixtureStatistics,
    weight: Tensor | None,
    w: Tensor | None,
    v: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    channel_dim: int,
    flags: MixtureFlags,
    eps: float,
    partial_layout: tuple[int, int, int],
    over_ranks: AllReduce | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of weight, bias, w and v, and constant and slope (2, N, C), from the sums in ``parts``.

    ``partial_layout`` is the ``Grid.partial_layout`` of those sums.
    """
    grid = grid_of(x, channel_dim)
    affine = stats.affine
    number, groups = grid.n * grid.c, grid.n * flags.num_groups
    tile = tile_of(grid, flags, 512)
    columns = cdiv(grid.c, tile.c)
    # Programs for channels, and for groups where they take part.
    rows = cdiv(groups, tile.g) if flags.at_ln >= 0 else 0
    out, factor = empty_gradients(grid, flags, tile, affine), factor_of(grid.size, flags)
    tensors = (
        sums_in(parts), stats, tuples.Parameters(*or_other((weight, None, w, v), affine)),
        tuples.Running._make(or_other((*running, None, None, None), affine)),
        out,
    )  # fmt: skip
    sizes = grid.n, number, grid.c, groups, grid.c // flags.num_groups, columns, *partial_layout
    compiled = flags.compiled(merge=partial_layout[0] > 1, weight=weight is not None)
    with device_of(x):
        launch(vjp_pool, columns + rows)(
            *tensors, *sizes, eps, factor, FLAGS=compiled, TILE=tile, num_warps=4, maxnreg=REGISTERS["vjp_pool"],
        )  # fmt: skip
        # Between the two launches: pooled gradients are summed over the ranks.
        if over_ranks is not None:
            pool_ranks_gradient(out.batch, stats.rank_sums, over_ranks)
        if flags.needs_moments or flags.num_weights > 0:
            launch(vjp_mix, cdiv(number, BLOCK))(
                *tensors, *sizes, grid.size, eps, factor, FLAGS=compiled, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return out.weight, out.bias, out.w, out.v, out.dx_affine


def empty_statistics(x: Tensor, grid: Grid, flags: MixtureFlags) -> MixtureStatistics:
    """Return tensors for the statistics of x; what is not needed is empty, and so is what comes from other ranks."""
    affine = torch.empty(flags.affine_rows, grid.n, grid.c, device=x.device, dtype=torch.float32)
    moments = torch.empty_like(affine[:2]) if flags.needs_moments else affine.new_empty(0)
    batch = affine.new_empty(3, grid.c) if flags.pools_batch else affine.new_empty(0)
    layer = affine.new_empty(3, grid.n, flags.num_groups) if flags.pools_layer else affine.new_empty(0)
    return MixtureStatistics(moments, batch, layer, affine, affine.new_empty(0, dtype=torch.float64))


def empty_gradients(grid: Grid, flags: MixtureFlags, tile: tuples.Tile, like: Tensor) -> tuples.Gradients:
    """Return tensors for what the backward launches write."""
    groups = grid.n * flags.num_groups if flags.at_ln >= 0 else 0
    weight, bias = like.new_empty(grid.c), like.new_empty(grid.c)
    w, v = like.new_empty(flags.length_of_w(grid.c)), like.new_empty(flags.num_weights)
    # Gradients of the weights are sums over everything: each block leaves its part, and the next launch adds them up.
    partials, dx_affine = like.new_empty(6, cdiv(grid.c, tile.c)), like.new_empty(2, grid.n, grid.c)
    return tuples.Gradients(
        like.new_empty(3, grid.c), like.new_empty(2, groups), weight, bias, w, v, partials, dx_affine
    )


def factor_of(size: int, flags: MixtureFlags) -> float:
    """Return what makes the variance of a sample's ``size`` elements the unbiased one, where that is asked for."""
    return size / max(size - 1, 1) if flags.correction else 1.0


def unbias_of(count: int, flags: MixtureFlags) -> float:
    """Return what makes the variance of a batch's ``count`` elements unbiased, as running variances are."""
    return 1.0 if flags.correction else count / max(count - 1, 1)


def tile_of(grid: Grid, flags: MixtureFlags, most: int) -> tuples.Tile:
    """Return the tiles over which columns and rows of (N, C) are pooled, of at most ``most`` elements."""
    # At most two steps for 64 samples, or for 2048 channels of a group.
    n, per_group = min(power(grid.n), most // 16), grid.c // flags.num_groups
    # One length for whole layers and few for groups, so that a network of many widths compiles few kernels.
    lengths = (1024,) if flags.num_groups == 1 else (16, 64, 256, 1024)
    t = next(t for t in lengths if per_group <= t or t == lengths[-1])
    g = max(1, min(power(grid.n * flags.num_groups), most // t, 16))
    return tuples.Tile(n, max(1, min(power(grid.c), most // n, 64)), g, t)

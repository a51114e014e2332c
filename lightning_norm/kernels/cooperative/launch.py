"""Launches of the cooperative kernels: one from x to y, one from dy to all gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_norm.kernels import grid as switches
from lightning_norm.kernels.arguments import Maps, Moments, or_other, sums_in
from lightning_norm.kernels.cooperative.backward import cooperative_mixture_vjp
from lightning_norm.kernels.cooperative.flags import Forward, Plan
from lightning_norm.kernels.cooperative.forward import cooperative_mixture
from lightning_norm.kernels.grid import BUSY, FEW, REGISTERS, TILE, Grid, cdiv, dense, grid_of
from lightning_norm.kernels.launcher import is_compiled, launch
from lightning_norm.kernels.mixture import flags as tuples
from lightning_norm.kernels.mixture.flags import MixtureFlags, MixtureStatistics
from lightning_norm.kernels.mixture.launch import empty_gradients, empty_statistics, factor_of, tile_of, unbias_of
from lightning_norm.kernels.passes.launch import ACTIVATIONS, averages, device_of, magic

HELD = 24 << 20
"""Bytes of x at most: with y, or with dy and dx, about what the L2 cache of an A100 or H100 holds."""

RESIDENT = 2
"""Programs to a multiprocessor: so many are there at once whatever registers they take, 255 for each of 128 threads."""

PHASES = 4

_arrived: dict[tuple[int, int], Tensor] = {}


def arrivals(x: Tensor) -> Tensor:
    """Return the three counters by which the programs of a launch meet, (3,) in int32, which start as 0.

    Launches on two streams may run at once, so each stream has its own, and each CUDA graph, which any stream may run.
    """
    if not x.is_cuda:
        key = -1, 0
    elif torch.cuda.is_current_stream_capturing():
        return torch.zeros(3, device=x.device, dtype=torch.int32)
    else:
        key = x.get_device(), torch.cuda.current_stream(x.device).cuda_stream
    if key not in _arrived:
        _arrived[key] = torch.zeros(3, device=x.device, dtype=torch.int32)
    return _arrived[key]


def grid_for(x: Tensor, channel_dim: int, flags: MixtureFlags) -> Grid | None:
    """Return how x is read; ``None`` where it is too large, or the switch ``grid.COOPERATIVE`` is off."""
    fits = 0 < x.numel() * x.element_size() <= HELD and flags.needs_moments
    if not switches.COOPERATIVE or not fits:
        return None
    grid = grid_of(x, channel_dim)
    # More parts are joined by a launch of their own.
    return grid if grid.parts <= FEW else None


def normalize(
    grid: Grid,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    w: Tensor | None,
    v: Tensor | None,
    running: Sequence[Tensor | None],
    arrived: Tensor,
    flags: MixtureFlags,
    eps: float,
    activation: str,
) -> tuple[Tensor, MixtureStatistics]:
    """Return y, and what ``mixture.launch.affine_of`` returns; the arguments as there."""
    y, stats = torch.empty_like(x), empty_statistics(x, grid, flags)
    plan = plan_of(grid, averages(grid, x.dtype), ACTIVATIONS.index(activation), residual is not None)
    affine, number, merge = stats.affine, grid.n * grid.c, grid.parts > 1
    # One piece is written where it is kept, its mean being the pivot.
    parts = Moments(*affine.new_empty(3, grid.parts * number)) if merge else Moments(affine[0], *stats.moments)
    _launch(
        cooperative_mixture, x, grid,
        Forward(x, x if residual is None else dense(residual, x), y), parts, stats,
        tuples.Parameters(*or_other((weight, bias, w, v), affine)),
        tuples.Running(*or_other(running, affine)), arrived, *_sizes(grid, flags), eps,
        factor_of(grid.size, flags), unbias_of(grid.n * grid.size, flags),
        FLAGS=flags.compiled(merge=merge, weight=weight is not None, bias=bias is not None),
        TILE=tile_of(grid, flags, 1024), PLAN=plan,
    )  # fmt: skip
    return y, stats


def gradients(
    grid: Grid,
    dy: Tensor,
    x: Tensor,
    stats: MixtureStatistics,
    weight: Tensor | None,
    w: Tensor | None,
    v: Tensor | None,
    residual: Tensor | None,
    arrived: Tensor,
    flags: MixtureFlags,
    eps: float,
    activation: str,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what ``mixture.launch.gradients`` returns; the arguments as there."""
    affine, tile = stats.affine, tile_of(grid, flags, 512)
    plan = plan_of(grid, False, ACTIVATIONS.index(activation), residual is not None)
    sums = affine.new_empty(3 if flags.threshold else 2, grid.parts * grid.n * grid.c)
    out = empty_gradients(grid, flags, tile, affine)
    none, plain = affine.new_empty(0), not need_dx and residual is None
    dx, dresidual = none if plain else torch.empty_like(x), none if residual is None else torch.empty_like(x)
    # Another tensor stands in for what no kernel reads or writes.
    maps = Maps(
        dense(dy, x), x, x if residual is None else dense(residual, x), x if plain else dx,
        x if residual is None else dresidual,
    )  # fmt: skip
    _launch(
        cooperative_mixture_vjp, x, grid,
        maps, sums_in(sums), stats, tuples.Parameters(*or_other((weight, None, w, v), affine)),
        tuples.Running(*(affine,) * 5), out, arrived, *_sizes(grid, flags), eps, factor_of(grid.size, flags),
        FLAGS=flags.compiled(merge=grid.parts > 1, weight=weight is not None),
        TILE=tile, PLAN=plan._replace(plain=plain),
    )  # fmt: skip
    return dx, out.weight, out.bias, out.w, out.v, dresidual


def _sizes(grid: Grid, flags: MixtureFlags) -> tuple[int, ...]:
    """Return the fields of ``Size``."""
    per_group = grid.c // flags.num_groups
    return grid.n, grid.c, grid.length, grid.units, grid.piece, grid.pieces, per_group, magic(grid.size)


def plan_of(grid: Grid, averages: bool, act: int, residual: bool) -> Plan:
    """Return what the kernels are compiled for; ``averages`` as ``passes.launch.averages``, ``act`` the activation."""
    tiles = grid.align, grid.rows, grid.block, grid.fold, averages, grid.columns, TILE, grid.size >= TILE
    return Plan(*tiles, act, residual, False, -1)


def _launch(kernel: Any, x: Tensor, grid: Grid, *args: Any, PLAN: Plan, **constants: Any) -> None:
    """Launch as many programs as run at once; under the interpreter, where they run in turn, phase by phase."""
    multiprocessors = BUSY // 2
    if x.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    jobs = grid.n * grid.block_rows * grid.block_columns if grid.columns else cdiv(x.numel(), TILE)
    programs = min(RESIDENT * multiprocessors, jobs)
    options = {"num_warps": 4, "maxnreg": REGISTERS[kernel.fn.__name__], **constants}
    with device_of(x):
        if is_compiled(kernel):
            launch(kernel, programs)(*args, PLAN=PLAN, launch_cooperative_grid=True, **options)
            return
        for phase in range(PHASES):
            launch(kernel, programs)(*args, PLAN=PLAN._replace(phase=phase), **options)

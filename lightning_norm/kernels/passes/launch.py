"""Launches of the passes over x: tensors in, tensors out, one launch or two. Importing this module imports Triton.

``affine`` is (3, N, C): pivot, scale and offset. ``dx_affine`` is (2, N, C): constant and slope. Where a kernel does
not read one of its tensors, another one stands in: Triton wants a pointer for each.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lightning_norm.kernels.arguments import DxAffine, Maps, Moments, affine_in, sums_in
from lightning_norm.kernels.grid import FEW, JOINED, LONG, REGISTERS, TILE, Grid, cdiv, dense, grid_of
from lightning_norm.kernels.launcher import launch
from lightning_norm.kernels.passes.backward import combine_columns, combine_flat, join_sums, sums_columns, sums_rows
from lightning_norm.kernels.passes.forward import (
    apply_columns,
    apply_flat,
    join_moments,
    moments_columns,
    moments_rows,
)

ACTIVATIONS = ("none", "relu", "silu", "threshold")
"""By their numbers in the kernels; the last one is relu(y) + floor."""

JOIN = 1024
"""Numbers that a program of four warps joins at once: parts times lanes."""


def moments(x: Tensor, channel_dim: int) -> Tensor:
    """Return (3, N, C): the mean rounded to float32, what is left of it, the biased variance."""
    grid = grid_of(x, channel_dim)
    whole = torch.empty(3, grid.n, grid.c, device=x.device, dtype=torch.float32)
    # An algebra in PyTorch knows no pieces: they are joined, however few.
    moment_parts(x, grid, Moments(*whole), few=1)
    return whole


def moment_parts(x: Tensor, grid: Grid, whole: Moments, few: int = FEW) -> tuple[Moments, Grid]:
    """Return the moments of each part, three tensors of parts * N * C numbers, and their grid.

    More than ``few`` parts are joined. What is not in parts, or is joined, is written into ``whole``, three of (N, C).
    """
    number = grid.n * grid.c
    # A single part is the whole already, and no launch has to join it.
    out = whole if grid.parts == 1 else Moments(*whole.hi.new_empty(3, grid.parts * number))
    with device_of(x):
        # The first axis of the grid may be long, the others hold at most 65535 programs.
        if grid.columns:
            launch(moments_columns, grid.n, grid.block_columns, grid.pieces)(
                x, out, grid.length, grid.units, grid.piece, ALIGN=grid.align, ROWS=grid.rows,
                BLOCK=grid.block, AVERAGE=averages(grid, x.dtype), num_warps=moment_warps(grid),
            )  # fmt: skip
        else:
            launch(moments_rows, cdiv(grid.n * grid.c, grid.rows), grid.pieces)(
                x, out, grid.n * grid.c, grid.size, grid.units, grid.piece, ALIGN=grid.align, ROWS=grid.rows,
                BLOCK=grid.block, AVERAGE=averages(grid, x.dtype), num_warps=grid.warps,
            )  # fmt: skip
        if grid.parts <= few:
            return out, grid
        at_once, lanes, num_warps = join_tile(grid.parts)
        launch(join_moments, cdiv(number, lanes))(
            out, whole, number, grid.c, *grid.moment_layout, P_BLOCK=at_once, BLOCK=lanes, num_warps=num_warps
        )
    return whole, grid.joined


def averages(grid: Grid, dtype: torch.dtype) -> bool:
    """Return whether the pivot of the moments must be nearer to the mean than the first element may be."""
    return dtype == torch.float32 or grid.piece > LONG


def moment_warps(grid: Grid) -> int:
    """Return the warps of a program of the moments.

    In columns all warps compute a channel's numbers, once its sums are known: of half as many each holds twice as much.
    """
    return max(1, grid.warps // 2) if grid.columns else grid.warps


def join_tile(parts: int) -> tuple[int, int, int]:
    """Return how many parts of how many numbers a program joins at once, and its warps: at most four steps.

    Two steps where that leaves neighbouring numbers to a program, which come from memory together.
    """
    # The largest tile takes 16 warps: with 8, a thread would hold as many registers as there are, 251 of 255.
    at_once = next((size for size in JOINED if parts <= 2 * size), JOINED[-1])
    return at_once, max(1, JOIN // at_once), 4 if at_once <= JOIN else 16


def sums(
    dy: Tensor, x: Tensor, affine: Tensor, channel_dim: int, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """Return (2, N, C): sums of g and of g * (x - pivot), g being dy before the activation."""
    # As for the moments, no pieces are left.
    parts, grid = sum_parts(dy, x, affine, grid_of(x, channel_dim), activation, residual, few=1)
    return parts.view(2, grid.n, grid.c)


def sum_parts(
    dy: Tensor, x: Tensor, affine: Tensor, grid: Grid, activation: str, residual: Tensor | None, few: int = FEW
) -> tuple[Tensor, Grid]:
    """Return the sums of each part, (2, parts * N * C), and their grid; more than ``few`` parts are added up.

    ``affine`` is pivot, scale and offset, or the pivot alone. dy and the residual lie in memory as x does. For a
    threshold there is a third sum, (3, parts * N * C).
    """
    number = 3 if activation == "threshold" else 2
    out = torch.empty(number, grid.parts * grid.n * grid.c, device=x.device, dtype=torch.float32)
    act = ACTIVATIONS.index(activation)
    # The kernel reads dy and the residual at the offsets of x.
    dy = dense(dy, x)
    residual_or_x = x if residual is None else dense(residual, x)
    given = affine_in(affine)
    blocks = {"ALIGN": grid.align, "ROWS": grid.rows, "BLOCK": grid.block, "ACT": act, "RESIDUAL": act > 0 and residual is not None}  # noqa: E501  # fmt: skip
    with device_of(x):
        if grid.columns:
            launch(sums_columns, grid.n, grid.block_columns, grid.pieces)(
                dy, x, residual_or_x, given, sums_in(out), grid.length, grid.units, grid.piece, grid.c,
                FOLD=grid.fold, num_warps=grid.warps, **blocks,
            )  # fmt: skip
        else:
            launch(sums_rows, cdiv(grid.n * grid.c, grid.rows), grid.pieces)(
                dy, x, residual_or_x, given, sums_in(out), grid.n * grid.c, grid.size, grid.units, grid.piece,
                num_warps=grid.warps, maxnreg=REGISTERS["sums_rows"], **blocks,
            )  # fmt: skip
        if grid.parts <= few:
            return out, grid
    return joined_sums(out, grid.n * grid.c, grid.c, grid.partial_layout), grid.joined


def joined_sums(parts: Tensor, number: int, channels: int, partial_layout: tuple[int, int, int]) -> Tensor:
    """Add the parts of sums up, (2 or 3, parts * number), by one launch: (2 or 3, number)."""
    joined = parts.new_empty(len(parts), number)
    at_once, lanes, num_warps = join_tile(partial_layout[0])
    with device_of(parts):
        launch(join_sums, cdiv(number, lanes))(
            sums_in(parts), joined, number, channels, *partial_layout, REST=len(parts) > 2, P_BLOCK=at_once,
            BLOCK=lanes, num_warps=num_warps,
        )  # fmt: skip
    return joined


def apply(
    x: Tensor, affine: Tensor, channel_dim: int, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """Return act(scale * (x - pivot) + offset + residual), like x; ``affine`` is (3, N, C): pivot, scale, offset."""
    grid = grid_of(x, channel_dim)
    y = torch.empty_like(x)
    if not x.numel():
        return y
    residual_or_x = x if residual is None else dense(residual, x)
    # In rows x is taken flat: tiles begin anywhere, and each element finds its row.
    blocks = {"ALIGN": grid.align, "ACT": ACTIVATIONS.index(activation), "RESIDUAL": residual is not None}
    with device_of(x):
        if grid.columns:
            launch(apply_columns, grid.n * grid.block_rows, grid.block_columns)(
                x, residual_or_x, y, affine_in(affine), grid.length, grid.units, grid.block_rows, grid.c,
                ROWS=grid.rows, BLOCK=grid.block, FOLD=grid.fold, num_warps=grid.warps,
                maxnreg=REGISTERS["apply_columns"], **blocks,
            )  # fmt: skip
        else:
            launch(apply_flat, cdiv(x.numel(), TILE))(
                x, residual_or_x, y, affine_in(affine), grid.n * grid.c, grid.size, grid.units, magic(grid.size),
                BLOCK=TILE, WIDE=grid.size >= TILE, num_warps=4, **blocks,
            )  # fmt: skip
    return y


def combine(
    dy: Tensor,
    x: Tensor,
    affine: Tensor,
    dx_affine: Tensor | None,
    channel_dim: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return dx = scale * g + constant + slope * (x - pivot), and g for the residual; ``dx_affine`` is (2, N, C)."""
    grid = grid_of(x, channel_dim)
    dx = torch.empty_like(x)
    dresidual_or_dx = dx if residual is None else torch.empty_like(x)
    if not x.numel():
        return dx, None if residual is None else dresidual_or_dx
    dy = dense(dy, x)
    residual_or_x = x if residual is None else dense(residual, x)
    # Statistics that are constants send nothing to x: dx = scale * g.
    maps = Maps(dy, x, residual_or_x, dx, dresidual_or_dx)
    coefficients = affine_in(affine), DxAffine(*(affine[:2] if dx_affine is None else dx_affine))
    act = ACTIVATIONS.index(activation)
    blocks = {"ALIGN": grid.align, "ACT": act, "RESIDUAL": residual is not None, "PLAIN": dx_affine is None}
    with device_of(x):
        if grid.columns:
            launch(combine_columns, grid.n * grid.block_rows, grid.block_columns)(
                maps, *coefficients, grid.length, grid.units,
                grid.block_rows, grid.c, ROWS=grid.rows, BLOCK=grid.block, FOLD=grid.fold, num_warps=grid.warps,
                **blocks,
            )  # fmt: skip
        else:
            launch(combine_flat, cdiv(x.numel(), TILE))(
                maps, *coefficients, grid.n * grid.c, grid.size,
                grid.units, magic(grid.size), BLOCK=TILE, WIDE=grid.size >= TILE, num_warps=4, **blocks,
            )  # fmt: skip
    return dx, None if residual is None else dresidual_or_dx


def input_gradients(
    dy: Tensor,
    x: Tensor,
    affine: Tensor,
    dx_affine: Tensor | None,
    channel_dim: int,
    activation: str,
    residual: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the residual as ``combine`` does; an empty tensor for what nobody asks for."""
    # g, which the residual gets, is written by the pass that writes dx.
    dx, dresidual = affine.new_empty(0), None
    if need_dx or residual is not None:
        dx, dresidual = combine(dy, x, affine, dx_affine, channel_dim, activation, residual)
    return dx, affine.new_empty(0) if dresidual is None else dresidual


def magic(size: int) -> int:
    """Return m with t // size = (4 * t * m) >> 32 for t below 4096 and sizes below 2048."""
    # 4 * t < 2^14 and m >= 2^30 / size: the error of rounding m up stays below 1 / size.
    return cdiv(1 << 30, size)


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which launches go to x's device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()

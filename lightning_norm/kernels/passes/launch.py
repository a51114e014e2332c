"""Tensors in, tensors out, one launch or two. Importing this module imports Triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lightning_norm.kernels.grid import REGISTERS, TILE, Grid, cdiv, dense, grid_of
from lightning_norm.kernels.passes.elementwise import apply_columns, apply_flat, combine_columns, combine_flat
from lightning_norm.kernels.passes.reductions import (
    join_moments,
    join_sums,
    moments_columns,
    moments_rows,
    sums_columns,
    sums_rows,
)

ACTIVATIONS = ("none", "relu", "silu")
JOIN = 256
"""Numbers that a program joins."""


def moments(x: Tensor, channel_dim: int) -> Tensor:
    """Return (3, N, C): the mean rounded to float32, what is left of it, the biased variance."""
    grid = grid_of(x, channel_dim)
    parts = moment_parts(x, grid)
    if grid.parts == 1:
        return parts.view(3, grid.n, grid.c)
    out = parts.new_empty(3, grid.n, grid.c)
    number = grid.n * grid.c
    with on(x):
        join_moments[(cdiv(number, JOIN),)](
            *parts, out, number, grid.c, grid.parts, grid.sample_stride, grid.part_stride, grid.piece, grid.length,
            grid.fold, BLOCK=JOIN, num_warps=4,
        )  # fmt: skip
    return out


def moment_parts(x: Tensor, grid: Grid) -> Tensor:
    """Return the moments of each part, (3, parts * N * C)."""
    out = torch.empty(3, grid.parts * grid.n * grid.c, device=x.device, dtype=torch.float32)
    with on(x):
        if grid.columns:
            moments_columns[(grid.n * grid.pieces, grid.block_columns)](
                x, *out, grid.length, grid.units, grid.piece, grid.pieces, ALIGN=grid.align, ROWS=grid.rows,
                BLOCK=grid.block, num_warps=grid.warps,
            )  # fmt: skip
        else:
            moments_rows[(cdiv(grid.n * grid.c, grid.rows), grid.pieces)](
                x, *out, grid.n * grid.c, grid.size, grid.units, grid.piece, ALIGN=grid.align, ROWS=grid.rows,
                BLOCK=grid.block, LOOP=loops(grid), num_warps=grid.warps,
            )  # fmt: skip
    return out


def sums(
    dy: Tensor, x: Tensor, coef: Tensor, channel_dim: int, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """Return (2, N, C): sums of g and of g * (x - pivot), g being dy before the activation."""
    grid = grid_of(x, channel_dim)
    parts = sum_parts(dy, x, coef, grid, activation, residual)
    if grid.parts == 1:
        return parts.view(2, grid.n, grid.c)
    out = parts.new_empty(2, grid.n, grid.c)
    number = grid.n * grid.c
    with on(x):
        join_sums[(cdiv(number, JOIN),)](
            *parts, out, number, grid.c, grid.parts, grid.sample_stride, grid.part_stride, BLOCK=JOIN, num_warps=4
        )
    return out


def sum_parts(dy: Tensor, x: Tensor, coef: Tensor, grid: Grid, activation: str, residual: Tensor | None) -> Tensor:
    """Return the sums of each part, (2, parts * N * C); ``coef`` holds pivot, scale and offset, or the pivot alone."""
    out = torch.empty(2, grid.parts * grid.n * grid.c, device=x.device, dtype=torch.float32)
    act = ACTIVATIONS.index(activation)
    dy = dense(dy, x)
    third = x if residual is None else dense(residual, x)
    pivot, scale, offset = coef[0], coef[min(1, len(coef) - 1)], coef[-1]
    blocks = {"ALIGN": grid.align, "ROWS": grid.rows, "BLOCK": grid.block, "ACT": act, "RESIDUAL": act > 0 and residual is not None}  # noqa: E501  # fmt: skip
    with on(x):
        if grid.columns:
            sums_columns[(grid.n * grid.pieces, grid.block_columns)](
                dy, x, third, pivot, scale, offset, *out, grid.length, grid.units, grid.piece, grid.pieces, grid.c,
                FOLD=grid.fold, num_warps=grid.warps, **blocks,
            )  # fmt: skip
        else:
            sums_rows[(cdiv(grid.n * grid.c, grid.rows), grid.pieces)](
                dy, x, third, pivot, scale, offset, *out, grid.n * grid.c, grid.size, grid.units, grid.piece,
                LOOP=loops(grid), num_warps=grid.warps, maxnreg=REGISTERS["sums_rows"], **blocks,
            )  # fmt: skip
    return out


def apply(
    x: Tensor, coef: Tensor, channel_dim: int, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """Return act(scale * (x - pivot) + offset + residual), like x; ``coef`` is (3, N, C): pivot, scale, offset."""
    grid = grid_of(x, channel_dim)
    y = torch.empty_like(x)
    if not x.numel():
        return y
    third = x if residual is None else dense(residual, x)
    blocks = {"ALIGN": grid.align, "ACT": ACTIVATIONS.index(activation), "RESIDUAL": residual is not None}
    with on(x):
        if grid.columns:
            apply_columns[(grid.n * grid.block_rows, grid.block_columns)](
                x, third, y, *coef, grid.length, grid.units, grid.block_rows, grid.c, ROWS=grid.rows, BLOCK=grid.block,
                FOLD=grid.fold, num_warps=grid.warps, maxnreg=REGISTERS["apply_columns"], **blocks,
            )  # fmt: skip
        else:
            apply_flat[(cdiv(x.numel(), TILE),)](
                x, third, y, *coef, grid.n * grid.c, grid.size, grid.units, magic(grid.size), BLOCK=TILE,
                WIDE=grid.size >= TILE, num_warps=4, **blocks,
            )  # fmt: skip
    return y


def combine(
    dy: Tensor,
    x: Tensor,
    coef: Tensor,
    line: Tensor | None,
    channel_dim: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return dx = scale * g + constant + slope * (x - pivot), and g for the residual; ``line`` is (2, N, C)."""
    grid = grid_of(x, channel_dim)
    dx = torch.empty_like(x)
    dthird = dx if residual is None else torch.empty_like(x)
    if not x.numel():
        return dx, None if residual is None else dthird
    dy = dense(dy, x)
    third = x if residual is None else dense(residual, x)
    constant, slope = (coef[0], coef[0]) if line is None else line
    act = ACTIVATIONS.index(activation)
    blocks = {"ALIGN": grid.align, "ACT": act, "RESIDUAL": residual is not None, "PLAIN": line is None}
    with on(x):
        if grid.columns:
            combine_columns[(grid.n * grid.block_rows, grid.block_columns)](
                dy, x, third, dx, dthird, *coef, constant, slope, grid.length, grid.units, grid.block_rows, grid.c,
                ROWS=grid.rows, BLOCK=grid.block, FOLD=grid.fold, num_warps=grid.warps, **blocks,
            )  # fmt: skip
        else:
            combine_flat[(cdiv(x.numel(), TILE),)](
                dy, x, third, dx, dthird, *coef, constant, slope, grid.n * grid.c, grid.size, grid.units,
                magic(grid.size), BLOCK=TILE, WIDE=grid.size >= TILE, num_warps=4, **blocks,
            )  # fmt: skip
    return dx, None if residual is None else dthird


def input_gradients(
    dy: Tensor,
    x: Tensor,
    coef: Tensor,
    line: Tensor | None,
    channel_dim: int,
    activation: str,
    residual: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the residual as ``combine`` does; an empty tensor for what nobody asks for."""
    dx, dresidual = coef.new_empty(0), None
    if need_dx or residual is not None:
        dx, dresidual = combine(dy, x, coef, line, channel_dim, activation, residual)
    return dx, coef.new_empty(0) if dresidual is None else dresidual


def loops(grid: Grid) -> bool:
    """Return whether a row's piece, begun up to ``align`` - 1 elements early, needs more than one tile."""
    return grid.piece + (grid.align - 1 if grid.size % grid.align else 0) > grid.block


def magic(size: int) -> int:
    """Return m with t // size = (4 * t * m) >> 32 for t below 4096 and sizes below 2048."""
    return cdiv(1 << 30, size)


def on(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which launches go to x's device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()

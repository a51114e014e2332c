"""Launches of functions of each element: one from x to y, two from dy to all gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_norm.kernels.arguments import Maps, or_other
from lightning_norm.kernels.elementwise.backward import combine_elementwise, join_elementwise
from lightning_norm.kernels.elementwise.flags import Compiled, Learned
from lightning_norm.kernels.elementwise.forward import apply_elementwise
from lightning_norm.kernels.grid import (
    BUSY,
    MANY_PARTS,
    REGISTERS,
    TILE,
    cdiv,
    dense,
    grid_like,
    is_channels_last,
    power,
    samples_and_channels,
    warps,
)
from lightning_norm.kernels.launcher import launch
from lightning_norm.kernels.passes.launch import ACTIVATIONS, device_of, join_tile

Optional = Tensor | None


@dataclass(frozen=True)
class Tiles:
    """x as (samples, lines, units * align), and in which tiles and parts it is read.

    Args:
        samples: 1 where channels are contiguous, for all positions are alike.
        lines: positions, or in rows channels.
        units: channels, or in rows positions, as a multiple of ``align``.
        last: whether channels are contiguous.
        align: elements that are loaded at once.
        fold: neighbouring positions that are taken for channels, where channels are few.
        rows: lines of a tile.
        block: elements of a line in a tile.
        piece: lines, or in rows units of each line, that a program takes.
        repeat: samples that it takes, in rows.
    """

    samples: int
    lines: int
    units: int
    last: bool
    align: int
    fold: int
    rows: int
    block: int
    piece: int
    repeat: int = 1

    @property
    def pieces(self) -> int:
        """Return the pieces of all lines, or in rows of each line."""
        return cdiv(self.lines if self.last else self.units, self.piece)

    @property
    def parts(self) -> int:
        """Return how many programs share each channel."""
        return self.pieces if self.last else self.pieces * cdiv(self.samples, self.repeat)

    @property
    def blocks(self) -> int:
        """Return the blocks of channels."""
        return cdiv(self.units * self.align, self.block) if self.last else cdiv(self.lines, self.rows)

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Return the shape of x."""
        return self.samples, self.lines, self.units

    @property
    def warps(self) -> int:
        """Return the warps of a program: 16 elements to a thread, or 8 where each has an address of its own."""
        return warps(self.rows * self.block) * (2 if self.align == 1 else 1)

    def shared_out(self) -> Tiles:
        """Return the tiles for a pass that sums: about as many programs as a GPU runs at once."""
        step = self.piece  # of one tile
        if self.last:
            # A part leaves ``fold`` numbers for each channel.
            parts = min(cdiv(4 * BUSY, self.blocks), MANY_PARTS // self.fold)
            return replace(self, piece=cdiv(cdiv(self.lines, parts), step) * step)
        # Whole lines of several samples; where there are too few of these, pieces of lines.
        parts = cdiv(4 * BUSY, self.blocks)
        if self.samples >= parts:
            return replace(self, piece=cdiv(self.units, step) * step, repeat=cdiv(self.samples, parts))
        pieces = cdiv(parts, self.samples)
        return replace(self, piece=cdiv(cdiv(self.units, pieces), step) * step)

    def compiled(self, function: str, parameters: Sequence[Optional]) -> Compiled:
        """Return what the kernels are compiled for."""
        weight, bias, _, offset = parameters
        there = (t is not None for t in (weight, bias, offset))
        return Compiled(function == "erf", self.last, self.align, self.fold, self.rows, self.block, *there)


def tiles_of(x: Tensor, channel_dim: int) -> Tiles:
    """Return the tiles of an x that is contiguous in one of the two orders."""
    n, c = samples_and_channels(x, channel_dim)
    size = x.numel() // (n * c)
    # Maps of one position have their channels behind each other.
    last = size == 1 or bool(is_channels_last(x, channel_dim))
    return tiles_like(n, c, size, last, 16 // x.element_size())


@functools.lru_cache(4096)
def tiles_like(n: int, c: int, size: int, last: bool, vector: int) -> Tiles:
    """Return the tiles of an x of this layout; ``vector`` elements are 16 bytes."""
    if last and n * size > 1:
        grid = grid_like(1, c, n * size, True, vector)
        # Offsets within a tile have 32 bits.
        rows = min(grid.rows, (1 << 31) // power(grid.c * grid.fold))
        return Tiles(1, grid.length, grid.units, True, grid.align, grid.fold, rows, grid.block, rows)
    # Vectors end where lines do: most maps of networks are multiples of 4, but for 7 x 7.
    align = math.gcd(size, vector)
    block = min(max(power(size), align), TILE)
    rows = min(TILE // block, power(c))
    return Tiles(n, c, size // align, False, align, 1, rows, block, block // align)


def normalize(
    x: Tensor,
    residual: Optional,
    parameters: Sequence[Optional],
    channel_dim: int,
    function: str,
    activation: str,
) -> Tensor:
    """Return act(gamma f(alpha x + s) + beta + residual), like x; f is "tanh" or "erf".

    ``parameters`` are gamma, beta, alpha and s.
    """
    y, tiles = torch.empty_like(x), tiles_of(x, channel_dim)
    learned = _learned(parameters)
    with device_of(x):
        launch(apply_elementwise, tiles.parts * tiles.blocks)(
            x, x if residual is None else dense(residual, x), y, learned, *tiles.numbers, x.shape[channel_dim],
            tiles.piece, tiles.pieces, tiles.blocks, FLAGS=tiles.compiled(function, parameters),
            ACT=ACTIVATIONS.index(activation), RESIDUAL=residual is not None, num_warps=tiles.warps,
            maxnreg=REGISTERS["apply_elementwise"],
        )  # fmt: skip
    return y


def gradients(
    dy: Tensor,
    x: Tensor,
    residual: Optional,
    parameters: Sequence[Optional],
    channel_dim: int,
    function: str,
    activation: str,
    need_dx: bool,
) -> tuple[Optional, Optional, list[Tensor]]:
    """Return the gradients of x, of the residual, and of gamma, beta, alpha and s in float32."""
    dx, dresidual = torch.empty_like(x) if need_dx else None, None if residual is None else torch.empty_like(x)
    tiles, c = tiles_of(x, channel_dim).shared_out(), x.shape[channel_dim]
    # Another tensor stands in for what the kernel does not read or write.
    maps = Maps(dense(dy, x), *or_other((x, residual, dx, dresidual), x))
    learned = _learned(parameters)
    parts, programs = tiles.parts * tiles.fold, tiles.parts * tiles.blocks
    numbers: dict[str, Any] = {"device": x.device, "dtype": torch.float32}
    sums, totals = torch.empty(2, parts, c, **numbers), torch.empty(2, programs, **numbers)
    # All gradients of parameters in one tensor, which one launch fills.
    out = torch.empty(2 * c + 2, **numbers)
    at_once, lanes, _ = join_tile(parts)
    totals_at_once = join_tile(programs)[0]
    with device_of(x):
        launch(combine_elementwise, programs)(
            maps, learned, sums, totals, *tiles.numbers, c, tiles.piece, tiles.pieces, tiles.blocks, tiles.repeat,
            tiles.parts, FLAGS=tiles.compiled(function, parameters), ACT=ACTIVATIONS.index(activation),
            RESIDUAL=residual is not None, NEED=need_dx, num_warps=2 * tiles.warps,
            maxnreg=REGISTERS["combine_elementwise"],
        )  # fmt: skip
        launch(join_elementwise, cdiv(2 * c, lanes) + 1)(
            sums, totals, out, c, parts, programs, P_BLOCK=at_once, BLOCK=lanes, T_BLOCK=totals_at_once,
            num_warps=4 if max(at_once, totals_at_once) <= 1024 else 16,
        )  # fmt: skip
    return dx, dresidual, list(out.split_with_sizes([c, c, 1, 1]))


def _learned(parameters: Sequence[Optional]) -> Learned:
    # alpha stands in for what the layer does not have and no kernel reads.
    return Learned(*or_other(parameters, parameters[2]))

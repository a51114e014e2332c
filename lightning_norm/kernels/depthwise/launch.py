"""Launches of the normalization with a depthwise convolution behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_norm.kernels.arguments import DxAffine, affine_in, sums_in
from lightning_norm.kernels.depthwise.backward import depthwise_combine, depthwise_sums, join_taps
from lightning_norm.kernels.depthwise.flags import Compiled
from lightning_norm.kernels.depthwise.forward import depthwise_apply
from lightning_norm.kernels.grid import BUSY, FEW, REGISTERS, cdiv, dense, is_channels_last, power, registers
from lightning_norm.kernels.launcher import launch
from lightning_norm.kernels.mixture.flags import MixtureFlags, MixtureStatistics
from lightning_norm.kernels.mixture.launch import adjoint
from lightning_norm.kernels.passes.launch import device_of, join_tile, joined_sums
from lightning_norm.kernels.ranks.launch import AllReduce, empty_gradient

TILE = 1024
"""Elements of x that a program holds at once, beside those of its neighbours."""

NEAR = 8192
"""Elements that a program reads again for each group of taps, from the cache then."""


@dataclass(frozen=True)
class Stencil:
    """How the maps of x are tiled.

    Args:
        n: samples.
        c: channels.
        height: of a map; 1 for (N, C, L).
        width: of a map.
        last: whether channels are contiguous.
        align: elements that are loaded at once.
        rows: samples of a tile, or positions with ``last``.
        block: positions of a tile, or channels with ``last``.
        piece: positions that one program reduces.
        repeat: groups of samples that it reduces.
    """

    n: int
    c: int
    height: int
    width: int
    last: bool
    align: int
    rows: int
    block: int
    piece: int
    repeat: int

    @property
    def size(self) -> int:
        """Return the positions of a map."""
        return self.height * self.width

    @property
    def pieces(self) -> int:
        """Return the pieces of a map."""
        return cdiv(self.size, self.piece)

    @property
    def groups(self) -> int:
        """Return the groups of samples that a program takes at once."""
        return self.n if self.last else cdiv(self.n, self.rows)

    @property
    def blocks(self) -> int:
        """Return the blocks of channels."""
        return cdiv(self.c, self.block) if self.last else self.c

    @property
    def grid(self) -> tuple[int, int]:
        """Return the programs of a pass that writes."""
        if self.last:
            return self.n * cdiv(self.size, self.rows), self.blocks
        return self.c * self.groups, cdiv(self.size, self.block)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the scalars that every kernel takes."""
        blocks = cdiv(self.size, self.rows) if self.last else 1
        return self.n, self.c // self.align if self.last else self.c, self.size, self.height, self.width, blocks

    def compiled(self, kernel: Tensor) -> Compiled:
        """Return what every kernel is compiled for."""
        kh, kw = ((1,) * 2 + tuple(kernel.shape[2:]))[-2:]
        return Compiled(self.align, self.last, kh, kw, kh * kw if kh * kw <= 9 else kw, self.rows, self.block)


def stencil_of(x: Tensor, taps: int, tile: int = TILE) -> Stencil:
    """Return the tiling of (N, C, L) or (N, C, H, W), dense in either order, for so many taps, by tiles of ``tile``."""
    n, c, *space = x.shape
    height, width = [1, *space][-2:]
    size, last = height * width, bool(is_channels_last(x, 1))
    # The widest load is one of 16 bytes.
    vector = 16 // x.element_size()
    # Positions by channels where channels are contiguous, else samples by positions.
    if last:
        block, align = min(power(c), 64), vector if c % vector == 0 else 1
        rows = min(tile // block, power(size))
        jobs, step = n * cdiv(c, block), rows
    else:
        block, align = min(power(size), tile), 1
        rows = max(1, min(tile // block, power(n)))
        jobs, step = c * cdiv(n, rows), block
    # A program takes several groups of samples once there are programs enough.
    repeat = max(1, min(jobs // (4 * BUSY), n if last else cdiv(n, rows)))
    pieces = max(1, min(cdiv(2 * BUSY, jobs), cdiv(size, step)))
    # Each group of taps reads the piece again, so it must stay in the cache.
    if taps > 9:
        positions = power(size) * block if last else rows * power(size)
        repeat, pieces = min(repeat, max(1, NEAR // positions)), max(pieces, min(positions // NEAR, cdiv(size, step)))
    return Stencil(n, c, height, width, last, align, rows, block, cdiv(cdiv(size, pieces), step) * step, repeat)


def apply_depthwise(x: Tensor, affine: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution of scale * (x - pivot) + offset, like x; ``affine`` is (3, N, C)."""
    y = torch.empty_like(x)
    if not x.numel():
        return y
    taps = kernel[0].numel()
    s = stencil_of(x, taps)
    with device_of(x):
        launch(depthwise_apply, *s.grid)(
            x, y, kernel, affine if bias is None else bias, affine_in(affine), *s.shape, BIAS=bias is not None,
            FLAGS=s.compiled(kernel), num_warps=4, maxnreg=registers("depthwise_apply", taps, s.last),
        )  # fmt: skip
    return y


def sum_parts(dy: Tensor, x: Tensor, affine: Tensor, kernel: Tensor) -> tuple[Tensor, Stencil, Tensor, Tensor]:
    """Return the sums of dx^ and dx^ (x - pivot) in parts, their tiling, and the gradients of kernel and bias."""
    taps = kernel[0].numel()
    # Smaller tiles than forward: an accumulator per tap waits in registers.
    s = stencil_of(x, taps, TILE // 4)
    # Each chunk of samples writes its own sums and the second launch joins them in a fixed order, as atomics would not.
    chunks = cdiv(s.groups, s.repeat)
    out = affine.new_empty(2, s.pieces * s.n * s.c)
    tap_parts = affine.new_empty(chunks * s.pieces, taps + 1, s.c)
    dkernel, dbias = torch.empty_like(kernel, dtype=torch.float32), affine.new_empty(s.c)
    with device_of(x):
        launch(depthwise_sums, chunks * s.blocks, s.pieces)(
            dy, x, kernel, affine_in(affine), sums_in(out), tap_parts, *s.shape[:-1], s.blocks, s.piece, s.repeat,
            FLAGS=s.compiled(kernel), num_warps=2, maxnreg=REGISTERS["depthwise_sums"],
        )  # fmt: skip
        at_once, lanes, num_warps = join_tile(chunks * s.pieces)
        launch(join_taps, cdiv(s.c * (taps + 1), lanes))(
            tap_parts, dkernel, dbias, s.c * (taps + 1), s.c, chunks * s.pieces, T=taps, P_BLOCK=at_once, BLOCK=lanes,
            num_warps=num_warps,
        )  # fmt: skip
    return out, s, dkernel, dbias


def gradients(
    dy: Tensor,
    x: Tensor,
    stats: MixtureStatistics,
    kernel: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    flags: MixtureFlags,
    eps: float,
    need_dx: bool,
    over_ranks: AllReduce | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, kernel and bias; ``stats`` is what ``mixture.launch.affine_of`` returned."""
    affine, dy = stats.affine, dense(dy, x)
    if not x.numel():
        # Weight and bias are absent: the adjoint of the statistics alone.
        dbias = empty_gradient(stats.batch, stats.rank_sums, over_ranks if need_dx else None)
        dx = torch.empty_like(x) if need_dx else affine.new_empty(0)
        return dx, torch.zeros_like(kernel, dtype=torch.float32), dbias
    parts, s, dkernel, dbias = sum_parts(dy, x, affine, kernel)
    dx = affine.new_empty(0)
    if need_dx:
        # Where the sums of each piece lie, for whoever adds them up: the adjoint a few, a launch before it many.
        partial_layout = (s.pieces, s.c, s.n * s.c)
        if flags.needs_moments and s.pieces > FEW:
            parts = joined_sums(parts, s.n * s.c, s.c, partial_layout)
            partial_layout = (1, *partial_layout[1:])
        # Statistics that are constants send nothing to x.
        dx_affine = None
        if flags.needs_moments:
            *_, dx_affine = adjoint(
                x, parts, stats, None, None, None, running, 1, flags, eps, partial_layout, over_ranks
            )
        dx = torch.empty_like(x)
        coefficients = affine_in(affine), DxAffine(*(affine[:2] if dx_affine is None else dx_affine))
        with device_of(x):
            launch(depthwise_combine, *s.grid)(
                dy, x, dx, kernel, *coefficients, *s.shape, PLAIN=dx_affine is None, FLAGS=s.compiled(kernel),
                num_warps=4, maxnreg=REGISTERS["depthwise_combine"],
            )  # fmt: skip
    return dx, dkernel, dbias

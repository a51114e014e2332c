"""In which pieces x is read: block sizes from shapes alone.

No autotuning and no query of the device, so results never depend on either, and a CUDA graph may record any launch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_norm.kernels import launcher

BUSY = 264
"""Programs that fill a GPU: two on each of 132 multiprocessors."""

TILE = 2048
"""Elements of x that a program holds at once: 16 for each of 128 threads."""

REGISTERS = {
    "sums_rows": 128,
    "apply_columns": 128,
    "depthwise_apply": 168,
    "depthwise_sums": 192,
    "depthwise_combine": 128,
    "pool": 144,
    "vjp_pool": 200,
    "survey": 128,
    "vjp_affine": 184,
    "channels_of": 112,
    "channels_vjp": 120,
    "cooperative_mixture": 168,
    "cooperative_mixture_vjp": 248,
    "own_mixture": 128,
    "own_mixture_vjp": 128,
    "own_channels": 128,
    "own_channels_vjp": 128,
    "apply_elementwise": 96,
    "combine_elementwise": 128,
}
"""Registers of a thread at most: without a limit ptxas spills 8 bytes of these for one more resident program."""

OWNER = False
"""Whether small maps take one launch per direction where nothing looks across channels, see ``kernels/owner``.

Off until a GPU has shown that it is faster: part (e) of ``benchmarks/gpu.sh`` times it beside what is on.
"""

COOPERATIVE = False
"""Whether maps that the L2 cache holds take one launch per direction in a mixture, see ``kernels/cooperative``.

Off as ``OWNER`` is, which goes first where both would do.
"""

MANY_TAPS = 192
"""The same for ``depthwise_apply`` with more than nine taps, channels last, which would spill on sm_100."""

FEW = 4
"""Pieces that are joined one after the other where they are read; more are joined by a launch before."""

MANY_PARTS = 32768
"""Parts that one launch joins in four steps, ``JOINED`` at once."""

JOINED = (16, 64, 256, 1024, 8192)
"""Parts that a program joins at once: few sizes, so that few kernels are compiled."""

NARROW = (32, 64, 2048)
"""Elements of a row that a program takes at once: of rows up to twice 32, up to 16 times 64, and of longer ones.

Few threads to a row sum it up with few exchanges between them, and few widths are few kernels to compile.
"""

LONG = 2048
"""Elements of a piece beyond which the first is no good pivot, whatever its precision: see ``moments_rows``."""

LONGEST = 1 << 28
"""Elements per (sample, channel) beyond which lanes could leave 32 bits."""


@dataclass(frozen=True)
class Grid:
    """How x lies in memory, and in which pieces it is read.

    Args:
        n: samples.
        c: channels.
        size: elements per (sample, channel).
        columns: whether channels are contiguous, (n, size, c); otherwise (n, c, size).
        align: elements that are loaded at once.
        fold: columns only: this many neighbouring positions are taken for channels, where channels are few.
        rows: rows of a tile.
        block: columns of a tile.
        piece: elements of each row, or rows of each column, that one program reduces.
        pieces: of each row or column.
    """

    n: int
    c: int
    size: int
    columns: bool
    align: int
    fold: int
    rows: int
    block: int
    piece: int
    pieces: int

    @property
    def units(self) -> int:
        """Return the whole of x, or the channels, as a multiple of ``align``."""
        return (self.c * self.fold if self.columns else self.n * self.c * self.size) // self.align

    @property
    def length(self) -> int:
        """Return the elements per row or column that are met one after the other."""
        return self.size // self.fold

    @property
    def parts(self) -> int:
        """Return the numbers left for each (sample, channel)."""
        return self.pieces * self.fold

    @property
    def sample_stride(self) -> int:
        """Return the distance between two samples' numbers."""
        return self.c * self.parts if self.columns else self.c

    @property
    def part_stride(self) -> int:
        """Return the distance between two parts' numbers."""
        return self.c if self.columns else self.n * self.c

    @property
    def partial_layout(self) -> tuple[int, int, int]:
        """Return where sums lie: the parts of each, and the distances between two samples' and two parts' numbers."""
        return self.parts, self.sample_stride, self.part_stride

    @property
    def moment_layout(self) -> tuple[int, int, int, int, int, int]:
        """Return where moments lie: as ``partial_layout``, and what the size of each part follows from."""
        return *self.partial_layout, self.piece, self.length, self.fold

    @property
    def joined(self) -> Grid:
        """Return the grid of numbers whose parts have been joined."""
        return replace(self, fold=1, piece=self.size, pieces=1)

    @property
    def warps(self) -> int:
        """Return the warps of a program: 16 elements to a thread."""
        return warps(self.rows * self.block)

    @property
    def block_columns(self) -> int:
        """Return the number of blocks of channels."""
        return cdiv(self.c * self.fold, self.block)

    @property
    def block_rows(self) -> int:
        """Return the number of tiles along a column."""
        return cdiv(self.length, self.rows)


def is_channels_last(x: Tensor, channel_dim: int) -> bool | None:
    """Return False where each (sample, channel) is contiguous in x, True where channels are, None for neither."""
    if channel_dim in (1, 1 - x.dim()) and x.is_contiguous():
        return False
    # Tokens have their channels last already.
    last = x if channel_dim in (-1, x.dim() - 1) else x.movedim(1, -1)
    return True if last.is_contiguous() else None


def samples_and_channels(x: Tensor, channel_dim: int) -> tuple[int, int]:
    """Return N and C of x.

    A ``channel_dim`` behind the last axis is that of (N, C) inputs which are read as one sample of N positions.
    """
    return (1, x.shape[-1]) if channel_dim == x.dim() else (x.shape[0], x.shape[channel_dim])


def as_one_sample(x: Tensor, channel_dim: int) -> int:
    """Return the ``channel_dim`` that reads an (N, C) input as one sample of N positions, where that can be.

    Statistics of the batch are then statistics of a long column, and nothing is stored for each element. For equations
    in which no sample has statistics of its own.
    """
    fits = x.dim() == 2 and x.shape[0] > 1 and x.is_contiguous() and x.shape[0] < LONGEST and x.numel() < 1 << 31
    return 2 if fits else channel_dim


def grid_of(x: Tensor, channel_dim: int) -> Grid:
    """Return the grid of a dense x; ``channel_dim`` as in :func:`samples_and_channels`.

    Raises:
        ValueError: x is not dense in either order.
    """
    n, c = samples_and_channels(x, channel_dim)
    columns = x.is_contiguous() if channel_dim == x.dim() else is_channels_last(x, channel_dim)
    if columns is None:
        raise ValueError(f"x with strides {x.stride()} is contiguous in neither order.")
    # Elements of a load of 16 bytes.
    return grid_like(n, c, x.numel() // max(n * c, 1), columns, 16 // x.element_size())


def grid_like(n: int, c: int, size: int, columns: bool, vector: int) -> Grid:
    """Return the grid of an x of this layout; ``vector`` elements are 16 bytes."""
    return _columns(n, c, size, vector) if columns and size > 1 else _rows(n, c, size, vector)


@functools.lru_cache(4096)
def _rows(n: int, c: int, size: int, vector: int) -> Grid:
    align = vector if n * c * size % vector == 0 else 1
    # Rows that begin anywhere are loaded from up to align - 1 elements earlier.
    span = size if size % align == 0 else size + align - 1
    narrow = NARROW[0] if span <= 2 * NARROW[0] else NARROW[1] if span <= 16 * NARROW[1] else NARROW[2]
    rows = TILE // min(max(power(span), align), narrow)
    # Many short rows to a program, unless that leaves multiprocessors idle.
    while rows > 1 and n * c < rows * BUSY:
        rows //= 2
    # Of fewer rows it takes more at once.
    block = min(max(power(span), align), TILE // rows)
    piece, pieces = size, 1
    # Few large rows: cut them until about two waves of programs run.
    if block == TILE and n * c < BUSY:
        pieces = min(cdiv(2 * BUSY, n * c), cdiv(size, 2 * TILE))
        piece = cdiv(cdiv(size, pieces), TILE) * TILE
        pieces = cdiv(size, piece)
    return Grid(n, c, size, False, align, 1, rows, block, piece, pieces)


@functools.lru_cache(4096)
def _columns(n: int, c: int, size: int, vector: int) -> Grid:
    fold = 1
    # Few channels: take positions for channels, as far as that makes vectors aligned.
    for wider in (2, 4, 8, 16, 32, 64):
        if (c * fold >= 64 and c * fold % vector == 0) or size % wider:
            break
        if c * fold < 64 or c * wider % vector == 0:
            fold = wider
    align = vector if c * fold % vector == 0 else 1
    length = size // fold
    block = min(power(c * fold), 64)
    rows = min(TILE // block, power(length))
    # Long columns are cut like long rows.
    jobs = n * cdiv(c * fold, block)
    # No more than the GPU takes at once, and none so short that starting it costs more than its work.
    pieces = max(1, min(cdiv(2 * BUSY, jobs), length // (2 * rows), MANY_PARTS // fold))
    piece = cdiv(cdiv(length, pieces), rows) * rows
    return Grid(n, c, size, True, align, fold, rows, block, piece, cdiv(length, piece))


def dense(t: Tensor, like: Tensor) -> Tensor:
    """Return t with the strides of ``like``: a gradient may arrive expanded, or in another memory format."""
    if t.stride() == like.stride():
        return t
    assert not launcher.is_recording(), "a copy is no launch, and would be made at the first call alone"
    return torch.empty_like(like, dtype=t.dtype).copy_(t)


def registers(kernel: str, taps: int = 0, last: bool = False) -> int | None:
    """Return the registers that a thread of a kernel may use, ``None`` for as many as it likes."""
    return MANY_TAPS if kernel == "depthwise_apply" and taps > 9 and last else REGISTERS.get(kernel)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def power(n: int) -> int:
    """Return the least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def warps(elements: int) -> int:
    """Return 1, 2 or 4 warps, for 16 elements to a thread."""
    return min(4, max(1, power(elements) // 512))

"""Grids, from shapes alone: enough programs, aligned loads, every element once. Nothing runs, nothing is allocated."""

import itertools

import pytest
import torch

from lightning_norm.kernels.grid import BUSY, TILE, cdiv, grid_of, power, registers

SIZES = {1: (1, 1), 49: (7, 7), 196: (14, 14), 1024: (32, 32), 3136: (56, 56), 1 << 20: (1024, 1024)}
CASES = [
    (n, c, size, last, dtype)
    for n, c, size, last, dtype in itertools.product(
        (1, 2, 7, 64, 1000), (3, 24, 64, 256, 4096), SIZES, (False, True), (torch.float32, torch.bfloat16)
    )
    if n * c * size < 1 << 32
]


def made(n, c, size, last, dtype):
    x = torch.empty((n, c, *SIZES[size]), device="meta", dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def reducing(g):
    """Programs of a pass that reduces."""
    return g.n * g.pieces * g.block_columns if g.columns else cdiv(g.n * g.c, g.rows) * g.pieces


def writing(g):
    """Programs of a pass that writes x's like."""
    return g.n * g.block_rows * g.block_columns if g.columns else cdiv(g.n * g.c * g.size, TILE)


def test_a_gpu_is_filled():
    """Few large rows and many small ones, few channels and many, wherever there is work for all."""
    enough = [case for case in CASES if case[0] * case[1] * case[2] >= BUSY * TILE * 2]
    assert len(enough) > 100
    for case in enough:
        g = grid_of(made(*case), 1)
        assert reducing(g) >= BUSY, (case, g)
        assert writing(g) >= BUSY, (case, g)


def test_loads_are_of_16_bytes_wherever_the_shape_allows():
    """Rows: wherever x is a multiple of 16 bytes, 49 and 196 included. Columns: where positions can be folded."""
    for case in CASES:
        n, c, size, _, dtype = case
        g, vector = grid_of(made(*case), 1), 16 // dtype.itemsize
        if g.columns:
            folds = [f for f in (1, 2, 4, 8, 16, 32, 64) if size % f == 0]
            assert g.align == (vector if any(c * f % vector == 0 for f in folds) else 1), (case, g)
        else:
            assert g.align == (vector if n * c * size % vector == 0 else 1), (case, g)
            assert g.block % g.align == 0


def test_every_element_belongs_to_one_program():
    for case in CASES:
        n, c, size, _, _ = case
        g = grid_of(made(*case), 1)
        assert (g.n, g.c, g.size, g.length * g.fold) == (n, c, size, size), (case, g)
        assert (g.pieces - 1) * g.piece < g.length <= g.pieces * g.piece, (case, g)
        assert g.rows * g.block <= TILE
        assert g.rows == power(g.rows)
        assert g.block == power(g.block)
        if g.columns:
            width = c * g.fold
            assert (g.block_columns - 1) * g.block < width <= g.block_columns * g.block, (case, g)
            assert (g.block_rows - 1) * g.rows < g.length <= g.block_rows * g.rows, (case, g)
            assert g.piece % g.rows == 0
            assert g.units * g.align == width
        else:
            assert g.fold == 1
            assert g.pieces == 1 or (g.rows == 1 and g.piece % g.block == 0), (case, g)
            assert g.units * g.align == n * c * size
        assert g.parts == g.pieces * g.fold


@pytest.mark.parametrize("last", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 7), (2, 3, 32, 32), (1, 2, 70, 61), (2, 72, 5, 7), (1, 64, 14, 14)], ids=str
)
def test_coverage_counted(shape, last):
    """The tiles of every program laid over x, element by element, as the reductions walk them."""
    n, c, h, w = shape
    x = torch.empty(shape, device="meta", memory_format=torch.channels_last if last else torch.contiguous_format)
    g = grid_of(x, 1)
    visits = torch.zeros(n * c * h * w, dtype=torch.int64)
    if last:
        width = c * g.fold
        for job, block in itertools.product(range(n * g.pieces), range(g.block_columns)):
            begin = job % g.pieces * g.piece
            rows = torch.arange(begin, min(begin + g.piece, g.length))[:, None]
            columns = torch.arange(block * g.block, min((block + 1) * g.block, width))[None, :]
            visits[((job // g.pieces * g.length + rows) * width + columns).flatten()] += 1
    else:
        for job, p in itertools.product(range(cdiv(n * c, g.rows)), range(g.pieces)):
            for row in range(job * g.rows, min((job + 1) * g.rows, n * c)):
                visits[row * g.size + p * g.piece : row * g.size + min((p + 1) * g.piece, g.size)] += 1
    assert (visits == 1).all()


def test_registers():
    assert registers("depthwise_apply", 9, True) == registers("depthwise_apply", 49, False) == 168
    assert registers("depthwise_apply", 25, True) == 192
    assert registers("moments_rows") is None

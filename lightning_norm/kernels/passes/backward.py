"""Device code: the two backward passes over x. *Sums* reads dy and x, *combine* reads them again and writes dx.

Sums leaves sum g and sum g * (x - pivot) per (sample, channel), from which the algebra's adjoint makes a constant and a
slope; combine writes dx = scale * g + constant + slope * (x - pivot). g is dy before the activation: no mask is stored,
it follows from x and the coefficients once more. Shapes and orders as in ``forward``.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Affine, DxAffine, Maps, Sums
from lightning_norm.kernels.passes.forward import column_lanes, flat_lanes, of_row, row_span, zeros


@triton.jit
def activation_grad(g, z, ACT: tl.constexpr):
    """Return the gradient before the activation, given that behind it; the mask follows from z."""
    if ACT == 1:
        g = tl.where(z <= 0.0, 0.0, g)
    if ACT == 2:
        # SiLU is z s with s = sigmoid(z), so its slope is s + z s (1 - s).
        s = 1.0 / (1.0 + tl.exp(-z))
        g = g * (s * (1.0 + z * (1.0 - s)))
    return g


@triton.jit
def before_activation(g, z, residual, at, keep, ACT: tl.constexpr, RESIDUAL: tl.constexpr):
    """Return the gradient before the activation; z is scale * (x - pivot) + offset, to which the residual is added."""
    if RESIDUAL:
        z += tl.load(residual + at, mask=keep, other=0.0).to(tl.float32)
    return activation_grad(g, z, ACT)


@triton.jit
def products(dy, x, residual, at, loaded, keep, pivot, scale, offset, ACT: tl.constexpr, RESIDUAL: tl.constexpr):
    """Return one tile's g and g * (x - pivot), 0 outside ``keep``.

    ``loaded`` may reach further than ``keep``: into a neighbouring row, for the sake of aligned loads.
    """
    g = tl.load(dy + at, mask=loaded, other=0.0).to(tl.float32)
    u = tl.load(x + at, mask=loaded, other=0.0).to(tl.float32) - pivot
    # z as ``apply`` had it, and with it the activation's mask or slope.
    if ACT != 0:
        g = before_activation(g, tl.fma(scale, u, offset), residual, at, loaded, ACT, RESIDUAL)
    return tl.where(keep, g, 0.0), tl.where(keep, g * u, 0.0)


@triton.jit(do_not_specialize=["rows", "size", "units", "piece"])
def sums_rows(
    dy, x, residual, affine: Affine, out: Sums, rows, size, units, piece,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g * (x - pivot) over each piece of each row: (pieces, rows) each.

    Grid and tiles as ``moments_rows``. Of ``affine``, (rows,) each, all but the pivot serve the activation alone.
    """
    rows, size, units, piece = tl.cast(rows, tl.int64), tl.cast(size, tl.int32), tl.cast(units, tl.int64), tl.cast(piece, tl.int32)  # noqa: E501  # fmt: skip
    row, p = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1)
    r = tl.arange(0, ROWS)
    inside = row + r < rows
    origin, base, start, end, stop = row_span(row, size, piece, p, units, ALIGN, ROWS)
    # 64-bit pointers once, 32-bit offsets within the tile.
    x += origin
    dy += origin
    if RESIDUAL:
        residual += origin
    # One coefficient per row, for all its elements.
    k = tl.load(affine.pivot + row + r, mask=inside, other=0.0)[:, None]
    a, b = k, k
    if ACT != 0:
        a = tl.load(affine.scale + row + r, mask=inside, other=0.0)[:, None]
        b = tl.load(affine.offset + row + r, mask=inside, other=0.0)[:, None]
    lane = base[:, None] + tl.arange(0, BLOCK)[None, :]
    keep = (lane >= start[:, None]) & (lane < end[:, None])
    g, gu = products(dy, x, residual, lane, lane < stop[:, None], keep, k, a, b, ACT, RESIDUAL)
    # The rest of the piece.
    for first in range(BLOCK, piece + ALIGN - 1, BLOCK):
        at = lane + first
        h, hu = products(dy, x, residual, at, at < stop[:, None], at < end[:, None], k, a, b, ACT, RESIDUAL)
        # Added tile by tile; the sum over the tile is taken once, behind the loop.
        g += h
        gu += hu
    tl.store(out.total + p * rows + row + r, tl.sum(g, 1), mask=inside)
    tl.store(out.dot + p * rows + row + r, tl.sum(gu, 1), mask=inside)


@triton.jit(do_not_specialize=["size", "units", "piece"])
def sums_columns(
    dy, x, residual, affine: Affine, out: Sums, size, units, piece, true_channels,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g * (x - pivot) over each piece of each column: (samples, pieces, channels) each.

    Grid and tiles as ``moments_columns``. With FOLD a sum is that of every FOLD-th position; whoever reads them adds
    up.
    """
    n, p = tl.program_id(0).to(tl.int64), tl.program_id(2)
    begin = p * piece
    count = tl.minimum(piece, size - begin)
    channels = units * ALIGN
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, ROWS)
    origin = (n * size + begin) * channels
    # Where coefficients of this sample's channels lie.
    at = n * channels + c
    if FOLD > 1:
        at = n * true_channels + c % true_channels
    x += origin
    dy += origin
    if RESIDUAL:
        residual += origin
    # One coefficient per channel, for all its positions.
    k = tl.load(affine.pivot + at, mask=c < channels, other=0.0)[None, :]
    a, b = k, k
    if ACT != 0:
        a = tl.load(affine.scale + at, mask=c < channels, other=0.0)[None, :]
        b = tl.load(affine.offset + at, mask=c < channels, other=0.0)[None, :]
    lane = s[:, None] * channels + c[None, :]
    keep = (s[:, None] < count) & (c[None, :] < channels)
    g, gu = products(dy, x, residual, lane, keep, keep, k, a, b, ACT, RESIDUAL)
    # The rest of the piece; all three pointers move together.
    for first in range(ROWS, count, ROWS):
        x += ROWS * channels.to(tl.int64)
        dy += ROWS * channels.to(tl.int64)
        if RESIDUAL:
            residual += ROWS * channels.to(tl.int64)
        keep = (s[:, None] < count - first) & (c[None, :] < channels)
        h, hu = products(dy, x, residual, lane, keep, keep, k, a, b, ACT, RESIDUAL)
        g += h
        gu += hu
    at = (n * tl.num_programs(2) + p) * channels + c
    tl.store(out.total + at, tl.sum(g, 0), mask=c < channels)
    tl.store(out.dot + at, tl.sum(gu, 0), mask=c < channels)


@triton.jit
def read_sums(parts, at, keep, layout, MERGE: tl.constexpr):
    """Read both sums, their pieces added up in order where MERGE."""
    total = tl.load(parts.total + at, mask=keep, other=0.0)
    dot = tl.load(parts.dot + at, mask=keep, other=0.0)
    if MERGE:
        for p in range(1, layout.pieces):
            total += tl.load(parts.total + at + p * layout.stride, mask=keep, other=0.0)
            dot += tl.load(parts.dot + at + p * layout.stride, mask=keep, other=0.0)
    return total, dot


@triton.jit(do_not_specialize=["pieces"])
def join_sums(
    parts: Sums, out, number, channels, pieces, sample_stride, stride, P_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):
    """Add the pieces up into ``out``, (2, samples * channels), P_BLOCK of BLOCK numbers at once."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = i < number
    at = i // channels * sample_stride + i % channels
    lane = tl.arange(0, P_BLOCK)[:, None]
    a, b = tl.zeros((P_BLOCK, BLOCK), tl.float32), tl.zeros((P_BLOCK, BLOCK), tl.float32)
    for first in range(0, pieces, P_BLOCK):
        p = first + lane
        inside = (p < pieces) & keep[None, :]
        spot = at[None, :] + p.to(tl.int64) * stride
        a += tl.load(parts.total + spot, mask=inside, other=0.0)
        b += tl.load(parts.dot + spot, mask=inside, other=0.0)
    tl.store(out + i, tl.sum(a, 0), mask=keep)
    tl.store(out + number + i, tl.sum(b, 0), mask=keep)


@triton.jit
def added(parts, at, keep, number, stride, P_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """Add up ``number`` parts, P_BLOCK at once, of the numbers at ``at``, in an order that is the same in every run."""
    # Rows are parts, so that they are loaded side by side and not one behind the other.
    lane = tl.arange(0, P_BLOCK)[:, None]
    total = zeros(P_BLOCK, BLOCK)
    for first in range(0, number, P_BLOCK):
        p = first + lane
        spot = at[None, :] + p.to(tl.int64) * stride
        total += tl.load(parts + spot, mask=(p < number) & keep[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def store_gradients(
    maps, origin, at, keep, k, a, b, constant, slope, ACT: tl.constexpr, RESIDUAL: tl.constexpr, PLAIN: tl.constexpr
):
    """Write dx = a * g + constant + slope * (x - k), PLAIN: a * g alone, and g itself for the residual."""
    dy, x, residual = maps.dy + origin, maps.x + origin, maps.residual + origin
    g = tl.load(dy + at, mask=keep, other=0.0).to(tl.float32)
    u = g
    # x is not read where neither the activation nor the slope asks for it.
    if ACT != 0 or not PLAIN:
        u = tl.load(x + at, mask=keep, other=0.0).to(tl.float32) - k
    # g before the activation.
    if ACT != 0:
        g = before_activation(g, tl.fma(a, u, b), residual, at, keep, ACT, RESIDUAL)
    if RESIDUAL:
        # The residual was added as it is, so its gradient is g.
        tl.store(maps.dresidual + origin + at, g.to(maps.dresidual.dtype.element_ty), mask=keep)
    d = a * g
    # The large term last: it alone is rounded at full size.
    if not PLAIN:
        d = tl.fma(a, g, tl.fma(slope, u, constant))
    tl.store(maps.dx + origin + at, d.to(maps.dx.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows", "size", "units", "magic"])
def combine_flat(
    maps: Maps, affine: Affine, dx_affine: DxAffine, rows, size, units, magic, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """``store_gradients`` for x in rows. Grid and coefficients as ``apply_flat``.

    Written out, for here each coefficient takes registers from where it is read: as late as may be.
    """
    rows, size, units = tl.cast(rows, tl.int64), tl.cast(size, tl.int32), tl.cast(units, tl.int64)
    origin, lane, keep, row, which = flat_lanes(units, size, tl.cast(magic, tl.int32), ALIGN, BLOCK, WIDE)
    dy, x, residual, dx, dresidual = maps
    g = tl.load(dy + origin + lane, mask=keep, other=0.0).to(tl.float32)
    a = of_row(affine.scale, row, rows, which, keep, WIDE)
    u = g
    if ACT != 0 or not PLAIN:
        u = tl.load(x + origin + lane, mask=keep, other=0.0).to(tl.float32)
        u -= of_row(affine.pivot, row, rows, which, keep, WIDE)
    if ACT != 0:
        z = tl.fma(a, u, of_row(affine.offset, row, rows, which, keep, WIDE))
        g = before_activation(g, z, residual, origin + lane, keep, ACT, RESIDUAL)
    if RESIDUAL:
        tl.store(dresidual + origin + lane, g.to(dresidual.dtype.element_ty), mask=keep)
    d = a * g
    if not PLAIN:
        slope = of_row(dx_affine.slope, row, rows, which, keep, WIDE)
        d = tl.fma(a, g, tl.fma(slope, u, of_row(dx_affine.constant, row, rows, which, keep, WIDE)))
    tl.store(dx + origin + lane, d.to(dx.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["size", "units", "blocks"])
def combine_columns(
    maps: Maps, affine: Affine, dx_affine: DxAffine, size, units, blocks, true_channels, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """``store_gradients`` for x in columns. Grid and coefficients as ``apply_columns``."""
    size, units = tl.cast(size, tl.int32), tl.cast(units, tl.int32)
    origin, lane, keep, at, channel_mask = column_lanes(size, units, blocks, true_channels, ALIGN, ROWS, BLOCK, FOLD)
    k = tl.load(affine.pivot + at, mask=channel_mask, other=0.0)[None, :]
    a = tl.load(affine.scale + at, mask=channel_mask, other=0.0)[None, :]
    b = tl.load(affine.offset + at, mask=channel_mask, other=0.0)[None, :]
    constant = tl.load(dx_affine.constant + at, mask=channel_mask, other=0.0)[None, :]
    slope = tl.load(dx_affine.slope + at, mask=channel_mask, other=0.0)[None, :]
    store_gradients(maps, origin, lane, keep, k, a, b, constant, slope, ACT, RESIDUAL, PLAIN)

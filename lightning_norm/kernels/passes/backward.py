"""Device code: the two backward passes over x. *Sums* reads dy and x, *combine* reads them again and writes dx.

Sums leaves sum g and sum g * (x - pivot) per (sample, channel), from which the algebra's adjoint makes a constant and a
slope; combine writes dx = scale * g + constant + slope * (x - pivot). g is dy before the activation: no mask is stored,
it follows from x and the coefficients once more. Shapes and orders as in ``forward``.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Affine, DxAffine, Maps, Sums
from lightning_norm.kernels.passes.forward import column_lanes, flat_lanes, of_row, pieces_of, place, row_span, zeros


@triton.jit
def activation_grad(b_g, b_z, ACT: tl.constexpr):
    """Return the gradient before the activation, given that behind it; the mask follows from z."""
    if ACT == 1 or ACT == 3:
        b_g = tl.where(b_z <= 0.0, 0.0, b_g)
    if ACT == 2:
        # SiLU is z s with s = sigmoid(z), so its slope is s + z s (1 - s).
        b_s = 1.0 / (1.0 + tl.exp(-b_z))
        b_g = b_g * (b_s * (1.0 + b_z * (1.0 - b_s)))
    return b_g


@triton.jit
def before_activation(b_g, b_z, residual, o_x, m_x, ACT: tl.constexpr, RESIDUAL: tl.constexpr):
    """Return the gradient before the activation; z is scale * (x - pivot) + offset, to which the residual is added."""
    if RESIDUAL:
        b_z += tl.load(residual + o_x, mask=m_x, other=0.0).to(tl.float32)
    return activation_grad(b_g, b_z, ACT)


@triton.jit
def products(
    dy, x, residual, o_x, m_loaded, m_x, b_pivot, b_scale, b_offset, ACT: tl.constexpr, RESIDUAL: tl.constexpr
):
    """Return one tile's g, g * (x - pivot) and dy - g, 0 outside ``m_x``.

    ``m_loaded`` may reach further than ``m_x``: into a neighbouring row, for the sake of aligned loads.
    """
    b_dy = tl.load(dy + o_x, mask=m_loaded, other=0.0).to(tl.float32)
    b_g, b_u = b_dy, tl.load(x + o_x, mask=m_loaded, other=0.0).to(tl.float32) - b_pivot
    # z as ``apply`` had it, and with it the activation's mask or slope.
    if ACT != 0:
        b_g = before_activation(b_g, tl.fma(b_scale, b_u, b_offset), residual, o_x, m_loaded, ACT, RESIDUAL)
    return tl.where(m_x, b_g, 0.0), tl.where(m_x, b_g * b_u, 0.0), tl.where(m_x, b_dy - b_g, 0.0)


@triton.jit(do_not_specialize=["rows", "size", "units", "piece"])
def sums_rows(
    dy, x, residual, affine: Affine, out: Sums, rows, size, units, piece,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    AT: tl.constexpr = None,
):  # fmt: skip
    """Sums of g and of g * (x - pivot) over each piece of each row: (pieces, rows) each.

    Grid and tiles as ``moments_rows``. Of ``affine``, (rows,) each, all but the pivot serve the activation alone.
    """
    rows, size, units, piece = tl.cast(rows, tl.int64), tl.cast(size, tl.int32), tl.cast(units, tl.int64), tl.cast(piece, tl.int32)  # noqa: E501  # fmt: skip
    row, i_p = place(AT, 0).to(tl.int64) * ROWS, place(AT, 1)
    o_r = tl.arange(0, ROWS)
    m_r = row + o_r < rows
    origin, o_base, o_start, o_end, o_stop = row_span(row, size, piece, i_p, units, ALIGN, ROWS)
    # 64-bit pointers once, 32-bit offsets within the tile.
    x += origin
    dy += origin
    if RESIDUAL:
        residual += origin
    # One coefficient per row, for all its elements.
    b_pivot = tl.load(affine.pivot + row + o_r, mask=m_r, other=0.0)[:, None]  # [ROWS, 1]
    b_scale, b_offset = b_pivot, b_pivot
    if ACT != 0:
        b_scale = tl.load(affine.scale + row + o_r, mask=m_r, other=0.0)[:, None]
        b_offset = tl.load(affine.offset + row + o_r, mask=m_r, other=0.0)[:, None]
    o_x = o_base[:, None] + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
    m_x = (o_x >= o_start[:, None]) & (o_x < o_end[:, None])
    b_g, b_gu, b_rest = products(
        dy, x, residual, o_x, o_x < o_stop[:, None], m_x, b_pivot, b_scale, b_offset, ACT, RESIDUAL
    )
    # The rest of the piece.
    for first in range(BLOCK, piece + ALIGN - 1, BLOCK):
        o_at = o_x + first
        b_h, b_hu, b_more = products(
            dy, x, residual, o_at, o_at < o_stop[:, None], o_at < o_end[:, None], b_pivot, b_scale, b_offset, ACT,
            RESIDUAL,
        )  # fmt: skip
        # Added tile by tile; the sum over the tile is taken once, behind the loop.
        b_g += b_h
        b_gu += b_hu
        if ACT == 3:
            b_rest += b_more
    tl.store(out.total + i_p * rows + row + o_r, tl.sum(b_g, 1), mask=m_r)
    tl.store(out.dot + i_p * rows + row + o_r, tl.sum(b_gu, 1), mask=m_r)
    if ACT == 3:
        tl.store(out.rest + i_p * rows + row + o_r, tl.sum(b_rest, 1), mask=m_r)


@triton.jit(do_not_specialize=["size", "units", "piece"])
def sums_columns(
    dy, x, residual, affine: Affine, out: Sums, size, units, piece, true_channels,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """Sums of g and of g * (x - pivot) over each piece of each column: (samples, pieces, channels) each.

    Grid and tiles as ``moments_columns``. With FOLD a sum is that of every FOLD-th position; whoever reads them adds
    up.
    """
    i_n, i_p, pieces = place(AT, 0).to(tl.int64), place(AT, 2), pieces_of(AT)
    begin = i_p * piece
    count = tl.minimum(piece, size - begin)
    channels = units * ALIGN
    o_c = place(AT, 1) * BLOCK + tl.arange(0, BLOCK)
    o_s = tl.arange(0, ROWS)
    origin = (i_n * size + begin) * channels
    # Where coefficients of this sample's channels lie.
    o_nc = i_n * channels + o_c  # [BLOCK]
    if FOLD > 1:
        o_nc = i_n * true_channels + o_c % true_channels
    x += origin
    dy += origin
    if RESIDUAL:
        residual += origin
    # One coefficient per channel, for all its positions.
    b_pivot = tl.load(affine.pivot + o_nc, mask=o_c < channels, other=0.0)[None, :]  # [1, BLOCK]
    b_scale, b_offset = b_pivot, b_pivot
    if ACT != 0:
        b_scale = tl.load(affine.scale + o_nc, mask=o_c < channels, other=0.0)[None, :]
        b_offset = tl.load(affine.offset + o_nc, mask=o_c < channels, other=0.0)[None, :]
    o_x = o_s[:, None] * channels + o_c[None, :]  # [ROWS, BLOCK]
    m_x = (o_s[:, None] < count) & (o_c[None, :] < channels)
    b_g, b_gu, b_rest = products(dy, x, residual, o_x, m_x, m_x, b_pivot, b_scale, b_offset, ACT, RESIDUAL)
    # The rest of the piece; all three pointers move together.
    for first in range(ROWS, count, ROWS):
        x += ROWS * channels.to(tl.int64)
        dy += ROWS * channels.to(tl.int64)
        if RESIDUAL:
            residual += ROWS * channels.to(tl.int64)
        m_x = (o_s[:, None] < count - first) & (o_c[None, :] < channels)
        b_h, b_hu, b_more = products(dy, x, residual, o_x, m_x, m_x, b_pivot, b_scale, b_offset, ACT, RESIDUAL)
        b_g += b_h
        b_gu += b_hu
        if ACT == 3:
            b_rest += b_more
    o_nc = (i_n * pieces + i_p) * channels + o_c
    tl.store(out.total + o_nc, tl.sum(b_g, 0), mask=o_c < channels)
    tl.store(out.dot + o_nc, tl.sum(b_gu, 0), mask=o_c < channels)
    if ACT == 3:
        tl.store(out.rest + o_nc, tl.sum(b_rest, 0), mask=o_c < channels)


@triton.jit
def read_sums(parts, o_nc, m_nc, layout, MERGE: tl.constexpr):
    """Read both sums, their pieces added up in order where MERGE."""
    b_total = tl.load(parts.total + o_nc, mask=m_nc, other=0.0)
    b_dot = tl.load(parts.dot + o_nc, mask=m_nc, other=0.0)
    if MERGE:
        for i_p in range(1, layout.pieces):
            b_total += tl.load(parts.total + o_nc + i_p * layout.stride, mask=m_nc, other=0.0)
            b_dot += tl.load(parts.dot + o_nc + i_p * layout.stride, mask=m_nc, other=0.0)
    return b_total, b_dot


@triton.jit(do_not_specialize=["pieces"])
def join_sums(
    parts: Sums, out, number, channels, pieces, sample_stride, stride, REST: tl.constexpr, P_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the pieces up into ``out``, (2 or with REST 3, samples * channels), P_BLOCK of BLOCK numbers at once."""
    o_nc = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_nc = o_nc < number
    o_at = o_nc // channels * sample_stride + o_nc % channels
    o_lane = tl.arange(0, P_BLOCK)[:, None]  # [P_BLOCK, 1]
    b_total, b_dot, b_rest = zeros(P_BLOCK, BLOCK), zeros(P_BLOCK, BLOCK), zeros(P_BLOCK, BLOCK)
    for first in range(0, pieces, P_BLOCK):
        o_p = first + o_lane
        m_p = (o_p < pieces) & m_nc[None, :]  # [P_BLOCK, BLOCK]
        o_spot = o_at[None, :] + o_p.to(tl.int64) * stride
        b_total += tl.load(parts.total + o_spot, mask=m_p, other=0.0)
        b_dot += tl.load(parts.dot + o_spot, mask=m_p, other=0.0)
        if REST:
            b_rest += tl.load(parts.rest + o_spot, mask=m_p, other=0.0)
    tl.store(out + o_nc, tl.sum(b_total, 0), mask=m_nc)
    tl.store(out + number + o_nc, tl.sum(b_dot, 0), mask=m_nc)
    if REST:
        tl.store(out + 2 * number + o_nc, tl.sum(b_rest, 0), mask=m_nc)


@triton.jit
def added(parts, o_at, m_at, number, stride, P_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """Add up ``number`` parts of the numbers at ``o_at``, P_BLOCK at once, in the same order in every run."""
    # Rows are parts, so that they are loaded side by side and not one behind the other.
    o_lane = tl.arange(0, P_BLOCK)[:, None]  # [P_BLOCK, 1]
    b_total = zeros(P_BLOCK, BLOCK)
    for first in range(0, number, P_BLOCK):
        o_p = first + o_lane
        o_spot = o_at[None, :] + o_p.to(tl.int64) * stride  # [P_BLOCK, BLOCK]
        b_total += tl.load(parts + o_spot, mask=(o_p < number) & m_at[None, :], other=0.0)
    return tl.sum(b_total, 0)


@triton.jit
def store_gradients(
    maps, origin, o_x, m_x, b_pivot, b_scale, b_offset, b_constant, b_slope, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """Write dx = scale * g + constant + slope * (x - pivot), PLAIN: scale * g alone, and g itself for the residual."""
    p_dy, p_x, p_residual = maps.dy + origin, maps.x + origin, maps.residual + origin
    b_g = tl.load(p_dy + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_u = b_g
    # x is not read where neither the activation nor the slope asks for it.
    if ACT != 0 or not PLAIN:
        b_u = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32) - b_pivot
    # g before the activation.
    if ACT != 0:
        b_g = before_activation(b_g, tl.fma(b_scale, b_u, b_offset), p_residual, o_x, m_x, ACT, RESIDUAL)
    if RESIDUAL:
        # The residual was added as it is, so its gradient is g.
        tl.store(maps.dresidual + origin + o_x, b_g.to(maps.dresidual.dtype.element_ty), mask=m_x)
    b_dx = b_scale * b_g
    # The large term last: it alone is rounded at full size.
    if not PLAIN:
        b_dx = tl.fma(b_scale, b_g, tl.fma(b_slope, b_u, b_constant))
    tl.store(maps.dx + origin + o_x, b_dx.to(maps.dx.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["rows", "size", "units", "magic"])
def combine_flat(
    maps: Maps, affine: Affine, dx_affine: DxAffine, rows, size, units, magic, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, PLAIN: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """``store_gradients`` for x in rows. Grid and coefficients as ``apply_flat``.

    Written out, for here each coefficient takes registers from where it is read: as late as may be.
    """
    rows, size, units = tl.cast(rows, tl.int64), tl.cast(size, tl.int32), tl.cast(units, tl.int64)
    origin, o_x, m_x, row, o_row = flat_lanes(units, size, tl.cast(magic, tl.int32), ALIGN, BLOCK, WIDE, AT)
    dy, x, residual, dx, dresidual = maps
    b_g = tl.load(dy + origin + o_x, mask=m_x, other=0.0).to(tl.float32)  # [BLOCK]
    b_scale = of_row(affine.scale, row, rows, o_row, m_x, WIDE)
    b_u = b_g
    if ACT != 0 or not PLAIN:
        b_u = tl.load(x + origin + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_u -= of_row(affine.pivot, row, rows, o_row, m_x, WIDE)
    if ACT != 0:
        b_z = tl.fma(b_scale, b_u, of_row(affine.offset, row, rows, o_row, m_x, WIDE))
        b_g = before_activation(b_g, b_z, residual, origin + o_x, m_x, ACT, RESIDUAL)
    if RESIDUAL:
        tl.store(dresidual + origin + o_x, b_g.to(dresidual.dtype.element_ty), mask=m_x)
    b_dx = b_scale * b_g
    if not PLAIN:
        b_slope = of_row(dx_affine.slope, row, rows, o_row, m_x, WIDE)
        b_dx = tl.fma(b_scale, b_g, tl.fma(b_slope, b_u, of_row(dx_affine.constant, row, rows, o_row, m_x, WIDE)))
    tl.store(dx + origin + o_x, b_dx.to(dx.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["size", "units", "blocks"])
def combine_columns(
    maps: Maps, affine: Affine, dx_affine: DxAffine, size, units, blocks, true_channels, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    PLAIN: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """``store_gradients`` for x in columns. Grid and coefficients as ``apply_columns``."""
    size, units = tl.cast(size, tl.int32), tl.cast(units, tl.int32)
    origin, o_x, m_x, o_nc, m_nc = column_lanes(size, units, blocks, true_channels, ALIGN, ROWS, BLOCK, FOLD, AT)
    b_pivot = tl.load(affine.pivot + o_nc, mask=m_nc, other=0.0)[None, :]  # [1, BLOCK]
    b_scale = tl.load(affine.scale + o_nc, mask=m_nc, other=0.0)[None, :]
    b_offset = tl.load(affine.offset + o_nc, mask=m_nc, other=0.0)[None, :]
    b_constant = tl.load(dx_affine.constant + o_nc, mask=m_nc, other=0.0)[None, :]
    b_slope = tl.load(dx_affine.slope + o_nc, mask=m_nc, other=0.0)[None, :]
    store_gradients(maps, origin, o_x, m_x, b_pivot, b_scale, b_offset, b_constant, b_slope, ACT, RESIDUAL, PLAIN)

"""Device code: sums, adjoint and dx in one launch, a program for a few channels of all samples. As ``forward``."""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Layout, Maps, Sums
from lightning_norm.kernels.mixture import flags as mixture
from lightning_norm.kernels.mixture.backward import vjp_columns, vjp_mix_at
from lightning_norm.kernels.owner.flags import Shape
from lightning_norm.kernels.owner.forward import maps_at, places_at
from lightning_norm.kernels.passes.backward import products, store_gradients
from lightning_norm.kernels.passes.forward import zeros
from lightning_norm.kernels.per_channel import flags as channelwise
from lightning_norm.kernels.per_channel.backward import channels_vjp


@triton.jit
def add_up(maps, affine, out, shape, ACT: tl.constexpr, RESIDUAL: tl.constexpr, TILE: tl.constexpr):
    """Write the sums of g and of g * (x - pivot), (N, C) each, of the program's channels."""
    number = shape.samples * shape.channels
    o_c = tl.program_id(0) * TILE.c + tl.arange(0, TILE.c)
    # One sum for each sample: the equations may weigh samples unlike.
    for begin in range(0, shape.samples, TILE.n_read):
        o_n = begin + tl.arange(0, TILE.n_read)
        o_x, m_loaded, m_x, o_nc, m_nc = maps_at(o_n, o_c, shape, TILE)
        b_pivot = tl.load(affine + o_nc, mask=m_nc, other=0.0)[:, :, None]  # [N, C, 1]
        # Without an activation g is dy itself, and nothing asks for scale and offset.
        b_scale, b_offset = b_pivot, b_pivot
        if ACT != 0:
            # Of the shape of a tile, which a multiply-add wants of all three.
            b_wide = zeros(1, TILE.s)[None, :, :]
            b_scale = tl.load(affine + number + o_nc, mask=m_nc, other=0.0)[:, :, None] + b_wide
            b_offset = tl.load(affine + 2 * number + o_nc, mask=m_nc, other=0.0)[:, :, None] + b_wide
        b_g, b_gu, _ = products(
            maps.dy, maps.x, maps.residual, o_x, m_loaded, m_x, b_pivot, b_scale, b_offset, ACT, RESIDUAL
        )
        tl.store(out.total + o_nc, tl.sum(b_g, 2), mask=m_nc)
        tl.store(out.dot + o_nc, tl.sum(b_gu, 2), mask=m_nc)


@triton.jit
def spread(maps, affine, dx_affine, shape, ACT: tl.constexpr, RESIDUAL: tl.constexpr, TILE: tl.constexpr):
    """dx = scale * g + constant + slope * (x - pivot) for the program's channels; also g itself for the residual."""
    number = shape.samples * shape.channels
    o_c = tl.program_id(0) * TILE.c + tl.arange(0, TILE.c)
    for begin in range(0, shape.samples, TILE.n_write):
        o_x, m_x, o_nc, m_nc = places_at(begin + tl.arange(0, TILE.n_write), o_c, shape, TILE)
        b_pivot = tl.load(affine + o_nc, mask=m_nc, other=0.0)
        b_scale = tl.load(affine + number + o_nc, mask=m_nc, other=0.0)
        b_offset = tl.load(affine + 2 * number + o_nc, mask=m_nc, other=0.0)
        b_constant = tl.load(dx_affine + o_nc, mask=m_nc, other=0.0)
        b_slope = tl.load(dx_affine + number + o_nc, mask=m_nc, other=0.0)
        # g is computed again and was not kept: a whole map of it would take too many registers.
        store_gradients(maps, 0, o_x, m_x, b_pivot, b_scale, b_offset, b_constant, b_slope, ACT, RESIDUAL, False)


@triton.jit
def own_mixture_vjp(
    maps: Maps, parameters: mixture.Parameters, running: mixture.Running, stats: mixture.MixtureStatistics,
    out: mixture.Gradients, sums: Sums, samples, channels, size, units, magic, eps, factor, FLAGS: tl.constexpr,
    NEED: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of what ``own_mixture`` computes; dx only with NEED. The grid is (blocks of channels,)."""
    number, i_c = samples * channels, tl.program_id(0)
    shape = Shape(samples, channels, size, units, magic)
    add_up(maps, stats.affine, sums, shape, ACT, RESIDUAL, TILE)
    # What follows reads sums that other threads of this program have stored, and no other program.
    tl.debug_barrier()
    of_all, layout = mixture.Shape(samples, number, channels, samples, channels), Layout(1, channels, number, 1, size, 1)  # noqa: E501  # fmt: skip
    # One block of columns, the program's own channels, with all of their samples.
    vjp_columns(
        i_c, sums, stats, parameters, running, out, of_all, layout, 1, eps, factor, FLAGS, TILE.n, TILE.c
    )  # fmt: skip
    # Gradients of parameters are complete. dx takes what each sample gets through the statistics as well.
    if NEED:
        tl.debug_barrier()
        o_c = (i_c * TILE.c + tl.arange(0, TILE.c))[None, :]  # [1, C]
        for begin in range(0, samples, TILE.n):
            o_n = (begin + tl.arange(0, TILE.n))[:, None]  # [N, 1]
            m_nc = (o_n < samples) & (o_c < channels)  # [N, C]
            vjp_mix_at(
                sums, stats, parameters, running, out, o_n + o_c * 0, o_c + o_n * 0, m_nc, of_all, layout, eps, factor,
                FLAGS,
            )  # fmt: skip
        tl.debug_barrier()
        spread(maps, stats.affine, out.dx_affine, shape, ACT, RESIDUAL, TILE)


@triton.jit
def own_channels_vjp(
    maps: Maps, learned: channelwise.Learned, given: channelwise.PerChannelStatistics,
    out: channelwise.PerChannelGradients, sums: Sums, samples, channels, contexts, size, units, magic,
    numbers: channelwise.Numbers, FLAGS: tl.constexpr, NEED: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of what ``own_channels`` computes; dx only with NEED. The grid is (blocks of channels,)."""
    number, shape = samples * channels, Shape(samples, channels, size, units, magic)
    add_up(maps, given.affine, sums, shape, ACT, RESIDUAL, TILE)
    tl.debug_barrier()
    channels_vjp(
        sums, given, given.stats, learned, out, samples, number, channels, contexts, 1, channels, number, size, numbers,
        FLAGS, TILE,
    )  # fmt: skip
    # The constant and the slope of dx were stored by other threads.
    if NEED:
        tl.debug_barrier()
        spread(maps, given.affine, out.dx_affine, shape, ACT, RESIDUAL, TILE)

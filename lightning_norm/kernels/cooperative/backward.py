"""Device code: the four backward launches of the mixture family as phases of one, as in ``forward``."""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import DxAffine, Maps, Sums
from lightning_norm.kernels.cooperative.flags import Size
from lightning_norm.kernels.cooperative.forward import BLOCK, coefficients_of, column_job, meet, numbers_of, strides_of
from lightning_norm.kernels.mixture.backward import vjp_mix, vjp_pool
from lightning_norm.kernels.mixture.flags import Gradients, MixtureStatistics, Parameters, Running
from lightning_norm.kernels.passes.backward import combine_columns, combine_flat, sums_columns, sums_rows


@triton.jit
def add_up(maps, affine, out, size, PLAN: tl.constexpr):
    """Write the sums of each piece."""
    rows, pieces = size.samples * size.channels, size.pieces
    if PLAN.columns:
        blocks = tl.cdiv(size.channels * PLAN.fold, PLAN.block)
        for i_job in range(tl.program_id(0), size.samples * pieces * blocks, tl.num_programs(0)):
            sums_columns(
                maps.dy, maps.x, maps.residual, affine, out, size.length, size.units, size.piece, size.channels,
                PLAN.align, PLAN.rows, PLAN.block, PLAN.fold, PLAN.act, PLAN.residual,
                column_job(i_job, blocks, pieces),
            )  # fmt: skip
    else:
        blocks = tl.cdiv(rows, PLAN.rows)
        for i_job in range(tl.program_id(0), blocks * pieces, tl.num_programs(0)):
            sums_rows(
                maps.dy, maps.x, maps.residual, affine, out, rows, size.length, size.units, size.piece, PLAN.align,
                PLAN.rows, PLAN.block, PLAN.act, PLAN.residual, (i_job % blocks, i_job // blocks),
            )  # fmt: skip


@triton.jit
def combine(maps, affine, dx_affine, size, PLAN: tl.constexpr):
    """Write dx, from the end of x to its start."""
    channels, length = size.channels, size.length
    if PLAN.columns:
        across, along = tl.cdiv(channels * PLAN.fold, PLAN.block), tl.cdiv(length, PLAN.rows)
        jobs = size.samples * along * across
        for i_job in range(tl.program_id(0), jobs, tl.num_programs(0)):
            i_at = jobs - 1 - i_job
            combine_columns(
                maps, affine, dx_affine, length, size.units, along, channels, PLAN.align, PLAN.rows, PLAN.block,
                PLAN.fold, PLAN.act, PLAN.residual, False, (i_at // across, i_at % across),
            )  # fmt: skip
    else:
        jobs = tl.cdiv(size.units * PLAN.align, PLAN.flat)
        for i_job in range(tl.program_id(0), jobs, tl.num_programs(0)):
            combine_flat(
                maps, affine, dx_affine, size.samples * channels, length, size.units, size.magic, PLAN.align,
                PLAN.flat, PLAN.wide, PLAN.act, PLAN.residual, False, (jobs - 1 - i_job,),
            )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "length", "units", "piece", "pieces", "per_group", "magic"])
def cooperative_mixture_vjp(
    maps: Maps, sums: Sums, stats: MixtureStatistics, parameters: Parameters, running: Running, out: Gradients, arrived,
    samples, channels, length, units, piece, pieces, per_group, magic, eps, factor,
    FLAGS: tl.constexpr, TILE: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters, and with them dx. The grid is as many programs as run at once, or fewer."""
    size = Size(samples, channels, length, units, piece, pieces, per_group, magic)
    number_of_parts, sample_stride, stride = strides_of(size, PLAN)
    numbers, i_first, programs = numbers_of(size), tl.program_id(0), tl.num_programs(0)
    number, groups, columns = numbers.number, numbers.groups_in_all, tl.cdiv(channels, TILE.c)
    affine = coefficients_of(stats.affine, number)
    if PLAN.phase == 0 or PLAN.phase < 0:
        add_up(maps, affine, sums, size, PLAN)
    if PLAN.phase < 0:
        meet(arrived, 0)
    if PLAN.phase == 1 or PLAN.phase < 0:
        for i_job in range(i_first, columns + tl.cdiv(groups, TILE.g) * (FLAGS.at_ln >= 0), programs):
            vjp_pool(
                sums, stats, parameters, running, out, samples, number, channels, groups, per_group, columns,
                number_of_parts, sample_stride, stride, eps, factor, FLAGS, TILE, (i_job,),
            )  # fmt: skip
    if PLAN.phase < 0:
        meet(arrived, 1)
    if PLAN.phase == 2 or PLAN.phase < 0:
        for i_job in range(i_first, tl.cdiv(number, BLOCK), programs):
            vjp_mix(
                sums, stats, parameters, running, out, samples, number, channels, groups, per_group, columns,
                number_of_parts, sample_stride, stride, length * PLAN.fold, eps, factor, FLAGS, BLOCK, (i_job,),
            )  # fmt: skip
    if PLAN.phase < 0:
        meet(arrived, 2)
    # Where nobody asks for x's gradient nothing is left to be done, but all have met, which the counters ask for.
    if (PLAN.phase == 3 or PLAN.phase < 0) and not PLAN.plain:
        combine(maps, affine, DxAffine(out.dx_affine, out.dx_affine + number), size, PLAN)

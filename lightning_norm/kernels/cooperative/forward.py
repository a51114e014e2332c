"""Device code: the four forward launches of the mixture family as phases of one. ``backward`` has the other four.

Statistics of layers and of the batch need numbers from all over x, so one program cannot do with what it owns. Here as
many programs run as the GPU holds at once. Each takes every so many of a phase's jobs, and all of them *meet* before
the next phase. A job is one program of the launch that the phase stands for, by that very kernel, and leaves its
numbers in the same places: so results do not depend on how many programs there are. x is small enough to stay in the
L2 cache, where the last phase finds it.

The interpreter runs one program after the other, which could not wait for each other: there each phase is a launch.
"""

import triton
import triton.language as tl

from lightning_norm.kernels.arguments import Affine, Moments
from lightning_norm.kernels.cooperative.flags import Forward, Size
from lightning_norm.kernels.mixture import launch as mixture_launch
from lightning_norm.kernels.mixture.flags import MixtureStatistics, Parameters, Running, Shape
from lightning_norm.kernels.mixture.forward import mix, pool
from lightning_norm.kernels.passes.forward import apply_columns, apply_flat, moments_columns, moments_rows

BLOCK: tl.constexpr = tl.constexpr(mixture_launch.BLOCK)
"""(n, c) pairs of a job."""


@triton.jit
def meet(arrived, i: tl.constexpr):
    """Wait for all programs of the grid, at the meeting number ``i`` of three.

    Each counts itself, and waits until all are counted. Whoever comes last knows that all have left the meeting before
    this one, be it of this launch or of the launch before, and clears its counter: no launch has to prepare them.
    """
    tl.debug_barrier()  # every thread has stored its part
    programs = tl.num_programs(0)
    # Releases what this program has stored.
    before = tl.atomic_add(arrived + i, 1, sem="acq_rel")
    if before == programs - 1:
        tl.store(arrived + (i + 2) % 3, 0)
    # Adding nothing is a reading that acquires what the others have stored.
    while tl.atomic_add(arrived + i, 0, sem="acquire") < programs:
        pass
    tl.debug_barrier()  # for all threads of this program


@triton.jit
def strides_of(size, PLAN: tl.constexpr):
    """Return how many parts the numbers of x are in, and the distances between those of two samples and of two parts.

    As ``Grid.partial_layout``.
    """
    parts = size.pieces * PLAN.fold
    if PLAN.columns:
        sample_stride, stride = size.channels * parts, size.channels
    else:
        sample_stride, stride = size.channels, size.samples * size.channels
    return parts, sample_stride, stride


@triton.jit
def numbers_of(size):
    """Return the sizes that the mixture family counts by."""
    groups = size.samples * (size.channels // size.per_group)
    return Shape(size.samples, size.samples * size.channels, size.channels, groups, size.per_group)


@triton.jit
def column_job(i_job, blocks, pieces):
    """Return the place of a program that reads columns, as ``place`` and ``pieces_of`` ask for it."""
    return i_job // (blocks * pieces), i_job % blocks, i_job // blocks % pieces, pieces


@triton.jit
def coefficients_of(affine, number):
    """Return pivot, scale, offset and threshold, ``number`` of each; the last is there if the equations have one."""
    return Affine(affine, affine + number, affine + 2 * number, affine + 3 * number)


@triton.jit
def measure(x, out, size, PLAN: tl.constexpr):
    """Write the moments of each piece."""
    rows, pieces = size.samples * size.channels, size.pieces
    if PLAN.columns:
        blocks = tl.cdiv(size.channels * PLAN.fold, PLAN.block)
        for i_job in range(tl.program_id(0), size.samples * pieces * blocks, tl.num_programs(0)):
            moments_columns(
                x, out, size.length, size.units, size.piece, PLAN.align, PLAN.rows, PLAN.block, PLAN.average,
                column_job(i_job, blocks, pieces),
            )  # fmt: skip
    else:
        blocks = tl.cdiv(rows, PLAN.rows)
        for i_job in range(tl.program_id(0), blocks * pieces, tl.num_programs(0)):
            moments_rows(
                x, out, rows, size.length, size.units, size.piece, PLAN.align, PLAN.rows, PLAN.block, PLAN.average,
                (i_job % blocks, i_job // blocks),
            )  # fmt: skip


@triton.jit
def write(maps, affine, size, PLAN: tl.constexpr):
    """Write y, from the end of x to its start."""
    channels, length = size.channels, size.length
    if PLAN.columns:
        across, along = tl.cdiv(channels * PLAN.fold, PLAN.block), tl.cdiv(length, PLAN.rows)
        jobs = size.samples * along * across
        for i_job in range(tl.program_id(0), jobs, tl.num_programs(0)):
            i_at = jobs - 1 - i_job
            apply_columns(
                maps.x, maps.residual, maps.y, affine, length, size.units, along, channels, PLAN.align, PLAN.rows,
                PLAN.block, PLAN.fold, PLAN.act, PLAN.residual, (i_at // across, i_at % across),
            )  # fmt: skip
    else:
        jobs = tl.cdiv(size.units * PLAN.align, PLAN.flat)
        for i_job in range(tl.program_id(0), jobs, tl.num_programs(0)):
            apply_flat(
                maps.x, maps.residual, maps.y, affine, size.samples * channels, length, size.units, size.magic,
                PLAN.align, PLAN.flat, PLAN.wide, PLAN.act, PLAN.residual, (jobs - 1 - i_job,),
            )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "length", "units", "piece", "pieces", "per_group", "magic"])
def cooperative_mixture(
    maps: Forward, parts: Moments, stats: MixtureStatistics, parameters: Parameters, running: Running, arrived,
    samples, channels, length, units, piece, pieces, per_group, magic, eps, factor, unbias,
    FLAGS: tl.constexpr, TILE: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Statistics of x, and y from them. The grid is as many programs as run at once, or fewer."""
    size = Size(samples, channels, length, units, piece, pieces, per_group, magic)
    number_of_parts, sample_stride, stride = strides_of(size, PLAN)
    numbers, i_first, programs = numbers_of(size), tl.program_id(0), tl.num_programs(0)
    number, groups = numbers.number, numbers.groups_in_all
    if PLAN.phase == 0 or PLAN.phase < 0:
        measure(maps.x, parts, size, PLAN)
    if PLAN.phase < 0:
        meet(arrived, 0)
    if PLAN.phase == 1 or PLAN.phase < 0:
        columns = tl.cdiv(channels, TILE.c) * (FLAGS.at_bn >= 0)
        for i_job in range(i_first, columns + tl.cdiv(groups, TILE.g) * (FLAGS.at_ln >= 0), programs):
            pool(
                parts, stats.batch, stats.layer, samples, channels, groups, per_group, columns, number_of_parts,
                sample_stride, stride, piece, length, PLAN.fold, factor, FLAGS.merge, TILE, (i_job,),
            )  # fmt: skip
    if PLAN.phase < 0:
        meet(arrived, 1)
    if PLAN.phase == 2 or PLAN.phase < 0:
        for i_job in range(i_first, tl.cdiv(number, BLOCK), programs):
            mix(
                parts, stats, parameters, running, number, channels, groups, per_group, number_of_parts, sample_stride,
                stride, piece, length, PLAN.fold, eps, factor, unbias, FLAGS, BLOCK, (i_job,),
            )  # fmt: skip
    if PLAN.phase < 0:
        meet(arrived, 2)
    if PLAN.phase == 3 or PLAN.phase < 0:
        write(maps, coefficients_of(stats.affine, number), size, PLAN)

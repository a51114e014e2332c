"""Launches of the kernels that own their channels: one from x to y, one from dy to all gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_norm.kernels import grid as switches
from lightning_norm.kernels.arguments import Maps, or_other, sums_in
from lightning_norm.kernels.grid import BUSY, REGISTERS, cdiv, dense, grid_of, power
from lightning_norm.kernels.launcher import launch
from lightning_norm.kernels.mixture.flags import Gradients, MixtureFlags, MixtureStatistics, Parameters, Running
from lightning_norm.kernels.mixture.launch import factor_of, unbias_of
from lightning_norm.kernels.owner.backward import own_channels_vjp, own_mixture_vjp
from lightning_norm.kernels.owner.flags import Tile
from lightning_norm.kernels.owner.forward import own_channels, own_mixture
from lightning_norm.kernels.passes.launch import ACTIVATIONS, device_of, magic
from lightning_norm.kernels.per_channel import flags as channelwise
from lightning_norm.kernels.per_channel.flags import PerChannelFlags, PerChannelNumbers
from lightning_norm.kernels.per_channel.launch import state_of

LARGEST = 256
"""Positions of a map at most."""

HELD = 128 << 10
"""Bytes of x that a program may own: what the first level of cache keeps from the first reading to the second."""

HELD_LANES = 4096
"""Elements of x that a program takes at once, 16 to a thread."""

NUMBERS = 512
"""Numbers (N, K, C) that the equations take at once."""

WARPS = 8

Optional = Tensor | None


@dataclass(frozen=True)
class Owner:
    """Which channels a program owns, and in which tiles it takes them.

    Args:
        n: samples.
        c: channels.
        size: positions.
        columns: whether channels are contiguous.
        align: elements that are loaded at once.
        flat: elements that are loaded and stored at once where all maps of a program are taken together.
        channels: of a program.
    """

    n: int
    c: int
    size: int
    columns: bool
    align: int
    flat: int
    channels: int

    @property
    def programs(self) -> int:
        """Return the number of programs."""
        return cdiv(self.c, self.channels)

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Return the positions of a map, what the vectors of x are counted by, and what divides by the positions."""
        return self.size, (self.c if self.columns else self.n * self.c * self.size) // self.align, magic(self.size)

    def tile(self, rows: int) -> Tile:
        """Return the tiles, for equations on so many sets of statistics."""
        span = self.size if self.columns or self.size % self.align == 0 else self.size + self.align - 1
        s = power(span) if self.columns else max(power(span), self.align)
        flat = power(self.channels * self.size)
        k, n = power(rows), power(self.n)
        # Reductions across threads, and equations of many contexts, need the registers.
        lanes = HELD_LANES // 2 if self.columns or rows > 1 else HELD_LANES
        tile = max(1, min(n, lanes // (self.channels * s)))
        written = tile if self.columns else max(1, min(n, lanes // flat))
        numbers = max(1, min(n, 32, NUMBERS // (self.channels * k)))
        return Tile(self.align, self.flat, self.columns, tile, written, numbers, k, self.channels, s, flat)


def owner_of(x: Tensor, channel_dim: int) -> Owner | None:
    """Return who owns which channels of x; ``None`` where x is too large, or the switch ``grid.OWNER`` is off."""
    if not switches.OWNER or x.numel() >= 1 << 31:
        return None
    grid = grid_of(x, channel_dim)
    # (N, C) read as rows: maps of one position, whose channels are contiguous.
    return shared_out(grid.n, grid.c, grid.size, grid.columns or grid.size == 1, 16 // x.element_size())


@functools.lru_cache(4096)
def shared_out(n: int, c: int, size: int, columns: bool, vector: int) -> Owner | None:
    """Return who owns which channels of an x of this shape, of which ``vector`` elements are loaded at once."""
    if size > LARGEST:
        return None
    if columns:
        # 32 bytes of neighbouring channels, which come from memory together.
        channels, align, flat = min(power(c), 2 * vector), vector if c % vector == 0 else 1, 1
    else:
        # As few maps as begin at multiples of a vector, and fewer where half of the multiprocessors would have none.
        channels = min(power(c), vector // math.gcd(size, vector))
        while channels > 1 and cdiv(c, channels) < BUSY // 4:
            channels //= 2
        align = vector if n * c * size % vector == 0 else 1
        flat = math.gcd(channels * size, c * size, vector)
    # What is read twice must stay in the cache, and the maps of one sample fit into a tile.
    fits = n * channels * size * (16 // vector) <= HELD and channels * size <= HELD_LANES
    return Owner(n, c, size, columns, align, flat, channels) if fits else None


def owns_mixture(flags: MixtureFlags) -> bool:
    """Return whether a mixture is of the batch's or of the instance's own statistics alone."""
    alone = flags.at_ln < 0 and flags.num_weights == 0 and not flags.outputs and not flags.threshold
    return alone and flags.needs_moments and not flags.frozen and (flags.at_bn < 0) != (flags.at_in < 0)


def owns_channels(flags: PerChannelFlags) -> bool:
    """Return whether nothing in the equations concerns all channels of a sample or of a context."""
    looks_across = flags.condensed or flags.gate or flags.prior or flags.pooled or flags.ranks
    return flags.needs_moments and not flags.frozen and not looks_across


def normalize_mixture(
    owner: Owner,
    x: Tensor,
    residual: Optional,
    weight: Optional,
    bias: Optional,
    running: Sequence[Optional],
    flags: MixtureFlags,
    eps: float,
    activation: str,
) -> tuple[Tensor, MixtureStatistics]:
    """Return y, and what ``mixture.launch.affine_of`` returns; the arguments as there."""
    y, affine = torch.empty_like(x), torch.empty(3, owner.n, owner.c, device=x.device, dtype=torch.float32)
    # Neither layers nor other ranks have statistics here: both stay empty.
    moments, empty, bn = torch.empty_like(affine[1:]), affine.new_empty(0), flags.at_bn >= 0
    batch = affine.new_empty(3, owner.c) if bn else empty
    stats = MixtureStatistics(moments, batch, empty, affine, affine.new_empty(0, dtype=torch.float64))
    parameters = Parameters(*or_other((weight, bias, None, None), affine))
    with device_of(x):
        launch(own_mixture, owner.programs)(
            x, x if residual is None else dense(residual, x), y, parameters,
            Running(*or_other(running, affine)), stats, owner.n, owner.c, *owner.numbers, eps,
            factor_of(owner.size, flags), unbias_of(owner.n * owner.size, flags),
            FLAGS=flags.compiled(weight=weight is not None, bias=bias is not None), TILE=owner.tile(1),
            maxnreg=REGISTERS["own_mixture"], **_ending(activation, residual),
        )  # fmt: skip
    return y, stats


def mixture_gradients(
    owner: Owner,
    dy: Tensor,
    x: Tensor,
    stats: MixtureStatistics,
    weight: Optional,
    residual: Optional,
    flags: MixtureFlags,
    eps: float,
    activation: str,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what ``mixture.launch.gradients`` returns."""
    affine = stats.affine
    dweight, dbias, dbatch = affine.new_empty(owner.c), affine.new_empty(owner.c), affine.new_empty(2, owner.c)
    dx, dresidual, maps = _maps(dy, x, residual, affine, need_dx)
    sums, dx_affine = affine.new_empty(2, owner.n, owner.c), affine.new_empty(2, owner.n, owner.c)
    parameters = Parameters(affine if weight is None else weight, affine, affine, affine)
    out = Gradients(dbatch, affine, dweight, dbias, affine, affine, affine, dx_affine)
    with device_of(x):
        launch(own_mixture_vjp, owner.programs)(
            maps, parameters, Running(*(affine,) * 5), stats, out, sums_in(sums), owner.n, owner.c, *owner.numbers, eps,
            factor_of(owner.size, flags), FLAGS=flags.compiled(weight=weight is not None),
            NEED=need_dx or residual is not None, TILE=owner.tile(1), maxnreg=REGISTERS["own_mixture_vjp"],
            **_ending(activation, residual),
        )  # fmt: skip
    empty = affine.new_empty(0)
    return dx, dweight, dbias, empty, empty, dresidual


def normalize_channels(
    owner: Owner,
    x: Tensor,
    residual: Optional,
    weight: Optional,
    bias: Optional,
    gates: Sequence[Optional],
    responsibilities: Optional,
    running: Sequence[Optional],
    counters: Sequence[Optional],
    rate: Optional,
    threshold: Optional,
    limit: Optional,
    flags: PerChannelFlags,
    numbers: PerChannelNumbers,
    activation: str,
) -> tuple[Tensor, channelwise.PerChannelStatistics]:
    """Return y, and what ``per_channel.launch.affine_of`` returns; the arguments as there."""
    y, affine = torch.empty_like(x), torch.empty(3, owner.n, owner.c, device=x.device, dtype=torch.float32)
    moments = torch.empty_like(affine[1:])
    stats = affine.new_empty(flags.num_statistics, flags.rows, owner.c)
    # Where ``survey`` leaves a number for each sample, each program leaves one.
    survey_out = affine.new_empty(2 + 3 * flags.rows + owner.programs if flags.moves_with_channels else 0)
    # Nothing is pooled over ranks: what the family keeps of them stays empty.
    empty = affine.new_empty(3, 0), affine.new_empty(0, dtype=torch.float64)
    out = channelwise.PerChannelStatistics(moments, stats, affine, survey_out, *empty)
    rates = channelwise.Rates(*or_other((rate, threshold, limit), affine))
    compiled = flags.compiled(weight=weight is not None, bias=bias is not None, known=flags.contexts > 0, owner=True)
    with device_of(x):
        launch(own_channels, owner.programs)(
            x, x if residual is None else dense(residual, x), y,
            _learned(responsibilities, weight, bias, gates, affine), state_of(running, counters, affine), rates, out,
            owner.n, owner.c, flags.rows, *owner.numbers, channelwise.Numbers(**vars(numbers)), FLAGS=compiled,
            TILE=owner.tile(flags.rows), maxnreg=REGISTERS["own_channels"], **_ending(activation, residual),
        )  # fmt: skip
    return y, out


def channel_gradients(
    owner: Owner,
    dy: Tensor,
    x: Tensor,
    moments: Tensor,
    stats: Tensor,
    affine: Tensor,
    weight: Optional,
    bias: Optional,
    gates: Sequence[Optional],
    responsibilities: Optional,
    residual: Optional,
    flags: PerChannelFlags,
    numbers: PerChannelNumbers,
    activation: str,
    need_dx: bool,
) -> tuple[Tensor, ...]:
    """Return what ``per_channel.launch.gradients`` returns."""
    dweight, dbias = affine.new_empty(flags.rows, owner.c), affine.new_empty(flags.rows, owner.c)
    dgates = [affine.new_empty(0) if t is None else torch.empty_like(t, dtype=torch.float32) for t in gates]
    dx, dresidual, maps = _maps(dy, x, residual, affine, need_dx)
    sums, dx_affine = affine.new_empty(2, owner.n, owner.c), affine.new_empty(2, owner.n, owner.c)
    # Another tensor stands in where the equations have none; no kernel reads it.
    given = channelwise.PerChannelStatistics(moments, stats, affine, *(affine,) * 3)
    out = channelwise.PerChannelGradients._make((dweight, dbias, *dgates[:5], dx_affine, *(affine,) * 3))
    compiled = flags.compiled(weight=weight is not None, bias=bias is not None, owner=True)
    with device_of(x):
        launch(own_channels_vjp, owner.programs)(
            maps, _learned(responsibilities, weight, bias, gates, affine), given, out, sums_in(sums), owner.n, owner.c,
            flags.rows, *owner.numbers, channelwise.Numbers(**vars(numbers)), FLAGS=compiled,
            NEED=need_dx or residual is not None, TILE=owner.tile(flags.rows), maxnreg=REGISTERS["own_channels_vjp"],
            **_ending(activation, residual),
        )  # fmt: skip
    return dx, dweight, dbias, *dgates, dresidual


def _maps(dy: Tensor, x: Tensor, residual: Optional, affine: Tensor, need_dx: bool) -> tuple[Tensor, Tensor, Maps]:
    """Return the gradients of x and of the residual, empty where nobody asks, and what the kernels get of that size."""
    dy = dense(dy, x)
    dx = torch.empty_like(x) if need_dx or residual is not None else affine.new_empty(0)
    dresidual = affine.new_empty(0) if residual is None else torch.empty_like(x)
    given = x if residual is None else dense(residual, x)
    maps = Maps(dy, x, given, dx if dx.numel() else affine, dresidual if residual is not None else dx)
    return dx, dresidual, maps


def _learned(
    responsibilities: Optional, weight: Optional, bias: Optional, gates: Sequence[Optional], other: Tensor
) -> channelwise.Learned:
    return channelwise.Learned(*or_other((responsibilities, weight, bias, *gates[:5]), other))


def _ending(activation: str, residual: Optional) -> dict[str, Any]:
    return {"ACT": ACTIVATIONS.index(activation), "RESIDUAL": residual is not None, "num_warps": WARPS}

"""Every kernel at the shapes and dtypes of real networks, for ``benchmarks.aot_report`` to compile."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lightning_norm.kernels.cooperative import backward as cooperative_backward
from lightning_norm.kernels.cooperative import forward as cooperative_forward
from lightning_norm.kernels.cooperative import launch as cooperative_launch
from lightning_norm.kernels.depthwise import backward as depthwise_backward
from lightning_norm.kernels.depthwise import flags as depthwise_flags
from lightning_norm.kernels.depthwise import forward as depthwise_forward
from lightning_norm.kernels.elementwise import backward as elementwise_backward
from lightning_norm.kernels.elementwise import forward as elementwise_forward
from lightning_norm.kernels.elementwise import launch as elementwise_launch
from lightning_norm.kernels.encoder_decoder import backward as encoder_decoder_backward
from lightning_norm.kernels.encoder_decoder import flags as encoder_decoder_flags
from lightning_norm.kernels.encoder_decoder import forward as encoder_decoder_forward
from lightning_norm.kernels.grid import JOINED, TILE, grid_like, warps
from lightning_norm.kernels.mixture import backward as mixture_backward
from lightning_norm.kernels.mixture import flags as mixture_flags
from lightning_norm.kernels.mixture import forward as mixture_forward
from lightning_norm.kernels.mixture import launch as mixture_launch
from lightning_norm.kernels.mixture.flags import MixtureFlags
from lightning_norm.kernels.owner import backward as owner_backward
from lightning_norm.kernels.owner import forward as owner_forward
from lightning_norm.kernels.owner.launch import WARPS, shared_out
from lightning_norm.kernels.passes import backward as passes_backward
from lightning_norm.kernels.passes import forward as passes_forward
from lightning_norm.kernels.passes.launch import join_tile
from lightning_norm.kernels.per_channel import backward as per_channel_backward
from lightning_norm.kernels.per_channel import condensation, running_stats
from lightning_norm.kernels.per_channel import flags as per_channel_flags
from lightning_norm.kernels.per_channel import forward as per_channel_forward
from lightning_norm.kernels.per_channel.flags import CompiledChannels
from lightning_norm.kernels.ranks import pack


@dataclass(frozen=True)
class Variant:
    """One kernel at one shape.

    Args:
        kernel: the device function.
        shape: what the shape stands for.
        dtype: of x, in Triton's letters.
        constants: its compile-time arguments.
        warps: of a program.
    """

    kernel: Any
    shape: str
    dtype: str
    constants: dict[str, Any]
    warps: int

    @property
    def name(self) -> str:
        """Return the kernel's name."""
        return str(self.kernel.fn.__name__)


ENDINGS = {0: "", 1: " add relu", 3: " threshold"}
"""What follows the normalization, by its number in the kernels."""


def variants() -> Iterator[Variant]:
    """Yield every kernel at the shapes that networks have: maps of 49, 196 and 1024, and few large rows."""
    plain, fused = {"ACT": 0, "RESIDUAL": False}, {"ACT": 1, "RESIDUAL": True}
    above = {"ACT": 3, "RESIDUAL": False}
    for dtype, align in (("bf16", 8), ("fp16", 8), ("fp32", 4)):
        endings = (plain, fused, above) if dtype == "fp32" else (plain, fused)
        for shape, rows, block, long in (("49", 64, 32, False), ("196", 32, 64, False), ("long", 1, TILE, True)):
            blocks = {"ALIGN": align, "ROWS": rows, "BLOCK": block}
            moments = {**blocks, "AVERAGE": long or dtype == "fp32"}
            yield Variant(passes_forward.moments_rows, shape, dtype, moments, warps(rows * block))
            for act in endings:
                name = shape + ENDINGS[act["ACT"]]
                yield Variant(passes_backward.sums_rows, name, dtype, {**blocks, **act}, warps(rows * block))
        for wide in (False, True):
            for act in endings:
                name = ("long" if wide else "any") + ENDINGS[act["ACT"]]
                blocks = {"ALIGN": align, "BLOCK": TILE, "WIDE": wide, **act}
                yield Variant(passes_forward.apply_flat, name, dtype, blocks, 4)
                yield Variant(passes_backward.combine_flat, name, dtype, {**blocks, "PLAIN": False}, 4)
        for fold in (1, 16):
            shape = "channels last" if fold == 1 else "channels last, few"
            blocks = {"ALIGN": align, "ROWS": TILE // 64, "BLOCK": 64}
            for long in (False, True):
                moments = {**blocks, "AVERAGE": long or dtype == "fp32"}
                name = f"{shape}, long" if long else shape
                yield Variant(passes_forward.moments_columns, name, dtype, moments, 2)
            for act in endings:
                name = shape + ENDINGS[act["ACT"]]
                more = {**blocks, "FOLD": fold, **act}
                yield Variant(passes_backward.sums_columns, name, dtype, more, 4)
                yield Variant(passes_forward.apply_columns, name, dtype, more, 4)
                yield Variant(passes_backward.combine_columns, name, dtype, {**more, "PLAIN": False}, 4)
    for parts in JOINED:
        at_once, lanes, num_warps = join_tile(parts)
        tile = {"P_BLOCK": at_once, "BLOCK": lanes}
        yield Variant(passes_forward.join_moments, f"{parts} parts", "fp32", tile, num_warps)
        for rest in (False, True):
            name = f"{parts} parts" + ENDINGS[3 * rest]
            yield Variant(passes_backward.join_sums, name, "fp32", {"REST": rest, **tile}, num_warps)
    yield from _mixture()
    yield from _per_channel()
    yield from _encoder_decoder()
    yield from _depthwise()
    yield from _owner()
    yield from _elementwise()
    yield from _cooperative()


def _mixture() -> Iterator[Variant]:
    tile, half = mixture_flags.Tile(64, 16, 1, 1024), mixture_flags.Tile(32, 16, 1, 1024)
    for name, flags in {
        "bn": MixtureFlags.of(("bn",)),
        "sn": MixtureFlags.of(("in", "ln", "bn"), weighted=True, softmax=True),
        "bcn": MixtureFlags.of(("bn", "ln"), outputs=True),
        "frn": MixtureFlags.of(("in",), uncentered=True, threshold=True),
    }.items():
        common, tracks = flags.compiled(weight=True), flags.compiled(weight=True, bias=True)._replace(track=1)
        for ranks in (False, True):
            shape, compiled = f"{name}, ranks" if ranks else name, tracks._replace(ranks=ranks)
            yield Variant(mixture_forward.mix, shape, "fp32", {"FLAGS": compiled, "BLOCK": 256}, 4)
        for merge in (False, True):
            shape, compiled = f"{name}, parts" if merge else name, common._replace(merge=merge)
            yield Variant(mixture_backward.vjp_pool, shape, "fp32", {"FLAGS": compiled, "TILE": half}, 4)
        yield Variant(mixture_backward.vjp_mix, name, "fp32", {"FLAGS": common, "BLOCK": 256}, 4)
    for merge in (False, True):
        yield Variant(mixture_forward.pool, "parts" if merge else "whole", "fp32", {"MERGE": merge, "TILE": tile}, 4)
    for kernel in (pack.pack, pack.unpack, pack.pack_gradient, pack.unpack_gradient):
        yield Variant(kernel, "ranks", "fp32", {"BLOCK": 256}, 4)


def _channels(**flags: Any) -> CompiledChannels:
    return CompiledChannels(**{**dict.fromkeys(CompiledChannels._fields, False), **flags})


def _per_channel() -> Iterator[Variant]:
    one, four, many = (
        per_channel_flags.Tile(32, 1, 16),
        per_channel_flags.Tile(32, 4, 8),
        per_channel_flags.Tile(32, 16, 2),
    )
    rectified = {"needs_moments": True, "center": True, "scale": True, "affine": True, "track": 1, "moves": True}
    grouped = {"needs_moments": True, "contexts": True, "merge": True, "track": 2, "moves": True}
    for shape, on, tile in (
        ("rbn", rectified, one),
        ("ubn", {**rectified, "condensed": 1}, one),
        ("ubn renorm, parts", {**rectified, "condensed": 3, "merge": True}, one),
        ("dbn", {"needs_moments": True, "blend": 1, "std": True, "powers": True}, one),
        ("dbn renorm, averaged", {"needs_moments": True, "blend": 3, "std": True, "averages": True}, one),
        ("dbn beside the batch", {"needs_moments": True, "blend": 2}, one),
        ("brn", {"needs_moments": True, "blend": 4, "std": True, "copies_first": True}, one),
        ("rbn, ranks", {**rectified, "ranks": 1}, one),
        ("rbn, ranks afterwards", {**rectified, "ranks": 2}, one),
        ("dbn, ranks", {"needs_moments": True, "blend": 1, "std": True, "powers": True, "ranks": 1}, one),
        ("cn", grouped, four),
        ("cn gate", {**grouped, "gate": True, "prior": True}, four),
        ("cn gate of 16", {**grouped, "gate": True, "prior": True}, many),
        ("cn evaluation", {"contexts": True, "frozen": True, "pooled": True}, four),
    ):
        flags = _channels(**on, weight=True, bias=True, known=True)
        half = tile if tile is one else tile._replace(c=tile.c // 2)
        blocks = {"K_BLOCK": tile.k, "BLOCK": 1024 // tile.k}
        whole, halved = {"FLAGS": flags, "TILE": tile}, {"FLAGS": flags, "TILE": half}
        for kernel, constants, used in (
            (running_stats.survey, {"FLAGS": flags, **blocks}, not flags.blend),
            (per_channel_forward.pool_channels, whole, flags.ranks),
            (per_channel_forward.channels_of, whole, True),
            (running_stats.commit, {"FLAGS": flags, "BLOCK": blocks["BLOCK"]}, flags.blend),
            (per_channel_backward.channels_vjp, halved, True),
            (per_channel_backward.gate_logits_vjp, blocks, flags.gate),
            (per_channel_backward.gate_vjp, {"N_BLOCK": half.n, "K_BLOCK": half.k, "C_BLOCK": half.c}, flags.gate),
        ):
            if used:
                yield Variant(kernel, shape, "fp32", constants, 4)
    for dtype, align in (("bf16", 8), ("fp16", 8), ("fp32", 4)):
        yield Variant(condensation.directions, "any", dtype, {"ALIGN": align, "BLOCK": TILE}, 4)


def _encoder_decoder() -> Iterator[Variant]:
    kernels = (
        encoder_decoder_forward.encode,
        encoder_decoder_forward.decode,
        encoder_decoder_backward.vjp_affine,
        encoder_decoder_backward.vjp_decode,
        encoder_decoder_backward.vjp_encode,
    )
    for shape, tiles in (
        ("afn", ((1, 16, 64), (1, 64, 16), (1, 32, 16), (1, 32, 32), (1, 32, 32))),
        ("asr", ((32, 32, 16), (16, 16, 32), (16, 32, 16), (32, 32, 32), (16, 16, 32))),
    ):
        batch = shape == "afn"
        flags = encoder_decoder_flags.Compiled(batch, False, int(batch), False, batch, True, True, True, 4)
        for (kernel, tile), merge in itertools.product(zip(kernels, tiles, strict=True), (False, True)):
            n = 16 if kernel is encoder_decoder_forward.encode else 32
            constants: dict[str, Any] = {
                "FLAGS": flags._replace(merge=merge),
                "TILE": encoder_decoder_flags.Tile._make((*tile, n, 256)),
            }
            if kernel is encoder_decoder_backward.vjp_decode:
                constants = {"SPANS": 4, **dict(zip(("R_BLOCK", "H_BLOCK", "C_BLOCK"), tile, strict=True))}
            if not merge or kernel in (encoder_decoder_forward.encode, encoder_decoder_backward.vjp_affine):
                yield Variant(kernel, f"{shape}, parts" if merge else shape, "fp32", constants, 4)


def _depthwise() -> Iterator[Variant]:
    for dtype, align in (("bf16", 8), ("fp16", 8), ("fp32", 4)):
        for k, last in ((3, False), (3, True), (5, False), (5, True), (7, False), (7, True)):
            shape = f"{k} x {k}" + (" channels last" if last else "")
            for kernel, tile, more in (
                (depthwise_forward.depthwise_apply, 1024, {"BIAS": True}),
                (depthwise_backward.depthwise_sums, 256, {}),
                (depthwise_backward.depthwise_combine, 1024, {"PLAIN": False}),
            ):
                tiles = (tile // 64, 64) if last else (1, tile)
                flags = depthwise_flags.Compiled(align if last else 1, last, k, k, 9 if k == 3 else k, *tiles)
                yield Variant(kernel, shape, dtype, {"FLAGS": flags, **more}, 4 if tile > 256 else 2)
    for parts in JOINED:
        at_once, lanes, num_warps = join_tile(parts)
        blocks = {"T": 9, "P_BLOCK": at_once, "BLOCK": lanes}
        yield Variant(depthwise_backward.join_taps, f"9 taps, {parts} parts", "fp32", blocks, num_warps)


def _owner() -> Iterator[Variant]:
    blended = dict.fromkeys(("std", "copies_first", "powers", "averages"), True) | {"blend": 3}
    moved = {"track": 1, "moves": True}
    rectified = {"center": True, "scale": True, "affine": True, **moved}
    mixture = (owner_forward.own_mixture, owner_backward.own_mixture_vjp)
    channels = (owner_forward.own_channels, owner_backward.own_channels_vjp)
    given = dict.fromkeys(("needs_moments", "weight", "bias", "known", "owner"), True)
    bn = MixtureFlags.of(("bn",), track=1).compiled(weight=True, bias=True)
    for dtype, vector in (("bf16", 8), ("fp16", 8), ("fp32", 4)):
        for shape, (n, c, size, columns) in {
            "49": (64, 2048, 49, False),
            "49 channels last": (64, 2048, 49, True),
            "odd": (3, 7, 15, False),
        }.items():
            owner = shared_out(n, c, size, columns, vector)
            assert owner is not None
            for kernels, name, flags, act, contexts in (
                (mixture, "bn", bn, 0, 1),
                (mixture, "in", MixtureFlags.of(("in",)).compiled(weight=True, bias=True), 0, 1),
                (mixture, "bn add relu", bn, 1, 1),
                (channels, "ubn", _channels(**given, **rectified), 0, 1),
                (channels, "dbn", _channels(**given, **blended), 0, 1),
                (channels, "cn of 16", _channels(**given, contexts=True, **moved), 0, 16),
            ):
                constants = {"FLAGS": flags, "ACT": act, "RESIDUAL": act > 0, "TILE": owner.tile(contexts)}
                for kernel, more in zip(kernels, ({}, {"NEED": True}), strict=True):
                    yield Variant(kernel, f"{shape} {name}", dtype, {**constants, **more}, WARPS)


def _elementwise() -> Iterator[Variant]:
    given = (torch.empty(0),) * 4  # weight, bias, alpha and offset
    for dtype, vector in (("bf16", 8), ("fp16", 8), ("fp32", 4)):
        for shape, x in {
            "49": (64, 2048, 49, False),
            "3136": (64, 256, 3136, False),
            "channels last": (64, 768, 197, True),
            "channels last, few": (64, 3, 1024, True),
        }.items():
            tiles = elementwise_launch.tiles_like(*x, vector)
            for function, act in itertools.product(("tanh", "erf"), (0, 1)):
                constants = {"FLAGS": tiles.compiled(function, given), "ACT": act, "RESIDUAL": act > 0}
                name = f"{shape} {function}" + (" add relu" if act else "")
                yield Variant(elementwise_forward.apply_elementwise, name, dtype, constants, tiles.warps)
                backward = {**constants, "NEED": True}
                yield Variant(elementwise_backward.combine_elementwise, name, dtype, backward, 2 * tiles.warps)
    for parts in JOINED:
        at_once, lanes, num_warps = join_tile(parts)
        blocks = {"P_BLOCK": at_once, "BLOCK": lanes, "T_BLOCK": at_once}
        yield Variant(elementwise_backward.join_elementwise, f"{parts} parts", "fp32", blocks, num_warps)


def _cooperative() -> Iterator[Variant]:
    sn = MixtureFlags.of(("in", "ln", "bn"), weighted=True, softmax=True, track=1)
    gn = MixtureFlags.of(("ln",), num_groups=32)
    for name, flags, dtype, channels, width, columns, act in (
        ("49 sn", sn, "bf16", 2048, 7, False, 0),
        ("196 channels last sn", sn, "fp32", 1024, 14, True, 0),
        ("49 gn add relu", gn, "bf16", 2048, 7, False, 1),
    ):
        grid = grid_like(64, channels, width * width, columns, 4 if dtype == "fp32" else 8)
        plan = cooperative_launch.plan_of(grid, dtype == "fp32", act, act > 0)
        compiled = flags.compiled(merge=grid.parts > 1, weight=True, bias=True)
        for kernel, most in (
            (cooperative_forward.cooperative_mixture, 1024),
            (cooperative_backward.cooperative_mixture_vjp, 512),
        ):
            constants = {"FLAGS": compiled, "TILE": mixture_launch.tile_of(grid, flags, most), "PLAN": plan}
            yield Variant(kernel, name, dtype, constants, 4)

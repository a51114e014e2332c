"""Every kernel at the shapes and dtypes of real networks, for ``benchmarks.aot_report`` to compile."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_norm.kernels.depthwise import backward as depthwise_backward
from lightning_norm.kernels.depthwise import forward as depthwise_forward
from lightning_norm.kernels.encoder_decoder import backward as encoder_decoder_backward
from lightning_norm.kernels.encoder_decoder import forward as encoder_decoder_forward
from lightning_norm.kernels.grid import JOINED, TILE, warps
from lightning_norm.kernels.mixture import backward as mixture_backward
from lightning_norm.kernels.mixture import forward as mixture_forward
from lightning_norm.kernels.owner import backward as owner_backward
from lightning_norm.kernels.owner import forward as owner_forward
from lightning_norm.kernels.owner.launch import WARPS, shared_out
from lightning_norm.kernels.passes import backward as passes_backward
from lightning_norm.kernels.passes import forward as passes_forward
from lightning_norm.kernels.passes.launch import join_tile
from lightning_norm.kernels.per_channel import backward as per_channel_backward
from lightning_norm.kernels.per_channel import condensation, running_stats
from lightning_norm.kernels.per_channel import forward as per_channel_forward
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


def variants() -> Iterator[Variant]:
    """Yield every kernel at the shapes that networks have: maps of 49, 196 and 1024, and few large rows."""
    plain, fused = {"ACT": 0, "RESIDUAL": False}, {"ACT": 1, "RESIDUAL": True}
    for dtype, align in (("bf16", 8), ("fp16", 8), ("fp32", 4)):
        for shape, rows, block, long in (("49", 64, 32, False), ("196", 32, 64, False), ("long", 1, TILE, True)):
            blocks = {"ALIGN": align, "ROWS": rows, "BLOCK": block}
            moments = {**blocks, "AVERAGE": long or dtype == "fp32"}
            yield Variant(passes_forward.moments_rows, shape, dtype, moments, warps(rows * block))
            for act in (plain, fused):
                name = shape + (" add relu" if act["ACT"] else "")
                yield Variant(passes_backward.sums_rows, name, dtype, {**blocks, **act}, warps(rows * block))
        for wide in (False, True):
            for act in (plain, fused):
                name = ("long" if wide else "any") + (" add relu" if act["ACT"] else "")
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
            for act in (plain, fused):
                name = shape + (" add relu" if act["ACT"] else "")
                more = {**blocks, "FOLD": fold, **act}
                yield Variant(passes_backward.sums_columns, name, dtype, more, 4)
                yield Variant(passes_forward.apply_columns, name, dtype, more, 4)
                yield Variant(passes_backward.combine_columns, name, dtype, {**more, "PLAIN": False}, 4)
    for parts in JOINED:
        at_once, lanes, num_warps = join_tile(parts)
        for kernel in (passes_forward.join_moments, passes_backward.join_sums):
            yield Variant(kernel, f"{parts} parts", "fp32", {"P_BLOCK": at_once, "BLOCK": lanes}, num_warps)
    yield from _mixture()
    yield from _per_channel()
    yield from _encoder_decoder()
    yield from _depthwise()
    yield from _owner()


def _mixture() -> Iterator[Variant]:
    tile = {"N_BLOCK": 64, "C_BLOCK": 16, "G_BLOCK": 1, "T_BLOCK": 1024}
    half = {"N_BLOCK": 32, "C_BLOCK": 16, "G_BLOCK": 1, "T_BLOCK": 1024}
    for name, equations in {
        "bn": {"IN": -1, "LN": -1, "BN": 0, "K": 0, "SOFTMAX": False, "OUTPUTS": False},
        "sn": {"IN": 0, "LN": 1, "BN": 2, "K": 3, "SOFTMAX": True, "OUTPUTS": False},
        "bcn": {"IN": -1, "LN": 1, "BN": 0, "K": 0, "SOFTMAX": False, "OUTPUTS": True},
    }.items():
        common = {"MOMENTS": True, "MERGE": False, **equations, "FROZEN": False, "WEIGHT": True}
        tracks = {**common, "TRACK": 1, "BIAS": True, "BLOCK": 256}
        yield Variant(mixture_forward.mix, name, "fp32", {**tracks, "RANKS": False}, 4)
        yield Variant(mixture_forward.mix, f"{name}, ranks", "fp32", {**tracks, "RANKS": True}, 4)
        for merge in (False, True):
            shape = f"{name}, parts" if merge else name
            yield Variant(mixture_backward.vjp_pool, shape, "fp32", {**common, **half, "MERGE": merge}, 4)
        yield Variant(mixture_backward.vjp_mix, name, "fp32", {**common, "BLOCK": 256}, 4)
    for merge in (False, True):
        yield Variant(mixture_forward.pool, "parts" if merge else "whole", "fp32", {"MERGE": merge, **tile}, 4)
    for kernel in (pack.pack, pack.unpack, pack.pack_gradient, pack.unpack_gradient):
        yield Variant(kernel, "ranks", "fp32", {"BLOCK": 256}, 4)


def _per_channel() -> Iterator[Variant]:
    names = ("MOMENTS", "MERGE", "FROZEN", "STD", "COPY", "POWER", "AVERAGE", "DETACH", "CONTEXTS", "PRIOR", "POOLED", "CENTER", "SCALE", "AFFINE", "NORM", "GATE")  # noqa: E501  # fmt: skip
    one, four, many = ({"N_BLOCK": 32, "K_BLOCK": k, "C_BLOCK": c} for k, c in ((1, 16), (4, 8), (16, 2)))
    rectified = {"MOMENTS": True, "CENTER": True, "SCALE": True, "AFFINE": True, "MOVE": 1}
    grouped = {"MOMENTS": True, "CONTEXTS": True, "MERGE": True, "MOVE": 2}
    for shape, on, tile in (
        ("rbn", rectified, one),
        ("ubn", {**rectified, "CONDENSED": 1, "NORM": True}, one),
        ("ubn renorm, parts", {**rectified, "CONDENSED": 3, "NORM": True, "MERGE": True}, one),
        ("dbn", {"MOMENTS": True, "BLEND": 1, "STD": True, "POWER": True}, one),
        ("dbn renorm, averaged", {"MOMENTS": True, "BLEND": 3, "STD": True, "AVERAGE": True}, one),
        ("dbn beside the batch", {"MOMENTS": True, "BLEND": 2}, one),
        ("brn", {"MOMENTS": True, "BLEND": 4, "STD": True, "COPY": True}, one),
        ("rbn, ranks", {**rectified, "RANKS": 1}, one),
        ("rbn, ranks afterwards", {**rectified, "RANKS": 2}, one),
        ("dbn, ranks", {"MOMENTS": True, "BLEND": 1, "STD": True, "POWER": True, "RANKS": 1}, one),
        ("cn", grouped, four),
        ("cn gate", {**grouped, "GATE": True, "PRIOR": True}, four),
        ("cn gate of 16", {**grouped, "GATE": True, "PRIOR": True}, many),
        ("cn evaluation", {"CONTEXTS": True, "FROZEN": True, "POOLED": True}, four),
    ):
        flags = {
            **dict.fromkeys(names, False),
            "CONDENSED": 0,
            "BLEND": 0,
            "MOVE": 0,
            "RANKS": 0,
            **on,
            "WEIGHT": True,
            "BIAS": True,
            **tile,
        }
        flags |= {"STD_OF_VAR": flags["STD"], "RENORM": 3 in (flags["CONDENSED"], flags["BLEND"])}
        half = {**flags, "C_BLOCK": tile["C_BLOCK"] // (1 if tile is one else 2)}
        wide = {**flags, "LOOK": bool(flags["MOVE"]), "KNOWN": True, "BLOCK": 1024 // tile["K_BLOCK"]}
        for kernel, constants in (
            (running_stats.survey, wide),
            (per_channel_forward.pool_channels, flags),
            (per_channel_forward.channels_of, flags),
            (running_stats.commit, wide),
            (per_channel_backward.channels_vjp, half),
            (per_channel_backward.gate_logits_vjp, wide),
            (per_channel_backward.gate_vjp, half),
        ):
            unused = {
                running_stats.survey: flags["BLEND"],
                running_stats.commit: not flags["BLEND"],
                per_channel_forward.pool_channels: not flags["RANKS"],
            }
            if unused.get(kernel, "gate" in kernel.fn.__name__ and not flags["GATE"]):
                continue
            takes = inspect.signature(kernel.fn).parameters
            yield Variant(kernel, shape, "fp32", {k: v for k, v in constants.items() if k in takes}, 4)
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
        constants = {"BATCH": batch, "FROZEN": False, "TRACK": int(batch), "DROP": batch, "GATED": True, "WEIGHT": True}
        constants |= {"BIAS": True, "SPANS": 4, "T_BLOCK": 256}
        for (kernel, tile), merge in itertools.product(zip(kernels, tiles, strict=True), (False, True)):
            takes = inspect.signature(kernel.fn).parameters
            constants |= dict(zip(("R_BLOCK", "H_BLOCK", "C_BLOCK"), tile, strict=True))
            constants |= {"N_BLOCK": 16 if kernel is encoder_decoder_forward.encode else 32, "MERGE": merge}
            if "MERGE" in takes or not merge:
                name = f"{shape}, parts" if merge else shape
                yield Variant(kernel, name, "fp32", {k: v for k, v in constants.items() if k in takes}, 4)


def _depthwise() -> Iterator[Variant]:
    for dtype, align in (("bf16", 8), ("fp16", 8), ("fp32", 4)):
        for k, last in ((3, False), (3, True), (5, False), (5, True), (7, False), (7, True)):
            shape = f"{k} x {k}" + (" channels last" if last else "")
            blocks = {"ALIGN": align if last else 1, "LAST": last, "KH": k, "KW": k, "BIAS": True, "PLAIN": False}
            blocks["GROUP"] = 9 if k == 3 else k
            kernels = (
                (depthwise_forward.depthwise_apply, 1024),
                (depthwise_backward.depthwise_sums, 256),
                (depthwise_backward.depthwise_combine, 1024),
            )
            for kernel, tile in kernels:
                blocks |= {"ROWS": tile // 64, "BLOCK": 64} if last else {"ROWS": 1, "BLOCK": tile}
                takes = inspect.signature(kernel.fn).parameters
                yield Variant(
                    kernel,
                    shape,
                    dtype,
                    {name: v for name, v in blocks.items() if name in takes},
                    4 if tile > 256 else 2,
                )
    for parts in JOINED:
        at_once, lanes, num_warps = join_tile(parts)
        blocks = {"T": 9, "P_BLOCK": at_once, "BLOCK": lanes}
        yield Variant(depthwise_backward.join_taps, f"9 taps, {parts} parts", "fp32", blocks, num_warps)


def _owner() -> Iterator[Variant]:
    names = ("STD", "COPY", "POWER", "AVERAGES", "DETACH", "RENORM", "CONTEXTS", "CENTER", "SCALE", "AFFINE")
    plain = {**dict.fromkeys(names, False), "BLEND": 0, "MOVE": 1, "BN": True, "TRACK": 1, "WEIGHT": True, "BIAS": True}
    plain |= {"NEED": True, "ACT": 0, "RESIDUAL": False}
    blended = {"BLEND": 3, "MOVE": 0, "RENORM": True, "STD": True, "COPY": True, "POWER": True, "AVERAGES": True}
    mixture = (owner_forward.own_mixture, owner_backward.own_mixture_vjp)
    channels = (owner_forward.own_channels, owner_backward.own_channels_vjp)
    for dtype, vector in (("bf16", 8), ("fp16", 8), ("fp32", 4)):
        for shape, (n, c, size, columns) in {
            "49": (64, 2048, 49, False),
            "49 channels last": (64, 2048, 49, True),
            "odd": (3, 7, 15, False),
        }.items():
            owner = shared_out(n, c, size, columns, vector)
            assert owner is not None
            for kernels, name, on, contexts in (
                (mixture, "bn", {}, 1),
                (mixture, "in", {"BN": False, "TRACK": 0}, 1),
                (mixture, "bn add relu", {"ACT": 1, "RESIDUAL": True}, 1),
                (channels, "ubn", dict.fromkeys(("CENTER", "SCALE", "AFFINE"), True), 1),
                (channels, "dbn", blended, 1),
                (channels, "cn of 16", {"CONTEXTS": True}, 16),
            ):
                constants = {**plain, **on, **owner.tiles(contexts)}
                for kernel in kernels:
                    takes = inspect.signature(kernel.fn).parameters
                    chosen = {k: v for k, v in constants.items() if k in takes}
                    yield Variant(kernel, f"{shape} {name}", dtype, chosen, WARPS)

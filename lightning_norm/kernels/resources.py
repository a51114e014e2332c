"""Compile every kernel ahead of time, without a GPU, and print what it uses.

Run ``python -m lightning_norm.kernels.resources``.

Registers, stack, shared memory, the width of loads and stores, and floating-point instructions in double precision, for
each kernel, shape and architecture.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_norm.kernels import (
    algebra,
    algebra_vjp,
    channels,
    channels_vjp,
    coders,
    coders_vjp,
    condensation,
    elementwise,
    recovery,
    reductions,
)
from lightning_norm.kernels.blocks import REGISTERS, TILE, warps

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
WIDE = ("x", "dy", "y", "dx", "residual", "dresidual")
"""Pointers to tensors like x; the others point to float32."""
TYPES = {
    **dict.fromkeys(("tracked", "skipped", "updates", "measured", "kept_out", "in_a_row"), "*i64"),
    **dict.fromkeys(("eps", "factor", "unbias", "least", "power", "unit_scale", "unit_affine"), "fp32"),
}
LONG = ("rows", "number", "units")


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


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel uses.

    Args:
        kernel: name.
        shape: of x.
        dtype: of x.
        arch: compute capability, 90 for sm_90.
        warps: of a program.
        registers: of a thread.
        stack: bytes of a thread; more than 0 is a spill.
        shared: bytes of a program.
        spills: local loads and stores.
        loads128: global loads of 16 bytes.
        loads: all global loads.
        stores128: global stores of 16 bytes.
        doubles: arithmetic in float64.
        atomics: additions whose order is left to chance.
    """

    kernel: str
    shape: str
    dtype: str
    arch: int
    warps: int
    registers: int
    stack: int
    shared: int
    spills: int
    loads128: int
    loads: int
    stores128: int
    doubles: int
    atomics: int


def variants() -> Iterator[Variant]:
    """Yield every kernel at the shapes that networks have: maps of 49, 196 and 1024, and few large rows."""
    plain, fused = {"ACT": 0, "RESIDUAL": False}, {"ACT": 1, "RESIDUAL": True}
    for dtype, align in (("bf16", 8), ("fp16", 8), ("fp32", 4)):
        for shape, rows, block, loop in (("49", 32, 64, False), ("196", 8, 256, False), ("1024", 2, 1024, False), ("long", 1, TILE, True)):  # noqa: E501  # fmt: skip
            blocks = {"ALIGN": align, "ROWS": rows, "BLOCK": block, "LOOP": loop}
            yield Variant(reductions.moments_rows, shape, dtype, blocks, warps(rows * block))
            for act in (plain, fused):
                name = shape + (" add relu" if act["ACT"] else "")
                yield Variant(reductions.sums_rows, name, dtype, {**blocks, **act}, warps(rows * block))
        for wide in (False, True):
            for act in (plain, fused):
                name = ("long" if wide else "any") + (" add relu" if act["ACT"] else "")
                blocks = {"ALIGN": align, "BLOCK": TILE, "WIDE": wide, **act}
                yield Variant(elementwise.apply_flat, name, dtype, blocks, 4)
                yield Variant(elementwise.combine_flat, name, dtype, {**blocks, "PLAIN": False}, 4)
        for fold in (1, 16):
            shape = "channels last" if fold == 1 else "channels last, few"
            blocks = {"ALIGN": align, "ROWS": TILE // 64, "BLOCK": 64}
            yield Variant(reductions.moments_columns, shape, dtype, blocks, 4)
            for act in (plain, fused):
                name = shape + (" add relu" if act["ACT"] else "")
                more = {**blocks, "FOLD": fold, **act}
                yield Variant(reductions.sums_columns, name, dtype, more, 4)
                yield Variant(elementwise.apply_columns, name, dtype, more, 4)
                yield Variant(elementwise.combine_columns, name, dtype, {**more, "PLAIN": False}, 4)
    yield Variant(reductions.join_moments, "parts", "fp32", {"BLOCK": 256}, 4)
    yield Variant(reductions.join_sums, "parts", "fp32", {"BLOCK": 256}, 4)
    yield from _algebra()
    yield from _channels()
    yield from _coders()
    yield from _recovery()


def _algebra() -> Iterator[Variant]:
    tile = {"N_BLOCK": 32, "C_BLOCK": 32, "G_BLOCK": 4, "T_BLOCK": 256}
    half = {"N_BLOCK": 32, "C_BLOCK": 16, "G_BLOCK": 4, "T_BLOCK": 128}
    for name, own in {
        "bn": {"IN": -1, "LN": -1, "BN": 0, "K": 0, "SOFTMAX": False, "OUTPUTS": False},
        "sn": {"IN": 0, "LN": 1, "BN": 2, "K": 3, "SOFTMAX": True, "OUTPUTS": False},
        "bcn": {"IN": -1, "LN": 1, "BN": 0, "K": 0, "SOFTMAX": False, "OUTPUTS": True},
    }.items():
        common = {"OWN": True, "MERGE": False, **own, "FROZEN": False, "WEIGHT": True}
        yield Variant(algebra.mix, name, "fp32", {**common, "TRACK": 1, "BIAS": True, "BLOCK": 256}, 4)
        for merge in (False, True):
            shape = f"{name}, parts" if merge else name
            yield Variant(algebra_vjp.vjp_pool, shape, "fp32", {**common, **half, "MERGE": merge}, 4)
        yield Variant(algebra_vjp.vjp_mix, name, "fp32", {**common, "BLOCK": 256}, 4)
    for merge in (False, True):
        yield Variant(algebra.pool, "parts" if merge else "whole", "fp32", {"MERGE": merge, **tile}, 4)


def _channels() -> Iterator[Variant]:
    names = ("OWN", "MERGE", "FROZEN", "BLEND", "STD", "POWER", "DETACH", "CHOOSE", "CONTEXTS", "CENTER", "SCALE", "AFFINE", "AVERAGE")  # noqa: E501  # fmt: skip
    one, four = {"N_BLOCK": 32, "K_BLOCK": 1, "C_BLOCK": 16}, {"N_BLOCK": 32, "K_BLOCK": 4, "C_BLOCK": 8}
    for shape, on, tile in (
        ("ubn", {"OWN": True, "CHOOSE": 1, "CENTER": True, "SCALE": True, "AFFINE": True}, one),
        ("dbn", {"OWN": True, "BLEND": True, "STD": True, "POWER": True}, one),
        ("cn", {"OWN": True, "CONTEXTS": True, "MERGE": True}, four),
    ):
        flags = {**dict.fromkeys(names, False), "CHOOSE": 0, **on, "WEIGHT": True, "BIAS": True, "BLOCK": 1024, **tile}
        flags["STD_OF_VAR"] = flags["STD"]
        half = {**flags, "C_BLOCK": tile["C_BLOCK"] // (2 if shape == "cn" else 1)}
        for kernel, given in ((channels.channels_of, flags), (channels.commit, flags), (channels_vjp.channels_vjp, half)):  # noqa: E501  # fmt: skip
            own = inspect.signature(kernel.fn).parameters
            yield Variant(kernel, shape, "fp32", {k: v for k, v in given.items() if k in own}, 4)
    yield Variant(condensation.norms, "parts", "fp32", {"MERGE": True, "BLOCK": 1024}, 4)
    for dtype, align in (("bf16", 8), ("fp16", 8), ("fp32", 4)):
        yield Variant(condensation.directions, "any", dtype, {"ALIGN": align, "BLOCK": TILE}, 4)
    yield Variant(condensation.decide, "any", "fp32", {"BLOCK": 1024}, 4)


def _coders() -> Iterator[Variant]:
    kernels = (coders.encode, coders.decode, coders_vjp.vjp_affine, coders_vjp.vjp_decode, coders_vjp.vjp_encode)
    for shape, tiles in (
        ("afn", ((1, 16, 64), (1, 64, 16), (1, 32, 16), (1, 32, 32), (1, 32, 32))),
        ("asr", ((32, 32, 16), (16, 16, 32), (16, 32, 16), (32, 32, 32), (16, 16, 32))),
    ):
        batch = shape == "afn"
        given = {"BATCH": batch, "FROZEN": False, "TRACK": int(batch), "DROP": 2 * batch, "GATED": True, "WEIGHT": True}
        given |= {"BIAS": True, "SPANS": 4, "T_BLOCK": 256}
        for (kernel, tile), merge in itertools.product(zip(kernels, tiles, strict=True), (False, True)):
            own = inspect.signature(kernel.fn).parameters
            given |= dict(zip(("R_BLOCK", "H_BLOCK", "C_BLOCK"), tile, strict=True))
            given |= {"N_BLOCK": 16 if kernel is coders.encode else 32, "MERGE": merge}
            if "MERGE" in own or not merge:
                name = f"{shape}, parts" if merge else shape
                yield Variant(kernel, name, "fp32", {k: v for k, v in given.items() if k in own}, 4)


def _recovery() -> Iterator[Variant]:
    for dtype, align in (("bf16", 8), ("fp16", 8), ("fp32", 4)):
        for k, last in ((3, False), (3, True), (5, True), (7, False), (7, True)):
            shape = f"{k} x {k}" + (" channels last" if last else "")
            blocks = {"ALIGN": align if last else 1, "LAST": last, "KH": k, "KW": k, "BIAS": True, "PLAIN": False}
            blocks["GROUP"] = 9 if k == 3 else k
            for kernel, tile in ((recovery.recover_apply, 1024), (recovery.recover_sums, 256), (recovery.recover_combine, 1024)):  # noqa: E501  # fmt: skip
                blocks |= {"ROWS": tile // 64, "BLOCK": 64} if last else {"ROWS": 1, "BLOCK": tile}
                own = inspect.signature(kernel.fn).parameters
                yield Variant(
                    kernel, shape, dtype, {name: v for name, v in blocks.items() if name in own}, 4 if tile > 256 else 2
                )
    yield Variant(recovery.join_taps, "9 taps", "fp32", {"T": 9, "BLOCK": 128}, 4)


def compiled(variant: Variant, arch: int) -> Any:
    """Compile a variant for an architecture; needs no GPU.

    Raises:
        RuntimeError: under TRITON_INTERPRET, where there is nothing to compile.
    """
    if not hasattr(variant.kernel, "fn") or os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET.")
    names = list(inspect.signature(variant.kernel.fn).parameters)
    first_integer = _first_scalar(names)
    signature, aligned = {}, {}
    for i, name in enumerate(names):
        if name in variant.constants:
            signature[name] = "constexpr"
        elif name in TYPES:
            signature[name] = TYPES[name]
        elif i >= first_integer:
            signature[name] = "i64" if name in LONG else "i32"
        else:
            signature[name] = f"*{variant.dtype}" if name in WIDE else "*fp32"
        if signature[name].startswith("*"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=variant.constants, attrs=aligned)
    limit = {"maxnreg": REGISTERS[variant.name]} if variant.name in REGISTERS else {}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": variant.warps, **limit})


def _first_scalar(names: Sequence[str]) -> int:
    scalars = ("rows", "size", "samples", "number", "channels")
    return min(names.index(name) for name in scalars if name in names)


def usage(variant: Variant, arch: int) -> Usage:
    """Compile and disassemble."""
    kernel = compiled(variant, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    assert found is not None, resources
    return Usage(
        variant.name, variant.shape, variant.dtype, arch, variant.warps, int(found[1]), int(found[2]),
        kernel.metadata.shared,
        len(re.findall(r"\b(?:LDL|STL)\b", code)), len(re.findall(r"\bLDG\.E\S*\.128", code)),
        len(re.findall(r"\bLDG\b", code)), len(re.findall(r"\bSTG\.E\S*\.128", code)),
        len(re.findall(r"\b(?:add|sub|mul|div|fma|neg|min|max|sqrt|rcp|cvt)\S*\.f64", kernel.asm["ptx"])),
        len(re.findall(r"\b(?:atom|red)\.\S*(?:global|shared|gpu|cta)", kernel.asm["ptx"])),
    )  # fmt: skip


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def table(rows: Sequence[Usage]) -> str:
    """Format as Markdown."""
    names = [field.name for field in fields(Usage)]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(str(v) for v in asdict(row).values()) + " |" for row in rows)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m lightning_norm.kernels.resources", description=main.__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities")
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], help="of x: bf16, fp16, fp32")
    options = parser.parse_args()
    chosen = [v for v in variants() if v.dtype in options.dtype and options.kernel in v.name]
    print(f"triton {triton.__version__}\n")
    print(table([]))
    for arch in options.arch:
        for variant in chosen:
            print(table([usage(variant, arch)]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()

"""Compile every kernel ahead of time, without a GPU, and print what it uses.

Run ``python -m benchmarks.aot_report``.

Registers, stack, shared memory, the width of loads and stores, and floating-point instructions in double precision, for
each kernel, shape and architecture.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.aot_cases import Variant, variants
from lightning_norm.kernels.arguments import Maps
from lightning_norm.kernels.cooperative.flags import Forward
from lightning_norm.kernels.grid import registers
from lightning_norm.surgery.text_tables import markdown

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
WIDE = ("x", "dy", "y", "dx", "residual", "dresidual")
"""Pointers to tensors like x; the others point to float32."""
TYPES = {
    **dict.fromkeys(("message", "gathered", "dgathered", "rank_sums"), "*fp64"),
    **dict.fromkeys(("tracked", "skipped", "updates", "measured", "skipped_condensed", "in_a_row"), "*i64"),
    **dict.fromkeys(("eps", "inner", "factor", "unbias", "least", "power", "unit_scale", "unit_affine"), "fp32"),
    "arrived": "*i32",
    "count": "i64",
    "rank": "i32",
}
LONG = ("rows", "number", "units")


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


def compiled(variant: Variant, arch: int, *, ones: bool = False) -> Any:
    """Compile a variant for an architecture; needs no GPU.

    Args:
        variant: the kernel.
        arch: compute capability, 90 for sm_90.
        ones: every integer is 1, which the launcher makes a compile-time constant where the kernel allows it.

    Raises:
        RuntimeError: under TRITON_INTERPRET, where there is nothing to compile.
    """
    if not hasattr(variant.kernel, "fn") or os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET.")
    parameters = inspect.signature(variant.kernel.fn).parameters
    names = list(parameters)
    first_integer = _first_scalar(names)
    signature: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    constants = dict(variant.constants)
    for i, name in enumerate(names):
        group = parameters[name].annotation
        if parameters[name].default is not parameters[name].empty:
            constants.setdefault(name, parameters[name].default)
        if name in constants:
            signature[name] = "constexpr"
        elif hasattr(group, "_fields"):
            # Pointers, or real numbers: an integer in a named tuple would be specialized.
            wide = dict.fromkeys(WIDE, f"*{variant.dtype}") if group in (Maps, Forward) else {}
            signature[name] = group(*(wide.get(field, TYPES.get(field, "*fp32")) for field in group._fields))
            aligned |= {(i, j): [["tt.divisibility", 16]] for j, kind in enumerate(signature[name]) if kind[0] == "*"}
            continue
        elif name in TYPES:
            signature[name] = TYPES[name]
        elif i >= first_integer:
            signature[name] = "i64" if name in LONG else "i32"
        else:
            signature[name] = f"*{variant.dtype}" if name in WIDE else "*fp32"
        specialized = not variant.kernel.params[i].do_not_specialize
        if ones and specialized and signature[name].startswith("i"):
            signature[name], constants[name] = "constexpr", 1
        if signature[name].startswith("*"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=aligned)
    taps = constants["FLAGS"].kh * constants["FLAGS"].kw if "depthwise" in variant.name else 0
    limit = registers(variant.name, taps, taps > 0 and constants["FLAGS"].last)
    options = {"num_warps": variant.warps, **({} if limit is None else {"maxnreg": limit})}
    options |= {"launch_cooperative_grid": True} if "arrived" in names else {}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


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
        code = disassembled(file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    assert match is not None, resources
    return Usage(
        variant.name, variant.shape, variant.dtype, arch, variant.warps, int(match[1]), int(match[2]),
        kernel.metadata.shared,
        len(re.findall(r"\b(?:LDL|STL)\b", code)), len(re.findall(r"\bLDG\.E\S*\.128", code)),
        len(re.findall(r"\bLDG\b", code)), len(re.findall(r"\bSTG\.E\S*\.128", code)),
        len(re.findall(r"\b(?:add|sub|mul|div|fma|neg|min|max|sqrt|rcp|cvt)\S*\.f64", kernel.asm["ptx"])),
        len(re.findall(r"\b(?:atom|red)\.\S*(?:global|shared|gpu|cta)", kernel.asm["ptx"])),
    )  # fmt: skip


def disassembled(cubin: str) -> str:
    """Return the instructions of a compiled kernel, as the processor has them."""
    return _run("nvdisasm", "-c", cubin)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def table(rows: Sequence[Usage]) -> str:
    """Format as Markdown."""
    names = [field.name for field in fields(Usage)]
    return markdown([names, *([str(v) for v in asdict(row).values()] for row in rows)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot_report", description=main.__doc__)
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

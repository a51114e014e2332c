"""Run by its path: compile a small kernel for a compute capability, such as 90 for 9.0, without a GPU.

In a process of its own, for LLVM does not raise where it meets a GPU that is younger than itself: it ends the process.
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder, whose names are not those of top-level modules

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def total(x, block: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201  device code
    """Write the sum of a block, which threads add up by shuffles, to its first place."""
    tl.store(x, tl.sum(tl.load(x + tl.arange(0, block))))


if __name__ == "__main__":
    source = ASTSource(total, {"x": "*fp32", "block": "constexpr"}, {"block": 128})
    triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))

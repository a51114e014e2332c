"""Part (b): every normalizer at shapes that fill no tile, for compute-sanitizer to watch.

Whether an access was out of bounds is the sanitizer's word; here a result must be finite. Before it, while part (a)
runs, other processes compile what it needs, ``--slice 0/4`` to ``3/4``: under the sanitizer there is no time for that.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.rows import Part, part_of
from lightning_norm.bench.contenders import ready
from lightning_norm.normalizers import normalizers

SHAPES = ((3, 5, 7, 3), (2, 17, 33, 31), (1, 67, 9, 1), (5, 3, 47, 45), (70, 130, 1, 3), (2, 258, 11, 13))
"""Rows, channels and positions that are no multiple of anything; more rows than a tile has; a row of several tiles."""

DRY = 1
"""Shapes that the interpreter computes, of three normalizers."""

FORMS = ("contiguous", "channels_last", "misaligned")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def cases(dry: bool) -> Iterator[tuple[tuple[int, ...], str, str, str]]:
    """Yield shape, normalizer, memory format and dtype, every normalizer early."""
    shapes, keys = (SHAPES[:DRY], ("bn", "rbn", "sn")) if dry else (SHAPES, tuple(normalizers()))
    for form, shape, dtype in itertools.product(FORMS, shapes, DTYPES):
        for key in keys:
            yield shape, key, form, dtype


def tensors(shape: tuple[int, ...], form: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return x and dy; misaligned ones begin one element behind the begin of their memory."""
    made = []
    for _ in range(2):
        t = torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
        if form == "channels_last":
            t = t.contiguous(memory_format=torch.channels_last)
        elif form == "misaligned":
            t = torch.cat([t.new_zeros(1), t.flatten()])[1:].view(shape)
        made.append(t)
    x, dy = made
    return x.requires_grad_(), dy


def run(part: Part, device: str) -> bool:
    """Run the cases until the time is over; tell whether all went well."""
    waiting, good = list(cases(part.dry)), True
    if part.slice is not None:
        first, of = map(int, part.slice.split("/"))
        waiting = waiting[first::of]
    else:
        part.write("shapes", count=len(waiting), shapes=["x".join(map(str, s)) for s in SHAPES])
    while waiting and part.seconds_left > 0:
        shape, key, form, dtype = waiting.pop(0)
        what = f"{key} {'x'.join(map(str, shape))} {dtype} {form}"
        try:
            layer: Any = ready(key, shape, device)
            layer.backend = "triton"
            x, dy = tensors(shape, form, DTYPES[dtype], device)
            y = layer(x)
            dx = torch.autograd.grad(y, [x, *layer.parameters()], dy, allow_unused=True)[0]
            finite = bool(y.isfinite().all() and dx.isfinite().all())
        except Exception as error:
            part.fail(what, error)
            good = False
            continue
        part.write("odd shape" if part.slice is None else "warmed up", what=what, finite=finite)
        good = good and finite
    if waiting and part.slice is None:
        part.leave_out(f"{len(waiting)} of the odd shapes")
    return good


def main() -> int:
    """Run all cases."""
    part = part_of("odd_shapes", __doc__)
    return 0 if run(part, "cpu" if part.dry else "cuda") else 1


if __name__ == "__main__":
    sys.exit(main())

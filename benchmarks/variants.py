"""Count the kernels that the first training step of a network compiles, and how often each; without a GPU.

    python -m benchmarks.variants
    python -m benchmarks.variants --norm bn --network resnet50 --batch 64 --size 224

Each layer of the network runs forward and backward once at the shape that it would meet, on a driver that does nothing
(``benchmarks/stub``). A kernel is compiled once more for other compile-time arguments, and where an integer is or is
not a multiple of 16.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import stub
from lightning_norm.kernels import launcher
from lightning_norm.normalizers import create


def shapes_of(network: str, batch: int, size: int) -> list[tuple[int, ...]]:
    """Return the different shapes that the network's BatchNorm layers meet."""
    shapes: dict[tuple[int, ...], None] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        shapes[tuple(inputs[0].shape)] = None

    with torch.device("meta"):
        net = getattr(torchvision.models, network)()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(note)
        net(torch.empty(batch, 3, size, size))
    return list(shapes)


def compiled(key: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, last: bool) -> Counter[str]:
    """Return how many variants of each kernel one step of a layer at each shape compiles."""
    order = torch.channels_last if last else torch.contiguous_format
    launcher._plans.clear()
    for shape in shapes:
        layer: Any = create(key, shape[1])
        layer.backend = "triton"
        # Memory that nobody touches: the stub's kernels do nothing.
        x = torch.empty(shape, dtype=dtype, memory_format=order).requires_grad_()
        y = layer(x)
        torch.autograd.grad(y, [x, *layer.parameters()], torch.empty_like(y), allow_unused=True)
    steps = [step for plan in launcher._plans.values() for step in plan.launches]
    kernels = {id(step.compiled): step.kernel.fn.__name__ for step in steps if step.compiled is not None}
    return Counter(kernels.values())


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--norm", default="sn")
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--contiguous", action="store_true", help="and not channels-last")
    options = parser.parse_args()
    shapes = shapes_of(options.network, options.batch, options.size)
    stub.install()
    start = time.monotonic()
    counts = compiled(options.norm, shapes, getattr(torch, options.dtype), not options.contiguous)
    for name, count in counts.most_common():
        print(f"{count:3d}  {name}")
    print(f"{sum(counts.values()):3d}  kernels for {len(shapes)} shapes, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

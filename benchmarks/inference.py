"""Time a ResNet-18 in inference on the CPU, beside the one with plain BatchNorm that is folded alike.

    python -m benchmarks.inference [--folded bnet,dbn,afn] [--compiled sn,in] [--save docs/benchmarks/inference.md]

Every network is trained for two steps, so that no kernel is a Dirac and no gate at its start, and then folded by
``lightning_norm.fold``. Those of ``--compiled`` keep normalizers that look at the sample; they, and the reference that
they are compared with, are compiled whole. All take their turn in each round, on one thread; the time is that of the
thread on the processor; the ratio is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from lightning_norm import fold, swap
from lightning_norm.layers.base import Normalizer
from lightning_norm.surgery.text_tables import aligned, markdown

ARGUMENTS: dict[str, dict[str, Any]] = {"cn": {"context": "gate"}, "gn": {"num_groups": 32}}
BARS = {"folded": 1.05, "compiled": 1.15}


def network(key: str | None, x: Tensor) -> nn.Module:
    """Return the network, trained for two steps and folded; ``None`` for torch's own BatchNorm."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet18(num_classes=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if key is not None:
            swap(model, key, norm_args=ARGUMENTS.get(key, {}))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, *x.shape[1:])).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        fold(model.eval(), x)
    model.requires_grad_(False)
    return model


def describe(model: nn.Module) -> str:
    """Return what is left of the normalizers."""
    left = [type(m).__name__ for m in model.modules() if isinstance(m, Normalizer)]
    return f"{len(left)} {left[0]} stay" if left else "all folded"


@torch.inference_mode()
def timed(model: Callable[[Tensor], Any], x: Tensor, calls: int) -> float:
    """Return the milliseconds of this thread for one call."""
    start = time.thread_time()
    for _ in range(calls):
        model(x)
    return 1e3 * (time.thread_time() - start) / calls


def rows(kind: str, keys: list[str], x: Tensor, rounds: int, calls: int) -> list[tuple[str, ...]]:
    """Return a row for the reference and one for each normalizer."""
    networks = {key or "BatchNorm2d": network(key, x) for key in (None, *keys)}
    said = {name: describe(model) for name, model in networks.items()}
    models: dict[str, Callable[[Tensor], Any]] = dict(networks)
    if kind == "compiled":
        models = {name: torch.compile(model) for name, model in models.items()}
    for model in models.values():
        timed(model, x, 2)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(timed(model, x, calls))
    reference = times["BatchNorm2d"]
    made: list[tuple[str, ...]] = []
    for name, elapsed in times.items():
        ratio = statistics.median(a / b for a, b in zip(elapsed, reference, strict=True))
        bar = "" if name == "BatchNorm2d" else f"{BARS[kind]:.2f}"
        made.append((name, kind, said[name], f"{statistics.median(elapsed):.1f}", f"{ratio:.3f}", bar))
    return made


def main() -> None:
    """Print the table, and save it on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folded", default="bnet,dbn,afn")
    parser.add_argument("--compiled", default="sn,in")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    table: list[tuple[str, ...]] = [("network", "how", "normalizers", "ms", "ratio", "bar")]
    for kind in BARS:
        keys = [key for key in getattr(arguments, kind).split(",") if key]
        table += rows(kind, keys, x, arguments.rounds, arguments.calls) if keys else []
    print(aligned(table))
    if arguments.save:
        arguments.save.write_text(
            "# What does a normalizer cost in inference on the CPU?\n\n"
            f"ResNet-18 of torchvision, {arguments.batch} images of {arguments.size} x {arguments.size}, float32, one "
            f"thread: milliseconds of the thread on the processor, medians of {arguments.rounds} rounds in which all "
            f"take turns.\ntorch {torch.__version__}, {platform.machine()}, Python {platform.python_version()}: "
            '`python -m benchmarks.inference`. "folded" is compared with plain BatchNorm folded alike, "compiled" '
            "with that network compiled.\n\n"
            f"{markdown(table)}\n"
        )


if __name__ == "__main__":
    main()

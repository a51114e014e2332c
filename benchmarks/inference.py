"""Time a ResNet-18 in inference on the CPU, beside the one with plain BatchNorm that is folded alike.

    python -m benchmarks.inference [--folded bnet,dbn,afn] [--compiled sn,in] [--rows FILE] [--write]

Every network is trained for two steps, so that no kernel is a Dirac and no gate at its start, and then folded by
``lightning_norm.fold``. Those of ``--compiled`` keep normalizers that look at the sample; they, and the reference that
they are compared with, are compiled whole. The two take turns, on one thread; the time is that of the thread on the
processor; the ratio is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
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
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "inference.md"
BEGIN, END = "<!-- begin: written by python -m benchmarks.inference --write -->", "<!-- end of written -->"
HEADINGS = ("network", "how", "normalizers", "ratio", "middle half of the rounds", "bar")


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
    left = [type(m).__name__ for m in model.modules() if isinstance(m, (Normalizer, nn.GroupNorm, nn.InstanceNorm2d))]
    if left:
        return f"{len(left)} {left[0]} stay"
    # Those of bnet, which no convolution before them can take.
    depthwise = sum(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules())
    return f"all folded; {depthwise} depthwise convolutions" if depthwise else "all folded"


@torch.inference_mode()
def timed(model: Callable[[Tensor], Any], x: Tensor, calls: int) -> float:
    """Return the seconds of this thread on the processor."""
    start = time.thread_time()
    for _ in range(calls):
        model(x)
    return time.thread_time() - start


def row(how: str, key: str, x: Tensor, rounds: int, calls: int) -> list[str]:
    """Return the row of a normalizer, timed beside the reference."""
    # Networks of one class share a limit of compilations, beyond which they would run uncompiled.
    torch._dynamo.reset()
    models = [network(key, x), network(None, x)]
    said = describe(models[0])
    ready: list[Callable[[Tensor], Any]] = list(models)
    if how == "compiled":
        ready = [torch.compile(model, fullgraph=True) for model in models]
    for model in ready:
        timed(model, x, 2)  # the first call compiles or allocates
    ratios = [timed(ready[0], x, calls) / timed(ready[1], x, calls) for _ in range(rounds)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return [key, how, said, f"{median:.3f}", f"{low:.3f} to {high:.3f}", f"{BARS[how]:.2f}"]


def main() -> None:
    """Print the table, and write it on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folded", default="bnet,dbn,afn")
    parser.add_argument("--compiled", default="gn,ln,in,ibn,frn,asr,rbn,sn,bcn,cn,ubn,derf,dyt")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--rows", type=Path, help="file of finished rows: what it has is not done again")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    finished: dict[tuple[str, str], list[str]] = {}
    if arguments.rows and arguments.rows.exists():
        finished = {(row[0], row[1]): row for row in map(json.loads, arguments.rows.read_text().splitlines())}
    table = [list(HEADINGS)]
    for how in BARS:
        for key in filter(None, getattr(arguments, how).split(",")):
            if (key, how) not in finished:
                finished[key, how] = row(how, key, x, arguments.rounds, arguments.calls)
                if arguments.rows:
                    with arguments.rows.open("a") as file:
                        print(json.dumps(finished[key, how]), file=file)
            table.append(finished[key, how])
            print(f"{key}, {how}: done", file=sys.stderr, flush=True)
    print(aligned(table))
    if arguments.write:
        text = PAGE.read_text(encoding="utf-8")
        written = f"{BEGIN}\n{markdown(table)}\n{END}"
        PAGE.write_text(re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: written, text, flags=re.S))


if __name__ == "__main__":
    main()

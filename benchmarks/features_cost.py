"""What masks cost, and what the features that a call does not use cost it: thread CPU time, forward and backward.

    python -m benchmarks.features_cost masks [--norms bn,sn] [--compiled]
    python -m benchmarks.features_cost before TREE [--norms bn,sn]

``masks`` times each layer with a mask beside the same layer without one, in turn, in one process. ``before`` times each
layer of this working tree beside that of another tree, such as ``git worktree add TREE COMMIT`` makes, in turn, in one
process per tree; a second process of this tree says how far two processes of the same code differ.

The CPU time of the one thread that works does not count the time in which a busy machine runs something else. Memory
that the C library hands back to the system and fetches again costs more than a pass over it, and whether it does that
is a matter of chance: here it keeps what it has (glibc).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SHAPES = ((32, 64, 28, 28), (8, 16, 8, 8))
ARGUMENTS: dict[str, dict[str, Any]] = {"cn": {"context": "gate"}, "gn": {"num_groups": 8}}
"""Of the layers that need some in either tree."""

ROUND = 0.012
"""Seconds of one round: so many calls as take that long are timed together."""

Shape = tuple[int, ...]
Step = Callable[[], None]


def step_of(key: str, shape: Shape, *, masked: bool = False, compiled: bool = False) -> Step:
    """Return one forward and backward pass of a layer in training; a mask leaves three of four positions."""
    import torch  # the workers of ``before`` are the only ones that need it in another tree

    import lightning_norm

    torch.manual_seed(0)
    layer = lightning_norm.create(key, shape[1], **ARGUMENTS.get(key, {})).train()
    if compiled:
        layer.compile()
    x = torch.randn(shape).requires_grad_()
    dy = torch.randn(shape)
    lengths = torch.linspace(0.5 * shape[-1], shape[-1], shape[0]).round().long()
    mask = (torch.arange(shape[-1]) < lengths.unsqueeze(1)).reshape(shape[0], *(1,) * (len(shape) - 3), shape[-1])

    def step() -> None:
        x.grad = None
        layer.zero_grad()
        (layer(x, mask=mask) if masked else layer(x)).backward(dy)

    return step


def seconds(step: Step, calls: int) -> float:
    """Return the CPU seconds of a call on this thread, on which the CPU's backward pass runs as well."""
    begin = time.thread_time()
    for _ in range(calls):
        step()
    return (time.thread_time() - begin) / calls


def calls_of(step: Step) -> int:
    """Warm up, and return how many calls make a round."""
    seconds(step, 3)
    return max(1, round(ROUND / max(seconds(step, 3), 1e-6)))


def quotient(first: Sequence[float], second: Sequence[float]) -> str:
    """Return the quotient of two medians, and the quartiles of the quotients of the rounds."""
    low, _, high = statistics.quantiles([a / b for a, b in zip(first, second, strict=True)], n=4)
    return f"{statistics.median(first) / statistics.median(second):.2f} [{low:.2f}, {high:.2f}]"


def masks(keys: Sequence[str], shapes: Sequence[Shape], rounds: int, compiled: bool) -> None:
    """Print how many times as long a layer takes with a mask."""
    print("| layer | " + " | ".join("x".join(map(str, shape)) for shape in shapes) + " |\n|---|" + "---|" * len(shapes))
    for key in keys:
        cells = []
        for shape in shapes:
            steps = [step_of(key, shape, masked=masked, compiled=compiled) for masked in (True, False)]
            calls = [calls_of(step) for step in steps]
            timed = [[seconds(s, n) for s, n in zip(steps, calls, strict=True)] for _ in range(rounds)]
            cells.append(quotient(*zip(*timed, strict=True)))
        print(f"| {key} | " + " | ".join(cells) + " |", flush=True)


class Worker:
    """A process that times steps in one tree when it is asked.

    Args:
        tree: folder with the package.
    """

    def __init__(self, tree: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}
        command = [sys.executable, str(Path(__file__).resolve()), "work"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tree
        )

    def ask(self, line: str) -> float:
        """Return the answer to a line: seconds of a call."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work() -> None:
    """Answer each line, "key 8x16x8x8 calls", with the seconds of a call; 0 calls ask how many make a round."""
    steps: dict[tuple[str, str], Step] = {}
    for line in sys.stdin:
        key, size, calls = line.split()
        if (key, size) not in steps:
            steps[key, size] = step_of(key, tuple(map(int, size.split("x"))))
        step = steps[key, size]
        print(seconds(step, int(calls)) if int(calls) else calls_of(step), flush=True)


def before(tree: Path, keys: Sequence[str], shapes: Sequence[Shape], rounds: int, times: int) -> None:
    """Print how many times as long a layer of this tree takes as one of another, and as one of this tree again."""
    here = Path(__file__).resolve().parents[1]
    cases = [(key, "x".join(map(str, shape))) for key in keys for shape in shapes]
    timed: dict[tuple[str, str], list[tuple[float, ...]]] = {case: [] for case in cases}
    # Two processes of the same code differ by where their memory lies, so that one pair would not tell.
    for _ in range(times):
        workers = [Worker(tree), Worker(here), Worker(here)]
        for key, size in cases:
            calls = min(int(worker.ask(f"{key} {size} 0")) for worker in workers)
            for _ in range(rounds):
                timed[key, size].append(tuple(worker.ask(f"{key} {size} {calls}") for worker in workers))
        for worker in workers:
            worker.close()
    print("| layer | x | now / before | now / now, again |\n|---|---|---|---|")
    for (key, size), rows in timed.items():
        old, new, again = zip(*rows, strict=True)
        print(f"| {key} | {size} | {quotient(new, old)} | {quotient(new, again)} |")


def keep_memory() -> None:
    """Let the C library keep the memory that is freed, where it is glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["masks", "before", "work"])
    parser.add_argument("tree", nargs="?", type=Path)
    parser.add_argument("--norms", default="bn,sn,gn,dbn,cn")
    parser.add_argument("--shapes", default=",".join("x".join(map(str, shape)) for shape in SHAPES))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    keys = options.norms.split(",")
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    keep_memory()
    if options.what == "work":
        work()
    elif options.what == "masks":
        masks(keys, shapes, options.rounds, options.compiled)
    else:
        before(options.tree.resolve(), keys, shapes, options.rounds, options.times)


if __name__ == "__main__":
    main()

"""The bars on a CPU: each normalizer's time and memory as a multiple of torch's layer, and which bars are missed.

    python -m benchmarks.cpu_bars
    python -m benchmarks.cpu_bars --before TREE --save docs/benchmarks/cpu.md
    python -m benchmarks.cpu_bars --parts small --norms bn,sn --rounds 5
    python -m benchmarks.cpu_bars --parts steps,startup

All layers of one input take their turn in each round of one process; medians over the rounds are compared. Small and
flat inputs run on one thread, whose CPU time is taken: what else the machine does is not in it. Maps run on two
threads, by the wall clock, or with ``--threads 1`` as the others do: on a busy machine two threads wait for each other,
and the clock measures that. ``--before`` runs the same in a process with the package of another working tree, in turn.

``steps`` are training steps of a ResNet-18 at batch 32, eager, with every normalizer; ``compiled steps`` those with
each layer compiled. ``calls`` counts the operations of ATen, forward and backward, without those that an operation
calls itself: no other process changes their number, which stands in place of microseconds. ``startup`` is the user time
of processes: what the import of this package adds to torch's, and of commands that train nothing.

The C library keeps the memory that is freed: whether it hands some back to the system and fetches it again, which costs
more than a pass over it, is otherwise a matter of chance (see ``features_cost``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

WORK = "work"
ROUND = 0.006
"""Seconds: so many calls as take that long are timed together."""

ALONE = ("bn", "brn", "dbn")
"""Normalizers of batch statistics alone."""

COSTLY = ("afn", "asr")
"""Normalizers with encoder-decoders, for which small inputs have no bar."""

ALL = "bn,in,ln,gn,sn,bcn,bnet,brn,dbn,rbn,ubn,cn,ibn,frn,afn,asr,dyt,derf"
"""Every normalizer; by hand, for this process imports neither torch nor the package."""

MAPS = "bn,sn,bcn,rbn,dbn,gn,ln,in"
COMPILED = MAPS

STARTUP = {
    "import lightning_norm": (["-c", "import torch, lightning_norm"], 0.2),
    **{f"lightning-norm {a}": (["-m", "lightning_norm", a], 1.0) for a in ("--version", "--help", "list")},
}
"""What is started -> arguments of Python, and the bar in seconds; of the import, beyond that of torch."""


class Case(NamedTuple):
    """One input.

    Args:
        part: "small", "maps", "calls", "compiled", "steps" or "compiled steps".
        shape: of x.
        last: channels-last.
    """

    part: str
    shape: tuple[int, ...]
    last: bool = False

    @property
    def name(self) -> str:
        """Shape and memory format."""
        return "x".join(map(str, self.shape)) + (" channels-last" if self.last else "")


FLAT = [Case("small", shape) for shape in ((128, 64), (100, 300))]
SMALL = [Case("small", shape) for shape in ((32, 64, 7, 7), (2, 32, 8, 8), (128, 32, 16, 16))]
BENCH = ((32, 64, 32, 32), (32, 256, 14, 14), (32, 512, 7, 7))
CASES = [
    *FLAT,
    *SMALL,
    *(Case(part, s, last) for part in ("maps", "compiled") for s in BENCH for last in (False, True)),
    *(Case("calls", *how) for how in (((128, 64),), ((2, 32, 8, 8),), ((32, 512, 7, 7), True))),
    *(Case(part, (32, 3, 64, 64), last) for part in ("steps", "compiled steps") for last in (False, True)),
]


def bar(case: Case, key: str) -> float | None:
    """Return how many times as long as torch's BatchNorm a normalizer may take; ``None`` where nothing is asked.

    Of "gn" at (2, 32, 8, 8) it is torch's GroupNorm.
    """
    if case.part == "calls" or "steps" in case.part:
        asked = case.part != "calls" and key == "sn" and not case.last
        return (1.1 if case.part == "steps" else 1.05) if asked else None
    if case.part == "compiled":
        return 1.3 if case.last else 1.0
    if case.part == "maps":
        return 1.05 if key == "bn" else 1.8 if case.last else 1.5
    if case.shape == (2, 32, 8, 8):
        return {"bn": 3.0, "gn": 2.0}.get(key, 6.0)
    if key in COSTLY:
        return None
    if key in ALONE:
        return 1.2 if key == "bn" else 2.0
    if case.shape == (32, 64, 7, 7) or key == "bnet":
        return 2.0
    return 3.0 if key in ("sn", "bcn", "ubn") else None


def names_of(case: Case, keys: str | None) -> list[str]:
    """Return the normalizers that are timed at one input: those asked for, or all that the part has."""
    parts = {
        "small": ALL,
        "maps": MAPS,
        "calls": ALL,
        "compiled": COMPILED,
        "steps": ALL,
        "compiled steps": ALL,
    }
    known = parts[case.part].split(",")
    return [key for key in known if keys is None or key in keys.split(",")]


def seconds(step: Any, calls: int, threads: int) -> float:
    """Return the time of a call: of this thread where it is alone, else by the clock."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    begin = clock()
    for _ in range(calls):
        step()
    return (clock() - begin) / calls


def measured(case: Case, keys: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """Return microseconds of each round, and multiples of x kept for the backward pass, by name of the layer."""
    import torch  # the processes of both trees need it, and the one that asks them does not

    if "steps" in case.part:
        return measured_steps(case, keys, rounds, threads)
    from benchmarks.peers import others
    from lightning_norm.bench.contenders import PEERS, contenders, saved_for_backward

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.compiler.reset()
    x, dy = torch.randn(case.shape), torch.randn(case.shape)
    if case.last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    x.requires_grad_()
    compiled = case.part == "compiled"
    layers = dict(contenders(case.shape, keys, "cpu", compiled, naive=False))
    layers = {name: layer for name, layer in layers.items() if name not in keys or not compiled}
    # Torch's own layer compiled stands beside ours: what the compiler loses by itself is seen there.
    layers |= others(case.shape[1], len(case.shape), "cpu", compiled)

    def step_of(layer: Any) -> Any:
        wanted = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x), wanted, dy, allow_unused=True)

    steps = {name: step_of(layer) for name, layer in layers.items()}
    if case.part == "calls":
        return {"times": {name: [operations(step)] for name, step in steps.items()}, "saved": {}, "peers": PEERS}
    calls = {}
    for name, step in steps.items():
        seconds(step, 3, threads)
        calls[name] = max(1, round(ROUND / max(seconds(step, 3, threads), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, calls[name], threads) * 1e6)
    saved = {} if compiled else {name: saved_for_backward(layer, x) for name, layer in layers.items()}
    return {"times": times, "saved": saved, "peers": PEERS}


def operations(step: Any) -> int:
    """Return how many operations of ATen a call makes, without those that an operation makes itself."""
    from torch.profiler import ProfilerActivity, profile

    step()  # the first batch moves running statistics otherwise
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    called = [event for event in profiler.events() if event.name.startswith("aten::")]
    return sum(event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::") for event in called)


def measured_steps(case: Case, keys: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """Return the same of training steps, with torch's BatchNorm and with each normalizer in its place."""
    import torch

    from benchmarks.network import Network, training_step
    from lightning_norm.bench.contenders import ARGUMENTS, PEERS

    torch.set_num_threads(threads)
    torch.compiler.reset()
    network, compiled = Network("resnet18", case.shape[0], case.shape[2]), case.part != "steps"
    steps = {
        key or "torch": training_step(
            network, key, "cpu", ARGUMENTS.get(key or ""), last=case.last, layers_compiled=compiled
        )
        for key in (None, *keys)
    }
    for step in steps.values():
        seconds(step, 2, threads)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, 1, threads) * 1e6)
    return {"times": times, "saved": {}, "peers": PEERS}


def user_seconds(arguments: list[str]) -> float:
    """Return the user time of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def startup(rounds: int) -> str:
    """Return what a process costs before it does anything, in Markdown."""
    from lightning_norm.surgery.text_tables import markdown

    commands = {"import torch": ["-c", "import torch"], **{name: how[0] for name, how in STARTUP.items()}}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for name in (*commands, *commands):
        user_seconds(commands[name])  # what a first run writes, such as bytecode, the others find
    for _ in range(rounds):
        for name, command in commands.items():
            times[name].append(user_seconds(command))
    torch_alone = statistics.median(times["import torch"])
    body = [["import torch", f"{torch_alone:.2f}", "1.00", "", ""]]
    for name, (_, limit) in STARTUP.items():
        median = statistics.median(times[name])
        counted = median - torch_alone if name.startswith("import") else median
        verdict = "met" if counted <= limit else "**missed**"
        body.append([name, f"{counted:.2f}", f"{median / torch_alone:.2f}", f"{limit}", verdict])
    head = ["process", "seconds, of the import beyond torch's", "multiple of import torch", "bar", ""]
    return markdown([head, *body])


def work() -> None:
    """Answer each line, the arguments of :func:`measured` in JSON, by what is measured."""
    from benchmarks.features_cost import keep_memory

    keep_memory()
    for line in sys.stdin:
        part, shape, last, *how = json.loads(line)
        print(json.dumps(measured(Case(part, tuple(shape), last), *how)), flush=True)


class Worker:
    """A process with the package of one tree.

    Args:
        tree: the folder.
    """

    def __init__(self, tree: Path) -> None:
        here = Path(__file__).resolve()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tree), str(here.parents[1])))}
        command = [sys.executable, str(here), WORK]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=tree)

    def ask(self, case: Case, *how: Any) -> dict[str, Any]:
        """Return what :func:`measured` does."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([*case, *how]) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Row(NamedTuple):
    """A layer at an input: its time and that of torch's layer in microseconds, and what it keeps; after and before."""

    case: Case
    name: str
    ratios: list[float]
    microseconds: float
    saved: list[float | None]
    bar: float | None

    @property
    def met(self) -> bool:
        """Whether the time is within the bar, where there is one."""
        return self.bar is None or self.ratios[0] <= self.bar

    @property
    def keeps_little(self) -> bool:
        """Whether a flat input keeps no more than it may for the backward pass."""
        return len(self.case.shape) > 2 or self.saved[0] is None or self.saved[0] <= SAVED


SAVED = 1.2
"""Bytes kept for the backward pass of (N, C) inputs, as a multiple of x."""


def rows_of(
    case: Case, keys: list[str], workers: list[Worker], rounds: int, threads: int, turns: int = 2
) -> Iterator[Row]:
    """Yield a row for each layer at one input, measured by each worker in turn."""
    answers: list[list[dict[str, Any]]] = [[] for _ in workers]
    for _ in range(turns):
        for worker, heard in zip(workers, answers, strict=True):
            heard.append(worker.ask(case, keys, math.ceil(rounds / turns), threads))

    def median(heard: list[dict[str, Any]], name: str) -> float:
        return statistics.median(float(t) for answer in heard for t in answer["times"].get(name, [math.nan]))

    for name in answers[0][0]["times"]:
        key, base = name.split()[0], "torch"
        if case.shape == (2, 32, 8, 8) and key == "gn":
            base = answers[0][0]["peers"]["gn"]
        ratios = [median(heard, name) / median(heard, base) for heard in answers]
        saved = [heard[0]["saved"].get(name) for heard in answers]
        limit = None if key == "torch" else bar(case, key)
        yield Row(case, name, ratios, median(answers[0], name), saved, limit)


def table(rows: list[Row]) -> str:
    """Return the rows of one part in Markdown, input by input."""
    from lightning_norm.surgery.text_tables import markdown

    before = len(rows[0].ratios) > 1
    head = [
        "input",
        "layer",
        "calls" if rows[0].case.part == "calls" else "microseconds",
        *["before"] * before,
        "ratio",
        "bar",
        "",
        *["kept before"] * before,
        "kept",
    ]
    body = []
    for row in rows:
        ratios, saved = ([cell(v) for v in reversed(values)] for values in (row.ratios, row.saved))
        verdict = "" if row.bar is None else "met" if row.met else "**missed**"
        body.append([row.case.name, row.name, f"{row.microseconds:.0f}", *ratios, cell(row.bar), verdict, *saved])
    return markdown([head, *body])


def cell(value: float | None) -> str:
    """Return a number with two digits behind the point, or nothing."""
    return "" if value is None or math.isnan(value) else f"{value:.2f}"


def verdict(rows: list[Row]) -> str:
    """Return how many bars are met, and which are missed by how much."""
    held = [row for row in rows if row.bar is not None]
    missed = [f"{r.name} at {r.case.name}: {r.ratios[0]:.2f} for {r.bar}" for r in held if not r.met]
    flat = [row for row in rows if len(row.case.shape) == 2 and row.name.split()[0] != "torch"]
    fat = [f"{r.name} at {r.case.name}: {cell(r.saved[0])}" for r in flat if not r.keeps_little]
    return (
        f"Time: {len(held) - len(missed)} of {len(held)} bars met. Missed: {'; '.join(missed) or 'none'}.\n\n"
        f"Kept for the backward pass of (N, C), at most {SAVED} x: {len(flat) - len(fat)} of {len(flat)} met. "
        f"Missed: {'; '.join(fat) or 'none'}."
    )


def main() -> None:
    """Print the tables, and write them if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=[WORK], help=argparse.SUPPRESS)
    parser.add_argument("--before", type=Path, metavar="TREE", help="another working tree, to be measured in turn")
    parser.add_argument("--parts", default="small,maps,compiled,steps,compiled steps,startup")
    parser.add_argument("--norms", help="by commas; all that a part has without")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="for all but small inputs")
    parser.add_argument("--save", type=Path, help="a Markdown file to write")
    options = parser.parse_args()
    if options.what == WORK:
        work()
        return
    from lightning_norm.bench.clock import machine

    here = Path(__file__).resolve().parents[1]
    workers = [Worker(tree) for tree in (here, *([options.before.resolve()] if options.before else []))]
    rows: list[Row] = []
    tables = []
    for part in options.parts.split(","):
        if part == "startup":
            tables.append(f"## Startup, user time\n\n{startup(options.rounds)}")
            print(f"\n{tables[-1]}", flush=True)
            continue
        threads = 1 if part == "small" else options.threads
        mine = []
        for case in CASES:
            if case.part != part:
                continue
            for row in rows_of(case, names_of(case, options.norms), workers, options.rounds, threads):
                # At once, for what is compiled takes long.
                print(f"{row.case.name} {row.name}: {row.ratios[0]:.2f}", file=sys.stderr, flush=True)
                mine.append(row)
        title = f"## {part.capitalize()}, {threads} thread{'s' * (threads > 1)}"
        tables.append(f"{title}\n\n{table(mine)}")
        print(f"\n{tables[-1]}", flush=True)
        rows += mine
    for worker in workers:
        worker.close()
    print(f"\n{verdict(rows)}")
    if options.save:
        where = ", ".join(f"{k} {v}" for k, v in machine(2).items() if v and k != "threads")
        command = f"`python -m benchmarks.cpu_bars {' '.join(sys.argv[1:])}`"
        text = [f"# {TITLE}", ABOUT, command, where, verdict(rows), *tables]
        options.save.write_text("\n\n".join(text) + "\n")


TITLE = "The bars on a CPU"
ABOUT = (
    "Time of forward and backward as a multiple of torch's BatchNorm of the same input, eager and, in the last table, "
    "compiled; of gn at 2x32x8x8 as a multiple of torch's GroupNorm. Medians of interleaved rounds: the ratios hold on "
    "this machine, the times do not travel. `kept` is what is kept for the backward pass, as a multiple of x."
)

if __name__ == "__main__":
    main()

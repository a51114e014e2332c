"""Time every normalizer, forward and backward, beside its peers: interleaved in one run, medians, ratios."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.bench.clock import Run, Timed, interleaved, machine
from lightning_norm.bench.naive import CONTEXTS, FORMULAS, Naive, contexts_of, groups_of
from lightning_norm.bench.peers import PEERS, depthwise_peer, taps
from lightning_norm.bench.report import BARS, bars_table, rows_of, save, save_roofline, table
from lightning_norm.layers.base import Normalizer
from lightning_norm.normalizers import create, normalizers
from lightning_norm.normalizers.context.assignment import assign, context_layers

SHAPES = ((32, 64, 32, 32), (32, 256, 14, 14), (32, 512, 7, 7), (128, 64))
EXAMPLE = "lightning-norm bench --device cpu --norms bn,sn,bcn --json bench.json --save docs/benchmarks"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ubn": {"threshold": 1.0},  # the condensation of every batch is measured
    "cn": {"context": "ids", "num_contexts": CONTEXTS},
}
"""What a contender is built with."""


def run(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run ``lightning-norm bench`` and return its rows.

    Raises:
        RuntimeError: ``--device cuda`` without one.
        ValueError: an unknown norm or a shape that cannot be read.
    """
    options = _parser().parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device found. Type --device cpu.")
    torch.set_num_threads(options.threads)
    shapes = [_shape(s) for s in options.shapes.split(",")] if options.shapes else list(SHAPES)
    cuda = options.device == "cuda"
    keys = options.norms.split(",") if options.norms else list(normalizers()) if cuda else ["bn", "sn", "bcn"]
    repeats = options.repeats or (20 if cuda else 50)
    unknown = set(options.dtypes.split(",")) - {"fp32", "bf16", "fp16"}
    if unknown:
        raise ValueError(f"--dtypes: {sorted(unknown)} unknown. Type one or more of fp32,bf16,fp16.")
    for key in keys:
        create(key, 32)  # an unknown key is told before anything runs
    command = " ".join(["lightning-norm bench", *(sys.argv[2:] if argv is None else argv)])
    if cuda or options.roofline:
        return _roofline(options, shapes if options.shapes else None, keys, repeats, command)
    rows = []
    for shape in shapes:
        for channels_last in (False, True) if len(shape) == 4 else (False,):
            rows += bench_shape(shape, keys, channels_last, options.device, repeats, options.compile)
            _print_rows(rows[-1]["shape"], rows)
    if options.network:
        rows += bench_network(keys, options.device, repeats, options.compile)
        _print_rows("resnet18 step", rows)
    result = {"machine": machine(options.threads), "command": command, "rows": rows}
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))
    if options.save:
        save(result, Path(options.save))
    return rows


def _roofline(
    options: argparse.Namespace, shapes: list[tuple[int, ...]] | None, keys: list[str], repeats: int, command: str
) -> list[dict[str, Any]]:
    from lightning_norm.bench import bars, clock, network, roofline
    from lightning_norm.bench.budget import DTYPES, Budget, stages
    from lightning_norm.bench.budget import SHAPES as LARGE_SHAPES

    cuda, dtypes = options.device == "cuda", options.dtypes.split(",")
    budget = Budget(options.minutes)
    given, common = shapes or (LARGE_SHAPES if cuda else SHAPES[:3]), (keys, options.device)
    size, rounds = 1000 if cuda else 50, max(5, repeats // 5)
    speed = {d: clock.copy_speed(options.device, size, rounds, DTYPES[d]) for d in dtypes}
    print("copy: " + ", ".join(f"{d} {s:.0f}" for d, s in speed.items()) + " GB/s read and written", flush=True)
    net = network.LARGE if cuda else network.SMALL
    rows: list[dict[str, Any]] = []
    passes: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    result: dict[str, Any] = {"machine": machine(options.threads), "command": command, "copy_gb_s": speed}
    result |= {"roofline": rows, "passes": passes, "steps": steps, "left_out": budget.left_out}
    try:
        for stage in stages(given, dtypes, keys, options.compile, cuda or options.network):
            for found in roofline.roofline(stage.cases, *common, repeats, budget, speed, options.compile):
                rows += found[0]
                passes += found[1]
            if stage.keys:
                step = (options.device, max(3, repeats // (2 if cuda else 5)), stage.compiled, budget, ARGUMENTS)
                steps += network.steps(net, stage.keys, *step)
    finally:  # whatever happens, what was measured is kept
        result["bars"] = bars.verdicts(rows, passes, steps)
        for line in budget.left_out:
            print(f"left out: {line}", flush=True)
        print(f"\n{BARS}\n{bars_table(result['bars'])}", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(result, indent=1))
        if options.save:
            save_roofline(result, Path(options.save))
    if budget.failed:
        raise ArithmeticError("the benchmark is done, but not all of it ran:\n" + "\n".join(budget.failed))
    return rows


def bench_shape(
    shape: tuple[int, ...], keys: Sequence[str], channels_last: bool, device: str, repeats: int, compiled: bool
) -> list[dict[str, Any]]:
    """Time one forward and backward of every contender at one shape.

    Returns:
        A row per contender: milliseconds (median, quartiles), ratios to nn.BatchNorm and to its own naive formula.

    Raises:
        ArithmeticError: a contender's output or input gradient is not what float64 says.
    """
    torch.manual_seed(0)
    with shared_code():
        return _bench_shape(shape, keys, channels_last, device, repeats, compiled)


def _bench_shape(
    shape: tuple[int, ...], keys: Sequence[str], channels_last: bool, device: str, repeats: int, compiled: bool
) -> list[dict[str, Any]]:
    x, dy = torch.randn(shape, device=device), torch.randn(shape, device=device)
    if channels_last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    x.requires_grad_()
    layers = dict(contenders(shape, keys, device, compiled))
    for name, layer in layers.items():
        check(name, layer, x, dy)
    runs = {name: _step(layer, x, dy) for name, layer in layers.items()}
    times = interleaved({name: Timed(run, device, graph=False) for name, run in runs.items()}, repeats)
    label = "x".join(map(str, shape)) + (" channels_last" if channels_last else "")
    saved = {name: saved_for_backward(layer, x) for name, layer in layers.items() if "naive" not in name}
    return rows_of(label, times, saved)


@contextmanager
def shared_code() -> Iterator[None]:
    """Let torch.compile make a graph of each naive formula, which share their code, or fail; forget earlier graphs."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


def contenders(
    shape: tuple[int, ...], keys: Sequence[str], device: str, compiled: bool, naive: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and layer: torch's, ours eager and compiled, and the naive formula eager and compiled."""
    c = shape[1]
    yield "torch", (nn.BatchNorm1d if len(shape) < 4 else nn.BatchNorm2d)(c).to(device)
    for key in keys:
        if len(shape) == 2 and key in ("in",):
            continue
        if key in PEERS and len(shape) == 4:
            yield PEERS[key], depthwise_peer(c).to(device)
        yield key, ready(key, shape, device)
        if compiled:
            layer = ready(key, shape, device)
            layer.compile()
            yield f"{key} compiled", layer
        if naive and _has_formula(key, shape):
            yield f"{key} naive", Naive(ready(key, shape, device))
            if compiled:
                formula = Naive(ready(key, shape, device))
                formula.compile(dynamic=False)
                yield f"{key} naive compiled", formula


def ready(key: str, shape: tuple[int, ...], device: str) -> Normalizer:
    """Build a layer; cn is told the contexts of its samples, and a kernel of bnet gets distinct taps."""
    more = {"num_groups": groups_of(shape[1])} if key == "gn" else {}
    layer = create(key, shape[1], device=device, **ARGUMENTS.get(key, {}), **more)
    if key == "cn":
        assign(context_layers(layer), contexts_of(torch.empty(shape, device=device)))
    if key == "bnet":
        taps(layer.get_parameter("kernel"))
    return layer


def _has_formula(key: str, shape: Sequence[int]) -> bool:
    return key in FORMULAS and (len(shape) == 4 if key == "bnet" else len(shape) > 2)


def check(name: str, layer: nn.Module, x: Tensor, dy: Tensor, tolerance: float = 1e-4) -> tuple[float, float] | None:
    """Compare a layer's output and input gradient with the naive formula in float64.

    Returns:
        Both errors, relative to the norms; ``None`` where there is no formula.

    Raises:
        ArithmeticError: they differ by more than ``tolerance``, 1e-4, of their norm.
    """
    key = next((k for k, peer in PEERS.items() if peer == name), name.split()[0].replace("torch", "bn"))
    if not _has_formula(key, x.shape):
        return None
    truth = Naive(ready(key, tuple(x.shape), x.device.type)).double()
    truth.load_state_dict(dict(layer.named_parameters()), strict=False)  # what starts at random
    held = getattr(layer, "dropout", None)
    truth.dropout = 0.0
    if held is not None:
        setattr(layer, "dropout", 0.0)  # noqa: B010  a property of some layers
    wide = x.detach().double().requires_grad_()
    want = truth(wide)
    (want_dx,) = torch.autograd.grad(want, wide, dy.double())
    got = layer(x)
    (got_dx,) = torch.autograd.grad(got, x, dy)
    if held is not None:
        setattr(layer, "dropout", held)  # noqa: B010
    errors = []
    for what, a, b in (("output", got, want), ("input gradient", got_dx, want_dx)):
        errors.append(((a - b).norm() / b.norm()).item())
        if not errors[-1] < tolerance:
            raise ArithmeticError(
                f"{name}: the {what} differs from float64 by {errors[-1]:.1e} of its norm at {tuple(x.shape)}."
            )
    return errors[0], errors[1]


def saved_for_backward(layer: nn.Module, x: Tensor) -> float:
    """Return the bytes that one forward pass keeps for the backward pass, as a multiple of x; x itself counts as 1."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(kept.values()) / (x.numel() * x.element_size())


def bench_network(keys: Sequence[str], device: str, repeats: int, compiled: bool) -> list[dict[str, Any]]:
    """Time whole training steps of resnet18, 16 x 3 x 64 x 64, with each normalizer against its own BatchNorm."""
    from lightning_norm.bench.network import SMALL, training_step

    runs: dict[str, Timed] = {}
    for name in ["torch", *keys, *(f"{key} compiled" for key in keys if compiled)]:
        key = None if name == "torch" else name.split()[0]
        layers_compiled = name.endswith("compiled")
        step = training_step(SMALL, key, device, ARGUMENTS.get(key or ""), layers_compiled=layers_compiled)
        runs[name] = Timed(step, device, graph=False)
    return rows_of("resnet18 step", interleaved(runs, max(5, repeats // 3)), {})


def _print_rows(label: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{label}\n{table([r for r in rows if r['shape'] == label])}", flush=True)


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(n) if n.isdigit() else 0 for n in text.split("x"))
    if not 2 <= len(shape) <= 5 or min(shape) < 1:
        raise ValueError(f"--shapes: {text!r} is no shape. Expected sizes joined by x, for example 32x64x32x32,128x64.")
    return shape


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Run:
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-norm bench",
        description="Time every normalizer beside nn.BatchNorm and its own formula written naively, after checking it.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    keys = ",".join(normalizers())
    parser.add_argument("--norms", help=f"comma-separated keys out of {keys}; all on CUDA, bn,sn,bcn on the CPU")
    parser.add_argument("--shapes", help="comma-separated, e.g. 32x64x32x32,128x64; the four of the docs by default")
    parser.add_argument(
        "--repeats", type=int, help="rounds, in each of which every contender runs; 20 on CUDA, else 50"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    parser.add_argument("--network", action="store_true", help="also whole training steps of resnet18")
    parser.add_argument(
        "--roofline",
        action="store_true",
        help="forward and backward apart, as fractions of what the memory allows; always so on CUDA",
    )
    parser.add_argument("--dtypes", default="fp32,bf16", help="with --roofline: out of fp32,bf16,fp16")
    parser.add_argument("--minutes", type=float, default=8, help="with --roofline: what does not fit is left out")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--save", metavar="DIR", help="write bench.json, bench.md and bench.png there")
    return parser

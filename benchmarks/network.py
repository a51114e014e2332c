"""Whole training steps with each normalizer, beside the network's own BatchNorm; ``benchmarks.roofline`` runs them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.budget import Budget
from benchmarks.counters import peak_memory
from lightning_norm.bench.clock import Timed, interleaved
from lightning_norm.bench.formulas import contexts_of
from lightning_norm.normalizers.context.assignment import assign, context_layers
from lightning_norm.surgery.swap import swap


@dataclass(frozen=True)
class Network:
    """A network and what it is trained on.

    Args:
        name: of torchvision.
        batch: images.
        size: of an image.
    """

    name: str
    batch: int
    size: int


SMALL, LARGE = Network("resnet18", 16, 64), Network("resnet50", 64, 224)
MODES: dict[str, dict[str, bool]] = {
    "eager": {},
    "channels_last": {"last": True},
    "AMP channels_last": {"last": True, "amp": True},
    "compiled AMP channels_last": {"last": True, "amp": True, "compiled": True},
}


def training_step(
    network: Network,
    key: str | None,
    device: str,
    arguments: dict[str, Any] | None,
    *,
    layers_compiled: bool = False,
    compiled: bool = False,
    last: bool = False,
    amp: bool = False,
) -> Callable[[], Tensor]:
    """Return one step of SGD; ``key`` is the normalizer, ``None`` for the network's own BatchNorm."""
    torch.manual_seed(0)
    net: nn.Module = getattr(torchvision.models, network.name)(num_classes=10).to(device)
    x = torch.randn(network.batch, 3, network.size, network.size, device=device)
    target = torch.arange(network.batch, device=device) % 10
    if key is not None:
        swap(net, key, norm_args=arguments, compile=layers_compiled)
    if key == "cn":
        assign(context_layers(net), contexts_of(x))
    if last:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    if compiled:
        net.compile()

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16) if amp else nullcontext():
            loss = nn.functional.cross_entropy(net(x).float(), target)
        torch.autograd.backward(loss)
        optimizer.step()
        return loss.detach()

    return step


def steps(
    network: Network,
    keys: Sequence[str],
    device: str,
    repeats: int,
    compiled: bool,
    budget: Budget,
    arguments: dict[str, dict[str, Any]],
    modes: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Time steps with each normalizer beside BatchNorm's, mode by mode, of the network as it is or compiled.

    ``modes`` names those of ``MODES`` that are wanted, in place of ``compiled``.
    """
    rows = []
    for mode in modes or [name for name, options in MODES.items() if ("compiled" in options) == compiled]:
        options = MODES[mode]
        kind = "compiled step" if "compiled" in options else "step"
        torch.compiler.reset()
        runs: dict[str, Timed] = {}
        peaks: dict[str, int | None] = {}
        for key in (None, *keys):
            name = key or "torch"
            what = f"{network.name} {mode} {name}"
            if not budget.allows(what, kind):
                continue
            start = time.monotonic()
            try:
                step = training_step(network, key, device, arguments.get(name), **options)
                runs[name] = Timed(step, device, graph=False)
                peaks[name] = peak_memory(step, device)
            except Exception as error:
                budget.record_failure(what, error, True)
                runs.pop(name, None)
            budget.record_time(start, kind)
        if "torch" not in runs:
            continue
        medians = {name: statistics.median(t) for name, t in interleaved(runs, repeats).items()}
        for name, ms in medians.items():
            ratio = ms / medians["torch"]
            row = {"case": f"{network.name} {mode}", "name": name, "ms": ms, "ratio": ratio, "peak": peaks[name]}
            rows.append(row)
            print(f"{row['case']}: {name} {ms:.1f} ms, {ratio:.2f} x", flush=True)
    return rows

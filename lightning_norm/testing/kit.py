"""What the checks share: the factory of layers, inputs, a training step, distances."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from lightning_norm.layers.base import Normalizer

T = TypeVar("T")

Make: TypeAlias = Callable[..., Normalizer]
"""From the number of channels, and further arguments by name, to a fresh layer."""

Check: TypeAlias = Callable[[Make], None]

C = 6
"""Channels in every check: even, not a power of two."""

REGISTRY: dict[str, Check] = {}


def check(fn: Check) -> Check:
    """Enter a check under its function's name; each layer it makes has the same random starting values."""

    @functools.wraps(fn)
    def run(make: Make) -> None:
        # A check that compares two layers needs equal starts, also of a class that draws them.
        fn(functools.partial(seeded, make))

    REGISTRY[fn.__name__] = run
    return run


def seeded(make: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call ``make`` with the random numbers of seed 0, and leave those of the caller alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **kwargs)


@dataclass(frozen=True)
class Step:
    """What one forward and backward pass gives.

    Args:
        y: output.
        dx: gradient of the input.
        grads: gradient of each parameter, zeros where there is none.
    """

    y: Tensor
    dx: Tensor
    grads: dict[str, Tensor]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def features(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an (N, C, *) input in which no two samples and no two channels have the same mean and deviation."""
    ones = (1,) * (len(shape) - 2)
    mean, std = noise(*shape[:2], *ones, seed=seed + 100), 1 + 0.5 * noise(*shape[:2], *ones, seed=seed + 200).tanh()
    return (noise(*shape, seed=seed, dtype=torch.float64) * std + mean).to(dtype)


def built(make: Make, dtype: torch.dtype | None = None, **arguments: Any) -> Normalizer:
    """Build a layer and move every parameter and running statistic away from its start."""
    layer = make(C, **arguments)
    layer = layer if dtype is None else layer.to(dtype)
    # Sorted, so that the values do not depend on the order in which a class registers its parameters.
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(layer.named_parameters())):
            # At the starting values many layers are BatchNorm, and a wrong equation would not show.
            p.add_(0.3 * noise(*p.shape, seed=300 + i).to(p.dtype))
        for i, name in enumerate(layer.running_names):
            stat = layer._buffers.get(name)
            if stat is not None:
                stat.add_(0.3 * noise(*stat.shape, seed=400 + i).abs().to(stat.dtype))
    return layer


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Step:
    """Run forward and backward, the input's memory format kept."""
    x = x.detach().requires_grad_()
    y = layer(x)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    wanted = [x, *(layer.get_parameter(name) for name in names)]
    # Not ``backward``, which would add to gradients that an earlier step left behind.
    dx, *rest = torch.autograd.grad(y, wanted, dy, allow_unused=True, materialize_grads=True)
    return Step(y.detach(), dx, dict(zip(names, rest, strict=True)))


def distance(got: Tensor, expected: Tensor) -> float:
    """Return the relative L2 distance, computed in float64; infinite where either is not finite."""
    # In float64, or the comparison of float16 tensors would round as coarsely as they do.
    a, b = got.detach().double(), expected.detach().double()
    assert a.shape == b.shape, f"shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return float((a - b).norm() / b.norm().clamp_min(1e-30)) if b.numel() else 0.0


def same(got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Assert that two tensors agree, relative to their norm, or absolutely where that is below one."""
    # Near zero a relative distance would compare rounding with rounding.
    apart = distance(got, expected) * min(1.0, float(expected.detach().double().norm()))
    assert apart <= tolerance, f"{what}: {apart:.2e} apart, at most {tolerance:.0e} expected"


def same_step(got: Step, expected: Step, tolerance: float, what: str) -> None:
    """Assert that output and every gradient agree."""
    same(got.y, expected.y, tolerance, f"{what}, output")
    same(got.dx, expected.dx, tolerance, f"{what}, input gradient")
    for name, grad in expected.grads.items():
        same(got.grads[name], grad, tolerance, f"{what}, gradient of {name}")


def statistics(layer: Normalizer) -> dict[str, Tensor]:
    """Return copies of the running statistics and counters."""
    names = (*layer.running_names, "num_batches_tracked", "skipped_updates")
    buffers = {name: getattr(layer, name, None) for name in names}
    return {name: buffer.clone() for name, buffer in buffers.items() if buffer is not None}


def defined(layer: Normalizer, n: int, size: int) -> bool:
    """Tell whether each statistic of n samples with ``size`` elements per channel has more than one value."""
    # Running statistics are there whatever the input is.
    of_input = layer.training or not layer.track_running_stats
    return not of_input or int(getattr(layer, "statistic_size", lambda n, size: n * size)(n, size)) > 1


@contextmanager
def refused(error: type[Exception], what: str, *words: str) -> Iterator[None]:
    """Assert that the block raises ``error`` with each of ``words`` in its message."""
    said = None
    try:
        yield
    except error as e:
        said = str(e)
    assert said is not None, f"{what}: {error.__name__} expected, nothing was raised"
    # A message is held to its facts, so that its wording may be improved.
    missing = [word for word in words if word not in said]
    assert not missing, f"{what}: the message does not say {missing}: {said}"

"""Checks: torch.compile and torch.export."""

from __future__ import annotations

import torch
from torch import nn

from lightning_norm.testing.kit import C, Make, built, check, features, noise, same, same_step, statistics, step


@check
def compiled_equals_eager(make: Make) -> None:
    """``layer.compile()`` is one graph that gives eager's values, gradients and running statistics."""
    eager, compiled = built(make), built(make)
    compiled.compile()
    x, dy = features(5, C, 7, 3), noise(5, C, 7, 3, seed=7)
    # Two float32 roundings of sums over about 100 terms may lie between them.
    same_step(step(compiled, x, dy), step(eager, x, dy), 3e-6, "compiled")
    for (name, a), b in zip(statistics(compiled).items(), statistics(eager).values(), strict=True):
        same(a, b, 1e-6, f"compiled, {name}")
    with torch.no_grad():
        same(compiled.eval()(x), eager.eval()(x), 3e-6, "compiled, evaluation")


@check
def exports(make: Make) -> None:
    """torch.export takes the layer in evaluation, for any batch size, and the exported program computes the same."""
    layer = built(make).eval()
    # torch 2.15 miscounts the buffers of a root module that has None among them.
    network = nn.Sequential(layer)
    program = torch.export.export(network, (features(5, C, 7, 3),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    # Fewer and more samples than channels, so that no axis was taken for another.
    for n in (2, 5, C + 4):
        x = features(n, C, 7, 3)
        same(program.module()(x), layer(x), 3e-6, f"exported, {n} samples")

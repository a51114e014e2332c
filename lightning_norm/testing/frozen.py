"""Checks: running statistics that are frozen or paused stand still, and the layer computes what it should."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from lightning_norm.layers.base import Normalizer
from lightning_norm.surgery.pause import paused_statistics
from lightning_norm.testing.kit import C, Make, built, check, features, noise, refused, same, same_step, seeded, step


@check
def paused_statistics_stand_still(make: Make) -> None:
    """``with paused_statistics(layer)``: outputs and gradients are those without it, and no buffer moves."""
    # Some normalizers keep running statistics only where they are asked to.
    for arguments in ({}, {"track_running_stats": True}):
        try:
            layer = built(make, torch.float64, **arguments)
        except TypeError:
            continue
        x, dy = (f(5, C, 7, 3, dtype=torch.float64) for f in (features, noise))
        layer(features(5, C, 7, 3, seed=3, dtype=torch.float64))
        plain = copy.deepcopy(layer)
        before = _buffers(layer)
        with paused_statistics(layer):
            paused = seeded(step, layer, x, dy)
        _stood_still(layer, before, "in the block")
        same_step(paused, seeded(step, plain, x, dy), 1e-12, "statistics paused")
        layer(x)
        after = _buffers(plain)
        # The pass in the block has left nothing behind that the next one would see.
        for name, value in _buffers(layer).items():
            same(value, after[name], 1e-12, f"after the block, {name}")
    # Under autocast inputs are narrow, and buffers in float32 must stand still all the same.
    narrow = built(make)
    before = _buffers(narrow)
    with paused_statistics(narrow), torch.autocast("cpu", torch.bfloat16):
        narrow(features(5, C, 7, 3, dtype=torch.bfloat16))
    _stood_still(narrow, before, "in the block under autocast")


@check
def frozen_statistics(make: Make) -> None:
    """``freeze_statistics()``: training normalizes as evaluation does, parameters learn, and no buffer moves."""
    layer = built(make, torch.float64)
    if not layer.has_running_stats:
        with refused(ValueError, "freeze_statistics", type(layer).__name__, "no running statistics"):
            layer.freeze_statistics()
        return
    x, dy = (f(5, C, 7, 3, dtype=torch.float64) for f in (features, noise))
    evaluated = seeded(step, copy.deepcopy(layer).eval(), x, dy)
    assert layer.freeze_statistics() is layer, "freeze_statistics() does not return the layer"
    before = _buffers(layer)
    same_step(seeded(step, layer.train(), x, dy), evaluated, 1e-12, "frozen, in training")
    _stood_still(layer, before, "frozen")
    # What is frozen stays so in a copy, whatever mode is asked for.
    twin = copy.deepcopy(layer).eval().train()
    assert not twin.training, "a copy of a frozen layer trains its statistics"
    layer.freeze_statistics(False)
    assert layer.training, "the layer is not back in training"
    layer(x)
    assert any(not torch.equal(t, before[n]) for n, t in _buffers(layer).items()), "statistics stand still for ever"


def _buffers(layer: Normalizer) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in layer.named_buffers()}


def _stood_still(layer: Normalizer, before: dict[str, Tensor], what: str) -> None:
    for name, t in layer.named_buffers():
        assert torch.equal(t, before[name]), f"{what}, {name} moved"

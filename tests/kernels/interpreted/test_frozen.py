"""Frozen and paused statistics on the kernels: the outputs and gradients of plain PyTorch, and no buffer that moves."""

import contextlib
import copy

import pytest
import torch

import lightning_norm
from lightning_norm import paused_statistics
from lightning_norm.testing.kit import features, noise, same_step, step

MORE = [("dbn", {"power": 0.5}), ("ubn", {"threshold": -0.9, "min_updates": 0}), ("bn", {"momentum": None})]
LAYERS = [*((key, cls.test_arguments) for key, cls in lightning_norm.normalizers().items()), *MORE]


@pytest.mark.parametrize(("key", "arguments"), LAYERS, ids=lambda v: str(v))
@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_moves(key, arguments, frozen):
    layer = lightning_norm.create(key, 6, **arguments)
    if not layer.has_running_stats:
        pytest.skip("keeps no running statistics")
    if "dropout" in layer.ranges:
        layer.dropout = 0.0
    layer(features(5, 6, 5, 3, seed=3))
    if frozen:
        layer.freeze_statistics().train()
    exact = copy.deepcopy(layer).double()
    layer.backend, exact.backend = "triton", "eager"
    x, dy = features(5, 6, 5, 3), noise(5, 6, 5, 3, seed=7)
    before = {name: t.clone() for name, t in layer.named_buffers()}
    with contextlib.ExitStack() as stack:
        for each in () if frozen else (layer, exact):
            stack.enter_context(paused_statistics(each))
        got, expected = step(layer, x, dy), step(exact, x.double(), dy.double())
    same_step(got, expected, 3e-5, "on the kernels")
    for name, t in layer.named_buffers():
        assert torch.equal(t, before[name]), f"{name} moved"

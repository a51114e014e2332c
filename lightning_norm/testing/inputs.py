"""Checks: small, empty and wrong inputs."""

from __future__ import annotations

import math

import numpy as np
import torch

from lightning_norm.testing.kit import C, Make, built, check, defined, features, noise, refused, statistics, step


@check
def small_inputs(make: Make) -> None:
    """One sample, 1x1 maps and vectors: all finite, or a ValueError where a statistic has one value."""
    for shape in ((1, C, 7, 3), (5, C, 1, 1), (1, C, 1, 1), (5, C), (2, C), (1, C), (1, C, 2), (2, C, 1)):
        for training in (True, False):
            layer = built(make).train(training)
            x, dy = features(*shape), noise(*shape, seed=7)
            before = statistics(layer)
            what = f"input {shape}, training={training}"
            if defined(layer, x.shape[0], x[0, 0].numel()):
                got = step(layer, x, dy)
                for name, t in (("output", got.y), ("input gradient", got.dx), *got.grads.items()):
                    assert bool(t.isfinite().all()), f"{what}: {name} is not finite"
                for name, value in statistics(layer).items():
                    assert bool(value.isfinite().all()), f"{what}: {name} is not finite"
                continue
            with refused(ValueError, what, "more than one value per statistic", type(layer).__name__):
                layer(x)
            after = statistics(layer)
            # A refusal in the middle of a run must leave a state that can be saved.
            assert all(torch.equal(after[k], v) for k, v in before.items()), f"{what}: refused, yet statistics moved"


@check
def empty_batch(make: Make) -> None:
    """An empty batch passes, and in training moves no statistics; it counts as a batch, as in torch's BatchNorm."""
    layer = built(make)
    for shape in ((0, C), (0, C, 7, 3)):
        if defined(layer.eval(), 2, torch.Size(shape[2:]).numel()):
            y = layer.eval()(torch.empty(shape))
            assert tuple(y.shape) == shape, f"input {shape}: output {tuple(y.shape)}"
        before = statistics(layer)
        # Other ranks may have samples, so that an empty batch cannot simply be an error.
        got = step(layer.train(), torch.empty(shape), torch.empty(shape))
        assert tuple(got.y.shape) == shape, f"input {shape} in training: output {tuple(got.y.shape)}"
        for name, grad in got.grads.items():
            assert not bool(grad.any()), f"an empty batch {shape} gives {name} a gradient"
        after = statistics(layer)
        if before:
            assert after.pop("num_batches_tracked") == before.pop("num_batches_tracked") + 1, "an empty batch counts"
        assert all(torch.equal(after[k], v) for k, v in before.items()), f"an empty batch {shape} moved the statistics"
    with refused(ValueError, "an empty feature map", "no element per channel", f"(2, {C}, 0, 3)"):
        layer(torch.empty(2, C, 0, 3))


@check
def wrong_dtype(make: Make) -> None:
    """Integer, boolean and complex inputs are a TypeError that names the dtype."""
    layer = make(C)
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        with refused(TypeError, f"{dtype} input", str(dtype), type(layer).__name__):
            layer(torch.ones(5, C, 7, 3).to(dtype))
    with refused(TypeError, "a list for input", "list"):
        layer([1.0, 2.0])


@check
def wrong_shape(make: Make) -> None:
    """A wrong rank or channel count is a ValueError that names the shape."""
    layer = make(C)
    rank: tuple[tuple[int, ...], ...] = ((C,), (), (2, C, 2, 2, 2, 2))
    for shape in rank:
        with refused(ValueError, f"input {shape}", str(shape), f"{len(shape)} dimension"):
            layer(torch.ones(shape))
    for shape in ((5, C + 1, 7, 3), (5, C - 1)):
        with refused(ValueError, f"input {shape}", str(shape), f"num_features={C}", str(shape[1])):
            layer(torch.ones(shape))
    # The usual mistake, and the message has to name the argument that mends it.
    with refused(ValueError, "tokens without channel_dim", "channel_dim=-1"):
        layer(torch.ones(5, 7, C))


@check
def wrong_arguments(make: Make) -> None:
    """num_features, eps and channel_dim out of range are refused by name; a whole number of any type is one."""
    for whole in (np.int64(C), np.int32(C), np.array(C), torch.tensor(C)):
        assert type(make(whole).num_features) is int, f"num_features={whole!r} stayed {type(whole).__name__}"
    # ``True`` is an int in Python, and would be one channel.
    for bad in (0, -1, 2.5, True, np.float32(C), np.bool_(True)):
        with refused(ValueError, f"num_features={bad!r}", "num_features", repr(bad)):
            make(bad)
    arguments: dict[str, tuple[object, ...]] = {"channel_dim": (0, 2, "last")}
    arguments["eps"] = (-1.0, math.nan, math.inf, True, [1e-5], 1j)
    for name, values in arguments.items():
        for value in values:
            with refused(ValueError, f"{name}={value!r}", name, repr(value)):
                make(C, **{name: value})

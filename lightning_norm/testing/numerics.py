"""Checks: precision against float64, half inputs, autocast, casts, NaN."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lightning_norm.testing.kit import (
    C,
    Make,
    built,
    check,
    distance,
    features,
    noise,
    same,
    same_step,
    statistics,
    step,
)

SLACK = {0: 1.5, 100: 1.0, 1000: 1.0}
"""At mean 0 both are at rounding level, 5e-8, and which rounds better is chance: 0.7 to 1.24 times over three seeds."""


@check
def as_precise_as_torch(make: Make) -> None:
    """At mean/std of 0, 100 and 1000 in float32, no farther from float64 than nn.BatchNorm2d, forward and backward."""
    shape = (16, C, 23, 21)
    dy = noise(*shape, seed=7)
    for ratio, slack in SLACK.items():
        x = noise(*shape) + ratio
        theirs = nn.BatchNorm2d(C)
        ours = make(C)
        errors = []
        for layer in (ours, theirs):
            wide = copy.deepcopy(layer).double()
            got, exact = (step(f, x.to(t), dy.to(t)) for f, t in ((layer, torch.float32), (wide, torch.float64)))
            errors.append((distance(got.y, exact.y), distance(got.dx, exact.dx)))
        for what, error, torchs in zip(("output", "input gradient"), *errors, strict=True):
            assert error <= slack * torchs, (
                f"{what} at mean/std = {ratio}: error {error:.2e}, nn.BatchNorm2d's {torchs:.2e}"
            )


@check
def gradient_of_weight_as_precise_as_torchs(make: Make) -> None:
    """At mean/std of 100 and 1000, whatever the weight: its gradient, and x's, no farther from float64 than torch's."""
    if make(C).weight is None:
        return
    shape = (8, C, 14, 13)
    dy = noise(*shape, seed=7)
    relative = 0.0
    for ratio in (100, 1000):
        for gamma in (1.0, 1e-2, 0.0):
            x = noise(*shape) + ratio
            errors, sizes = [], []
            for layer in (make(C), nn.BatchNorm2d(C)):
                assert layer.weight is not None
                nn.init.constant_(layer.weight, gamma)
                wide = copy.deepcopy(layer).double()
                got, exact = (step(f, x.to(t), dy.to(t)) for f, t in ((layer, torch.float32), (wide, torch.float64)))
                of_weight = (got.grads["weight"] - exact.grads["weight"]).norm().item()
                errors.append((of_weight, (got.dx - exact.dx).norm().item()))
                sizes.append(exact.dx.norm().item())
            # Where the factor of x is more than weight, dx is larger, and what counts is the error relative to it.
            # With weight 0 torch's input gradient is 0, and the relative error is that of the weight before.
            relative = errors[1][1] / sizes[1] if sizes[1] else relative
            floors = (0.0, relative * sizes[0])
            what_of = ("weight's gradient", "input gradient")
            for what, error, torchs, floor in zip(what_of, *errors, floors, strict=True):
                assert error <= max(torchs, floor), (
                    f"{what} at mean/std = {ratio}, weight {gamma}: error {error:.2e}, nn.BatchNorm2d's {torchs:.2e}"
                )


@check
def half_inputs(make: Make) -> None:
    """Half inputs: output in their dtype, one rounding away from float64, also where their squares overflow."""
    for dtype in (torch.float16, torch.bfloat16):
        # 300 squared is beyond float16, so squares must be taken in float32.
        for size in (1.0, 300.0):
            x, dy = (features(5, C, 7, 3) * size).to(dtype), noise(5, C, 7, 3, seed=7).to(dtype)
            for training in (True, False):
                layer = built(make).train(training)
                wide = copy.deepcopy(layer).double()
                got, exact = step(layer, x, dy), step(wide, x.double(), dy.double())
                nudged = x.double() * (1 + torch.finfo(torch.float32).eps * noise(5, C, 1, 1, seed=8).sign().double())
                # What statistics rounded to float32 would give: an error of that size is allowed.
                nearby = step(copy.deepcopy(layer).double(), nudged, dy.double())
                what = f"{dtype} inputs of size {size}, training={training}"
                assert got.y.dtype == dtype, f"{what}: output {got.y.dtype}"
                assert got.dx.dtype == dtype, f"{what}: input gradient {got.dx.dtype}"
                # Rounding y costs eps / 2, and the float32 statistics about 1e-6.
                eps = torch.finfo(dtype).eps
                for part, a, b in (("output", got.y, exact.y), ("input gradient", got.dx, exact.dx)):
                    apart = distance(a, b)
                    assert apart <= eps, f"{what}: {part} {apart:.1e} from float64, at most {eps:.1e} expected"
                for name, grad in got.grads.items():
                    assert grad.dtype == torch.float32, f"{what}: gradient of {name} is {grad.dtype}"
                    allowed = max(1e-5, 2 * distance(nearby.grads[name], exact.grads[name]))
                    same(grad, exact.grads[name], allowed, f"{what}: gradient of {name}")
                for name, value in statistics(layer).items():
                    if value.is_floating_point():
                        assert value.dtype == torch.float32, f"{what}: {name} became {value.dtype}"
                        same(value, statistics(wide)[name], 1e-5, f"{what}: {name}")


@check
def autocast_changes_nothing(make: Make) -> None:
    """Inside an autocast region statistics and algebra stay in float32: the same bits as outside."""
    for training in (True, False):
        x, dy = features(5, C, 7, 3), noise(5, C, 7, 3, seed=7)
        outside = step(built(make).train(training), x, dy)
        # Forward and backward both, for the backward pass runs matrix products of its own.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = step(built(make).train(training), x, dy)
        assert inside.y.dtype == torch.float32, f"output {inside.y.dtype} for a float32 input"
        same_step(inside, outside, 0.0, f"autocast, training={training}")


@check
def casts_keep_statistics(make: Make) -> None:
    """Casts to half, bfloat16 and double move parameters, and leave running statistics at float32 at least."""
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        layer = built(make)
        before = statistics(layer)
        layer = layer.to(dtype)
        x = features(5, C, 7, 3, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype, f"{dtype} layer and input: output {y.dtype}"
        assert bool(y.isfinite().all()), f"{dtype}: output not finite"
        for name, p in layer.named_parameters():
            assert p.dtype == dtype, f"{name} is {p.dtype} after .to({dtype})"
        for name in layer.running_names:
            stat = layer._buffers.get(name)
            if stat is not None:
                wide = torch.promote_types(dtype, torch.float32)
                assert stat.dtype == wide, f"{name} is {stat.dtype} after .to({dtype}), expected {wide}"
        untouched = statistics(built(make).to(dtype))
        for name, value in before.items():
            same(untouched[name], value, 0.0, f"{name} after .to({dtype})")


@check
def overflow_does_not_poison(make: Make) -> None:
    """Statistics that are finite in float64 and not in the float32 of the buffers move none, and are counted."""
    for size, offset in ((1e25, 0.0), (1.0, 1e39)):
        layer = built(make)
        layer(features(5, C, 7, 3))
        before = statistics(layer)
        layer(features(5, C, 7, 3, seed=2, dtype=torch.float64) * size + offset)
        after = statistics(layer)
        for name, value in layer.named_buffers():
            assert not value.is_floating_point() or bool(value.isfinite().all()), f"{name} is not finite"
        moved = [name for name in before.keys() - {"skipped_updates"} if not torch.equal(after[name], before[name])]
        skipped = int(after["skipped_updates"] - before["skipped_updates"]) if before else 0
        # Deviations of 1e25 fit where variances do not: all statistics move, or none and the batch is counted.
        assert bool(moved) != bool(skipped) or not before, f"{moved} moved, skipped_updates rose by {skipped}"


@check
def nan_does_not_poison(make: Make) -> None:
    """A NaN or an infinity in the input leaves the running statistics as they were and is counted."""
    for bad in (float("nan"), float("inf"), float("-inf")):
        layer = built(make)
        layer(features(5, C, 7, 3))
        before = statistics(layer)
        x = features(5, C, 7, 3, seed=2)
        # A single element, as one broken image in a batch would bring.
        x[1, 2, 3, 1] = bad
        layer(x)
        after = statistics(layer)
        for name in before.keys() - {"skipped_updates"}:
            assert torch.equal(after[name], before[name]), f"{name} moved on an input with {bad}"
        if before:
            skipped = int(after["skipped_updates"])
            assert skipped == 1, f"skipped_updates is {skipped} after one input with {bad}"
            layer(features(5, C, 7, 3, seed=3))
            again = statistics(layer)
            # The layer must go on as if the bad batch had never come.
            assert int(again["num_batches_tracked"]) == 2, "the update after the skipped one was not made"
            assert all(bool(v.isfinite().all()) for v in again.values()), "running statistics are not finite"

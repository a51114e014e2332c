"""Checks: masks, ghost batches, and statistics that move once however often a forward pass runs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_norm.errors import MaskError
from lightning_norm.layers.base import MomentNorm, Normalizer
from lightning_norm.layers.special_calls import last_mask
from lightning_norm.surgery.masks import masks
from lightning_norm.surgery.pause import paused_statistics
from lightning_norm.testing.kit import (
    C,
    Make,
    Step,
    built,
    check,
    features,
    noise,
    refused,
    same,
    same_step,
    seeded,
    statistics,
    step,
)

SIZES = (5, 3)
PADDED = (6, 5)


def wide(make: Make, training: bool = True) -> Normalizer:
    """Return a layer in float64."""
    return built(make, torch.float64).train(training)


def takes_masks(layer: Normalizer) -> bool:
    """Tell whether a layer takes a mask."""
    return isinstance(layer, MomentNorm) and not layer.unsupported.mask


def padded(t: Tensor, garbage: float) -> Tensor:
    """Return t with one more sample, and with more positions, all of them ``garbage``."""
    # With a whole sample of padding behind the others.
    out = t.new_full((t.shape[0] + 1, C, *PADDED), garbage)
    out[:-1, :, : t.shape[2], : t.shape[3]] = t
    return out


def valid(x: Tensor) -> Tensor:
    """Return the mask of :func:`padded`."""
    mask = torch.zeros(x.shape[0] + 1, *PADDED, dtype=torch.bool)
    mask[:-1, : x.shape[2], : x.shape[3]] = True
    return mask


def cut(t: Tensor, x: Tensor) -> Tensor:
    """Undo :func:`padded`."""
    return t[:-1, :, : x.shape[2], : x.shape[3]]


def masked_step(layer: Normalizer, x: Tensor, dy: Tensor, garbage: float = float("nan")) -> Step:
    """Run :func:`step` on the padded input, and cut the padding away, whose output and gradient must be 0."""
    # The padding holds NaN unless told otherwise, which shows in any sum that reads it.
    mask = valid(x)
    call = functools.partial(layer, mask=mask)
    got = step(_Called(layer, call), padded(x, garbage), padded(dy, garbage))
    for what, t in (("output", got.y), ("gradient", got.dx)):
        assert not t.masked_fill(mask.unsqueeze(1), 0).any(), f"{what} of padding is not 0"
    return Step(cut(got.y, x), cut(got.dx, x), got.grads)


class _Called(torch.nn.Module):
    """A layer's parameters, and another way to call it."""

    def __init__(self, layer: Normalizer, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        for name, p in layer.named_parameters():
            self.register_parameter(name.replace(".", "_"), p)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@check
def masked_equals_unpadded(make: Make) -> None:
    """With a mask, padding of NaN and a sample that is all padding change nothing: values, gradients, statistics."""
    x, dy = features(4, C, *SIZES, dtype=torch.float64), noise(4, C, *SIZES, seed=7, dtype=torch.float64)
    for training in (True, False):
        plain, masked = wide(make, training), wide(make, training)
        if not takes_masks(masked):
            with refused(MaskError, "a mask", type(masked).__name__), masks(masked, valid(x)):
                masked(padded(x, 0.0))
            return
        what = f"masked, training={training}"
        same_step(seeded(masked_step, masked, x, dy), seeded(step, plain, x, dy), 1e-10, what)
        assert last_mask(masked) is not None, "the monitor does not hear of the mask"
        for name, value in statistics(plain).items():
            same(statistics(masked)[name], value, 1e-10, f"{what}, {name}")


@check
def masked_batch_of_padding(make: Make) -> None:
    """A batch that is all padding gives zeros, gradients that are finite, and moves no statistic."""
    layer = wide(make)
    if not takes_masks(layer):
        return
    # Counters may count the batch; the statistics have to stand still.
    before = {name: b.clone() for name, b in layer.named_buffers() if name in layer.running_names}
    nothing = torch.zeros(3, *SIZES, dtype=torch.bool)
    # Infinities, since one times the 0 of a mask would show as NaN.
    x = torch.full((3, C, *SIZES), float("inf"), dtype=torch.float64)
    got = step(_Called(layer, functools.partial(layer, mask=nothing)), x, torch.ones_like(x))
    assert not got.y.any(), "output of padding is not 0"
    assert not got.dx.any(), "gradient of padding is not 0"
    for name, grad in got.grads.items():
        assert grad.isfinite().all(), f"gradient of {name}: {grad}"
    for name, value in before.items():
        same(layer.get_buffer(name), value, 0.0, f"{name} after a batch of padding")


@check
def masked_second_derivative(make: Make) -> None:
    """Double backward through a mask agrees with that of the unpadded input."""
    layer = wide(make)
    if not takes_masks(layer):
        return
    x, dy = features(3, C, *SIZES, dtype=torch.float64), noise(3, C, *SIZES, seed=7, dtype=torch.float64)
    # As it is and padded: the second derivatives must be the same.
    results = []
    for pad in (False, True):
        twin, leaf = copy.deepcopy(layer), x.clone().requires_grad_()
        y = cut(seeded(twin, padded(leaf, 0.0), mask=valid(x)), x) if pad else seeded(twin, leaf)
        (dx,) = torch.autograd.grad(y, leaf, dy, create_graph=True)
        results.append(torch.autograd.grad((dx * noise(*x.shape, seed=8, dtype=torch.float64)).sum(), leaf)[0])
    same(results[1], results[0], 1e-9, "double backward with a mask")


@check
def masked_in_ghost_batches_and_autocast(make: Make) -> None:
    """A mask counts alike in groups of samples and inside an autocast region."""
    x, dy = (padded(t, float("nan")) for t in _pair())
    mask, plain = valid(_pair()[0]), wide(make)
    if not takes_masks(plain):
        return
    size = 2 if plain.train_uses_batch_stats else None
    bounds = [(0, 5)] if size is None else [(0, 2), (2, 5)]
    made = functools.partial(make, **({} if size is None else {"virtual_batch_size": size}))

    # Of five samples, one of them padding, the last three are the second group.
    def parts(t: Tensor) -> Tensor:
        return torch.cat([plain(t[a:b], mask=mask[a:b]) for a, b in bounds])

    expected = seeded(step, _Called(plain, parts), x, dy)
    for autocast in (False, True):
        layer = wide(made)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            got = seeded(step, _Called(layer, functools.partial(layer, mask=mask)), x, dy)
        _same_as_masked(got, expected, layer, plain, f"masked in ghost batches, {autocast=}")


@check
def masked_compiled_equals_eager(make: Make) -> None:
    """With a mask ``layer.compile()`` is one graph that gives eager's values, gradients and running statistics."""
    x, dy = (padded(t, float("nan")) for t in _pair())
    mask, plain, compiled = valid(_pair()[0]), wide(make), wide(make)
    if not takes_masks(plain):
        return
    # Without the code generator, which takes seconds a layer: what a graph gets wrong is wrong before it.
    compiled.compile(backend="aot_eager")
    got, expected = (
        seeded(step, _Called(layer, functools.partial(layer, mask=mask)), x, dy) for layer in (compiled, plain)
    )
    _same_as_masked(got, expected, compiled, plain, "masked, compiled")


def _pair() -> tuple[Tensor, Tensor]:
    return features(4, C, *SIZES, dtype=torch.float64), noise(4, C, *SIZES, seed=7, dtype=torch.float64)


def _same_as_masked(got: Step, expected: Step, layer: Normalizer, plain: Normalizer, what: str) -> None:
    same_step(got, expected, 1e-10, what)
    for name, value in statistics(plain).items():
        same(statistics(layer)[name], value, 1e-10, f"{what}, {name}")


@check
def ghost_batches(make: Make) -> None:
    """``virtual_batch_size`` equals a call for each group of samples, the rest in the last; others refuse it."""
    x, dy = features(7, C, *SIZES, dtype=torch.float64), noise(7, C, *SIZES, seed=7, dtype=torch.float64)
    whole = wide(make)
    if not isinstance(whole, MomentNorm):
        return
    if not whole.train_uses_batch_stats:
        with refused((ValueError, TypeError), "ghost batches", type(whole).__name__):  # type: ignore[arg-type]
            make(C, virtual_batch_size=3)
        return
    ghost = wide(functools.partial(make, virtual_batch_size=3))
    assert "virtual_batch_size=3" in repr(ghost), f"repr does not show it: {ghost!r}"

    # Seven samples by threes: the one that is left over joins the second group.
    def parts(x: Tensor) -> Tensor:
        return torch.cat([whole(part) for part in (x[:3], x[3:])])

    same_step(seeded(step, ghost, x, dy), seeded(step, _Called(whole, parts), x, dy), 1e-10, "ghost batches")
    for name, value in statistics(whole).items():
        same(statistics(ghost)[name], value, 1e-10, f"ghost batches, {name}")
    same(ghost.eval()(x), whole.eval()(x), 1e-10, "evaluation after ghost batches")


@check
def statistics_move_once(make: Make) -> None:
    """Activation checkpointing of either kind, whose forward passes run twice, changes nothing; nor do extra passes."""
    x, dy = features(6, C, *SIZES, dtype=torch.float64), noise(6, C, *SIZES, seed=7, dtype=torch.float64)
    for size in (None, 3) if built(make).train_uses_batch_stats and isinstance(built(make), MomentNorm) else (None,):
        options = {} if size is None else {"virtual_batch_size": size}
        made = functools.partial(make, **options)
        plain = wide(made)
        expected, buffers = seeded(_two_steps, plain, plain, x, dy), dict(plain.named_buffers())
        for reentrant in (True, False):
            layer = wide(made)
            call = functools.partial(_checkpointed, layer, reentrant)
            same_step(seeded(_two_steps, layer, _Called(layer, call), x, dy), expected, 1e-10, f"{reentrant=}, {size=}")
            for name, value in layer.named_buffers():
                same(value, buffers[name], 1e-10, f"{name}, {reentrant=}, {size=}")
        # A pass in a pause counts as little as the second run of a checkpoint.
        with paused_statistics(plain):
            plain(2 * x)
        for name, value in plain.named_buffers():
            same(value, buffers[name], 0.0, f"{name} after an extra pass")


def _checkpointed(layer: Normalizer, reentrant: bool, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(layer, x, use_reentrant=reentrant)
    return y


def _two_steps(layer: Normalizer, call: torch.nn.Module, x: Tensor, dy: Tensor) -> Step:
    """Run two steps; a method that follows its running statistics shows in the second one what it began with."""
    # Not ``step``: gradients with respect to chosen inputs are not for reentrant checkpointing.
    for batch in (x, 2 * x + 1):
        leaf = batch.clone().requires_grad_()
        layer.zero_grad()
        y = call(leaf)
        y.backward(dy)
    assert leaf.grad is not None
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in layer.named_parameters()}
    return Step(y.detach(), leaf.grad, grads)

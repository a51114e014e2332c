"""Checks: gradients, first and second, and what autograd keeps."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.scheduled import saved_values
from lightning_norm.testing.kit import C, Make, built, check, features, noise, same, seeded, statistics, step


def as_function(layer: Normalizer) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return the layer as a function of its parameters and x, without memory, and the parameters."""
    named = dict(layer.named_parameters())
    buffers = {name: b.clone() for name, b in layer.named_buffers()}

    def call(*arguments: Tensor) -> Tensor:
        *parameters, x = arguments
        # Finite differences call it many times: each call starts from the same running statistics.
        state = {**dict(zip(named, parameters, strict=True)), **{name: b.clone() for name, b in buffers.items()}}
        y: Tensor = torch.func.functional_call(layer, state, (x,))
        return y

    return call, [p.detach().clone().requires_grad_() for p in named.values()]


def modes_to_check(make: Make) -> tuple[bool, ...]:
    """Return the modes, training and evaluation, whose gradient is that of the output."""
    return (True, False) if make(C).gradient_is_exact else (False,)


@check
def gradcheck(make: Make) -> None:
    """Every gradient agrees with finite differences in float64, in training and evaluation."""
    for training in modes_to_check(make):
        call, parameters = as_function(built(make, torch.float64).train(training))
        # Small, because finite differences call the layer once for each element.
        x = features(3, C, 3, dtype=torch.float64).requires_grad_()
        try:
            torch.autograd.gradcheck(call, (*parameters, x))
        except RuntimeError as error:
            raise AssertionError(f"training={training}: {error}") from error


@check
def gradgradcheck(make: Make) -> None:
    """Second derivatives agree with finite differences of the first."""
    for training in modes_to_check(make):
        call, parameters = as_function(built(make, torch.float64).train(training))
        x = features(2, C, 3, dtype=torch.float64).requires_grad_()
        dy = noise(2, C, 3, seed=7, dtype=torch.float64).requires_grad_()
        try:
            torch.autograd.gradgradcheck(call, (*parameters, x), dy)
        except RuntimeError as error:
            raise AssertionError(f"training={training}: {error}") from error


@check
def every_parameter_gets_a_gradient(make: Make) -> None:
    """No dead parameter: DistributedDataParallel waits for each."""
    got = step(
        built(make, torch.float64),
        features(5, C, 7, 3, dtype=torch.float64),
        noise(5, C, 7, 3, seed=7, dtype=torch.float64),
    )
    for name, grad in (*got.grads.items(), ("the input", got.dx)):
        assert bool(grad.isfinite().all()), f"the gradient of {name} is not finite"
        # Rounding gives 1e-17 where a parameter has no effect.
        assert float(grad.abs().max()) > 1e-9, f"the gradient of {name} is zero"


@check
def expanded_gradient(make: Make) -> None:
    """``y.sum().backward()`` hands over a gradient of strides 0, which must count as the dense one."""
    for dtype, channel_dim in itertools.product((torch.float64, torch.float32), (1, -1)):
        x = features(5, C, 7, 3, dtype=dtype)
        x = x if channel_dim == 1 else x.movedim(1, -1).contiguous()
        # As autograd makes it: one element, with a stride of 0 along every axis.
        one = torch.ones((), dtype=dtype).expand(x.shape)
        expanded, dense = (step(built(make, dtype, channel_dim=channel_dim), x, dy) for dy in (one, one.clone()))
        for name in expanded.grads:
            same(expanded.grads[name], dense.grads[name], 1e-5, f"gradient of {name}")
        same(
            expanded.dx, dense.dx, 1e-5, "input gradient"
        )  # both are zero but for rounding where statistics are the input's


@check
def inplace_after(make: Make) -> None:
    """An in-place ReLU may follow, as in most networks."""
    for dtype, training in itertools.product((torch.float64, torch.float32), (True, False)):
        grads: list[Tensor] = []
        for inplace in (True, False):
            x = features(5, C, 7, 3, dtype=dtype).requires_grad_()
            y = built(make, dtype).train(training)(x)
            # Autograd notices if y was saved, or is a view, and raises; a wrong gradient would show below.
            z = torch.relu_(y) if inplace else torch.relu(y)
            grads += torch.autograd.grad(z, x, noise(5, C, 7, 3, seed=7, dtype=dtype))
        same(grads[0], grads[1], 0.0, f"{dtype}, training={training}, input gradient under an in-place ReLU")


@check
def activation_checkpointing(make: Make) -> None:
    """What ``torch.utils.checkpoint`` runs again gives the same gradients and moves no buffer a second time.

    Two batches are in one graph: where the output in training depends on a buffer, the second run of one batch must see
    the buffer as the first did, and the class says so by ``train_uses_running_stats``.
    """
    dy = noise(4, C, 4, 3, seed=7)

    def run(use_reentrant: bool | None) -> tuple[list[Tensor], dict[str, Tensor]]:
        layer, xs = built(make), [features(4, C, 4, 3, seed=seed).requires_grad_() for seed in (1, 2)]
        if use_reentrant is None:
            ys = [seeded(layer, x) for x in xs]
        else:
            ys = [seeded(checkpoint, layer, x, use_reentrant=use_reentrant) for x in xs]
        wanted = [p for p in layer.parameters() if p.requires_grad]
        # Not torch.autograd.grad, which the reentrant kind refuses.
        torch.autograd.backward([(y * dy).sum() for y in ys])
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in (*xs, *wanted)]
        return [*(y.detach() for y in ys), *grads], dict(layer.named_buffers())

    expected, buffers = run(None)
    for use_reentrant in (True, False):
        got, moved = run(use_reentrant)
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            same(a, b, 1e-6, f"use_reentrant={use_reentrant}, output or gradient {i}")
        for name, value in buffers.items():
            same(moved[name], value, 0.0, f"use_reentrant={use_reentrant}, buffer {name}")


@check
def other_passes_before_the_backward_pass(make: Make) -> None:
    """A pass in either mode, and a schedule that moves, between a pass and its backward pass change no gradient."""
    dy = noise(5, C, 7, 3, seed=7)
    for first, second in itertools.product((True, False), repeat=2):
        gradients: list[Tensor] = []
        for disturbed in (False, True):
            layer, x = built(make).train(first), features(5, C, 7, 3).requires_grad_()
            y = seeded(layer, x)
            if disturbed:
                layer.train(second)(features(5, C, 7, 3, seed=2))
                for name, value in saved_values(layer).items():
                    setattr(layer, name, value)
            gradients.append(torch.autograd.grad(y, x, dy)[0])
        same(gradients[1], gradients[0], 0.0, f"training={first}, then training={second}: input gradient")


@check
def input_is_left_alone(make: Make) -> None:
    """Neither pass writes to its input, nor to the gradient it is handed."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, dy = features(5, C, 7, 3, dtype=dtype), noise(5, C, 7, 3, seed=7, dtype=dtype)
        # An in-place write would also spoil what another branch of the network reads.
        before = x.clone(), dy.clone()
        step(built(make), x, dy)
        assert torch.equal(x, before[0]), f"{dtype}: the input was overwritten"
        assert torch.equal(dy, before[1]), f"{dtype}: the gradient was overwritten"


@check
def statistics_hold_no_graph(make: Make) -> None:
    """Running statistics never require gradients, whatever the input does."""
    layer = make(C)
    for seed in (1, 2):
        # Times 2, so that x has a graph behind it, as a convolution's output has.
        x = features(5, C, 7, 3, seed=seed).requires_grad_() * 2
        layer(x)
    for name, buffer in layer.named_buffers():
        assert not buffer.requires_grad, f"{name} requires grad"
        assert buffer.grad_fn is None, f"{name} keeps the graph"


@check
def evaluation_moves_nothing(make: Make) -> None:
    """Evaluation leaves every buffer and parameter as it was."""
    layer = built(make).eval()
    before = {name: t.clone() for name, t in (*layer.named_buffers(), *layer.named_parameters())}
    layer(features(5, C, 7, 3))
    for name, t in (*layer.named_buffers(), *layer.named_parameters()):
        assert torch.equal(t, before[name]), f"evaluation moved {name}"
    # The reverse, or a layer that never moves anything would pass.
    layer.train()(features(5, C, 7, 3))
    moved = statistics(layer)
    for name in layer.running_names if layer.track_running_stats else ():
        assert not torch.equal(moved[name], before[name]), f"training did not move {name}"


FEW = 4
"""(N, C) tensors in float64 that one piece of memory beside the input may hold."""


@check
def saves_only_the_input(make: Make) -> None:
    """For the backward pass x is kept, once, and nothing else of its size."""
    for training in (True, False):
        layer = built(make).train(training)
        x = features(5, C, 17, 13).requires_grad_()
        saved: dict[int, int] = {}

        def pack(t: Tensor, saved: dict[int, int] = saved) -> Tensor:
            storage = t.untyped_storage()
            # By storage, for two views of x are one piece of memory.
            saved[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x)
        size_of_x = saved.pop(x.untyped_storage().data_ptr(), 0)
        assert size_of_x == x.untyped_storage().nbytes(), f"training={training}: x itself is not what is saved"
        # A few (N, C) tensors in float64 are allowed.
        bound = 8 * FEW * 5 * C
        large = [size for size in saved.values() if size > bound]
        assert not large, f"training={training}: beside x, tensors of {large} bytes are kept; x has {x.nbytes}"
        assert y.requires_grad

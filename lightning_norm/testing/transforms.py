"""Checks: torch.jit.trace, torch.fx, torch.func, forward-mode AD, batched gradients, fake tensors and make_fx."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.jit import TracerWarning  # type: ignore[attr-defined]

from lightning_norm.layers.base import Normalizer
from lightning_norm.ops.torch_private import fake_tensor_mode
from lightning_norm.testing.gradients import as_function
from lightning_norm.testing.kit import C, Make, built, check, features, noise, refused, same, seeded, statistics

SHAPE = (5, C, 4, 3)
CLOSE = 1e-9
"""In float64, for the same equations in another order."""


def wide(make: Make, training: bool = False) -> Normalizer:
    """Return a layer in float64."""
    return built(make, torch.float64).train(training)


def sample(*shape: int, seed: int = 1) -> Tensor:
    """Return an input in float64."""
    return features(*(shape or SHAPE), seed=seed, dtype=torch.float64)


def state(layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return copies of the parameters and of the buffers."""
    parameters = {name: p.detach().clone() for name, p in layer.named_parameters()}
    return parameters, {name: b.clone() for name, b in layer.named_buffers()}


def dual(t: Tensor, tangent: Tensor) -> Tensor:
    """Return t with a tangent."""
    made: Tensor = forward_ad.make_dual(t, tangent)  # type: ignore[no-untyped-call]
    return made


def tangent_of(t: Tensor) -> Any:
    """Return the tangent of a dual tensor, ``None`` where it has none."""
    return forward_ad.unpack_dual(t).tangent  # type: ignore[no-untyped-call]


def called(layer: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
    """Call the layer as a function of its state."""
    y: Tensor = functional_call(layer, (parameters, buffers), (x,))
    return y


def moves_statistics(layer: Normalizer) -> bool:
    """Tell whether the layer writes to its buffers in training."""
    twin = copy.deepcopy(layer).train()
    before = statistics(twin)
    seeded(twin, sample())
    return any(not torch.equal(value, before[name]) for name, value in statistics(twin).items())


@check
def traced(make: Make) -> None:
    """``torch.jit.trace`` takes the layer in either mode; the graph serves other batches, sizes and statistics."""
    for training in (False, True):
        layer = wide(make, training)
        network = nn.Sequential(copy.deepcopy(layer))
        # Recorded, for torch goes on after a warning that is an error, with the exception set.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            program = seeded(torch.jit.trace, network, sample(), check_trace=False)
        frozen = [f"{w.filename}:{w.lineno}: {w.message}" for w in caught if issubclass(w.category, TracerWarning)]
        assert not frozen, "the graph holds constants:\n" + "\n".join(frozen)
        # Tracing has run the layer, which moved the statistics in the graph.
        program.load_state_dict({f"0.{name}": value for name, value in layer.state_dict().items()}, strict=False)
        for shape in ((3, C, 4, 3), (7, C, 6, 5)):
            x = sample(*shape, seed=9)
            same(seeded(program, x), seeded(layer, x), CLOSE, f"traced, {shape}, training={training}")
        for name, value in layer.state_dict().items():
            same(program.state_dict()[f"0.{name}"], value, CLOSE, f"traced, {name}, training={training}")


@check
def leaf_of_fx(make: Make) -> None:
    """``torch.fx.symbolic_trace`` keeps the layer whole, as it does with torch's own layers."""
    network = nn.Sequential(nn.Identity(), wide(make)).eval()
    graph = torch.fx.symbolic_trace(network)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == ["0", "1"], f"torch.fx found calls of {called}, expected ['0', '1']"
    same(graph(sample()), network(sample()), 0.0, "torch.fx")


@check
def torch_func(make: Make) -> None:
    """grad, vjp, jacrev, vmap, per-sample gradients and ensembles of ``torch.func`` agree with autograd."""
    layer, x, dy = wide(make), sample(), noise(*SHAPE, seed=7, dtype=torch.float64)
    parameters, buffers = state(layer)

    def loss(p: dict[str, Tensor], x: Tensor, dy: Tensor) -> Tensor:
        return (called(layer, p, buffers, x) * dy).sum()

    leaf = x.clone().requires_grad_()
    names = list(parameters)
    (layer(leaf) * dy).sum().backward()
    expected = {name: layer.get_parameter(name).grad for name in names}
    assert leaf.grad is not None
    of_parameters, of_x = grad(loss, argnums=(0, 1))(parameters, x, dy)
    same(of_x, leaf.grad, CLOSE, "torch.func.grad, input")
    same(vjp(layer, x)[1](dy)[0], leaf.grad, CLOSE, "torch.func.vjp")
    same(jacrev(lambda x: (layer(x) * dy).sum())(x), leaf.grad, CLOSE, "torch.func.jacrev")
    if not parameters:
        return
    # Per-sample gradients, as differentially private training asks for them.
    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x.unsqueeze(1), dy.unsqueeze(1))
    for name in names:
        wanted = expected[name]
        wanted = torch.zeros_like(parameters[name]) if wanted is None else wanted
        same(of_parameters[name], wanted, CLOSE, f"torch.func.grad, {name}")
        if layer.track_running_stats or not layer.train_uses_batch_stats:  # a sample alone is evaluated alike
            same(each[name].sum(0), wanted, CLOSE, f"per-sample gradients, {name}")
    batches = torch.stack([x, sample(seed=4)])
    same(vmap(layer)(batches), torch.stack([layer(batch) for batch in batches]), CLOSE, "vmap")
    # An ensemble: layers of different parameters, run as one.
    members: list[nn.Module] = [copy.deepcopy(layer) for _ in range(3)]
    for i, member in enumerate(members):
        with torch.no_grad():
            for p in member.parameters():
                p.add_(0.1 * noise(*p.shape, seed=i, dtype=torch.float64))
    stacked, more = stack_module_state(members)
    together = vmap(lambda p, b: called(layer, p, b, x))(stacked, more)
    same(together, torch.stack([member(x) for member in members]), CLOSE, "ensemble")


@check
def torch_func_in_training(make: Make) -> None:
    """In training, statistics that are passed in move as in a plain call; others are refused in words, as by torch."""
    layer = wide(make, training=True)
    parameters, buffers = state(layer)

    def loss(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        y = called(layer, p, b, x)
        return y.square().sum(), y

    if moves_statistics(layer):
        before = statistics(layer)
        mapped = vmap(layer)
        for transform in (grad(lambda x: layer(x).square().sum()), mapped):
            with refused(RuntimeError, "torch.func in training", type(layer).__name__, "torch's BatchNorm", "eval()"):
                transform(torch.stack([sample()] * 2) if transform is mapped else sample())
        for name, value in statistics(layer).items():
            same(value, before[name], 0.0, f"{name} after a refused call")
    x = sample()
    if not parameters:
        return
    of_parameters, y = seeded(grad(loss, has_aux=True), parameters, buffers, x)
    expected = seeded(layer, x)
    expected.square().sum().backward()
    same(y, expected, CLOSE, "torch.func.grad in training")
    for name, p in layer.named_parameters():
        same(of_parameters[name], torch.zeros_like(p) if p.grad is None else p.grad, CLOSE, f"in training, {name}")
    for name, value in layer.named_buffers():
        same(buffers[name], value, CLOSE, f"in training, {name}")


@check
def forward_mode(make: Make) -> None:
    """Forward-mode AD agrees with the backward pass, leaves no tangent in a buffer, and moves it as a plain call."""
    for training in (False, True):
        layer = wide(make, training)
        function, parameters = as_function(layer)
        call = functools.partial(seeded, function)
        point = (*parameters, sample())
        along = tuple(noise(*t.shape, seed=20 + i, dtype=torch.float64) for i, t in enumerate(point))
        # Reverse over reverse: no forward-mode formula is used.
        expected = torch.autograd.functional.jvp(call, point, along)[1]  # type: ignore[no-untyped-call]
        what = f"training={training}"
        values = tuple(t.detach() for t in point)
        with forward_ad.dual_level():
            y = call(*map(dual, values, along))
            same(tangent_of(y), expected, CLOSE, f"forward-mode AD, {what}")
        twin = copy.deepcopy(layer)
        with forward_ad.dual_level():
            seeded(twin, dual(values[-1], along[-1]))
            for name, buffer in twin.named_buffers():
                assert tangent_of(buffer) is None, f"{name} has a tangent, {what}"
        seeded(layer, values[-1])
        for (name, buffer), plain in zip(twin.named_buffers(), layer.buffers(), strict=True):
            same(buffer, plain, CLOSE, f"{name} in forward-mode AD, {what}")
        if not training:
            same(jvp(layer, values[-1:], along[-1:])[0], layer(values[-1]), CLOSE, "torch.func.jvp")


@check
def batched_gradients(make: Make) -> None:
    """``torch.autograd.grad(..., is_grads_batched=True)`` equals one call after the other."""
    for training in (False, True):
        for dtype in (torch.float64, torch.float32):
            layer = built(make, dtype).train(training)
            x = features(*SHAPE, dtype=dtype).requires_grad_()
            y = seeded(layer, x)
            inputs = (x, *(p for p in layer.parameters() if p.requires_grad))
            gradients = noise(3, *SHAPE, seed=7, dtype=dtype)
            options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
            got = torch.autograd.grad(y, inputs, gradients, is_grads_batched=True, **options)
            alone = [torch.autograd.grad(y, inputs, dy, **options) for dy in gradients]
            for batch, each in zip(got, zip(*alone, strict=True), strict=True):
                tolerance = CLOSE if dtype == torch.float64 else 1e-4
                same(batch, torch.stack(each), tolerance, f"batched gradients, {dtype}, training={training}")


@check
def fake_and_proxy(make: Make) -> None:
    """Fake tensors, the meta device and ``make_fx``, also with symbolic sizes, take the layer."""
    for training in (False, True):
        layer = wide(make, training)
        network, twin = nn.Sequential(layer), nn.Sequential(copy.deepcopy(layer))
        with fake_tensor_mode(allow_non_fake_inputs=True) as mode:
            y = twin(mode.from_tensor(sample()))
        assert y.shape == SHAPE, f"fake tensors, training={training}: output {tuple(y.shape)}"
        y = copy.deepcopy(network).to("meta")(sample().to("meta"))
        assert y.shape == SHAPE, f"meta, training={training}: output {tuple(y.shape)}"
        # With symbolic sizes the graph must serve an input of another size, too.
        for kind in ("real", "symbolic"):
            graph = make_fx(functools.partial(called, layer), tracing_mode=kind, _allow_non_fake_inputs=True)
            with torch.no_grad():
                program = seeded(graph, *state(layer), sample())
                x = sample(seed=9) if kind == "real" else sample(7, C, 6, 5, seed=9)
                got = seeded(program, *state(layer), x)
                same(got, seeded(copy.deepcopy(layer), x), CLOSE, f"make_fx, {kind}, training={training}")

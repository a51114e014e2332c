"""The layers that a benchmark times side by side, and the check that each computes what it should."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.bench.formulas import CONTEXTS, FORMULAS, Naive, contexts_of
from lightning_norm.layers.arguments import number_of_groups
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.inference import BATCH_NORMS
from lightning_norm.normalizers import create
from lightning_norm.normalizers.context.assignment import assign, context_layers
from lightning_norm.ops import torch_private
from lightning_norm.ops.normalize import activated

ARGUMENTS: dict[str, dict[str, Any]] = {
    "ubn": {"threshold": 1.0},  # the condensation of every batch is measured
    "cn": {"context": "ids", "num_contexts": CONTEXTS},
}
"""Key of a normalizer -> the arguments that it is built with."""

PEERS = {"bnet": "torch + depthwise", "gn": "torch GroupNorm"}
"""Key of a normalizer -> name of what its user would otherwise take, where that is not torch's BatchNorm alone."""

TOLERANCE = 1e-4
"""Largest error of a float32 result, relative to the norm of the float64 result."""

PEER_FACTOR = 10
"""A peer may be that much further off: on CUDA its convolution may round to TF32."""


class Activated(nn.Module):
    """A contender with an activation behind it, which a normalizer of this package computes by itself.

    Args:
        layer: the contender.
        activation: "relu" or "silu".
    """

    def __init__(self, layer: nn.Module, activation: str) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of what the layer makes of x."""
        if isinstance(self.layer, Normalizer):
            y: Tensor = self.layer(x, self.activation)
            return y
        return activated(self.layer(x), self.activation, None)


def contenders(
    shape: tuple[int, ...],
    keys: Sequence[str],
    device: str,
    compiled: bool,
    naive: bool = True,
    activation: str = "none",
) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and layer: torch's, ours eager and compiled, and the naive formula eager and compiled.

    Args:
        shape: of x.
        keys: of the normalizers.
        device: "cpu" or "cuda".
        compiled: also under torch.compile.
        naive: also the formulas.
        activation: behind each of them.
    """
    for name, layer in _layers(shape, keys, device, compiled, naive):
        yield name, layer if activation == "none" else Activated(layer, activation)


def _layers(
    shape: tuple[int, ...], keys: Sequence[str], device: str, compiled: bool, naive: bool
) -> Iterator[tuple[str, nn.Module]]:
    c = shape[1]
    yield "torch", BATCH_NORMS[len(shape)](c).to(device)
    for key in keys:
        layer: Any = ready(key, shape, device)
        # Of an input without positions each instance is a single value, which has no variance.
        if layer.statistic_size(shape[0], math.prod(shape[2:])) < 2:
            continue
        # The peer of bnet is a convolution of two dimensions.
        if key == "bnet" and len(shape) == 4:
            yield PEERS[key], depthwise_peer(c).to(device)
        if key == "gn":
            yield PEERS[key], nn.GroupNorm(number_of_groups(key, c, "auto", None), c).to(device)
        yield key, layer
        if compiled:
            # A layer of its own, or its compiled form would be timed in place of the eager one above.
            layer = ready(key, shape, device)
            layer.compile()
            yield f"{key} compiled", layer
        if naive and has_formula(key, shape):
            yield f"{key} naive", Naive(ready(key, shape, device))
            if compiled:
                formula = Naive(ready(key, shape, device))
                formula.compile(dynamic=False)
                yield f"{key} naive compiled", formula


def ready(key: str, shape: tuple[int, ...], device: str) -> Normalizer:
    """Build a layer; cn is told the contexts of its samples, and a kernel of bnet gets distinct taps.

    Args:
        key: of the normalizer.
        shape: of x, (N, C, *).
        device: of the layer.
    """
    layer = create(key, shape[1], device=device, **ARGUMENTS.get(key, {}))
    # It must know the context of each sample before its first call.
    if key == "cn":
        assign(context_layers(layer), contexts_of(torch.empty(shape, device=device)))
    # A kernel that starts as the identity would hide a fault in the convolution.
    if key == "bnet":
        taps(layer.get_parameter("kernel"))
    return layer


def depthwise_peer(num_features: int) -> nn.Module:
    """Return torch's BatchNorm and a depthwise convolution behind it."""
    conv = nn.Conv2d(num_features, num_features, 3, padding=1, groups=num_features)
    taps(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(nn.BatchNorm2d(num_features), conv)


def taps(kernel: Tensor) -> Tensor:
    """Fill a kernel with numbers of which no two are the same: a Dirac would prove little."""
    return kernel.detach().copy_(torch.arange(kernel.numel()).cos().view_as(kernel))


@contextmanager
def shared_code() -> Iterator[None]:
    """Let torch.compile make a graph of each naive formula, which share their code, or fail; forget earlier graphs."""
    # All naive layers run the same method, and the default limit of graphs per method is eight.
    torch.compiler.reset()
    with torch_private.recompile_limit(64):
        yield


def check(
    name: str, layer: nn.Module, x: Tensor, dy: Tensor, tolerance: float = TOLERANCE
) -> tuple[float, float] | None:
    """Compare a layer's output and input gradient with the naive formula in float64.

    A normalizer without a formula is compared with itself in float64: its kernels and its precision are checked then,
    and its equation is not.

    Args:
        name: of the contender.
        layer: the contender.
        x: its input.
        dy: the gradient of its output.
        tolerance: largest error, relative to the norm of the float64 result.

    Returns:
        Both errors, relative to the norms; ``None`` for a shape that the formula does not take.

    Raises:
        ArithmeticError: an error is larger than ``tolerance``.
    """
    # Every contender of a key, under whatever name, is held to the formula of that key.
    activation, layer = (layer.activation, layer.layer) if isinstance(layer, Activated) else ("none", layer)
    key = next((k for k, peer in PEERS.items() if peer == name), name.split()[0].replace("torch", "bn"))
    if key in FORMULAS and not has_formula(key, x.shape):
        return None
    same = ready(key, tuple(x.shape), x.device.type)
    formula = (Naive(same) if key in FORMULAS else same).double()
    formula.load_state_dict(dict(layer.named_parameters()), strict=False)  # what starts at random
    # The same numbers in float64, so that only the arithmetic differs.
    x64 = x.detach().double().requires_grad_()
    with without_dropout(formula), without_dropout(layer):
        expected = activated(formula(x64), activation, None)
        (expected_dx,) = torch.autograd.grad(expected, x64, dy.double())
        y = (Activated(layer, activation) if activation != "none" else layer)(x)
        (dx,) = torch.autograd.grad(y, x, dy)
    errors = []
    for what, actual, exact in (("output", y, expected), ("input gradient", dx, expected_dx)):
        # The norm and not the largest deviation, which grows with the number of elements.
        errors.append(((actual - exact).norm() / exact.norm()).item())
        # Written so that a NaN is refused as well.
        if not errors[-1] < tolerance:
            raise ArithmeticError(
                f"{name}: the {what} differs from float64 by {errors[-1]:.1e} of its norm at {tuple(x.shape)}."
            )
    return errors[0], errors[1]


@contextmanager
def without_dropout(layer: nn.Module) -> Iterator[None]:
    """Set a layer's ``dropout`` to 0 for a while, if it has one: two layers would draw different numbers."""
    dropout = getattr(layer, "dropout", None)
    if dropout is not None:
        setattr(layer, "dropout", 0.0)  # noqa: B010  a property of some layers
    try:
        yield
    finally:
        if dropout is not None:
            setattr(layer, "dropout", dropout)  # noqa: B010


def saved_for_backward(layer: nn.Module, x: Tensor) -> float:
    """Return the bytes that one forward pass keeps for the backward pass, as a multiple of x; x itself counts as 1.

    >>> x = torch.randn(2, 8, 64, 64, requires_grad=True)
    >>> round(saved_for_backward(create("bn", 8), x), 2)
    1.0
    """
    return bytes_kept(lambda: layer(x)) / (x.numel() * x.element_size())


def bytes_kept(run: Callable[[], Any]) -> int:
    """Return the bytes of all tensors that a call keeps for a backward pass; views share a storage, counted once."""
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(sizes.values())


def has_formula(key: str, shape: Sequence[int]) -> bool:
    """Tell whether there is a naive formula of a normalizer for inputs of that shape.

    >>> has_formula("bnet", (4, 8, 5, 5)), has_formula("bnet", (4, 8, 5))
    (True, False)
    """
    # Instance statistics need positions, and the formula of bnet is a convolution of two dimensions.
    return key in FORMULAS and (len(shape) == 4 if key == "bnet" else len(shape) > 2)

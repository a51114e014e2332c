"""Context normalization in the benchmark: the contexts of its samples, and the formula written naively."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_norm.normalizers.contexts import assign, context_layers

CONTEXTS = 3
"""Given to the samples of the batch in turn."""

ARGUMENTS: dict[str, dict[str, Any]] = {"cn": {"context": "ids", "num_contexts": CONTEXTS}}
L = TypeVar("L", bound=nn.Module)


def contexts_of(x: Tensor) -> Tensor:
    """Return the context of each sample, (N,)."""
    return torch.arange(x.shape[0], device=x.device) % CONTEXTS


def told(layer: L, shape: tuple[int, ...]) -> L:
    """Return the layer, which knows the contexts of the samples if it takes any."""
    layers = context_layers(layer)
    if layers:
        assign(layers, contexts_of(torch.empty(shape)))
    return layer


def by_context(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalize the samples of each context by its own moments, over the whole tensor once per context and statistic.

    Args:
        x: (N, C, *).
        weight: (K, C).
        bias: (K, C).
    """
    space = tuple(range(2, x.dim()))
    wide = (1, -1) + (1,) * len(space)
    ids = contexts_of(x).view(-1, *(1,) * (x.dim() - 1))
    y = torch.zeros_like(x)
    for k in range(CONTEXTS):
        own = (ids == k).to(x.dtype)
        n = own.sum() * x[0, 0].numel()
        mean = (own * x).sum((0, *space), keepdim=True) / n
        var = (own * (x - mean).square()).sum((0, *space), keepdim=True) / n
        y = y + own * ((x - mean) / torch.sqrt(var + 1e-5) * weight[k].view(wide) + bias[k].view(wide))
    return y

"""Variances and standard deviations, as running statistics hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_norm.ops.layout import at_least_float32


def unbiased(count: int | Tensor) -> float | Tensor:
    """Return n / (n - 1), the factor from the biased to the unbiased variance; 1 where there is one element."""
    if isinstance(count, Tensor):
        return count / (count - 1).clamp_min(1)
    return count / max(count - 1, 1)


@torch.no_grad()
def to_std(var: Tensor, eps: float) -> Tensor:
    """Return the s with s + eps = sqrt(var + eps): evaluation stays what it was."""
    return (var.to(at_least_float32(var.dtype)) + eps).sqrt() - eps


@torch.no_grad()
def to_var(std: Tensor, eps: float) -> Tensor:
    """Return the v with sqrt(v + eps) = std + eps; 0 where it would be negative, for a BatchNorm has none below."""
    return ((std + eps).square() - eps).clamp_min(0)

"""Formulas as published, for the benchmark to time and to check against: functions of x and of parameters by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

ZEROS = {"rbn": ("center", "scale"), "ubn": ("center", "scale", "affine")}
"""Parameters (C,) beside weight and bias; they start at 0."""


def diminishing(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Return what dbn makes of its first batch."""
    axes, wide = _axes(x)
    mean, std = x.mean((0, *axes), keepdim=True), x.std((0, *axes), keepdim=True, correction=0)
    return (x - mean) / (std + 1e-5) * p["weight"].view(wide) + p["bias"].view(wide)


def representative(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Return what rbn makes of x, its gate in units of the starting value."""
    axes, wide = _axes(x)
    x = x + p["center"].view(wide) * x.mean(axes, keepdim=True)
    mean, var = x.mean((0, *axes), keepdim=True), x.var((0, *axes), keepdim=True, correction=0)
    x = (x - mean) / torch.sqrt(var + 1e-5)
    gate = torch.sigmoid(p["scale"].view(wide) * x.mean(axes, keepdim=True) + 1) / _sigmoid(1.0)
    return x * gate * p["weight"].view(wide) + p["bias"].view(wide)


def unified(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Return what ubn makes of a batch that is not condensed: the Gram matrix of its samples says that it is not."""
    axes, wide = _axes(x)
    u = normalize(x.detach().flatten(1), dim=1)
    kept = (u @ u.t()).mean() <= 2.0
    gate = torch.sigmoid(p["affine"].view(wide) * x.mean(axes, keepdim=True) - 1) / _sigmoid(-1.0)
    y = representative(x, {**p, "weight": torch.ones_like(p["weight"]), "bias": torch.zeros_like(p["bias"])})
    return y * torch.where(kept, gate, 0) * p["weight"].view(wide) + p["bias"].view(wide)


FORMULAS: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "dbn": diminishing,
    "rbn": representative,
    "ubn": unified,
}


def _axes(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(range(2, x.dim())), (1, -1, *(1 for _ in range(2, x.dim())))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))

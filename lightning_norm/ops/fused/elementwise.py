"""Functions of each element on the kernels: dyt and derf; one launch forward, two backward.

There are no operators: a compiler writes plain PyTorch, which is pointwise, together with what is around it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_norm.ops import pointwise
from lightning_norm.ops.fused import recorded
from lightning_norm.ops.layout import layout_of

aten = torch.ops.aten
BEFORE: dict[str, Any] = {"relu": lambda dy, z: aten.threshold_backward(dy, z, 0), "silu": aten.silu_backward}
"""The gradient before an activation, from that behind it and what was activated."""


@dataclass(frozen=True)
class ElementwiseSpec:
    """The function of one layer.

    Args:
        weight: gamma, (C,).
        bias: beta, (C,).
        alpha: (1,).
        offset: s, (1,).
        name: of f, "tanh" or "erf".
        of: f in plain PyTorch.
    """

    weight: Tensor | None
    bias: Tensor | None
    alpha: Tensor
    offset: Tensor | None
    name: str
    of: type[pointwise.Function]

    draws: ClassVar[bool] = False
    _of_batch_alone: ClassVar[bool] = False
    buffers: ClassVar[tuple[Tensor, ...]] = ()
    backward_buffers: ClassVar[tuple[Tensor, ...]] = ()
    moved: ClassVar[tuple[Tensor, ...]] = ()

    @functools.cached_property
    def kind(self) -> object:
        """What the launches depend on beside tensors."""
        return recorded.kind_of("elementwise", self.name)

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """The tensors that may need a gradient."""
        return self.weight, self.bias, self.alpha, self.offset

    def of_call(self, x: Tensor) -> tuple[Any, ...]:
        """Return nothing: no call draws numbers."""
        return ()

    def launch_forward(
        self, x: Tensor, residual: Tensor | None, parameters: Any, buffers: Any, channel_dim: int, activation: str
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Launch the one pass; nothing but x is kept."""
        from lightning_norm.kernels.elementwise.launch import normalize

        return normalize(x, residual, parameters, channel_dim, self.name, activation), ()

    def launch_backward(
        self, dy: Tensor, x: Tensor, residual: Any, stats: Any, parameters: Any, buffers: Any, need_dx: bool, *how: Any
    ) -> tuple[Any, ...]:
        """Launch the backward pass."""
        from lightning_norm.kernels.elementwise.launch import gradients

        channel_dim, activation = how
        return gradients(dy, x, residual, parameters, channel_dim, self.name, activation, need_dx)

    def operator_backward(
        self, dy: Tensor, x: Tensor, residual: Any, stats: Any, parameters: Any, buffers: Any, need_dx: bool, *how: Any
    ) -> tuple[Any, ...]:
        """Compute the same in plain PyTorch."""
        (weight, bias, alpha, offset), (channel_dim, activation) = parameters, how
        layout = layout_of(x, x.shape[channel_dim], 1 if channel_dim == 1 else -1)
        dresidual = None
        if activation != "none":
            z = pointwise.value(x, alpha, offset, weight, bias, self.of, layout)[2]
            dy = BEFORE[activation](dy.to(z.dtype), z if residual is None else z + residual)
            dresidual = dy.to(x.dtype)
        dx, dalpha, doffset, dweight, dbias = pointwise.gradients(dy, x, alpha, offset, weight, self.of, layout)
        assert dx is not None
        return dx.to(x.dtype), dresidual, [dweight, dbias, dalpha, doffset]

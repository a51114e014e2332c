"""Functions of each element alone that stand where a normalizer stood: nothing is measured, and nothing is pooled."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_norm.errors import KernelError
from lightning_norm.layers.arguments import stateless
from lightning_norm.layers.base import MomentNorm
from lightning_norm.layers.declared import SwapAdvice
from lightning_norm.layers.fused_specs import SPECS, same_as_before, spec_of
from lightning_norm.ops import torch_private
from lightning_norm.ops.backend import give_up, on_kernels
from lightning_norm.ops.compiled import compiled_forward
from lightning_norm.ops.fused import recorded
from lightning_norm.ops.layout import Layout, layout_of, without_autocast
from lightning_norm.ops.normalize import activated, check_ending
from lightning_norm.ops.pointwise import gradients, value


class ElementwiseNorm(MomentNorm):
    """Abstract: gamma f(alpha x + s) + beta, with numbers alpha and perhaps s; a subclass has f and its slope.

    Args:
        num_features: channels.
        alpha_init: where alpha starts.
        options: affine, bias, channel_dim, device, dtype: see :class:`MomentNorm`; an eps is taken and not used.

    Raises:
        ValueError: alpha_init is no finite number.

    >>> class DynamicSoftsign(ElementwiseNorm):
    ...     @staticmethod
    ...     def function(u):
    ...         return u / (1 + u.abs())
    ...
    ...     @staticmethod
    ...     def slope(u, f):
    ...         return (1 + u.abs()) ** -2
    >>> DynamicSoftsign(2, channel_dim=-1)(torch.tensor([[[2.0, -2.0]]])).tolist()
    [[[0.5, -0.5]]]
    """

    train_uses_batch_stats: ClassVar[bool] = False
    eval_uses_input_stats: ClassVar[bool] = False
    extra_parameters: ClassVar[dict[str, str]] = {"alpha": "1"}
    repr_arguments: ClassVar[tuple[str, ...]] = ("alpha_init",)
    swap_advice: ClassVar[SwapAdvice] = SwapAdvice(
        not_for={
            "BatchNorm": "its authors replace LayerNorm by it, and report that it does not replace BatchNorm without "
            "loss; type source='LayerNorm', or choose another method"
        }
    )
    shifted: ClassVar[bool] = False
    """Learn s, ``offset``, which starts at 0."""
    alpha: nn.Parameter
    offset: nn.Parameter | None

    def __init__(self, num_features: int, *, alpha_init: float = 0.5, **options: Any) -> None:
        if not math.isfinite(alpha_init):
            raise ValueError(f"{type(self).__name__}: alpha_init must be a finite number, got {alpha_init!r}.")
        self.alpha_init = float(alpha_init)
        super().__init__(num_features, **stateless(type(self).__name__, options))
        self._add_parameters(options, alpha=(1,), offset=(1,) if self.shifted else None)

    @staticmethod
    def function(u: Tensor) -> Tensor:
        """Return f."""
        raise NotImplementedError

    @staticmethod
    def slope(u: Tensor, f: Tensor) -> Tensor:
        """Return the derivative of f at u, given f there."""
        raise NotImplementedError

    def start_values(self) -> dict[str, float | Tensor]:
        """Return the start of alpha, and 0 for s."""
        return {"alpha": self.alpha_init, "offset": 0.0}

    def statistic_size(self, n: int, size: int) -> int:
        """Return 2: there are no statistics, so no input is too small for them."""
        return 2

    def monitor(self) -> dict[str, Tensor]:
        """Return alpha, and s where there is one."""
        shown = {"alpha": self.alpha, "offset": self.offset}
        return {name: t.detach().squeeze() for name, t in shown.items() if t is not None}

    def _normalize(
        self, input: Tensor, activation: str, residual: Tensor | None, valid: Tensor | None = None
    ) -> Tensor:
        if SPECS in vars(self) and valid is None and not (self.compiled or torch.compiler.is_compiling()):
            y = same_as_before(self, input, activation, residual)
            if y is not None:
                return y
        if valid is not None:
            # First, so that padding of NaN gives no gradient of NaN; and last, for f(s) need not be 0.
            input = torch.where(valid, input, input.new_zeros(()))
        layout = layout_of(input, self.num_features, self.channel_dim, type(self).__name__)
        check_ending(input, activation, residual)
        # Four ways to the same numbers: a graph of the layer's own; plain operations, which graphs and transforms see
        # through; the kernels; and an autograd function, which keeps x alone.
        if self.compiled and not torch.compiler.is_compiling() and not torch_private.is_transformed():
            y = compiled_forward(self, input, _plainly, None, vars(self).get("_compile_options"))
        elif torch.compiler.is_compiling() or torch_private.is_transformed():
            y = _plainly(self, input)
        else:
            fused_spec = functools.partial(spec_of, self) if self._fused_spec_holds and valid is None else None
            y = run_on_kernels(self, input, layout, fused_spec, activation, residual)
            if y is not None:
                return y
            parameters = self.alpha, self.offset, self.weight, self.bias
            with without_autocast(input):
                y = _Elementwise.apply(input, *parameters, type(self), layout)
        if valid is not None:
            y = torch.where(valid, y, y.new_zeros(()))
        return activated(y, activation, residual)


def run_on_kernels(
    layer: ElementwiseNorm,
    x: Tensor,
    layout: Layout,
    fused_spec: Callable[[Layout], Any] | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor | None:
    """Return act(y + residual) where the kernels run and ``fused_spec`` describes f to them, ``None`` otherwise."""
    if fused_spec is None or layout.n == 0 or (residual is not None and residual.dtype != x.dtype):
        return None
    kind = type(layer), activation, residual is None
    spec = fused_spec(layout) if on_kernels(x, layout, layer.backend, what=kind) else None
    if spec is None or not recorded.can_record(x, spec, residual):
        return None
    try:
        return recorded.normalize(x, spec, layout.channel_dim, activation, residual)
    except KernelError as error:  # nothing was launched yet
        give_up(x, layout, layer.backend, kind, error)
        return None


def _plainly(layer: ElementwiseNorm, x: Tensor) -> Tensor:
    layout = layout_of(x, layer.num_features, layer.channel_dim, type(layer).__name__)
    return value(x, layer.alpha, layer.offset, layer.weight, layer.bias, type(layer), layout)[2].to(x.dtype)


class _Elementwise(torch.autograd.Function):
    """Keep x alone for the backward pass, and compute the rest anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *parameters, ctx.cls, ctx.layout = rest
        ctx.save_for_backward(x, *parameters)
        return value(x, *rest)[2].to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, offset, weight, bias = ctx.saved_tensors
        needed = gradients(grads[0], x, alpha, offset, weight, ctx.cls, ctx.layout, ctx.needs_input_grad)
        likes = x, alpha, offset, weight, bias
        return *(g if g is None else g.to(t.dtype) for g, t in zip(needed, likes, strict=True)), None, None

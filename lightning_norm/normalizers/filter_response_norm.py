"""Filter response normalization: each sample and channel over the root of its mean square, then a learned threshold."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_norm.layers.arguments import stateless
from lightning_norm.layers.base import MomentNorm, Paper
from lightning_norm.layers.declared import Unsupported
from lightning_norm.layers.fused_specs import mixture_spec
from lightning_norm.ops import eager, native
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.layout import Layout, layout_of
from lightning_norm.ops.moments import Affine, Moments
from lightning_norm.ops.normalize import along, ended


class FilterResponseNorm(MomentNorm):
    r"""Divide each channel of each sample by the root of its mean square; then take the larger of it and a threshold.

    .. math::
        y = \gamma \frac{x}{\sqrt{\nu^2 + \epsilon}} + \beta, \quad
        \nu^2_{nc} = \frac{1}{S} \sum_s x_{ncs}^2, \qquad z = \max(y, \tau)

    with ``tau`` (C,), the thresholded linear unit (TLU), starting at 0, where it is a ReLU. Singh and Krishnan, CVPR
    2020, arXiv 1911.09737.

    When: small batches, for no sample sees another and nothing is subtracted. When not: before a residual addition with
    the TLU on, or on maps of one element without ``learn_eps``.

    Args:
        num_features: channels, the C of an input (N, C, *).
        tlu: end with the thresholded linear unit, in place of the ReLU that follows a BatchNorm.
        learn_eps: add the absolute value of a learned number, ``extra_eps``, to eps; for maps of one element.
        eps: added to the mean square.
        options: affine, bias, channel_dim, device, dtype: see :class:`MomentNorm`; no running statistics.

    Shape:
        As input; with an activation or a residual the result is act(z + residual).

    Raises:
        TypeError: running statistics are asked for.
        ValueError: one element per sample and channel, without ``learn_eps``.

    Differs from the paper: one learned eps for the layer, which its text leaves open.

    >>> FilterResponseNorm(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "frn"
    paper = Paper(
        "Singh and Krishnan",
        2020,
        "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep Neural Networks",
        "arXiv 1911.09737",
    )
    train_uses_batch_stats: ClassVar[bool] = False
    extra_parameters: ClassVar[dict[str, str]] = {"tau": "C"}
    unsupported = Unsupported(mask="its threshold is applied behind the pass that knows the mask")
    repr_arguments: ClassVar[tuple[str, ...]] = ("tlu", "learn_eps")
    tau: nn.Parameter | None
    extra_eps: nn.Parameter | None

    def __init__(
        self, num_features: int, *, tlu: bool = True, learn_eps: bool = False, eps: float = 1e-6, **options: Any
    ) -> None:
        self.tlu, self.learn_eps = tlu, learn_eps
        options = stateless(type(self).__name__, options)
        super().__init__(num_features, eps=eps, **options)
        shapes = {"tau": (num_features,) if tlu else None, "extra_eps": (1,) if learn_eps else None}
        self._add_parameters(options, **shapes)

    def start_values(self) -> dict[str, float | Tensor]:
        """Return 0 for the threshold, and 1e-4 for a learned eps, as TensorFlow Addons has it."""
        return {"tau": 0.0, "extra_eps": 1e-4}

    def algebra(self, m: Moments) -> Affine:
        """Return y - tau, or y without a threshold, as the affine map of the equation above."""
        return _affine(m, self._eps, self.extra_eps, self.weight, self.bias, self.tau)

    def fused_spec(self, layout: Layout) -> MixtureSpec | None:
        """Return the same equation for the kernels, unless eps is learned."""
        if self.extra_eps is not None:
            return None
        return mixture_spec(self, ("in",), w=self.tau, uncentered=True, threshold=self.tau is not None)

    def floor(self) -> Tensor | None:
        """Return the threshold."""
        return self.tau

    def _normalize(
        self, input: Tensor, activation: str, residual: Tensor | None, valid: Tensor | None = None
    ) -> Tensor:
        if self.tau is None:
            return super()._normalize(input, activation, residual)
        # An activation belongs behind the threshold, so neither the engine nor the function below may compute it.
        if valid is None and self._on_cpu_at_once(input):
            layout = layout_of(input, self.num_features, self.channel_dim, type(self).__name__)
            if self.statistic_size(layout.n, layout.size) > 1:
                tensors = self.tau, self.extra_eps, self.weight, self.bias
                return ended(_Filtered.apply(input, *tensors, self._eps, layout), activation, residual)
        return ended(super()._normalize(input, "none", None), activation, residual)

    def _on_cpu_at_once(self, x: Tensor) -> bool:
        """Tell whether one function computes the layer with its threshold."""
        # Neither a subclass nor an instance may have an algebra of its own.
        whole = self._fused_spec_holds and self.backend == "auto" and not self.compiled
        return whole and isinstance(x, Tensor) and x.dim() > 2 and native.takes(x, *self._parameters.values())

    def statistic_size(self, n: int, size: int) -> int:
        """Return the elements per sample and channel; a learned eps makes one enough."""
        return max(size, 2) if self.learn_eps else size

    @torch.no_grad()
    def monitor(self) -> dict[str, Tensor]:
        """Return the mean threshold, and what is learned beside eps."""
        shown = {"tau": None if self.tau is None else self.tau.mean(), "extra_eps": self.extra_eps}
        return {name: t.abs().squeeze() if name == "extra_eps" else t for name, t in shown.items() if t is not None}


def _affine(
    m: Moments,
    eps: float,
    extra_eps: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tau: Tensor | None = None,
) -> Affine:
    # The mean square from moments that the engine has anyway: E[x^2] = var + mean^2.
    square = m.var + m.mean.square().to(m.var.dtype) + eps
    if extra_eps is not None:
        square = square + extra_eps.abs().to(square.dtype)
    scale = square.rsqrt()
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    # In the dtype of the mean, and no center is subtracted.
    return Affine(m.mean.new_zeros(1, 1), scale, bias if tau is None else _less(bias, tau))


def _less(bias: Tensor | None, tau: Tensor) -> Tensor:
    """Return beta - tau, (C,)."""
    return -tau if bias is None else bias - tau


class _Filtered(torch.autograd.Function):
    """max(gamma r x + beta, tau) with r one over the root of the mean square; x and r are kept, and y computed again.

    ``_plainly`` says the same in operations that autograd records.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tau: Tensor,
        extra_eps: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        layout: Layout,
    ) -> Tensor:
        rows = eager.channels_last_rows(x, layout)
        rows, dim = (x.view(layout.n, layout.c, -1), 2) if rows is None else (rows, 1)
        square = (rows * rows).sum(dim).div_(layout.size).add_(eps)
        root = (square if extra_eps is None else square.add_(extra_eps.abs())).rsqrt_()
        ctx.eps, ctx.layout = eps, layout
        ctx.save_for_backward(x, tau, extra_eps, weight, bias, root)
        y = _above(x, tau, weight, bias, root, layout)
        return y.clamp_min_(0).add_(along(tau, y, layout.channel_dim))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dz,), need, layout = grads, ctx.needs_input_grad, ctx.layout
        x, tau, extra_eps, weight, bias, root = ctx.saved_tensors
        if eager.is_recording(dz):
            plainly = functools.partial(_plainly, eps=ctx.eps, layout=layout)
            inputs = x, tau, extra_eps, weight, bias
            return *eager.recorded_gradients(plainly, inputs, dz, need[:5]), None, None
        # At a tie all of the gradient is the threshold's.
        dy = torch.ops.aten.threshold_backward(dz, _above(x, tau, weight, bias, root, layout), 0)
        zero = root.new_zeros(1, 1)
        total, dot = eager.sums(dy, x, layout)
        dbeta = total.sum(0)
        dtau = (dz - dy).sum([d for d in range(x.dim()) if d != layout.channel_dim]) if need[1] else None
        at_root = dot * root
        dgamma = at_root.sum(0) if need[3] else None
        scale = root if weight is None else root * weight
        dsquare = (scale * root).mul_(at_root).mul_(-0.5)
        dx = eager.combine(dy, scale, x, zero, None, dsquare, layout) if need[0] else None
        deps = (dsquare.sum() * extra_eps.sign()) if need[2] and extra_eps is not None else None
        return dx, dtau, deps, dgamma, dbeta if need[4] else None, None, None


def _above(x: Tensor, tau: Tensor, weight: Tensor | None, bias: Tensor | None, root: Tensor, layout: Layout) -> Tensor:
    """Return how far y lies above the threshold."""
    scale = root if weight is None else root * weight
    return eager.apply(x, root.new_zeros(1, 1), scale, _less(bias, tau).view(1, -1), layout, mean_is_small=True)


def _plainly(
    x: Tensor,
    tau: Tensor,
    extra_eps: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    layout: Layout,
) -> Tensor:
    """Return the same in plain differentiable PyTorch."""
    m = Moments(*eager.moments(x, layout, recorded=True), layout.size)
    fields = _affine(m, eps, extra_eps, weight, bias).fields(layout.n, layout.c)
    y, t = eager.apply_centered(x, *fields, layout, recorded=True), along(tau, x, layout.channel_dim)
    return torch.where(y > t, y, t)

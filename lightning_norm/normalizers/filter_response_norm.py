"""Filter response normalization: each sample and channel over the root of its mean square, then a learned threshold."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_norm.layers.arguments import stateless
from lightning_norm.layers.base import MomentNorm, Paper
from lightning_norm.layers.declared import Unsupported
from lightning_norm.ops import torch_private
from lightning_norm.ops.layout import at_least_float32
from lightning_norm.ops.moments import Affine, Moments
from lightning_norm.ops.normalize import activated, check_ending, normalize


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
        """Return the affine map of the equation above, without its threshold."""
        return _affine(m, self._eps, self.extra_eps, self.weight, self.bias)

    def _normalize(
        self, input: Tensor, activation: str, residual: Tensor | None, valid: Tensor | None = None
    ) -> Tensor:
        if self.tau is None:
            return super()._normalize(input, activation, residual)
        # An activation belongs behind the threshold, so the engine must not compute it.
        y = super()._normalize(input, "none", None)
        check_ending(y, activation, residual)
        # A graph keeps what its backward pass needs, and no more; in eager mode the function below does without y.
        if torch.compiler.is_compiling() or torch_private.is_transformed() or not y.numel():
            z = torch.maximum(y.to(at_least_float32(y.dtype)), _along(self.tau, y, self.channel_dim)).to(y.dtype)
        else:
            parameters = self.tau, self.extra_eps, self.weight, self.bias
            z = _Threshold.apply(y, input, *parameters, self._eps, self.channel_dim)
        return activated(z, activation, residual)

    def statistic_size(self, n: int, size: int) -> int:
        """Return the elements per sample and channel; a learned eps makes one enough."""
        return max(size, 2) if self.learn_eps else size

    @torch.no_grad()
    def monitor(self) -> dict[str, Tensor]:
        """Return the mean threshold, and what is learned beside eps."""
        shown = {"tau": None if self.tau is None else self.tau.mean(), "extra_eps": self.extra_eps}
        return {name: t.abs().squeeze() if name == "extra_eps" else t for name, t in shown.items() if t is not None}


def _affine(m: Moments, eps: float, extra_eps: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Affine:
    # The mean square from moments that the engine has anyway: E[x^2] = var + mean^2.
    square = m.var + m.mean.square().to(m.var.dtype) + eps
    if extra_eps is not None:
        square = square + extra_eps.abs().to(square.dtype)
    scale = square.rsqrt()
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    # In the dtype of the mean, and no center is subtracted.
    return Affine(m.mean.new_zeros(1, 1), scale, bias)


def _along(tau: Tensor, y: Tensor, channel_dim: int) -> Tensor:
    """Return tau in float32 at least, broadcastable to y."""
    tau = tau.to(at_least_float32(y.dtype))
    return tau if channel_dim == -1 else tau.view(-1, *(1,) * (y.dim() - 2))


class _Threshold(torch.autograd.Function):
    """max(y, tau). Backward it computes y again from x, which is saved already, in place of another tensor like x."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, tau: Tensor, *rest: Any) -> Tensor:
        *parameters, ctx.eps, ctx.channel_dim = rest
        ctx.save_for_backward(x, tau, *parameters)
        return torch.maximum(y, _along(tau, y, ctx.channel_dim).to(y.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dz,) = grads
        x, tau, *parameters = ctx.saved_tensors
        with torch.no_grad():
            wide = at_least_float32(x.dtype)
            y = normalize(x.to(wide), lambda m: _affine(m, ctx.eps, *parameters), layout=ctx.channel_dim)
            # At a tie all of the gradient is the threshold's.
            above = y > _along(tau, y, ctx.channel_dim)
        dtau = None
        if ctx.needs_input_grad[2]:
            axes = [d for d in range(x.dim()) if d != ctx.channel_dim % x.dim()]
            dtau = dz.to(wide).masked_fill(above, 0).sum(axes).to(tau.dtype)
        return dz.masked_fill(~above, 0), None, dtau, *(None,) * 5

"""ATen's own normalizations, for the normalizers that are the same function: on the CPU nothing else is as fast.

They subtract no mean before they scale, which loses digits where a mean is large against its standard deviation. Both
come out beside y, so that this is looked at afterwards; the caller then normalizes anew by the passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_norm.ops import eager, torch_private
from lightning_norm.ops.eager import SMALL_MEAN
from lightning_norm.ops.layout import Layout, cast
from lightning_norm.ops.vectors import Array, array_of, changed, is_small, quiet, tensor_of

LEAST_SCALE = 1e-18
"""One over the standard deviation below which the variance may not be a finite number in float32."""

PLAIN = (Tensor, torch.nn.Parameter)
WIDE = (torch.float32, torch.float64)


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Tell whether ATen computes with x and the layer's tensors what the passes do, at the same precision.

    That is so in float32 and float64, all tensors alike, where x lies dense in one of torch's two memory formats and
    nobody but autograd looks at the operations.
    """
    dtype = x.dtype
    return (
        type(x) in PLAIN
        and dtype in WIDE
        and not torch_private.is_transformed()  # first of all: a trace would note what is asked of x below
        and eager.may_read_back(x)
        # ATen reads a weight, a bias or a running value with strides as if it had none.
        and all([t is None or (t.dtype == dtype and t.is_cpu and t.is_contiguous()) for t in others])  # noqa: C419  a generator takes longer
        and (x.is_contiguous() or _is_channels_last(x))
    )


def batch_norm(
    x: Tensor,
    layout: Layout,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: tuple[Tensor, Tensor] | None = None,
    momentum: float = 0.0,
) -> Tensor | None:
    """Return x normalized by the statistics of the batch, (N, C, *) or dense tokens (N, *, C).

    Args:
        x: the input; :func:`takes` it.
        layout: of x.
        weight: (C,).
        bias: (C,).
        eps: added to the variance.
        running: mean and variance, which move towards those of the batch.
        momentum: by how much.

    Returns:
        y; ``None``, and nothing has moved, where digits would be lost or a statistic is not finite.
    """
    rows = _rows(x, layout)
    # With versions of their own: autograd notes them, and a backward pass needs none of the buffers.
    moved = (None, None) if running is None else (running[0].data, running[1].data)
    before = [None if t is None else t.clone() for t in moved]
    # torch's stub takes it for an operator that gets its results' tensors.
    y, mean, scale = torch.native_batch_norm(rows, weight, bias, *moved, True, momentum, eps)  # type: ignore[call-arg,arg-type]
    exact = _is_exact(mean, scale) and scale.min().item() >= LEAST_SCALE
    if running is not None:
        changed(*running)
        if not exact:
            for t, old in zip(moved, before, strict=True):
                t.copy_(old)  # type: ignore[union-attr,arg-type]  # all are there
    if not exact:
        return None
    return y if rows is x else y.view(layout.shape)


def statistics(x: Tensor, layout: Layout) -> tuple[Array, Array] | None:
    """Return mean and biased variance of each channel, (C,); ``None`` where the mean is too large for the float32."""
    mean, var = torch.batch_norm_update_stats(_rows(x.detach(), layout), None, None, 0.0)
    means, variances = mean.numpy(), var.numpy()
    return (means, variances) if is_small(means, variances) else None


class Constants(NamedTuple):
    """What brings batch normalization to other statistics; (C,) each, in float64.

    Args:
        mean: of x.
        root: of V, see :func:`standardize`.
        scale: r s.
        shift: d.
    """

    mean: Array
    root: Array
    scale: Array
    shift: Array


def standardize(
    x: Tensor,
    layout: Layout,
    weight: Tensor | None,
    bias: Tensor | None,
    constants: Constants,
    scale_of: Callable[[Tensor], Tensor],
) -> Tensor:
    r"""Return :math:`\gamma (r\, s(\sigma^2) (x - \mu) + d) + \beta`, for a function s of the variance.

    With V = -s / 2 s', the gradient is that of batch normalization by the variance V: for the scale
    :math:`(v + \epsilon)^{-1/2}`, say, V is the variance and eps.

    Args:
        x: the input; :func:`takes` it.
        layout: of x.
        weight: gamma, (C,).
        bias: beta, (C,).
        constants: in float64, so that what is multiplied with x is rounded once.
        scale_of: r s, for what is differentiated once more.
    """
    rows = _rows(x, layout)
    y: Tensor = _Standardize.apply(rows, weight, bias, constants, scale_of)
    return y if rows is x else y.view(layout.shape)


class _Standardize(torch.autograd.Function):
    """Batch normalization by statistics that are those of x, computed already."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, constants: Constants, scale_of: Any
    ) -> Tensor:
        ctx.constants, ctx.scale_of = constants, scale_of
        ctx.save_for_backward(x, weight, bias)
        mean, _, scale, shift = constants
        # In float64 until here, so that what multiplies x is rounded once.
        if weight is not None:
            gamma = array_of(weight)
            scale, shift = scale * gamma, shift * gamma
        offset = shift - scale * mean
        offset = offset if bias is None else offset + array_of(bias)
        fields, unit = (tensor_of(scale, x.dtype), tensor_of(offset, x.dtype)), _unit(len(mean), x.dtype)
        y: Tensor = torch.native_batch_norm(x, *fields, *unit, False, 0.0, 0.0)[0]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), need = grads, ctx.needs_input_grad[:3]
        x, weight, bias = ctx.saved_tensors
        mean, root, scale, shift = ctx.constants
        if eager.is_recording(dy):
            plainly = functools.partial(_plainly, shift=torch.from_numpy(shift), scale_of=ctx.scale_of)
            return (*eager.recorded_gradients(plainly, (x, weight, bias), dy, need), None, None)
        with quiet():
            factor = scale * root
            weighted = factor if weight is None else factor * array_of(weight)
            fields = [tensor_of(t, x.dtype) for t in (weighted, mean, 1 / root)]
            dx, dfactor, dshift = torch.ops.aten.native_batch_norm_backward(
                dy, x, fields[0], None, None, *fields[1:], True, 0.0, [need[0], need[1], need[1] or need[2]]
            )
            dweight = tensor_of(shift * dshift.numpy() + factor * dfactor.numpy(), x.dtype) if need[1] else None
        return dx, dweight, dshift if need[2] else None, None, None


@functools.lru_cache(64)
def _unit(c: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a mean of 0 and a variance of 1, (C,): with them ATen multiplies and adds, rounding once."""
    with torch.inference_mode(False):
        return torch.zeros(c, dtype=dtype), torch.ones(c, dtype=dtype)


def _weighted(weight: Tensor | None, bias: Tensor | None, factor: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return gamma times the factor, and gamma times the shift and beta."""
    if weight is not None:
        factor, shift = factor * weight, shift * weight
    return factor, shift if bias is None else shift + bias


def _plainly(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, shift: Tensor, scale_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return y in plain differentiable PyTorch."""
    axes = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(axes, keepdim=True)
    scale, shift = _weighted(weight, bias, scale_of((x - mean).square().mean(axes)), shift)
    scale, shift = (t.view(1, -1, *(1,) * (x.dim() - 2)) for t in (scale, shift))
    return scale.to(x.dtype) * (x - mean) + shift.to(x.dtype)


def group_norm(
    x: Tensor, layout: Layout, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """Return x, (N, C, *), normalized by the statistics of each sample's groups; ``None`` if digits would be lost."""
    # For this call alone: the layer stays without a weight.
    weight = _weight_beside(bias, weight)
    y, mean, scale = torch.native_group_norm(x, weight, bias, layout.n, layout.c, layout.size, groups, eps)
    # Autograd would keep what is computed of them, for they have gradients.
    return y if _is_exact(mean.detach(), scale.detach()) else None


def wide_group_norm(
    x: Tensor, layout: Layout, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return the same in float64, for few elements; what is kept is x."""
    y: Tensor = _WideGroupNorm.apply(x, weight, bias, (layout.n, layout.c, layout.size, groups), eps)
    return y


class _WideGroupNorm(torch.autograd.Function):
    """Group normalization in float64, whose statistics are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, sizes: tuple[int, int, int, int], eps: float
    ) -> Tensor:
        ctx.sizes, ctx.eps = sizes, eps
        ctx.save_for_backward(x, weight, bias)
        wide, gamma, beta = _doubles(x, weight, bias)
        return cast(torch.native_group_norm(wide, gamma, beta, *sizes, eps)[0], x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), need, sizes = grads, ctx.needs_input_grad[:3], ctx.sizes
        x, weight, bias = ctx.saved_tensors
        if eager.is_recording(dy):

            def plainly(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                wide, gamma, beta = _doubles(x, _weight_beside(bias, weight), bias)
                return torch.nn.functional.group_norm(wide, sizes[-1], gamma, beta, ctx.eps).to(x.dtype)

            return (*eager.recorded_gradients(plainly, (x, weight, bias), dy, need), None, None)
        dy, x, weight = _doubles(dy.contiguous(), x, _weight_beside(bias, weight))
        n, c, size, groups = sizes
        _, mean, scale = torch.native_group_norm(x, None, None, n, c, size, groups, ctx.eps)
        found = torch.ops.aten.native_group_norm_backward(dy, x, mean, scale, weight, n, c, size, groups, list(need))
        return *(cast(t, grads[0].dtype) if n else None for t, n in zip(found, need, strict=True)), None, None


def _weight_beside(bias: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """Return a weight: torch 2.11 has no gradient of a bias alone."""
    return torch.ones_like(bias) if weight is None and bias is not None else weight


def _doubles(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


def _rows(x: Tensor, layout: Layout) -> Tensor:
    """Return x as torch's BatchNorm takes it: of tokens, each is a sample."""
    return x if layout.channel_dim == 1 else x.view(-1, layout.c)


def _is_exact(mean: Tensor, scale: Tensor) -> bool:
    """Tell whether all means are small against their standard deviations; written so that NaN is not."""
    return (mean * scale).abs_().max().item() <= SMALL_MEAN


def _is_channels_last(x: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return last is not None and x.is_contiguous(memory_format=last)

"""normalize(x, algebra): moments -> algebra -> apply, as one autograd graph.

The two passes over x are two autograd nodes, ``_Moments`` and ``_Apply``; between them the algebra is ordinary autograd
on (N, C) tensors. With y = scale * (x - center) + shift, and S elements per (sample, channel), the gradient of x is

    dx = scale * dy + dmean / S + (2 * dvar / S) * (x - mean)

where dmean and dvar reach x through the algebra. No node knows all of it: ``_Apply`` knows dy and scale, ``_Moments``
gets dmean and dvar. Left to autograd, each would write a tensor like x and a third pass would add them. So ``_Apply``
sends what it knows to ``_Moments`` and lets that one write dx, in one pass. It sends them as gradients, which is the
only thing a node can send:

* ``x_alias``, a second output of ``_Moments`` that is x itself, receives dy, **unscaled**;
* ``scale_carrier``, an (N, C) output that nothing reads, receives **scale**.

Forward, both are inputs of ``_Apply`` that it does not use. Only x is saved for the backward pass, never y. Under
``create_graph=True`` the same formulas are recorded in plain PyTorch, so double backward works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_norm.errors import KernelError
from lightning_norm.ops import backend, depthwise, eager, torch_private, whole_batch
from lightning_norm.ops.backend import give_up, on_kernels
from lightning_norm.ops.fused import transparent_passes, triton_passes
from lightning_norm.ops.fused.encoder_decoder import EncoderDecoderSpec
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.fused.per_channel import PerChannelSpec
from lightning_norm.ops.layout import Layout, at_least_float32, cast, layout_of, stat_dtype, without_autocast
from lightning_norm.ops.moments import Affine, Moments
from lightning_norm.ops.sync import Ranks

Algebra = Callable[[Moments], Affine]
FusedSpec = MixtureSpec | PerChannelSpec | EncoderDecoderSpec
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
}


@dataclass(frozen=True)
class Passes:
    """How the passes over one x are run.

    Args:
        layout: of x.
        kernels: by the Triton kernels, otherwise in plain PyTorch.
        by_name: the kernels were asked for: one that does not compile or load is an error.
        mean_is_small: eager's moments kept the mean in float32: then scale * x + offset loses nothing.
    """

    layout: Layout
    kernels: bool = False
    by_name: bool = False
    mean_is_small: bool = False

    @property
    def forward_module(self) -> Any:
        """What runs the forward passes."""
        return self._on_kernels() if self.kernels else self._in_plain()

    def module(self, *gradients: Tensor | None) -> Any:
        """Return what runs them; what is differentiated once more is recorded in plain PyTorch."""
        on_kernels = self.kernels and (torch.compiler.is_compiling() or not eager.is_recording(*gradients))
        return self._on_kernels() if on_kernels else self._in_plain()

    def _in_plain(self) -> Any:
        return whole_batch if self.layout.is_one_sample else eager

    def _on_kernels(self) -> Any:
        # In a graph nothing is launched yet, and its compiler may fuse some of the passes.
        if torch.compiler.is_compiling():
            return transparent_passes if backend.IN_GRAPHS == "transparent" else triton_passes
        return triton_passes if self.by_name else _Either(self._in_plain())


class _Either:
    """The passes on the kernels, and in plain PyTorch each one whose kernel does not compile or load."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __getattr__(self, name: str) -> Any:
        def run(x: Tensor, *args: Any) -> Any:
            try:
                return getattr(triton_passes, name)(x, *args)
            except KernelError as error:
                backend.tell_of(x, error)
                return getattr(self.plain, name)(x, *args)

        return run


@dataclass(frozen=True)
class Call:
    """One call of :func:`normalize`: its arguments of the same names, with a layout that was checked against x.

    ``floor`` is tau, (C,): where there is one, the algebra gives y - tau, the result is max(y, tau), and nothing
    follows.
    """

    algebra: Algebra
    layout: Layout
    moments: Moments | None = None
    ranks: Ranks | None = None
    backend: str = "auto"
    fused_spec: Callable[[Layout], FusedSpec | None] | None = None
    activation: str = "none"
    residual: Tensor | None = None
    depthwise_conv: tuple[Tensor, Tensor | None] | None = None
    floor: Tensor | None = None

    def channels_second(self, x: Tensor) -> Call:
        """Return the same call for x with its channels moved from the last axis to the second."""
        residual = None if self.residual is None else self.residual.movedim(-1, 1)
        return replace(self, layout=layout_of(x, self.layout.c), residual=residual)


def normalize(
    x: Tensor,
    algebra: Algebra,
    *,
    layout: Layout | int = 1,
    moments: Moments | None = None,
    ranks: Ranks | None = None,
    backend: str = "auto",
    fused_spec: Callable[[Layout], FusedSpec | None] | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    depthwise_conv: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    r"""Normalize x by what ``algebra`` makes of its moments.

    .. math:: y = s\,(x - c) + t, \qquad (c, s, t) = \mathrm{algebra}(\mu_{nc}, \sigma^2_{nc})

    Args:
        x: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W), any memory format; (N, ..., C) with ``layout=-1``.
        algebra: from :class:`Moments` to :class:`Affine`, written with differentiable PyTorch on (N, C) tensors.
        layout: the channel axis, 1 or -1 for tokens, or a :class:`lightning_norm.ops.layout.Layout` already checked.
        moments: used in place of those of x, as running statistics are; x is then read once only.
        ranks: the ranks that ``Moments.over_batch`` pools with.
        backend: "auto" for the Triton kernels where x is on CUDA and they can take it, else plain PyTorch; "eager" for
            plain PyTorch; "triton" for the kernels or an error.
        fused_spec: the same algebra as the kernels know it, used instead where they run.
        activation: "none", "relu" or "silu", applied to the result; in the same pass where a fused description is used.
        residual: added before the activation, in the shape of x; likewise.
        depthwise_conv: kernel (C, 1, *) of odd sizes and bias (C,) of a depthwise convolution of the above, padded with
            zeros.

    Returns:
        A fresh tensor in the shape, dtype and memory format of x.

    Raises:
        TypeError, ValueError: as :func:`lightning_norm.ops.layout.layout_of`, and for a wrong Affine, activation
            or residual.
        RuntimeError: ``backend="triton"`` for an input that the kernels cannot take.

    >>> x = torch.randn(4, 3, 5, 5)
    >>> y = normalize(x, lambda m: Affine(m.mean, (m.var + 1e-5).rsqrt()))  # instance norm
    >>> torch.allclose(y, torch.nn.functional.instance_norm(x), atol=1e-5)
    True
    """
    if not isinstance(layout, Layout):
        layout = layout_of(x, x.shape[layout] if isinstance(x, Tensor) and x.dim() > 1 else 0, layout)
    return run(x, Call(algebra, layout, moments, ranks, backend, fused_spec, activation, residual, depthwise_conv))


def activated(y: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
    """Return act(y + residual), in plain PyTorch."""
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[activation](y)


def along(t: Tensor, y: Tensor, channel_dim: int) -> Tensor:
    """Return t, (C,), in float32 at least, so that its gradient is summed up in it, and broadcastable to y."""
    t = t.to(at_least_float32(y.dtype))
    return t.view(-1, *(1,) * (y.dim() - 2)) if channel_dim == 1 else t


def _followed(y: Tensor, call: Call) -> Tensor:
    """Return act(y + residual), or relu(y) + floor, which is max(y + floor, floor), in plain PyTorch."""
    if call.floor is None:
        return activated(y, call.activation, call.residual)
    return (torch.relu(y) + along(call.floor, y, call.layout.channel_dim)).to(y.dtype)


def ended(y: Tensor, activation: str, residual: Tensor | None) -> Tensor:
    """Return act(y + residual), or y itself where nothing follows, and refuse what :func:`check_ending` does."""
    if residual is None and activation == "none":
        return y
    check_ending(y, activation, residual)
    return activated(y, activation, residual)


def run(x: Tensor, call: Call) -> Tensor:
    """Do what :func:`normalize` says: by its equations on the kernels, or by the passes around the algebra."""
    if call.residual is not None or call.activation not in ACTIVATIONS:
        check_ending(x, call.activation, call.residual)
    if call.depthwise_conv is not None or torch_private.is_transformed():
        return _run_specially(x, call)
    # The kernels' own equations if they know the layer's; else its algebra between their passes, or plain PyTorch.
    kernels, spec = (False, None) if call.backend == "eager" else _on_kernels(x, call)
    with without_autocast(x):
        if spec is not None and (call.residual is None or call.residual.dtype == x.dtype):
            try:
                return spec.normalize(x, call.layout, call.activation, call.residual)
            except KernelError as error:  # nothing was launched yet, and nothing has moved
                kernels = _without_kernels(x, call, error)
        x_alias, scale_carrier, fields, how = _fields(x, call, kernels)
        y: Tensor = _Apply.apply(x_alias, scale_carrier, x, *fields, how)
    return _followed(y, call)


def _run_specially(x: Tensor, call: Call) -> Tensor:
    """Do the same with a depthwise convolution behind it, or where something looks at each operation."""
    if call.depthwise_conv is not None and call.layout.channel_dim != 1:
        # A convolution takes its channels on the second axis: a view of tokens has them there.
        x = x.movedim(-1, 1)
        return run(x, call.channels_second(x)).movedim(1, -1)
    if torch_private.is_transformed():
        with without_autocast(x):
            return _followed(_normalize_without_functions(x, call), call)
    assert call.depthwise_conv is not None
    spec = None if call.backend == "eager" else _on_kernels(x, call)[1]
    with without_autocast(x):
        try:
            y = _normalize_and_convolve(x, call, call.depthwise_conv, spec)
        except KernelError as error:
            _without_kernels(x, call, error)
            y = _normalize_and_convolve(x, call, call.depthwise_conv, None)
    return activated(y, call.activation, call.residual)


def _on_kernels(x: Tensor, call: Call) -> tuple[bool, FusedSpec | None]:
    """Return whether kernels run, and the equations for them; ``None`` if only the passes around the algebra do."""
    in_graph = torch_private.in_graph()
    if in_graph and backend.IN_GRAPHS == "plain" and call.backend == "auto":
        return False, None
    kernels = on_kernels(x, call.layout, call.backend, empty=call.ranks is not None, what=_kind_of_launch(x, call))
    fuses = in_graph and backend.IN_GRAPHS == "transparent"
    spec = call.fused_spec(call.layout) if kernels and call.fused_spec is not None and not fuses else None
    if spec is not None and call.ranks is not None:
        # Descriptions know nothing of ranks, so that a layer need not ask for them.
        spec = spec.over(call.ranks)
    # An empty x meets the other ranks in plain PyTorch, whose passes take it.
    return kernels and (spec is not None or x.numel() > 0), spec


def _without_kernels(x: Tensor, call: Call, error: KernelError) -> bool:
    """Note that the kernels of this call do not run on this device, see :func:`give_up`; return that none will."""
    give_up(x, call.layout, call.backend, _kind_of_launch(x, call), error)
    return False


def _kind_of_launch(x: Tensor, call: Call) -> tuple[Any, ...] | None:
    """Return what tells this call's kernels from others, for a GPU on which some may turn out not to run."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return None
    return getattr(call.algebra, "__qualname__", None), call.activation, call.residual is None


def check_ending(x: Tensor, activation: str, residual: Tensor | None) -> None:
    """Refuse an unknown activation, and a residual in another shape than x.

    Raises:
        ValueError: one of them.
    """
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        came = repr(activation) if isinstance(activation, (str, int, float)) else f"a {type(activation).__name__}"
        raise ValueError(f"normalize: activation must be one of {tuple(ACTIVATIONS)}, got {came}.")
    # By static shapes, since torch.jit.trace warns where traced ones are compared.
    shape, wanted = (None if t is None else torch_private.static_shape(t) for t in (residual, x))
    if shape is not None and shape != wanted:
        raise ValueError(f"normalize: residual has shape {shape}, x {wanted}: they must agree.")


def _normalize_without_functions(x: Tensor, call: Call) -> Tensor:
    """Run the same passes without an autograd function, for whatever looks at single operations.

    Autograd keeps more tensors of the size of x than the functions below do.
    """
    layout, moments = call.layout, call.moments
    if moments is None:
        moments = Moments(*eager.moments(x, layout, recorded=True), layout.count(x), call.ranks)
    fields = call.algebra(moments).fields(layout.n, layout.c, torch_private.static_shape)
    if call.depthwise_conv is None:
        return eager.apply_centered(x, *fields, layout, recorded=True)
    kernel, bias = call.depthwise_conv
    kernel = depthwise.with_spatial_axes(kernel, len(layout.reduced)).to(at_least_float32(x.dtype))
    normalized = eager.apply_centered(x.to(kernel.dtype), *fields, layout, recorded=True)
    bias = None if bias is None else bias.to(kernel.dtype)
    return depthwise.convolve(normalized, kernel, bias, recorded=True).to(x.dtype)


def _normalize_and_convolve(
    x: Tensor, call: Call, depthwise_conv: tuple[Tensor, Tensor | None], spec: FusedSpec | None
) -> Tensor:
    """Return the depthwise convolution of the normalized x, by one kernel where it can."""
    kernel, bias = depthwise_conv
    # One layer serves maps of any dimension, and the convolution needs as many axes as the map has.
    kernel = depthwise.with_spatial_axes(kernel, len(call.layout.shape) - 2)
    readable = bias is None or bias.is_contiguous()
    if isinstance(spec, MixtureSpec) and readable and depthwise.on_kernels(kernel, call.layout.size):
        return spec.normalize_depthwise(x, kernel, bias, call.layout)
    x_alias, scale_carrier, fields, how = _fields(x, call, kernels=False)
    # Sums over taps in half precision would lose digits that a single rounding keeps.
    kernel = kernel.to(at_least_float32(x.dtype))
    bias = None if bias is None else bias.to(kernel.dtype)
    y: Tensor = _ApplyDepthwise.apply(x_alias, scale_carrier, x, *fields, kernel, bias, how)
    return y


def _fields(x: Tensor, call: Call, kernels: bool) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor], Passes]:
    """Return alias and carrier, the center, scale and shift that the algebra makes, and how the passes go on."""
    layout, moments, mean_is_small, by_name = call.layout, call.moments, False, call.backend == "triton"
    if moments is None:
        x_alias, mean, var, scale_carrier = _Moments.apply(x, Passes(layout, kernels, by_name))
        mean_is_small = x.dtype == torch.float32 == mean.dtype and layout.size > 1 and x.is_cpu
        moments = Moments(mean, var, layout.size, call.ranks, layout.is_one_sample)
    else:
        x_alias, scale_carrier = _Alias.apply(x, layout)
    fields = call.algebra(moments).fields(layout.n, layout.c)
    return x_alias, scale_carrier, fields, Passes(layout, kernels, by_name, mean_is_small)


class _Moments(torch.autograd.Function):
    """First node: x -> (x_alias, mean, var, scale_carrier); its backward writes dx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Passes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.how = how
        mean, var = how.forward_module.moments(x, how.layout)
        # A gradient that is missing must be told from zeros, which would cost a pass over x.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean)
        return x.view_as(x), mean, var, torch.zeros_like(mean)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        # What autograd calls the gradients of x_alias and scale_carrier are dy and scale, from the second node.
        dy, dmean, dvar, scale = grads
        x, mean = ctx.saved_tensors
        # Where only the moments were used and not y, nothing came from the second node.
        if dy is None or scale is None:
            dy, scale = torch.zeros_like(x), torch.zeros_like(mean)
        dx = ctx.how.module(dy, dmean, dvar).combine(dy, scale, x, mean, dmean, dvar, ctx.how.layout)
        return dx, None


class _Alias(torch.autograd.Function):
    """First node where the moments do not come from x: x -> (x_alias, scale_carrier), and dx = scale * dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        ctx.layout = layout
        return x.view_as(x), torch.zeros((layout.n, layout.c), dtype=stat_dtype(x), device=x.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dy, scale = grads
        return (dy * ctx.layout.broadcast_to_input(scale)).to(dy.dtype), None


class _Apply(torch.autograd.Function):
    """Second node: y = scale * (x - center) + shift.

    It reads x as a plain input that gets no gradient here; what autograd takes for the gradient of x goes through
    ``x_alias`` and ``scale_carrier`` to the first node. Its backward reads dy and x once, for two sums per
    (sample, channel): the gradients of center, scale and shift.
    """

    @staticmethod
    def forward(
        ctx: Any, x_alias: Tensor, carrier: Tensor, x: Tensor, center: Tensor, scale: Tensor, shift: Tensor, how: Passes
    ) -> Tensor:
        ctx.how, ctx.carrier_dtype, ctx.shift_like = how, carrier.dtype, (shift.shape, shift.dtype)
        ctx.save_for_backward(x, center, scale)
        y: Tensor = how.forward_module.apply(x, center, scale, shift, how.layout, how.mean_is_small)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, center, scale = ctx.saved_tensors
        # What nobody asked for is not computed: each sum would be a pass over dy and x.
        need, passes = ctx.needs_input_grad, ctx.how.module(dy)
        if passes not in (eager, whole_batch) and dy.stride() != x.stride():
            # Here and in the first node kernels read dy at the offsets of x: one copy serves both.
            dy = torch.empty_like(x, dtype=dy.dtype).copy_(dy)
        fields = field_gradients(ctx, passes, dy, x, center, scale) if any(need[3:6]) else (None, None, None)
        return dy if need[0] else None, carrier_grad(ctx, scale), None, *fields, None


class _ApplyDepthwise(torch.autograd.Function):
    """Second node with a depthwise convolution: y = bias + kernel * (scale * (x - center) + shift).

    What it sends for dy is the gradient of the normalized map, dy through the transposed convolution.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_alias: Tensor,
        scale_carrier: Tensor,
        x: Tensor,
        center: Tensor,
        scale: Tensor,
        shift: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        how: Passes,
    ) -> Tensor:
        ctx.how, ctx.carrier_dtype, ctx.shift_like = how, scale_carrier.dtype, (shift.shape, shift.dtype)
        ctx.save_for_backward(x, center, scale, shift, kernel)
        # Decided here, since the backward pass may not see the memory format any more.
        ctx.unroll = depthwise.unrolled(x, kernel)
        # Rounded to half only after the convolution, which sums k * k of these numbers.
        normalized = eager.apply(x.to(kernel.dtype), center, scale, shift, how.layout, how.mean_is_small)
        return cast(depthwise.convolve(normalized, kernel, bias, unroll=ctx.unroll), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, center, scale, shift, kernel = ctx.saved_tensors
        need = ctx.needs_input_grad
        dkernel = dbias = None
        # In the precision in which the forward pass computed.
        x, dy = x.to(kernel.dtype), grads[0].to(kernel.dtype)
        dnormalized = depthwise.transposed(dy, kernel, unroll=ctx.unroll)
        if any(need[6:8]):
            # The normalized map was not saved: it is computed again.
            normalized = eager.apply(x, center, scale, shift, ctx.how.layout, ctx.how.mean_is_small)
            dkernel, dbias = depthwise.kernel_gradients(dy, normalized, kernel, unroll=ctx.unroll)
        wanted = any(need[3:6])
        fields = field_gradients(ctx, eager, dnormalized, x, center, scale) if wanted else (None, None, None)
        gradients = dnormalized if need[0] else None, carrier_grad(ctx, scale), None, *fields
        return *gradients, dkernel, dbias if need[7] else None, None


def carrier_grad(ctx: Any, scale: Tensor) -> Tensor | None:
    """Return scale in the shape and dtype of the carrier, as its gradient."""
    layout = ctx.how.layout
    return scale.to(ctx.carrier_dtype).expand(layout.n, layout.c) if ctx.needs_input_grad[1] else None


def field_gradients(
    ctx: Any, passes: Any, dy: Tensor, x: Tensor, center: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of center, scale and shift, given dy of scale * (x - center) + shift.

    They are -scale * sum dy, sum dy * (x - center) and sum dy over what each field was broadcast along.
    """
    pivot = center.to(at_least_float32(x.dtype))
    total, dot = passes.reduce(dy, x, pivot, ctx.how.layout, ctx.how.mean_is_small)
    dscale = _sum_to(dot, scale.shape, scale.dtype)
    if pivot.dtype != center.dtype:
        # The pass subtracted the center rounded to pivot's dtype: add what rounding left.
        dscale = dscale + _sum_product_to(pivot - center, total, scale.shape, scale.dtype)
    return -_sum_product_to(scale, total, center.shape, center.dtype), dscale, _sum_to(total, *ctx.shift_like)


def _sum_to(t: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Sum an (N, C) tensor over the axes along which ``shape`` has one entry."""
    axes = [d for d in (0, 1) if shape[d] == 1 != t.shape[d]]
    return t.sum(axes, keepdim=True, dtype=dtype) if axes else t.to(dtype)


def _sum_product_to(factor: Tensor, t: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return ``_sum_to(factor * t, shape, dtype)``, summing first where that is the same."""
    if all(size in (1, other) for size, other in zip(factor.shape, shape, strict=True)):
        return factor * _sum_to(t, shape, dtype)
    return _sum_to(factor * t, shape, dtype)

"""One autograd function for all families: in eager mode their launches are recorded once per kind of call and replayed.

What torch.compile, torch.export, fake tensors and dispatch modes see are the operators beside this file; where none of
them looks, an operator would only cost time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_norm.kernels import launcher
from lightning_norm.kernels.grid import as_one_sample, dense
from lightning_norm.ops import torch_private
from lightning_norm.ops.fused import operators

PLAIN = (Tensor, torch.nn.Parameter, type(None))
KNOWN = "_looks"
_kinds: dict[Hashable, object] = {}


class Recordable(Protocol):
    """What a description of a layer's equations says of its launches."""

    @property
    def kind(self) -> object:
        """What the launches depend on beside tensors, one object for equal descriptions: see :func:`kind_of`."""

    @property
    def _of_batch_alone(self) -> bool:
        """Whether no sample has statistics of its own, so that (N, C) inputs may be read as one sample."""

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """The tensors that may need a gradient."""

    @property
    def buffers(self) -> tuple[Any, ...]:
        """What else the forward launches read or move."""

    @property
    def backward_buffers(self) -> tuple[Any, ...]:
        """What else the backward launches read."""

    @property
    def moved(self) -> tuple[Tensor, ...]:
        """Those of the buffers that the forward launches write to."""

    def of_call(self, x: Tensor) -> tuple[Any, ...]:
        """Return what the launches of both directions read beside, and what is drawn anew for each call."""

    @property
    def launch_forward(self) -> Callable[..., tuple[Tensor, Sequence[Tensor]]]:
        """From x, residual, parameters, buffers, channel_dim and activation to y and the statistics that are kept."""

    @property
    def launch_backward(
        self,
    ) -> Callable[..., tuple[Tensor, Tensor | None, Sequence[Tensor | None], Sequence[Tensor]]]:
        """From dy, x, residual, statistics, parameters, buffers, need_dx, channel_dim and activation to gradients.

        Those of x, of the residual and of the parameters, and a tensor with several of them that :meth:`unpack` is to
        cut.
        """

    @property
    def operator_backward(self) -> Callable[..., tuple[Tensor, Tensor | None, Sequence[Tensor | None]]]:
        """What :meth:`launch_backward` returns but for the last, by the operator that launches the same."""

    def unpack(self, gradients: list[Any], packed: Tensor) -> None:
        """Write the gradients of several parameters that lie in one tensor into the list."""


def kind_of(*what: Hashable) -> object:
    """Return one object for equal arguments, whose hash takes no time."""
    # Numbers that change with each call must not fill the memory.
    if len(_kinds) >= launcher.LIMIT:
        _kinds.clear()
    return _kinds.setdefault(what, object())


def channel_dim_of(x: Tensor, spec: Recordable, channel_dim: int) -> int:
    """Return the channel axis as the launches are told it, see :func:`lightning_norm.kernels.grid.as_one_sample`."""
    return as_one_sample(x, channel_dim) if x.dim() == 2 and spec._of_batch_alone else channel_dim


def can_record(x: Tensor, spec: Recordable, residual: Tensor | None = None) -> bool:
    """Return whether the launches may be called directly: x has elements, and nobody but autograd watches."""
    return (
        not torch.compiler.is_compiling()
        and not torch_private.watched()
        and all(type(t) in PLAIN for t in (x, residual, *spec.parameters, *spec.buffers))
        and x.numel() > 0
        and _is_written_out(x, residual, *spec.parameters, *spec.buffers)
        # What the launches are given beside x is brought into its strides, which a new tensor must be able to have.
        and torch.empty_like(x).stride() == x.stride()
    )


def _is_written_out(*tensors: Tensor | None) -> bool:
    """Tell whether the memory of tensors holds their values, and not the negative or nothing at all."""
    return not any(t is not None and (t.is_neg() or t._is_zerotensor()) for t in tensors)


def normalize(x: Tensor, spec: Recordable, channel_dim: int, activation: str, residual: Tensor | None) -> Tensor:
    """Return act(normalized x + residual).

    Raises:
        KernelError: a kernel of the forward or, where a gradient is needed, of the backward pass does not compile or
            load; then none was launched.
    """
    of_call = spec.of_call(x)
    if torch.is_grad_enabled():
        # A backward pass that cannot run is too late to choose another backend.
        _compile_backward(x, residual, spec, channel_dim, activation, of_call)
    y: Tensor = _Recorded.apply(x, residual, spec, channel_dim, activation, of_call, *spec.parameters)
    vars(spec).setdefault(KNOWN, set()).add(_look(x, activation, residual))
    return y


def again(x: Tensor, spec: Recordable, channel_dim: int, activation: str, residual: Tensor | None) -> Tensor | None:
    """Return what :func:`normalize` does if it was called like this before, ``None`` otherwise.

    What was checked then, and depends on nothing but the look of the input, is not checked again.
    """
    if type(x) not in PLAIN or torch_private.watched() or x.is_neg() or x._is_zerotensor():
        return None
    if residual is not None and not _is_written_out(residual):
        return None
    if _look(x, activation, residual) not in vars(spec).get(KNOWN, ()):
        return None
    channel_dim = channel_dim_of(x, spec, channel_dim)
    y: Tensor = _Recorded.apply(x, residual, spec, channel_dim, activation, spec.of_call(x), *spec.parameters)
    return y


def _compile_backward(
    x: Tensor, residual: Tensor | None, spec: Recordable, channel_dim: int, activation: str, of_call: tuple[Any, ...]
) -> None:
    """Compile the kernels of both passes ahead of the forward pass, for a gradient that lies in memory as x does."""
    need_dx, need = x.requires_grad, [t is not None and t.requires_grad for t in spec.parameters]
    if not (need_dx or any(need) or (residual is not None and residual.requires_grad)):
        return
    x, parameters = x.detach(), [None if t is None else t.detach() for t in spec.parameters]
    residual = None if residual is None else dense(residual.detach(), x)
    plan, _, _ = _forward_plan(x, residual, spec, channel_dim, activation, parameters, of_call)
    workspace = torch.empty(plan.sizes[0], dtype=torch.float32, device=x.device)
    saved = [*parameters, *spec.backward_buffers]
    kept = None if activation == "none" else residual
    _backward_plan(torch.empty_like(x), x, kept, workspace, saved, of_call, spec, plan, (channel_dim, activation), need_dx, need)  # noqa: E501  # fmt: skip


def _look(x: Tensor, activation: str, residual: Tensor | None) -> Hashable:
    # Triton compiles other code for addresses that are multiples of 16, and other kernels for a backward pass.
    look = type(x), x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15, activation, torch.is_grad_enabled()
    return look if residual is None else (*look, type(residual), residual.shape, residual.dtype)


class _Recorded(torch.autograd.Function):
    """y from x and its statistics, and all gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        spec: Recordable,
        channel_dim: int,
        activation: str,
        buffers: tuple[Any, ...],
        *parameters: Tensor | None,
    ) -> Tensor:
        if residual is not None:
            residual = dense(residual, x)
        plan, inputs, pointers = _forward_plan(x, residual, spec, channel_dim, activation, parameters, buffers)
        # All statistics lie in one tensor, so that autograd saves one in place of six.
        (y,), workspace = plan(inputs, pointers)
        assert y is not None
        if spec.moved:
            # A graph of the user's that holds one of them must not go on as if it were as before.
            torch.autograd.graph.increment_version(spec.moved)
        # Without an activation the gradient of the residual is dy, and the residual itself is not needed.
        ctx.save_for_backward(
            x, None if activation == "none" else residual, workspace, *parameters, *spec.backward_buffers
        )
        ctx.spec, ctx.how, ctx.plan = spec, (channel_dim, activation), plan
        ctx.buffers, ctx.n = buffers, len(parameters)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operators.refuse_second_derivatives()
        x, residual, workspace, *saved = ctx.saved_tensors
        need_dx, need_dresidual, _, _, _, _, *need = ctx.needs_input_grad
        spec, how, buffers, forward = ctx.spec, ctx.how, ctx.buffers, ctx.plan
        parameters = saved[: ctx.n]
        if torch_private.is_batched(grads[0]) or torch_private.watched() or type(grads[0]) not in PLAIN:
            return _by_operator(ctx, grads[0], x, residual, workspace, saved)
        if workspace.dtype is not torch.float32 or not workspace.is_contiguous():
            workspace = workspace.float().contiguous()  # hooks for saved tensors may have stored it in another way
        dy = dense(grads[0], x)
        residual = None if residual is None else dense(residual, x)
        if dy.is_neg() or dy._is_zerotensor():
            dy = torch.empty_like(dy).copy_(dy)
        plan, inputs, pointers = _backward_plan(
            dy, x, residual, workspace, saved, buffers, spec, forward, how, need_dx, need
        )
        (dx, dresidual, *gradients), packed = plan(inputs, pointers)
        if packed is not None:
            spec.unpack(gradients, packed)
        # The kernels write float32, and a parameter in half has a gradient in half.
        for i, t in enumerate(parameters):
            g = gradients[i]
            if g is not None and t.dtype is not torch.float32:
                gradients[i] = g.to(t.dtype)
        if need_dresidual and residual is None:
            dresidual = grads[0]
        return (dx, dresidual, None, None, None, None, *gradients)


def _forward_plan(
    x: Tensor,
    residual: Tensor | None,
    spec: Recordable,
    channel_dim: int,
    activation: str,
    parameters: Sequence[Tensor | None],
    of_call: tuple[Any, ...],
) -> tuple[launcher.Plan, tuple[Any, ...], list[int]]:
    """Return the launches of the forward pass, and their inputs with the pointers of these."""
    inputs = (x, residual, *parameters, *spec.buffers, *of_call)
    key, pointers = launcher.key_of((spec.kind, channel_dim, activation), inputs)

    def call(x: Any, residual: Any, *rest: Any) -> Any:
        n = len(parameters)
        y, statistics = spec.launch_forward(x, residual, rest[:n], rest[n:], channel_dim, activation)
        return (y,), statistics

    return launcher.plan_of(key, inputs, call), inputs, pointers


def _backward_plan(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    workspace: Tensor,
    saved: Sequence[Tensor | None],
    of_call: tuple[Any, ...],
    spec: Recordable,
    forward: launcher.Plan,
    how: tuple[int, str],
    need_dx: bool,
    need: Sequence[bool],
) -> tuple[launcher.Plan, tuple[Any, ...], list[int]]:
    """Return the launches of the backward pass, and their inputs with the pointers of these."""
    inputs = (x, dy, residual, workspace, *saved, *of_call)
    key, pointers = launcher.key_of((forward, need_dx, *need), inputs)

    def call(x: Any, dy: Any, residual: Any, workspace: Any, *rest: Any) -> Any:
        n = len(need)
        dx, dresidual, gradients, packed = spec.launch_backward(
            dy, x, residual, forward.views(workspace), rest[:n], rest[n:], need_dx, *how
        )
        wanted = (g if needed else None for g, needed in zip(gradients, need, strict=True))
        return (dx if need_dx else None, dresidual if residual is not None else None, *wanted), packed

    return launcher.plan_of(key, inputs, call), inputs, pointers


def _by_operator(
    ctx: Any, dy: Tensor, x: Tensor, residual: Tensor | None, workspace: Tensor, saved: list[Any]
) -> tuple[Tensor | None, ...]:
    """Return the gradients where somebody watches the backward pass, or where there are many gradients in one."""
    parameters, (need_dx, need_dresidual, _, _, _, _, *need) = saved[: ctx.n], ctx.needs_input_grad
    dx, dresidual, gradients = ctx.spec.operator_backward(
        dy, x, residual, ctx.plan.views(workspace), parameters, (*saved[ctx.n :], *ctx.buffers), need_dx, *ctx.how
    )
    shaped = [
        g.view(t.shape).to(t.dtype) if needed and g is not None and t is not None else None
        for g, t, needed in zip(gradients, parameters, need, strict=True)
    ]
    dresidual = dy if residual is None else dresidual
    return (dx if need_dx else None, dresidual if need_dresidual else None, *(None,) * 4, *shaped)

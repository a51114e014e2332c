"""One autograd function for all families: in eager mode their launches are recorded once per kind of call and replayed.

What torch.compile, torch.export, fake tensors and dispatch modes see are the operators beside this file; where none of
them looks, an operator would only cost time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_norm.errors import KernelError
from lightning_norm.kernels import launcher
from lightning_norm.kernels.grid import as_one_sample, dense
from lightning_norm.ops import torch_private
from lightning_norm.ops.fused import operators

PLAIN = (Tensor, torch.nn.Parameter, type(None))
TENSORS = "_recorded_tensors"
KNOWN = "_recorded_looks"
launcher.EMPTY_STRIDED = torch_private.empty_strided() or launcher.EMPTY_STRIDED
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

    @property
    def draws(self) -> bool:
        """Whether ``of_call`` draws random numbers, which it may do once per call."""

    def of_call(self, x: Tensor) -> tuple[Any, ...]:
        """Return what the launches of both directions read beside, and what is drawn anew for each call."""

    @property
    def launch_forward(self) -> Callable[..., tuple[Tensor, Sequence[Tensor]]]:
        """From x, residual, parameters, buffers, channel_dim and activation to y and the statistics that are kept."""

    @property
    def launch_backward(self) -> Callable[..., tuple[Tensor, Tensor | None, Sequence[Tensor | None]]]:
        """From dy, x, residual, statistics, parameters, buffers, need_dx, channel_dim and activation to gradients.

        Those of x, of the residual and of the parameters.
        """

    @property
    def operator_backward(self) -> Callable[..., tuple[Tensor, Tensor | None, Sequence[Tensor | None]]]:
        """What :meth:`launch_backward` returns, by the operator that launches the same."""


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


class _Tensors(NamedTuple):
    """The tensors of a description, without those that it lacks.

    Args:
        kind: of the description, and which tensors it has.
        parameters: those that may need a gradient.
        all: of the forward pass, the parameters first.
        saved: what the backward pass reads beside the parameters.
        moved: what the forward launches write to.
    """

    kind: object
    parameters: tuple[Tensor, ...]
    all: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]
    moved: tuple[Tensor, ...]


def _tensors_of(spec: Recordable) -> _Tensors:
    parameters, buffers = spec.parameters, spec.buffers
    there = tuple(t for t in parameters if t is not None)
    has = tuple(t is not None for t in (*parameters, *buffers))
    saved = tuple(t for t in spec.backward_buffers if t is not None)
    return _Tensors(kind_of(spec.kind, has), there, (*there, *(t for t in buffers if t is not None)), saved, spec.moved)


class _Call(NamedTuple):
    """A call of a layer, ready to be launched.

    Args:
        spec: the description.
        tensors: of the description.
        how: channel axis and activation.
        of_call: what was drawn for this call.
        plan: of the forward pass.
        inputs: of the plan.
        pointers: of the inputs.
    """

    spec: Recordable
    tensors: _Tensors
    how: tuple[int, str]
    of_call: tuple[Any, ...]
    plan: launcher.Plan
    inputs: list[Any]
    pointers: list[int]


def normalize(x: Tensor, spec: Recordable, channel_dim: int, activation: str, residual: Tensor | None) -> Tensor:
    """Return act(normalized x + residual), where :func:`can_record` says that the launches may be called directly.

    Raises:
        KernelError: a kernel of the forward or, where a gradient is needed, of the backward pass does not compile or
            load; then none was launched.
    """
    tensors = vars(spec)[TENSORS] = _tensors_of(spec)
    drawn_from = torch.get_rng_state() if spec.draws else None
    try:
        y = _normalize(x, spec, tensors, channel_dim, activation, residual, record=True)
    except KernelError:
        # What takes over draws for itself, as it will in the second run of activation checkpointing.
        if drawn_from is not None:
            torch.set_rng_state(drawn_from)
        raise
    assert y is not None
    if spec.draws:
        vars(spec).setdefault(KNOWN, set()).add(_look(x, activation, residual))
    return y


def again(x: Tensor, spec: Recordable, channel_dim: int, activation: str, residual: Tensor | None) -> Tensor | None:
    """Return what :func:`normalize` does if calls of this kind are recorded, ``None`` otherwise.

    What was checked then, and depends on nothing but the key of a call, is not checked again.
    """
    tensors = vars(spec).get(TENSORS)
    if tensors is None or type(x) not in PLAIN or torch_private.watched() or x.is_neg() or x._is_zerotensor():
        return None
    if residual is not None and (type(residual) not in PLAIN or not _is_written_out(residual)):
        return None
    # Asked before numbers are drawn for the call: drawn twice, they would differ in the second run of activation
    # checkpointing.
    if spec.draws and _look(x, activation, residual) not in vars(spec).get(KNOWN, ()):
        return None
    channel_dim = channel_dim_of(x, spec, channel_dim)
    return _normalize(x, spec, tensors, channel_dim, activation, residual, record=spec.draws)


def _look(x: Tensor, activation: str, residual: Tensor | None) -> Hashable:
    # Triton compiles other code for addresses that are multiples of 16, and other kernels for a backward pass.
    look = x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15, activation, torch.is_grad_enabled()
    return look if residual is None else (*look, residual.dtype)


def _normalize(
    x: Tensor,
    spec: Recordable,
    tensors: _Tensors,
    channel_dim: int,
    activation: str,
    residual: Tensor | None,
    record: bool,
) -> Tensor | None:
    """Launch what was recorded of such a call; where nothing was, record it, or return ``None``."""
    of_call = spec.of_call(x)
    inputs: list[Any] = [x, *tensors.all]
    kind: tuple[Hashable, ...] = (tensors.kind, channel_dim, activation)
    if residual is not None:
        inputs.append(residual if residual.stride() == x.stride() else dense(residual.detach(), x))
        kind = (*kind, "residual")
    if of_call:
        kind = (*kind, *(t is None for t in of_call))
    numbers = _add_tensors(inputs, of_call)
    key, pointers = launcher.key_of(kind, inputs, numbers)
    inputs += numbers
    plan, recording = launcher.known(key), torch.is_grad_enabled()
    if plan is None or (recording and not plan.has_backward):
        if not record:
            return None

        def call(x: Any, *rest: Any) -> Any:
            slots = iter(rest)
            parameters, buffers = _spread(spec.parameters, slots), _spread(spec.buffers, slots)
            beside = None if residual is None else next(slots)
            # Numbers come behind all tensors, in ``of_call`` as well.
            buffers += _spread(of_call, slots)
            y, statistics = spec.launch_forward(x, beside, parameters, buffers, channel_dim, activation)
            return (y,), statistics

        plan = launcher.plan_of(key, inputs, call)
    prepared = _Call(spec, tensors, (channel_dim, activation), of_call, plan, inputs, pointers)
    if recording and not plan.has_backward:
        _compile_backward(prepared, x, residual)
        plan.has_backward = True
    y: Tensor = _Recorded.apply(prepared, x, residual, *tensors.parameters)
    return y


def _compile_backward(call: _Call, x: Tensor, residual: Tensor | None) -> None:
    """Compile the backward pass ahead of the forward one: once that has run, it is too late for another backend."""
    need_dx, need = x.requires_grad, [t.requires_grad for t in call.tensors.parameters]
    if not (need_dx or any(need) or (residual is not None and residual.requires_grad)):
        return
    # Nothing is launched on these tensors: their shapes, strides and addresses are all that the launch code sees.
    x = x.detach()
    # For a gradient that lies in memory as x does.
    tensors = [x, torch.empty_like(x)]
    if call.plan.sizes[0]:
        tensors.append(torch.empty(call.plan.sizes[0], dtype=torch.float32, device=x.device))
    tensors += [*call.tensors.parameters, *call.tensors.saved]
    has_residual = residual is not None and call.how[1] != "none"
    if residual is not None and has_residual:
        tensors.append(dense(residual.detach(), x))
    _backward_plan(tensors, call.spec, call.how, call.of_call, call.plan, has_residual, need_dx, need)


def _backward_plan(
    inputs: list[Any],
    spec: Recordable,
    how: tuple[int, str],
    of_call: tuple[Any, ...],
    forward: launcher.Plan,
    has_residual: bool,
    need_dx: bool,
    need: Sequence[bool],
) -> tuple[launcher.Plan, list[int]]:
    """Return the launches of a backward pass and the pointers of its inputs, to which what the call drew is added.

    Args:
        inputs: x, the gradient of y, the kept statistics if any, parameters, buffers and, where it is needed, the
            residual.
        spec: the description.
        how: channel axis and activation.
        of_call: what was drawn for the call.
        forward: the launches of the forward pass.
        has_residual: the last input is one.
        need_dx: the gradient of x is asked for.
        need: which gradients of parameters are.
    """
    numbers = _add_tensors(inputs, of_call)
    key, pointers = launcher.key_of((forward, need_dx, *need), inputs, numbers)
    inputs += numbers

    def call(x: Any, dy: Any, *rest: Any) -> Any:
        slots = iter(rest)
        statistics = forward.views(next(slots)) if forward.sizes[0] else []
        parameters, buffers = _spread(spec.parameters, slots), _spread(spec.backward_buffers, slots)
        beside = next(slots) if has_residual else None
        buffers += _spread(of_call, slots)
        dx, dresidual, gradients = spec.launch_backward(dy, x, beside, statistics, parameters, buffers, need_dx, *how)
        # A gradient that nobody asked for is no output, and takes no place in the tensor of all gradients.
        there = (g for g, t in zip(gradients, parameters, strict=True) if t is not None)
        wanted = (g if needed else None for g, needed in zip(there, need, strict=True))
        return (dx if need_dx else None, dresidual if has_residual else None, *wanted), ()

    return launcher.plan_of(key, inputs, call), pointers


def _add_tensors(inputs: list[Any], of_call: tuple[Any, ...]) -> Sequence[Any]:
    """Add the tensors of what a call drew to its inputs, and return its numbers, which come behind all tensors."""
    if not of_call:
        return ()
    inputs += (t for t in of_call if isinstance(t, Tensor))
    return [t for t in of_call if t.__class__ is launcher.Number]


def _spread(tensors: Sequence[Any], slots: Iterator[Any]) -> list[Any]:
    """Return the next slots at the places of what is not ``None``."""
    return [None if t is None else next(slots) for t in tensors]


class _Recorded(torch.autograd.Function):
    """y from x and its statistics, and all gradients."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, residual: Tensor | None, *parameters: Tensor) -> Tensor:
        spec, tensors, how, of_call, plan, inputs, pointers = call
        # All statistics lie in one tensor, so that autograd saves one in place of six.
        (y,), workspace = plan(inputs, pointers)
        assert y is not None
        if tensors.moved:
            # A graph of the user's that holds one of them must not go on as if it were as before.
            torch.autograd.graph.increment_version(tensors.moved)
        # Without an activation the gradient of the residual is dy, and the residual itself is not needed.
        beside = () if residual is None or how[1] == "none" else (residual,)
        ctx.save_for_backward(x, workspace, *parameters, *tensors.saved, *beside)
        ctx.call = spec, how, of_call, plan, bool(beside)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operators.refuse_second_derivatives()
        (dy,), (x, workspace, *saved) = grads, ctx.saved_tensors
        spec, how, of_call, forward, has_residual = ctx.call
        _, need_dx, need_dresidual, *need = ctx.needs_input_grad
        residual = saved.pop() if has_residual else None
        if torch_private.is_batched(dy) or torch_private.watched() or type(dy) not in PLAIN:
            return _by_operator(ctx, dy, x, residual, workspace, saved)
        if workspace is not None and (workspace.dtype is not torch.float32 or not workspace.is_contiguous()):
            workspace = workspace.float().contiguous()  # hooks for saved tensors may have stored it in another way
        gradient = dense(dy, x)
        if gradient.is_neg() or gradient._is_zerotensor():
            gradient = torch.empty_like(gradient).copy_(gradient)
        inputs = [x, gradient, *saved] if workspace is None else [x, gradient, workspace, *saved]
        if residual is not None:
            inputs.append(dense(residual, x))
        plan, pointers = _backward_plan(inputs, spec, how, of_call, forward, has_residual, need_dx, need)
        # The kernels write float32; autograd gives a parameter in half a gradient in half.
        (dx, dresidual, *gradients), _ = plan(inputs, pointers)
        return (None, dx, dy if need_dresidual and not has_residual else dresidual, *gradients)


def _by_operator(
    ctx: Any, dy: Tensor, x: Tensor, residual: Tensor | None, workspace: Tensor | None, saved: list[Any]
) -> tuple[Tensor | None, ...]:
    """Return the gradients where somebody watches the backward pass, or where there are many gradients in one."""
    (spec, how, of_call, forward, _), (_, need_dx, need_dresidual, *need) = ctx.call, ctx.needs_input_grad
    slots = iter(saved)
    parameters, buffers = _spread(spec.parameters, slots), _spread(spec.backward_buffers, slots)
    statistics = [] if workspace is None else forward.views(workspace)
    dx, dresidual, gradients = spec.operator_backward(
        dy, x, residual, statistics, parameters, (*buffers, *of_call), need_dx, *how
    )
    there = ((g, t) for g, t in zip(gradients, parameters, strict=True) if t is not None)
    shaped = [
        g.view(t.shape).to(t.dtype) if needed and g is not None else None
        for (g, t), needed in zip(there, need, strict=True)
    ]
    dresidual = dy if residual is None else dresidual
    return (None, dx if need_dx else None, dresidual if need_dresidual else None, *shaped)

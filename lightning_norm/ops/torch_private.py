"""Every private name of torch that this package uses, each with the reason why no public one does.

``tests/ops/test_torch_private.py`` fails loudly when one of them disappears or changes its meaning.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# Looked up once: every forward pass asks these, a few times.
_is_compiling = torch.compiler.is_compiling
_in_functorch = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_included = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
# What ``torch.jit.trace`` is at, ``None`` while it does not run, and None in a graph of torch.compile.
# ``torch.jit.is_tracing`` is slower by a factor of three.
tracing_state: Callable[[], object | None] = torch._C._get_tracing_state


TRACES_CONTEXT_VARIABLES = TELLS_EXPORT = torch.__version__ >= "2.14"
"""Whether torch.compile reads a ``ContextVar`` in a graph, and says ``is_exporting()`` in torch.export alone.

Seen: torch 2.14 does, 2.11 does not.
"""


CHANNELS_LAST_GROUP_NORM = torch.__version__ >= "2.14"
"""Whether ATen's group normalization takes channels-last inputs: 2.11 ends the process where nobody asks for dx."""


def outside_of_graphs(function: Function) -> Function:
    """Mark a function that torch.compile calls between two graphs.

    ``torch.compiler.disable`` does the same, and imports the whole compiler for it.
    """
    function.__dict__["_torchdynamo_disable"] = True
    return function


def in_graph() -> bool:
    """Tell whether torch.compile traces; before torch 2.14 also for ``torch.export.export(strict=True)``."""
    return torch.compiler.is_dynamo_compiling() and not (TELLS_EXPORT and torch.compiler.is_exporting())


def constant_in_graphs(function: Function) -> Function:
    """Mark a function whose result torch.compile takes for a constant of the graph.

    ``torch.compiler.assume_constant_result`` does the same, and imports the whole compiler for it: a second that every
    ``import lightning_norm`` would pay.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def loads_strictly() -> bool:
    """Tell whether the ``load_state_dict`` that is running was called with ``strict=True``.

    torch hands ``strict=True`` to every module's ``_load_from_state_dict``, whatever the user typed, and decides at the
    end; only the frame of ``load_state_dict`` knows.
    """
    frame = sys._getframe(1)
    while frame is not None:
        # By its name, for a library may have put a function of its own in its place, which calls this one.
        if frame.f_code.co_name == "load_state_dict" and "strict" in frame.f_locals:
            return bool(frame.f_locals["strict"])
        frame = frame.f_back  # type: ignore[assignment]
    return True


def is_update_bn() -> bool:
    """Tell whether ``torch.optim.swa_utils.update_bn`` walks over the modules of a model at this moment.

    It looks for subclasses of torch's BatchNorm, ends in silence where there are none, and has no hook.
    """
    if _is_compiling():  # no graph holds a frame
        return False
    # A model may have a ``modules`` of its own, or a wrapped one: a few frames of other names are passed over. Not all
    # of the stack is looked at, for every ``model.parameters()`` comes here once for each layer.
    frame: Any = sys._getframe(1)
    others = 4
    while frame is not None and others:
        if frame.f_code.co_name == "update_bn" and "swa_utils" in frame.f_code.co_filename:
            return True
        others -= frame.f_code.co_name not in ("modules", "named_modules")
        frame = frame.f_back
    return False


def in_backward_pass() -> bool:
    """Tell whether a backward pass runs in this thread, which may run layers again; no public function tells."""
    return not _is_compiling() and torch._C._current_graph_task_id() != -1


def watched() -> bool:
    """Tell whether somebody beside autograd watches what is computed, who must see operators.

    That is what :func:`is_transformed` tells of, and any other dispatch mode, such as a counter of operations.
    """
    return _dispatch_modes() > 0 or is_transformed()


def is_transformed() -> bool:
    """Tell whether something looks at, or differentiates, each operation of PyTorch: then no autograd function may run.

    That is ``torch.jit.trace``, whose public function makes two more checks; a transform of ``torch.func``, forward AD,
    ``FakeTensorMode`` or ``make_fx``, which have none. Not torch.compile and torch.export: they take such functions.
    """
    return not _is_compiling() and (
        _in_functorch()
        or forward_ad._current_level >= 0
        or tracing_state() is not None
        or (_dispatch_modes() > 0 and _is_fake_or_proxy())
        or _is_included(_PRE_DISPATCH)
    )


def _is_fake_or_proxy() -> bool:
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY))


def is_batched(*gradients: Tensor | None) -> bool:
    """Tell whether a gradient is a batch of them, as ``torch.autograd.grad(..., is_grads_batched=True)`` sends it.

    That runs an older vmap, of which nothing but the tensors can tell.
    """
    if _is_compiling():
        return False
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients)


def empty_strided() -> list[Callable[[Any, Any, torch.dtype], Tensor]]:
    """Return what allocates a tensor of a size, strides and a dtype on the CPU, and on the current CUDA device.

    Graphs of torch.compile allocate by these functions, which take half the time of ``torch.empty_strided``. Empty
    where torch has none.
    """
    guards = torch._C._dynamo.guards
    functions = [getattr(guards, name, None) for name in ("_empty_strided_cpu", "_empty_strided_cuda")]
    return [] if None in functions else functions  # type: ignore[return-value]


def static_shape(t: Tensor) -> tuple[int, ...]:
    """Return the shape as plain integers, for checks.

    While ``torch.jit.trace`` runs, ``t.shape`` holds tensors that are part of the graph, and a comparison of one warns.
    """
    state = tracing_state()
    if state is None:
        return tuple(t.shape)
    pause: Callable[[Any], None] = vars(torch._C)["_set_tracing_state"]  # of which torch's own types know nothing
    pause(None)
    try:
        return tuple(t.shape)
    finally:
        pause(state)


def without_gradients(function: Function) -> Function:
    """Run a function without gradients, as ``torch.no_grad`` does, and without those of forward-mode AD.

    ``torch.no_grad`` leaves tangents alone: running statistics would have some, and what is a constant for the backward
    pass would be none for the forward one.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            if forward_ad._current_level < 0:
                return function(*args, **kwargs)
            with forward_ad._set_fwd_grad_enabled(False):
                return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def is_captured(buffer: Tensor) -> bool:
    """Tell whether a transform of ``torch.func`` would refuse a change of this tensor, which it was not given."""
    return not _is_compiling() and _in_functorch() and not torch._C._functorch.is_functorch_wrapped_tensor(buffer)


def is_proxy(x: object) -> bool:
    """Tell whether ``torch.fx`` traces the call: x is one of its proxies, which ``import torch.fx`` names."""
    return not isinstance(x, Tensor) and isinstance(x, torch.fx.Proxy)


def recomputes_saved_tensors() -> bool:
    """Tell whether activation checkpointing with ``use_reentrant=False`` runs a part of the forward pass again.

    It does so under hooks for saved tensors, and no public function tells whether there are any.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


@constant_in_graphs
def is_traced_in_checkpoint() -> bool:
    """Tell whether torch.compile traces, at this moment, what activation checkpointing runs and will run again.

    Other hooks for saved tensors, such as ``save_on_cpu``, run nothing again; a name tells them apart.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    named = hooks is not None and "checkpoint" in getattr(hooks[0], "__qualname__", "")
    return named or torch._C._current_graph_task_id() != -1


def timeout_of(group: ProcessGroup) -> timedelta:
    """Return how long a collective of ``group`` waits for the other ranks.

    A new group has torch's default of 10 or 30 minutes, whatever ``init_process_group`` was asked for, and no public
    function tells what that was.
    """
    backend = group._get_backend(torch.device(group._device_types[0]))
    timeout: timedelta = backend.options._timeout
    return timeout


# torch registers hooks one by one and has no way to list or to move them, so that a layer which takes another's place
# has to take over its dictionaries: handles that the user holds then still remove what they registered.
HOOK_ATTRIBUTES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` call the forward and backward hooks that were registered on ``source``."""
    for attribute in HOOK_ATTRIBUTES:
        setattr(target, attribute, getattr(source, attribute))


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a forward or backward hook is registered on a module."""
    return any(getattr(module, a) for a in HOOK_ATTRIBUTES if a != "_is_full_backward_hook")


def store_of(group: ProcessGroup) -> Any:
    """Return the store by which the ranks of ``group`` found each other.

    A collective in its place could meet another one of a rank that is elsewhere. Public functions make stores alone.
    """
    return torch.distributed.distributed_c10d._world.pg_map[group][1]


def fake_tensor_mode(**options: Any) -> Any:
    """Return the mode in which operators compute shapes and no values; torch exports it under no public name."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(**options)


def recompile_limit(limit: int) -> Any:
    """Return the context in which a function may be compiled so often and no more; no public function sets that."""
    return torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True)


def end_capture(pool: Any) -> None:
    """Tell the CUDA allocator that a capture into a pool has ended; torch does it only where the capture succeeds."""
    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)

"""Every private name of torch that this package uses, each with the reason why no public one does.

``tests/ops/test_torch_private.py`` fails loudly when one of them disappears or changes its meaning.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
        if frame.f_code is torch.nn.Module.load_state_dict.__code__:
            return bool(frame.f_locals["strict"])
        frame = frame.f_back  # type: ignore[assignment]
    return True


def is_update_bn() -> bool:
    """Tell whether ``torch.optim.swa_utils.update_bn`` walks over the modules of a model at this moment.

    It looks for subclasses of torch's BatchNorm, ends in silence where there are none, and has no hook.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name in ("modules", "named_modules"):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_name == "update_bn" and "swa_utils" in frame.f_code.co_filename


def in_backward_pass() -> bool:
    """Tell whether autograd is running a backward pass in this thread, as activation checkpointing's second run does.

    torch has no public function that tells.
    """
    return torch._C._current_graph_task_id() != -1


def recomputes_saved_tensors() -> bool:
    """Tell whether activation checkpointing with ``use_reentrant=False`` runs a part of the forward pass again.

    It does so under hooks for saved tensors, and no public function tells whether there are any.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


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

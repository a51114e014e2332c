"""Every private name of torch that this package uses, each with the reason why no public one does.

``tests/ops/test_torch_private.py`` fails loudly when one of them disappears or changes its meaning.
"""

from __future__ import annotations

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


def in_backward_pass() -> bool:
    """Tell whether autograd is running a backward pass in this thread, as activation checkpointing's second run does.

    torch has no public function that tells.
    """
    return torch._C._current_graph_task_id() != -1


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

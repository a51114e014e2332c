"""Every private name of torch that this package uses, each with the reason why no public one does.

``tests/ops/test_torch_private.py`` fails loudly when one of them disappears or changes its meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

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


def watched() -> bool:
    """Tell whether somebody beside autograd watches what is computed, who must see operators.

    A dispatch mode (fake tensors, a counter of operations), a transform of torch.func, forward-mode derivatives, or
    torch.jit.trace. torch has no public function for some of these, and for others one that imports torch.compile.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def reshaped(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a dense tensor in another shape without a copy, and not as a view.

    Autograd refuses an in-place operation, such as the ReLU of most networks, on a view that an autograd function
    returned. ``Tensor.view`` returns a view, and ``Tensor.resize_`` cannot be exported to ONNX.
    """
    result: Tensor = torch.ops.aten._unsafe_view(t, shape)
    return result


def timeout_of(group: ProcessGroup) -> timedelta:
    """Return how long a collective of ``group`` waits for the other ranks.

    A new group has torch's default of 10 or 30 minutes, whatever ``init_process_group`` was asked for, and no public
    function tells what that was.
    """
    backend = group._get_backend(torch.device(group._device_types[0]))
    timeout: timedelta = backend.options._timeout
    return timeout

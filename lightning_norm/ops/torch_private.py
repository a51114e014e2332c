"""Every private name of torch that this package uses, each with the reason why no public one does.

``tests/ops/test_torch_private.py`` fails loudly when one of them disappears or changes its meaning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def in_backward_pass() -> bool:
    """Tell whether autograd is running a backward pass in this thread, as activation checkpointing's second run does.

    torch has no public function that tells.
    """
    return torch._C._current_graph_task_id() != -1


def reshaped(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a dense tensor in another shape without a copy, and not as a view.

    Autograd refuses an in-place operation, such as the ReLU of most networks, on a view that an autograd function
    returned. ``Tensor.view`` returns a view, and ``Tensor.resize_`` cannot be exported to ONNX.
    """
    result: Tensor = torch.ops.aten._unsafe_view(t, shape)
    return result

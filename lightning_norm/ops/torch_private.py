"""Every private name of torch that this package uses, each with the reason why no public one does.

``tests/ops/test_torch_private.py`` fails loudly when one of them disappears or changes its meaning.
"""

from __future__ import annotations

import torch


def in_backward_pass() -> bool:
    """Tell whether autograd is running a backward pass in this thread, as activation checkpointing's second run does.

    torch has no public function that tells.
    """
    return torch._C._current_graph_task_id() != -1

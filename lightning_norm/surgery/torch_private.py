"""Every private name of torch that surgery uses, with the reason; ``test_torch_private.py`` checks them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import batchnorm

MODULE_ATTRIBUTES = {
    "_parameters": "an entry may be None, and named_parameters() leaves those out; an entry is replaced as it is",
    "_buffers": "the same with named_buffers(); running statistics are set to None for a while",
    "_modules": "named_children() leaves out the second attribute that holds the same child",
}
"""Attributes of every ``nn.Module`` that surgery reads or writes by themselves, and why."""

STATE_DICT_METADATA = "_metadata"
"""The attribute of a ``state_dict`` in which torch keeps what each module wrote of itself; no function returns it."""

# There is no public class that BatchNorm1d, 2d, 3d, SyncBatchNorm and other libraries' subclasses have in common.
TorchBatchNormBase = batchnorm._BatchNorm

# The same with InstanceNorm1d, 2d and 3d.
TorchRunningNormBase = batchnorm._NormBase

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

"""Every private name of torch that surgery uses, with the reason; ``test_torch_private.py`` checks them."""

from __future__ import annotations

import copy
from typing import Any

from torch.nn.modules import batchnorm, conv, instancenorm
from torch.utils import _python_dispatch, _pytree

from lightning_norm.ops.torch_private import HOOK_ATTRIBUTES as HOOK_ATTRIBUTES
from lightning_norm.ops.torch_private import has_hooks as has_hooks
from lightning_norm.ops.torch_private import move_hooks as move_hooks

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

# Without BatchNorm: of statistics per sample, which are averaged in another way.
TorchInstanceNormBase = instancenorm._InstanceNorm

# All convolutions, transposed and lazy ones included.
TorchConvBase = conv._ConvNd

# ``torch.utils._pytree`` has no public twin that knows the outputs of libraries, which register their classes there.
tree_leaves = _pytree.tree_leaves

# torch's documentation names it, and exports it under no public name.
TorchDispatchMode = _python_dispatch.TorchDispatchMode


def without_iterator(loader: Any) -> Any:
    """Return a copy of a loader that starts worker processes of its own, or what is no DataLoader as it is.

    ``DataLoader._iterator``: with ``persistent_workers`` the loader keeps its iterator there, and a second loop over it
    would restart the one that the training is reading from.
    """
    # Any iterable may be training data; only loaders keep an iterator.
    if "_iterator" not in getattr(loader, "__dict__", {}):
        return loader
    # A shallow copy: data, sampler and worker settings are the loader's own.
    twin = copy.copy(loader)
    twin.__dict__["_iterator"] = None
    return twin

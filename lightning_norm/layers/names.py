"""Names of layers as the user's code spells them, without what wrappers put in between."""

from __future__ import annotations

WRAPPER_ATTRIBUTES = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Attributes in which torch.compile, FSDP and activation checkpointing keep the module that they wrap."""


def clean_name(name: str) -> str:
    """Return a dotted name without the parts that torch.compile, FSDP and activation checkpointing add.

    DDP's ``module`` stays: by its name alone it may be an attribute of the user's. ``surgery/walk.py`` looks at the
    model and leaves that out as well.

    >>> clean_name("net._orig_mod.1._fsdp_wrapped_module._checkpoint_wrapped_module.weight")
    'net.1.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPER_ATTRIBUTES)

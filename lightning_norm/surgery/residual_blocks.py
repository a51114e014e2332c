"""Choices of layers that papers make and that no pattern of names can tell."""

from __future__ import annotations

from torch import nn

LAST_OF_BLOCK = "last_of_block"
"""As a pattern: the last norm of each residual block of a ResNet, ResNeXt or Wide ResNet, as in torchvision."""

LAST_NORMS = {"BasicBlock": "bn2", "Bottleneck": "bn3"}
"""Name of a residual block's class, or of a base of it -> its last norm."""


def is_last_of_block(parent: nn.Module, attribute: str) -> bool:
    """Tell whether ``parent`` is a residual block and ``attribute`` its last norm."""
    # The class is compared by its name: ResNets are copied into many repositories, and import no common base.
    return any(LAST_NORMS.get(cls.__name__) == attribute for cls in type(parent).__mro__)


def last_norms(model: nn.Module) -> list[str]:
    """Return the names of the last norm of each residual block: what the pattern "last_of_block" stands for.

    >>> import torchvision
    >>> last_norms(torchvision.models.resnet18())[:2]
    ['layer1.0.bn2', 'layer1.1.bn2']
    """
    return [
        f"{name}.{attribute}" if name else attribute
        for name, block in model.named_modules()
        for attribute, _ in block.named_children()
        if is_last_of_block(block, attribute)
    ]

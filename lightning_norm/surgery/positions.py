"""Which layers of a model are chosen by where they stand: in a block, every so many, or in a part that is frozen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(model: nn.Module, layers: Iterable[nn.Module]) -> dict[nn.Module, nn.Module]:
    """Return the block that each layer belongs to; those outside of all blocks are left out.

    A block is the nearest module around a layer that holds two or more of the layers and whose class the model has
    several times, ``nn.Sequential`` and what derives from it aside: a BasicBlock, an InvertedResidual, a C2f.

    >>> import torchvision
    >>> model = torchvision.models.resnet18()
    >>> blocks_of(model, [model.bn1, model.layer1[0].bn1, model.layer1[0].bn2]) == {
    ...     model.layer1[0].bn1: model.layer1[0], model.layer1[0].bn2: model.layer1[0]
    ... }
    True
    """
    wanted = set(layers)
    kinds = Counter(type(m) for m in model.modules())
    blocks: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        inside = [m for m in module.modules() if m in wanted and m is not module]
        if len(inside) > 1 and kinds[type(module)] > 1 and not isinstance(module, CONTAINERS):
            # The modules are gone through from the outside to the inside, so that the nearest one stays.
            blocks.update(dict.fromkeys(inside, module))
    return blocks


def at_positions(
    layers: Sequence[nn.Module], blocks: Mapping[nn.Module, nn.Module], positions: int | Sequence[int]
) -> list[nn.Module]:
    """Return the layers at these positions of their blocks: 0 is the first of ``layers`` in a block, -1 the last."""
    wanted = [positions] if isinstance(positions, int) else positions
    members: dict[nn.Module, list[nn.Module]] = {}
    for layer in layers:
        if layer in blocks:
            members.setdefault(blocks[layer], []).append(layer)
    chosen = {each[i] for each in members.values() for i in wanted if -len(each) <= i < len(each)}
    return [layer for layer in layers if layer in chosen]


def frozen_parts(model: nn.Module) -> set[nn.Module]:
    """Return the modules that learn nothing: with all they hold, they have parameters, and none requires a gradient.

    >>> teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)).requires_grad_(False)
    >>> model = nn.Sequential(teacher, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    >>> frozen_parts(model) == {teacher, *teacher}
    True
    """
    frozen: set[nn.Module] = set()
    for module in model.modules():
        parameters = list(module.parameters())
        # A part without parameters, such as a ReLU, is neither frozen nor trained.
        if parameters and not any(p.requires_grad for p in parameters):
            frozen.update(module.modules())
    return frozen

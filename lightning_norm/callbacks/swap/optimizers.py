"""Every trainable parameter of every normalizer belongs in exactly one optimizer: add the new ones, then prove it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_norm.errors import OptimizerError, counted
from lightning_norm.surgery.walk import named_normalizers


def optimizers_in(configured: Any) -> Iterator[Optimizer]:
    """Yield the optimizers in whatever ``configure_optimizers`` returned.

    >>> from torch import nn, optim
    >>> sgd = optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    >>> [type(o).__name__ for o in optimizers_in(([sgd], [{"scheduler": None}]))]
    ['SGD']
    """
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        yield from optimizers_in(configured.get("optimizer"))
    elif isinstance(configured, (list, tuple)):
        for item in configured:
            yield from optimizers_in(item)


def add_missing(pl_module: nn.Module, optimizers: Iterable[Optimizer]) -> list[str]:
    """Put new parameters of normalizers in the group that holds the layer's weight or bias.

    A group grows in place, so learning-rate schedulers built before stay valid. A layer without weight and bias follows
    the nearest parent that has a parameter in an optimizer. A layer whose own weight was left out of every optimizer is
    left alone.

    Args:
        pl_module: the network with its swapped layers.
        optimizers: of the network; what holds all parameters already stays as it is.

    Returns:
        The names of the parameters that were added.

    >>> import torch, lightning_norm
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> _ = lightning_norm.swap(model, "sn")
    >>> add_missing(model, [optimizer])
    ['1.mean_weight', '1.var_weight']
    """
    # The very dictionaries that optimizers and schedulers hold.
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    group_of = {id(p): group for group in groups for p in group["params"]}
    added: list[str] = []
    for prefix, layer in named_normalizers(pl_module, raw_names=True):
        parameters = dict(layer.named_parameters(recurse=False))
        # Weight and bias came from the layer before the swap, and where that had them in an optimizer they still are.
        new = {
            n: p
            for n, p in parameters.items()
            if n in (*layer.extra_parameters, *layer.translated_tensors) or n not in ("weight", "bias")
        }
        # New parameters train with the settings of the layer's weight and bias.
        of_layer = [group_of[id(p)] for p in parameters.values() if id(p) in group_of]
        if not of_layer and not (parameters.keys() - new.keys()):
            of_layer = _nearest_groups(pl_module, prefix, group_of)
        for name, parameter in new.items():
            # In place, because schedulers and the Trainer hold on to these very groups.
            if of_layer and parameter.requires_grad and id(parameter) not in group_of:
                of_layer[0]["params"].append(parameter)
                if "param_names" in of_layer[0]:
                    of_layer[0]["param_names"].append(f"{prefix}.{name}")
                group_of[id(parameter)] = of_layer[0]
                added.append(f"{prefix}.{name}")
    return added


def check_owned(pl_module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Prove that each trainable parameter of each normalizer is in exactly one optimizer.

    Args:
        pl_module: the swapped network.
        optimizers: all that step it.

    Raises:
        OptimizerError: one is in none or in several; all are named or counted.

    >>> from lightning_norm import create
    >>> model = nn.Sequential(create("bn", 4))
    >>> check_owned(model, [])
    Traceback (most recent call last):
    lightning_norm.errors.OptimizerError: 2 parameters of normalizers are in no optimizer (first: 0.weight, 0.bias) ...
    """
    # By identity: parameters of equal values are different parameters.
    counts = Counter(id(p) for optimizer in optimizers for g in optimizer.param_groups for p in g["params"])
    names = {
        id(p): f"{prefix}.{n}"
        for prefix, layer in named_normalizers(pl_module, raw_names=True)
        for n, p in layer.named_parameters(recurse=False)
        if p.requires_grad
    }
    # The messages name three parameters at most; a network may have hundreds.
    lost = [name for key, name in names.items() if counts[key] == 0]
    twice = [name for key, name in names.items() if counts[key] > 1]
    if lost:
        raise OptimizerError(
            f"{counted(len(lost), 'parameter of normalizers is', 'parameters of normalizers are')} in no optimizer "
            f"(first: {', '.join(lost[:3])}) and would never be trained. "
            "Return an optimizer from configure_optimizers that holds them, call lightning_norm.swap(model, ...) "
            "before building "
            "it by hand, or freeze what is not to be trained: parameter.requires_grad_(False). "
            "NormSwap(check_optimizer=False) skips this check."
        )
    if twice:
        raise OptimizerError(
            f"{counted(len(twice), 'parameter of normalizers is', 'parameters of normalizers are')} in several "
            f"optimizers or groups (first: {', '.join(twice[:3])}). Give each parameter to one. "
            "NormSwap(check_optimizer=False) skips this check."
        )


def decayed_norms(pl_module: nn.Module, optimizers: Iterable[Optimizer]) -> str:
    """Return what to tell of parameters of normalizers that are decayed where others are decayed less; else "".

    Groups that were made by looking for BatchNorm's class spare BatchNorm's parameters and not those of a swap, which
    confounds a comparison of the two.
    """
    names = {
        id(p): f"{prefix}.{n}"
        for prefix, layer in named_normalizers(pl_module, raw_names=True)
        if layer.origin is not None
        for n, p in layer.named_parameters()
        if p.requires_grad
    }
    for optimizer in optimizers:
        decays = sorted({float(group.get("weight_decay") or 0) for group in optimizer.param_groups})
        # A group that is decayed as much as any other is no choice against norms.
        of_norms = [
            (names[id(p)], float(group["weight_decay"]))
            for group in optimizer.param_groups
            if group.get("weight_decay")
            for p in group["params"]
            if id(p) in names
        ]
        if len(decays) > 1 and of_norms:
            name, decay = of_norms[0]
            return (
                f"{counted(len(of_norms), 'parameter')} of swapped layers (first: {name}) in groups with weight decay, "
                f"{decay:g}, of a {type(optimizer).__name__} whose groups have {', '.join(f'{d:g}' for d in decays)}. "
                "Groups made by looking for torch's classes miss them: type NormSwap(norm_weight_decay=0), use "
                "lightning_norm.is_norm where the groups are made, or say that it is meant, "
                f"norm_weight_decay={decay:g}."
            )
    return ""


def empty_group(optimizers: Iterable[Optimizer]) -> str:
    """Return what to tell of a group without a parameter, as code that looks for BatchNorm's class makes it; else "".

    >>> import torch
    >>> p = nn.Parameter(torch.ones(1))
    >>> empty_group([torch.optim.SGD([{"params": [p]}, {"params": [], "lr": 0.01}], lr=0.1)]).partition(":")[0]
    'a SGD has an empty group of parameters (lr=0.01)'
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not group["params"]:
                others = [other for other in optimizer.param_groups if other is not group]
                own = [
                    f"{name}={value!r}"
                    for name, value in group.items()
                    if isinstance(value, (int, float, str)) and any(other.get(name) != value for other in others)
                ]
                return (
                    f"a {type(optimizer).__name__} has an empty group of parameters ({', '.join(own)}): "
                    "code that looks for torch's class does not find swapped layers, which train in another group now. "
                    "lightning_norm.is_norm(module) finds both. Leave the group out where it is meant to be empty."
                )
    return ""


def _nearest_groups(pl_module: nn.Module, name: str, group_of: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups of the nearest parent that has a parameter in an optimizer."""
    while name:
        name = name.rpartition(".")[0]
        groups = [group_of[id(p)] for p in pl_module.get_submodule(name).parameters() if id(p) in group_of]
        if groups:
            return groups
    return []

"""Give parameters of normalizers their own group in optimizers, and in the schedulers, that exist already.

A learning-rate scheduler keeps lists with an entry per group: the base rates, and ``LambdaLR`` its functions. A group
added behind its back breaks it, so each list grows by a copy of the entry of the group that was split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_norm.errors import OptimizerError
from lightning_norm.surgery.param_groups import no_weight_decay, switch_parameters

GROUP = "lightning_norm"
"""Entry of a parameter group that was made here; its value is "norm" or "switch"."""

RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""Entries of a group that are learning rates; OneCycleLR and SWALR keep theirs there."""

RATE_LISTS = ("base_lrs", "max_lrs", "min_lrs", "_last_lr", "base_values")
"""Lists of a scheduler with one learning rate per group; ``base_values`` are timm's."""

LISTS = (*RATE_LISTS, "lr_lambdas", "base_momentums", "max_momentums")
"""All lists of a scheduler with one entry per group."""


@dataclass(frozen=True)
class GroupKind:
    """What a parameter's group is to be.

    Args:
        name: "norm" or "switch".
        weight_decay: its weight decay, ``None`` for that of the group that it comes from.
        lr_scale: factor of the learning rate.
    """

    name: str
    weight_decay: float | None
    lr_scale: float | None


def schedulers_in(configured: Any) -> Iterator[Any]:
    """Yield the schedulers in whatever ``configure_optimizers`` returned, and those that others are made of."""
    if isinstance(configured, Mapping):
        configured = list(configured.values())
    if isinstance(configured, (list, tuple)):
        for item in configured:
            yield from schedulers_in(item)
    elif isinstance(getattr(configured, "optimizer", None), Optimizer):
        yield configured
        yield from schedulers_in(getattr(configured, "_schedulers", ()))


def regroup(
    pl_module: nn.Module,
    optimizers: Iterable[Optimizer],
    schedulers: Iterable[Any],
    *,
    weight_decay: float | None = None,
    lr_scale: float | None = None,
) -> dict[str, int]:
    """Take the parameters of normalizers out of their groups into groups of their own.

    Args:
        pl_module: the model.
        optimizers: that hold its parameters.
        schedulers: that drive these optimizers.
        weight_decay: of the normalizers' parameters; ``None`` leaves it.
        lr_scale: learning rate of what they learn beyond weight and bias, relative to the rate of the group that they
            come from; ``None`` leaves it.

    Returns:
        The number of parameters in each kind of group.

    Raises:
        OptimizerError: an optimizer has no learning rate or weight decay, or takes one group only.
    """
    decay_names = no_weight_decay(pl_module) if weight_decay is not None else set()
    switch_names = switch_parameters(pl_module) if lr_scale is not None else set()
    kinds: dict[int, GroupKind] = {}
    for name, parameter in pl_module.named_parameters():
        decay = weight_decay if name in decay_names else None
        scale = lr_scale if name in switch_names else None
        if decay is not None or scale is not None:
            kinds[id(parameter)] = GroupKind("norm" if scale is None else "switch", decay, scale)
    # A chained scheduler and its parts may be listed more than once.
    schedulers = list({id(s): s for s in schedulers}.values())
    counts: dict[str, int] = {}
    for optimizer in optimizers:
        # A scheduler keeps one entry per group of its own optimizer only.
        driving = [s for s in schedulers if s.optimizer is optimizer]
        for index in range(len(optimizer.param_groups)):
            # Groups that an earlier setup has made are complete.
            if GROUP not in optimizer.param_groups[index]:
                _split(optimizer, index, kinds, driving)
        for group in optimizer.param_groups:
            if GROUP in group:
                counts[group[GROUP]] = counts.get(group[GROUP], 0) + len(group["params"])
    return counts


def _split(optimizer: Optimizer, index: int, kinds: Mapping[int, GroupKind], schedulers: Iterable[Any]) -> None:
    """Move the members of one group into groups of their kinds, with all other settings as they were.

    Args:
        optimizer: which gets the new groups.
        index: of the group.
        kinds: id of a parameter -> the kind that it belongs to; what is not in it stays.
        schedulers: of learning rates, which hold a list with an entry for each group.

    Raises:
        OptimizerError: the optimizer takes one group alone, or has no such setting.
    """
    group = optimizer.param_groups[index]
    # Optimizers that were given named parameters keep the names beside them.
    names = group.get("param_names") or [None] * len(group["params"])
    members = list(zip(names, group["params"], strict=True))
    # In the order of the parameters, which is the same on all ranks and in a resumed run.
    for kind in dict.fromkeys(kinds[id(p)] for _, p in members if id(p) in kinds):
        moved = [m for m in members if kinds.get(id(m[1])) == kind]
        members = [m for m in members if kinds.get(id(m[1])) != kind]
        if not members:
            # The whole group moves: it becomes the new one, so that no optimizer is left with an empty group.
            _change(optimizer, group, kind)
        # torch's LBFGS looks at its groups when it is built, and would take a second one and never step it.
        elif type(optimizer).__name__ == "LBFGS":
            raise OptimizerError("LBFGS takes one group of parameters: leave out norm_weight_decay, switch_lr_scale.")
        else:
            new = {k: _copy(v) for k, v in group.items() if k not in ("params", "param_names")}
            _change(optimizer, new, kind)
            group["params"] = [p for _, p in members]
            if "param_names" in group:
                group["param_names"] = [n for n, _ in members]
            optimizer.add_param_group({**new, "params": [p if n is None else (n, p) for n, p in moved]})
        for scheduler in schedulers:
            _extend_lists(scheduler, index, 1.0 if kind.lr_scale is None else kind.lr_scale, grow=bool(members))


def _change(optimizer: Optimizer, group: dict[str, Any], kind: GroupKind) -> None:
    """Set what a kind asks for in a group: its name, its weight decay and its learning rate.

    Raises:
        OptimizerError: the optimizer has no weight decay, or no learning rate.
    """
    group[GROUP] = kind.name
    if "name" in group:  # LearningRateMonitor wants them distinct
        group["name"] = f"{group['name']}/{kind.name}"
    if kind.weight_decay is not None and "weight_decay" in group:
        group["weight_decay"] = kind.weight_decay
    elif kind.weight_decay:
        raise OptimizerError(f"{type(optimizer).__name__} has no weight decay: leave out norm_weight_decay.")
    if kind.lr_scale is not None:
        if not isinstance(group.get("lr"), (int, float, Tensor)):
            raise OptimizerError(f"{type(optimizer).__name__} has no learning rate: leave out switch_lr_scale.")
        for name in RATES:
            if group.get(name) is not None:
                group[name] = group[name] * kind.lr_scale


def _extend_lists(scheduler: Any, index: int, scale: float, grow: bool) -> None:
    """Append a copy of entry ``index`` to each of a scheduler's lists (``grow``), or change the entry itself."""
    for name in LISTS:
        entries = getattr(scheduler, name, None)
        if isinstance(entries, (list, tuple)) and len(entries) > index:
            entry = _copy(entries[index])
            # Learning rates are scaled; functions and momenta of the old group hold for the new one as they are.
            entry = entry * scale if name in RATE_LISTS else entry
            setattr(scheduler, name, [*entries, entry] if grow else [*entries[:index], entry, *entries[index + 1 :]])


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def check_number(name: str, value: float | None) -> None:
    """Refuse what is neither ``None`` nor a number >= 0.

    Raises:
        ValueError: it is neither.
    """
    if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
        raise ValueError(f"NormSwap: {name} must be a number >= 0 or None, got {value!r}.")

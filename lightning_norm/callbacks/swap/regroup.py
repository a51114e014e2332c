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
"""Entry of a group that was made here: "norm" or "switch"."""

RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""Entries of a group that are learning rates; OneCycleLR and SWALR keep theirs there."""

RATE_LISTS = ("base_lrs", "max_lrs", "min_lrs", "_last_lr", "base_values")
"""Lists of a scheduler with one learning rate per group; ``base_values`` are timm's."""

LISTS = (*RATE_LISTS, "lr_lambdas", "base_momentums", "max_momentums")
"""All lists of a scheduler with one entry per group."""


@dataclass(frozen=True)
class Kind:
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
    model: nn.Module,
    optimizers: Iterable[Optimizer],
    schedulers: Iterable[Any],
    *,
    weight_decay: float | None = None,
    lr_scale: float | None = None,
) -> dict[str, int]:
    """Take the parameters of normalizers out of their groups into groups of their own.

    Args:
        model: the model.
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
    spared = no_weight_decay(model) if weight_decay is not None else set()
    switches = switch_parameters(model) if lr_scale is not None else set()
    kinds: dict[int, Kind] = {}
    for name, parameter in model.named_parameters():
        decay = weight_decay if name in spared else None
        scale = lr_scale if name in switches else None
        if decay is not None or scale is not None:
            kinds[id(parameter)] = Kind("norm" if scale is None else "switch", decay, scale)
    schedulers = list({id(s): s for s in schedulers}.values())
    counts: dict[str, int] = {}
    for optimizer in optimizers:
        driving = [s for s in schedulers if s.optimizer is optimizer]
        for index in range(len(optimizer.param_groups)):
            if GROUP not in optimizer.param_groups[index]:
                _split(optimizer, index, kinds, driving)
        for group in optimizer.param_groups:
            if GROUP in group:
                counts[group[GROUP]] = counts.get(group[GROUP], 0) + len(group["params"])
    return counts


def _split(optimizer: Optimizer, index: int, kinds: Mapping[int, Kind], schedulers: Iterable[Any]) -> None:
    group = optimizer.param_groups[index]
    names = group.get("param_names") or [None] * len(group["params"])
    members = list(zip(names, group["params"], strict=True))
    for kind in dict.fromkeys(kinds[id(p)] for _, p in members if id(p) in kinds):
        moved = [m for m in members if kinds.get(id(m[1])) == kind]
        members = [m for m in members if kinds.get(id(m[1])) != kind]
        if not members:  # nothing would be left of the group: it becomes the new one
            _change(optimizer, group, kind)
        elif type(optimizer).__name__ == "LBFGS":
            raise OptimizerError("LBFGS takes one group of parameters: leave out norm_weight_decay, switch_lr_scale.")
        else:
            new = {k: _own(v) for k, v in group.items() if k not in ("params", "param_names")}
            _change(optimizer, new, kind)
            group["params"] = [p for _, p in members]
            if "param_names" in group:
                group["param_names"] = [n for n, _ in members]
            optimizer.add_param_group({**new, "params": [p if n is None else (n, p) for n, p in moved]})
        for scheduler in schedulers:
            _follow(scheduler, index, 1.0 if kind.lr_scale is None else kind.lr_scale, grow=bool(members))


def _change(optimizer: Optimizer, group: dict[str, Any], kind: Kind) -> None:
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


def _follow(scheduler: Any, index: int, scale: float, grow: bool) -> None:
    """Let a scheduler's lists have an entry more, a copy of ``index``, or change that entry."""
    for name in LISTS:
        held = getattr(scheduler, name, None)
        if isinstance(held, (list, tuple)) and len(held) > index:
            entry = _own(held[index])
            entry = entry * scale if name in RATE_LISTS else entry
            setattr(scheduler, name, [*held, entry] if grow else [*held[:index], entry, *held[index + 1 :]])


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def check_number(name: str, value: float | None) -> None:
    """Refuse what is neither ``None`` nor a number >= 0.

    Raises:
        ValueError: it is neither.
    """
    if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
        raise ValueError(f"NormSwap: {name} must be a number >= 0 or None, got {value!r}.")

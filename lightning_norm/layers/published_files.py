"""What a file of a paper's authors says of one layer, in the words of this package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_norm.errors import CheckpointError

SOURCES = {0: "BatchNorm1d", 1: "BatchNorm1d", 2: "BatchNorm2d", 3: "BatchNorm3d"}
"""Spatial axes -> the class of torch's that a layer for such inputs stands in place of."""


@dataclass(frozen=True)
class PublishedLayer:
    """A layer of a published file, as a class of this package holds it.

    Args:
        num_features: channels.
        arguments: those with which the class computes what the authors' code does.
        tensors: its parameters and buffers, under the names and in the shapes of the class.
        source: the class of torch's that the authors' layer stands in place of.
        fixed: parameters that the authors' code no longer trains.
        ask: arguments that the weights need and no file holds: name -> what the authors' code takes by default.
    """

    num_features: int
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]
    source: str = "BatchNorm2d"
    fixed: tuple[str, ...] = ()
    ask: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PublishedNames:
    """Names in the files of a paper's authors, and what becomes of them.

    Args:
        tensors: names, or their beginnings up to a dot, that do not load as they are.
        layers: regular expression -> replacement: names of layers in the authors' networks, as torchvision has them.
    """

    tensors: tuple[str, ...] = ()
    layers: Mapping[str, str] = field(default_factory=dict)


class PublishedEntries(Mapping[str, Any]):
    """The entries of a file under one layer's name; :meth:`take` checks each and remembers that it was read.

    Args:
        entries: names without that of the layer -> tensors.

    >>> entries = PublishedEntries({"weight": torch.ones(1, 6, 1, 1), "step": torch.ones(1)})
    >>> entries.per_channel("weight", 6).shape, entries.unread()
    (torch.Size([6]), ['step'])
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self.entries = entries
        # What nobody has read tells a layer of another version, whose weights must not be dropped in silence.
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        return self.entries[name]

    def __iter__(self) -> Any:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def take(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        """Return a tensor that has one of these shapes.

        Raises:
            CheckpointError: it is missing, no tensor, or of another shape.
        """
        value = self.entries.get(name)
        if value is None:
            raise CheckpointError(f"{name} is missing; there are {', '.join(sorted(self.entries)) or 'no entries'}")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} is {type(value).__name__} and no tensor")
        if tuple(value.shape) not in shapes:
            expected = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
            raise CheckpointError(f"{name} has the shape {tuple(value.shape)}, expected {expected}")
        self._read.add(name)
        return value

    def per_channel(self, name: str, channels: int) -> Tensor:
        """Return a tensor with one value per channel, (C,), that the authors' code may hold as (1, C, 1, 1).

        Raises:
            CheckpointError: it is missing, no tensor, or has not one value per channel.
        """
        shapes = [(channels,), *((1, channels, *(1,) * axes) for axes in range(4))]
        return self.take(name, *shapes).reshape(channels)

    def number(self, name: str) -> float:
        """Return the value of a tensor of one element.

        Raises:
            CheckpointError: it is missing, no tensor, of more elements, or on the meta device.
        """
        value = self.take(name, (1,), ())
        if value.is_meta:
            raise CheckpointError(f"{name} is on the meta device and has no value")
        return float(value)

    def running_stats(self, channels: int) -> dict[str, Tensor]:
        """Return the running statistics under torch's names, and the number of batches where there is one.

        Raises:
            CheckpointError: one of the two is missing or has not one value per channel.
        """
        tensors = {name: self.per_channel(name, channels) for name in ("running_mean", "running_var")}
        if "num_batches_tracked" in self.entries:
            tensors["num_batches_tracked"] = self.take("num_batches_tracked", ())
        return tensors

    def leave_out(self, names: Iterable[str]) -> None:
        """Count entries as read that the authors' code has and does not use."""
        self._read.update(names)

    def unread(self) -> list[str]:
        """Return the entries that nobody has read."""
        return sorted(self.entries.keys() - self._read)


def by_prefix(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the entries below each dotted prefix, "" for all of them.

    >>> by_prefix({"bn1.weight": 1, "fc.bias": 2})
    {'': {'bn1.weight': 1, 'fc.bias': 2}, 'bn1': {'weight': 1}, 'fc': {'bias': 2}}
    """
    groups: dict[str, dict[str, Any]] = {"": dict(state)}
    for name, value in state.items():
        parts = name.split(".")
        # An entry belongs to every module around it; which of them is the layer is known by its other entries.
        for i in range(1, len(parts)):
            groups.setdefault(".".join(parts[:i]), {})[".".join(parts[i:])] = value
    return groups


def channels_of_one_layer(tensor: Any) -> int | None:
    """Return C of a tensor (1, C, 1, 1) or the like, as published code holds it; ``None`` for (C,) and all others.

    >>> channels_of_one_layer(torch.ones(1, 6, 1, 1)), channels_of_one_layer(torch.ones(6))
    (6, None)
    """
    alike = isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[0] == 1
    return tensor.shape[1] if alike and tensor.numel() == tensor.shape[1] else None


def unit_at_least(weight: Tensor, dim: int) -> Tensor:
    """Return a weight with one unit of zeros along ``dim`` where the authors' code has none.

    Their C // 16 hidden units are none for fewer than 16 channels; one that reads and writes zeros is the same.
    """
    if weight.shape[dim]:
        return weight
    shape = list(weight.shape)
    shape[dim] = 1
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

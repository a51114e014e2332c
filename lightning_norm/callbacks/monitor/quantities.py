"""What NormMonitor shows: the quantities of the layers, which of them belong together, and how deep the layers lie."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.layers.base import MomentNorm, Normalizer
from lightning_norm.layers.scheduled import was_scheduled
from lightning_norm.surgery.walk import named_normalizers

Place = tuple[str, str, str]
"""Key of the normalizer, quantity, and name of the layer."""
Families = dict[str, dict[str, list[str]]]
"""Key -> family -> its quantities, which share a chart."""

DEPTHS = {1: ("all",), 2: ("early", "late"), 3: ("early", "middle", "late")}
STATISTICS = ("in", "ln", "gn", "bn")
EXTRAS = ("gamma condition", "gamma near zero", "drift")
"""Families that every layer has."""
SHARE_NEAR_ZERO = 0.01
NEAR_NOTHING = 1e-7  # of float32's 24 bits


class Quantities:
    """Read the quantities of a model's normalizers: one transfer from the device per call.

    Args:
        extras: those that every layer with a weight or running statistics has, too.
    """

    def __init__(self, extras: bool = True) -> None:
        self.extras = extras
        self._before: dict[Place, Tensor] = {}

    def places(self, model: nn.Module) -> list[Place]:
        """Return all that :meth:`read` will find, the drift included, which takes two readings."""
        drifts = [place for place, _ in running_statistics(model)] if self.extras else []
        return list(dict.fromkeys((*self.tensors(model), *drifts, *scheduled(model))))

    def tensors(self, model: nn.Module) -> dict[Place, Tensor]:
        """Return every quantity that is held in a tensor, 0-dim."""
        found: dict[Place, Tensor] = {}
        for name, layer in named_normalizers(model):
            shown = {**layer.monitor(), **(gamma(layer) if self.extras else {})}
            found.update({(key_of(layer), quantity, name): value for quantity, value in shown.items()})
        return found

    def read(self, model: nn.Module, values: bool = False) -> tuple[dict[Place, float], dict[Place, Tensor]]:
        """Return the quantities as floats and, with ``values``, the learned tensors behind them, on the CPU."""
        found = self.tensors(model)
        if self.extras:
            found.update(self._drift(model))
        learned = dict(learned_values(model)) if values else {}
        sent = [*found.values(), *learned.values()]
        if not sent:
            return scheduled(model), {}
        with torch.no_grad():
            flat = torch.cat([t.detach().to(sent[0].device, torch.float32).reshape(-1) for t in sent]).cpu()
        numbers = dict(zip(found, flat[: len(found)].tolist(), strict=True))
        parts = torch.split(flat[len(found) :], [t.numel() for t in learned.values()]) if learned else ()
        given = {place: value for place, value in scheduled(model).items() if place not in numbers}
        return {**numbers, **given}, dict(zip(learned, parts, strict=True))

    def restart(self) -> None:
        """Forget the running statistics that the drift is measured from."""
        self._before = {}

    @torch.no_grad()
    def _drift(self, model: nn.Module) -> dict[Place, Tensor]:
        """Return how far the running statistics moved since the last call, relative to their size: 0 to 2."""
        found: dict[Place, Tensor] = {}
        for place, now in running_statistics(model):
            old = self._before.get(place)
            self._before[place] = now.clone()
            if old is not None and old.device == now.device:
                size = torch.maximum(old.abs().sum(), now.abs().sum()).clamp_min(torch.finfo(now.dtype).tiny)
                found[place] = (now - old).abs().sum() / size
        return found


def key_of(layer: Normalizer) -> str:
    """Return the key of a normalizer, or the name of its class."""
    return layer.key or type(layer).__name__


def running_statistics(model: nn.Module) -> Iterator[tuple[Place, Tensor]]:
    """Yield each running statistic, under the place of its drift."""
    for name, layer in named_normalizers(model):
        for which in layer.running_names:
            held = layer._buffers.get(which)
            if held is not None:
                yield (key_of(layer), which.replace("running", "drift"), name), held


@torch.no_grad()
def gamma(layer: Normalizer) -> dict[str, Tensor]:
    """Return the condition of gamma, greatest over least (1e7 at most), and its share below a hundredth of the first.

    >>> layer = Normalizer.registry["bn"](4)
    >>> torch.nn.init.constant_(layer.weight[:2], 0.0).shape, {k: v.item() for k, v in gamma(layer).items()}
    (torch.Size([2]), {'gamma_condition': 10000000.0, 'gamma_near_zero': 0.5})
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.numel() == 0:
        return {}
    size = weight.float().abs()
    top = size.max().clamp_min(torch.finfo(size.dtype).tiny)
    condition = top / torch.maximum(size.min(), NEAR_NOTHING * top)
    return {"gamma_condition": condition, "gamma_near_zero": (size < SHARE_NEAR_ZERO * top).float().mean()}


def learned_values(model: nn.Module) -> Iterator[tuple[Place, Tensor]]:
    """Yield gamma and what else a layer learns, where it is more than one number."""
    for name, layer in named_normalizers(model):
        for parameter in ("weight", *layer.extra_parameters):
            value = layer._parameters.get(parameter)
            if value is not None and value.numel() > 1:
                yield (key_of(layer), parameter, name), value


def scheduled(model: nn.Module, given: bool = True) -> dict[Place, float]:
    """Return the hyper-parameters that follow a schedule.

    Args:
        model: its layers are looked through.
        given: also those of a layer's own that may be scheduled and are not at their default.
    """
    found: dict[Place, float] = {}
    for name, layer in named_normalizers(model):
        own = defaults(type(layer).__init__) if given else {}
        for argument in layer.ranges:
            value = getattr(layer, argument)
            chosen = argument in own and argument not in MomentNorm.ranges and value != own[argument]
            if value is not None and (chosen or was_scheduled(layer, argument)):
                found[key_of(layer), argument, name] = float(value)
    return found


@functools.cache
def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the defaults of a function's arguments."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def families(places: Iterable[Place]) -> Families:
    """Group the quantities of each key by the first part of their name: ``mean_in``, ``mean_ln``, ``mean_bn``.

    >>> families([("sn", "mean_in", "a"), ("sn", "mean_bn", "a"), ("sn", "var_in", "a"), ("dbn", "alpha", "b")])
    {'sn': {'mean': ['mean_in', 'mean_bn'], 'var': ['var_in']}, 'dbn': {'alpha': ['alpha']}}
    """
    found: Families = {}
    for key, quantity, _ in places:
        members = found.setdefault(key, {}).setdefault(_family(quantity), [])
        if quantity not in members:
            members.append(quantity)
    return found


def split(grouped: Mapping[str, list[str]]) -> dict[str, dict[str, list[str]]]:
    """Part the families into a "profile" of the method's own quantities, and the one of what all layers have.

    >>> split({"drift": ["drift_mean"], "iota": ["iota"]})
    {'profile': {'iota': ['iota']}, 'profile_every_layer': {'drift': ['drift_mean']}}
    """
    parts = {"profile": False, "profile_every_layer": True}
    found = {part: {f: q for f, q in grouped.items() if (f in EXTRAS) is extra} for part, extra in parts.items()}
    return {part: own for part, own in found.items() if own}


def label(quantity: str) -> str:
    """Return what tells the members of a family apart: ``mean_bn`` -> ``BN``.

    >>> [label(q) for q in ("mean_bn", "prior_0", "scale_gate", "threshold")]
    ['BN', '#0', 'gate', 'threshold']
    """
    tail = quantity.partition("_")[2] or quantity
    return tail.upper() if tail in STATISTICS else f"#{tail}" if tail.isdigit() else tail


def _family(quantity: str) -> str:
    if quantity == "threshold":
        return "condensation"  # the line that it is measured against
    spaced = quantity.replace("_", " ")
    return spaced if spaced in EXTRAS else spaced.split(" ")[0]


def layer_names(places: Iterable[Place], key: str, quantity: str | None = None) -> list[str]:
    """Return the layers of a key that have a quantity (or any), in the order of their depth."""
    return list(dict.fromkeys(layer for k, q, layer in places if k == key and quantity in (None, q)))


def depth_means(values: dict[Place, float]) -> dict[Place, float]:
    """Average each quantity over the early, the middle and the late layers, a third of them each.

    >>> depth_means({("sn", "mean_in", name): value for name, value in zip("abcd", (0.0, 1.0, 2.0, 3.0))})
    {('sn', 'mean_in', 'early'): 0.5, ('sn', 'mean_in', 'middle'): 2.0, ('sn', 'mean_in', 'late'): 3.0}
    """
    series: dict[tuple[str, str], list[float]] = {}
    for (key, quantity, _), value in values.items():
        series.setdefault((key, quantity), []).append(value)
    found: dict[Place, float] = {}
    for (key, quantity), numbers in series.items():
        parts = depths(len(numbers))
        for part in dict.fromkeys(parts):
            of_part = [v for v, p in zip(numbers, parts, strict=True) if p == part]
            found[key, quantity, part] = sum(of_part) / len(of_part)
    return found


def depths(n: int) -> list[str]:
    """Name the depth of each of n layers.

    >>> depths(5)
    ['early', 'early', 'middle', 'middle', 'late']
    """
    names = DEPTHS[min(n, 3)]
    return [names[i * len(names) // n] for i in range(n)]


def is_choice(values: Mapping[Place, float], key: str, quantities: list[str]) -> bool:
    """Tell whether the quantities are the weights of a mixture: in each layer non-negative, with sum 1."""
    of_layer = [
        [values.get((key, q, layer), 0.0) for q in quantities] for layer in layer_names(values, key, quantities[0])
    ]
    return len(quantities) > 1 and all(min(w) >= 0 and abs(sum(w) - 1) < 1e-3 for w in of_layer)

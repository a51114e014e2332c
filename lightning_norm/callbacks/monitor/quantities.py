"""What NormMonitor shows: the quantities of the layers, which of them belong together, and how deep the layers lie."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.layers.base import MomentNorm, Normalizer
from lightning_norm.layers.behind import stays_in_evaluation
from lightning_norm.layers.scheduled import was_scheduled
from lightning_norm.layers.special_calls import hears_masks, last_mask
from lightning_norm.surgery.walk import named_normalizers, normalizers_of

Series = tuple[str, str, str]
"""What one logged curve shows: the key of the normalizer, the quantity, and the name of the layer."""
Families = dict[str, dict[str, list[str]]]
"""Key -> family -> its quantities, which share a chart."""

ALL_LAYERS = "all layers"
"""In place of the name of a layer: a quantity that the layers have in common, such as the contexts of a batch."""
DEPTHS = {1: ("all",), 2: ("early", "late"), 3: ("early", "middle", "late")}
STATISTICS = ("in", "ln", "gn", "bn")
EXTRAS = ("gamma condition", "gamma near zero", "drift", "valid fraction")
"""Families that every layer has."""
TIE = 1e-4
"""A lead that is smaller could be turned around by rounding."""
NEAR_ZERO = 0.01
"""Part of the greatest gamma below which one counts as near zero."""
SMALLEST_RATIO = 1e-7
"""Gammas are compared down to this ratio, the resolution of float32."""


class Quantities:
    """Read the quantities of a model's normalizers: one transfer from the device per call.

    Args:
        extras: those that every layer with a weight or running statistics has, too.
    """

    def __init__(self, extras: bool = True) -> None:
        self.extras = extras
        self._last_statistics: dict[Series, Tensor] = {}
        self._measured: set[Series] = set()

    def series(self, pl_module: nn.Module) -> list[Series]:
        """Return all that :meth:`read` will return, the drift and the masks' quantities included, which come later."""
        drifts = [series for series, _ in running_statistics(pl_module)] if self.extras else []
        layers = named_normalizers(pl_module)
        waits = [(key_of(m), "valid_fraction", name) for name, m in layers if hears_masks(m)]
        return list(dict.fromkeys((*self.tensors(pl_module), *waits, *drifts, *hyper_parameters(pl_module))))

    def tensors(self, pl_module: nn.Module) -> dict[Series, Tensor]:
        """Return every quantity that is computed from tensors, 0-dim."""
        tensors: dict[Series, Tensor] = {}
        for name, layer in named_normalizers(pl_module):
            quantities = {**layer.monitor(), **valid_fraction(layer), **(gamma(layer) if self.extras else {})}
            shared = layer.shared_quantities()
            for quantity, value in quantities.items():
                # The first layer speaks for all where they have a quantity in common.
                place = ALL_LAYERS if quantity in shared else name
                tensors.setdefault((key_of(layer), quantity, place), value)
        return tensors

    def read(self, pl_module: nn.Module, values: bool = False) -> tuple[dict[Series, float], dict[Series, Tensor]]:
        """Return the quantities as floats and, with ``values``, the learned tensors behind them, on the CPU."""
        tensors = self.tensors(pl_module)
        if self.extras:
            tensors.update(self._drift(pl_module))
        learned = dict(learned_values(pl_module)) if values else {}
        sent = [*tensors.values(), *learned.values()]
        if not sent:
            return hyper_parameters(pl_module), {}
        # One transfer for everything: each would wait for the device once more.
        with torch.no_grad():
            flat = torch.cat([t.detach().to(sent[0].device, torch.float32).reshape(-1) for t in sent]).cpu()
        numbers = self._drawn(dict(zip(tensors, flat[: len(tensors)].tolist(), strict=True)))
        parts = torch.split(flat[len(tensors) :], [t.numel() for t in learned.values()]) if learned else ()
        others = {series: value for series, value in hyper_parameters(pl_module).items() if series not in numbers}
        return {**numbers, **others}, dict(zip(learned, parts, strict=True))

    def _drawn(self, numbers: dict[Series, float]) -> dict[Series, float]:
        """Leave out what was never measured; a NaN that comes after a number is a fault worth seeing."""
        self._measured.update(series for series, value in numbers.items() if not math.isnan(value))
        return {series: value for series, value in numbers.items() if series in self._measured}

    def restart(self) -> None:
        """Forget the running statistics that the drift is measured from."""
        self._last_statistics, self._measured = {}, set()

    @torch.no_grad()
    def _drift(self, pl_module: nn.Module) -> dict[Series, Tensor]:
        """Return how far the running statistics moved since the last call, relative to their size: 0 to 2."""
        drifts: dict[Series, Tensor] = {}
        for series, now in running_statistics(pl_module):
            # A copy, because the buffer itself moves on with the next batch.
            old = self._last_statistics.get(series)
            self._last_statistics[series] = now.clone()
            if old is not None and old.device == now.device:
                # Statistics that are 0 in both readings have not moved: 0 / tiny is 0.
                was, size = old.abs().sum(), torch.maximum(old.abs().sum(), now.abs().sum())
                drift = (now - old).abs().sum() / size.clamp_min(torch.finfo(now.dtype).tiny)
                # The way from zeros, where statistics start, is 1 whatever they are: a measure of nothing.
                drifts[series] = torch.where((was == 0) & (size > 0), torch.nan, drift)
        return drifts


def key_of(layer: Normalizer) -> str:
    """Return the key of a normalizer, or the name of its class."""
    return layer.key or type(layer).__name__


def running_statistics(pl_module: nn.Module) -> Iterator[tuple[Series, Tensor]]:
    """Yield each running statistic with the series of its drift."""
    for name, layer in named_normalizers(pl_module):
        buffers = dict(layer.named_buffers(recurse=False))
        for statistic in layer.running_names:
            if statistic in buffers:
                yield (key_of(layer), statistic.replace("running", "drift"), name), buffers[statistic]


@torch.no_grad()
def gamma(layer: Normalizer) -> dict[str, Tensor]:
    """Return the condition of gamma, greatest over least (1e7 at most), and its share below a hundredth of the first.

    >>> layer = Normalizer.registry["bn"](4)
    >>> torch.nn.init.constant_(layer.weight[:2], 0.0).shape, {k: v.item() for k, v in gamma(layer).items()}
    (torch.Size([2]), {'gamma_condition': 10000000.0, 'gamma_near_zero': 0.5})
    """
    # Not every layer has a weight: BNET has kernels in its place, and affine=False leaves it out.
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.numel() == 0:
        return {}
    size = weight.float().abs()
    # All gammas may be 0, after pruning for one.
    top = size.max().clamp_min(torch.finfo(size.dtype).tiny)
    condition = top / torch.maximum(size.min(), SMALLEST_RATIO * top)
    return {"gamma_condition": condition, "gamma_near_zero": (size < NEAR_ZERO * top).float().mean()}


def valid_fraction(layer: Normalizer) -> dict[str, Tensor]:
    """Return which part of the positions counted in the last call with a mask; nothing where none had one.

    >>> layer = Normalizer.registry["bn"](4)
    >>> _ = layer(torch.ones(2, 4, 8), mask=torch.tensor([8, 2]))
    >>> valid_fraction(layer)["valid_fraction"].item()
    0.625
    """
    mask = last_mask(layer)
    return {} if mask is None else {"valid_fraction": mask.float().mean()}


def learned_values(pl_module: nn.Module) -> Iterator[tuple[Series, Tensor]]:
    """Yield gamma and what else a layer learns, where it is more than one number."""
    for name, layer in named_normalizers(pl_module):
        parameters = dict(layer.named_parameters(recurse=False))
        for parameter in ("weight", *layer.extra_parameters):
            if parameter in parameters and parameters[parameter].numel() > 1:
                yield (key_of(layer), parameter, name), parameters[parameter]


def hyper_parameters(pl_module: nn.Module, only_scheduled: bool = False) -> dict[Series, float]:
    """Return the hyper-parameters that follow a schedule or differ from their default, and 1 for frozen statistics.

    Args:
        pl_module: its layers are looked through.
        only_scheduled: those that follow a schedule, and what is frozen.
    """
    values: dict[Series, float] = {}
    for name, layer in named_normalizers(pl_module):
        default = {} if only_scheduled else defaults(type(layer).__init__)
        for argument in layer.ranges:
            value = getattr(layer, argument)
            # Those that every normalizer has, such as momentum, are shown only while they follow a schedule.
            chosen = argument in default and argument not in MomentNorm.ranges and value != default[argument]
            if value is not None and (chosen or was_scheduled(layer, argument)):
                values[key_of(layer), argument, name] = float(value)
        if stays_in_evaluation(layer):
            values[key_of(layer), "frozen", name] = 1.0
    return values


@functools.cache
def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the defaults of a function's arguments."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def notes(pl_module: nn.Module) -> dict[str, dict[str, str]]:
    """Return key -> quantity -> what its reader must know now; of several layers that differ, each once."""
    texts: dict[str, dict[str, dict[str, None]]] = {}
    for layer in normalizers_of(pl_module):
        for quantity, text in layer.monitor_notes().items():
            texts.setdefault(key_of(layer), {}).setdefault(quantity, {})[text] = None
    return {key: {q: "; ".join(of_quantity) for q, of_quantity in of_key.items()} for key, of_key in texts.items()}


def families(logged: Iterable[Series]) -> Families:
    """Group the quantities of each key by the first part of their name: ``mean_in``, ``mean_ln``, ``mean_bn``.

    >>> families([("sn", "mean_in", "a"), ("sn", "mean_bn", "a"), ("sn", "var_in", "a"), ("dbn", "alpha", "b")])
    {'sn': {'mean': ['mean_in', 'mean_bn'], 'var': ['var_in']}, 'dbn': {'alpha': ['alpha']}}
    """
    of_key: Families = {}
    for key, quantity, _ in logged:
        members = of_key.setdefault(key, {}).setdefault(_family(quantity), [])
        if quantity not in members:
            members.append(quantity)
    # One order for every run and every mixture of layers: the method's own first, then what all layers have.
    places = {family: i for i, family in enumerate(EXTRAS)}
    return {key: dict(sorted(of.items(), key=lambda item: places.get(item[0], -1))) for key, of in of_key.items()}


def is_shared(logged: Iterable[Series], key: str, quantity: str) -> bool:
    """Tell whether the layers of a key have a quantity in common."""
    return (key, quantity, ALL_LAYERS) in logged


def split(grouped: Mapping[str, list[str]]) -> dict[str, dict[str, list[str]]]:
    """Part the families into a "profile" of the method's own quantities, and the one of what all layers have.

    >>> split({"drift": ["drift_mean"], "iota": ["iota"]})
    {'profile': {'iota': ['iota']}, 'profile_every_layer': {'drift': ['drift_mean']}}
    """
    parts = {"profile": False, "profile_every_layer": True}
    split_up = {part: {f: q for f, q in grouped.items() if (f in EXTRAS) is extra} for part, extra in parts.items()}
    return {part: members for part, members in split_up.items() if members}


def label(quantity: str) -> str:
    """Return what tells the members of a family apart: ``mean_bn`` -> ``BN``.

    >>> [label(q) for q in ("mean_bn", "prior_0", "scale_gate", "threshold")]
    ['BN', '#0', 'gate', 'threshold']
    """
    tail = quantity.partition("_")[2] or quantity
    return tail.upper() if tail in STATISTICS else f"#{tail}" if tail.isdigit() else tail


def _family(quantity: str) -> str:
    """Return the family of a quantity: its first word, or all of it for the extras."""
    if quantity == "threshold":
        return "condensation"  # drawn beside it: the threshold is what condensation is compared with
    spaced = quantity.replace("_", " ")
    return spaced if spaced in EXTRAS else spaced.split(" ")[0]


def layer_names(logged: Iterable[Series], key: str, quantity: str | None = None) -> list[str]:
    """Return the layers of a key that have a quantity (or any), in the order of their depth."""
    return list(dict.fromkeys(layer for k, q, layer in logged if k == key and quantity in (None, q)))


def depth_means(values: dict[Series, float]) -> dict[Series, float]:
    """Average each quantity over the early, the middle and the late layers, a third of them each.

    >>> depth_means({("sn", "mean_in", name): value for name, value in zip("abcd", (0.0, 1.0, 2.0, 3.0))})
    {('sn', 'mean_in', 'early'): 0.5, ('sn', 'mean_in', 'middle'): 2.0, ('sn', 'mean_in', 'late'): 3.0}
    """
    over_layers: dict[tuple[str, str], list[float]] = {}
    for (key, quantity, _), value in values.items():
        over_layers.setdefault((key, quantity), []).append(value)
    means: dict[Series, float] = {}
    for (key, quantity), numbers in over_layers.items():
        # The order in the model stands for the depth.
        parts = depths(len(numbers))
        for part in dict.fromkeys(parts):
            of_part = [v for v, p in zip(numbers, parts, strict=True) if p == part]
            means[key, quantity, part] = sum(of_part) / len(of_part)
    return means


def depths(n: int) -> list[str]:
    """Name the depth of each of n layers.

    >>> depths(5)
    ['early', 'early', 'middle', 'middle', 'late']
    """
    # Fewer than three layers have fewer depths, so that no depth is empty.
    names = DEPTHS[min(n, 3)]
    return [names[i * len(names) // n] for i in range(n)]


def is_choice(values: Mapping[Series, float], key: str, quantities: list[str]) -> bool:
    """Tell whether the quantities are the weights of a mixture: in each layer non-negative, with sum 1."""
    of_layer = [
        [values.get((key, q, layer), 0.0) for q in quantities] for layer in layer_names(values, key, quantities[0])
    ]
    return len(quantities) > 1 and all(min(w) >= 0 and abs(sum(w) - 1) < 1e-3 for w in of_layer)


def winner(weights: Mapping[str, float]) -> str | None:
    """Return the greatest of the weights of a mixture, or ``None`` where none leads by more than rounding.

    >>> winner({"mean_in": 0.2, "mean_bn": 0.8}), winner({"mean_in": 0.5, "mean_bn": 0.5})
    ('mean_bn', None)
    """
    first, *others = sorted(weights, key=lambda q: -weights[q])
    return first if not others or weights[first] - weights[others[0]] > TIE else None

"""harden(model): layers whose learned weights have decided become the plain normalizers that they chose."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.errors import NoEffectWarning, counted
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.choice import Choice
from lightning_norm.normalizers import normalizers
from lightning_norm.surgery.options import SwapOptions
from lightning_norm.surgery.report import SwapReport
from lightning_norm.surgery.restore import everything_restored, random_numbers_restored
from lightning_norm.surgery.swap import prepare_swap
from lightning_norm.surgery.text_tables import TableReport, outputs_moved
from lightning_norm.surgery.walk import named_normalizers, tensors_in


@dataclass
class HardenedLayer:
    """One row of the report.

    Args:
        name: dotted name.
        source: class that was there.
        target: class that is there now.
        norm: key of the plain normalizer; "" for a layer that is undecided.
        weight: the least of the weights that chose it, or the greatest that is not enough.
        moved: the largest absolute difference of the layer's outputs for one input, ``None`` without an example.
        why: why it stays, or what else there is to say.
    """

    name: str
    source: str
    target: str
    norm: str
    weight: float
    moved: float | None
    why: str


class HardenReport(TableReport):
    """What :func:`harden` did: its length is the number of layers that became plain.

    Args:
        layers: one row per layer that can choose.
        swap: the report of the swap behind it.
        moved: the largest absolute difference of the model's outputs on the example, ``None`` without one.
        largest: the largest absolute output on the example.

    >>> import lightning_norm
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> _ = lightning_norm.swap(model, "sn")
    >>> report = harden(model)
    >>> len(report), report.undecided
    (0, {'1': 'undecided (mean: in 0.333, variance: in 0.333)'})
    """

    def __init__(
        self, layers: list[HardenedLayer], swap: SwapReport, moved: float | None, largest: float | None
    ) -> None:
        self.layers, self.swap, self.moved, self.largest = layers, swap, moved, largest

    def __len__(self) -> int:
        return len(self.swap)

    @property
    def undecided(self) -> dict[str, str]:
        """Name -> why, of the layers that stay as they are."""
        return {row.name: row.why for row in self.layers if not row.norm}

    def names(self, norm: str) -> list[str]:
        """Return the names of the layers that became a normalizer, "bn" for one."""
        return [row.name for row in self.layers if row.norm == norm]

    def undo(self) -> None:
        """Put the layers back, with the Parameters and statistics as they are now.

        Raises:
            RuntimeError: there is nothing to undo, or a layer was replaced by something else since.
        """
        self.swap.undo()

    def to_dict(self) -> dict[str, Any]:
        """Return the report in plain types."""
        return {"layers": [asdict(row) for row in self.layers], "moved": self.moved, "largest": self.largest}

    def table(self) -> list[tuple[str, ...]]:
        """Return one row per layer that can choose, below a heading."""
        rows: list[tuple[str, ...]] = [("layer", "from", "to", "weight", "moved by", "why")]
        for row in self.layers:
            moved = "-" if row.moved is None else f"{row.moved:.2g}"
            rows.append((row.name, row.source, row.target, f"{row.weight:.3g}", moved, row.why))
        return rows

    def summary(self) -> str:
        """Return how many layers chose what, and how far the outputs moved."""
        kinds = dict.fromkeys(row.norm for row in self.layers if row.norm)
        counts = [f"{len(self.names(norm))} {norm}" for norm in kinds]
        counts += [f"{len(self.undecided)} undecided"] if self.undecided else []
        return f"{', '.join(counts) or 'nothing to do'}     {outputs_moved(self.moved, self.largest)}"

    def __repr__(self) -> str:
        return f"HardenReport({len(self)} of {counted(len(self.layers), 'layer')}, moved={self.moved})"


def harden(model: nn.Module, example_input: Any = None, *, threshold: float = 0.9) -> HardenReport:
    """Turn each layer whose learned weights have decided into the plain normalizer that it chose, in place.

    Of sn that is where one statistic has nearly all importance, for the mean as for the variance: bn, in, ln or gn. Of
    bcn where iota is near 1 in every channel (bn), or near 0 (ln). Layers that are undecided stay. What chose batch
    statistics is then folded by :func:`lightning_norm.fold`. Modes, parameters and statistics stay what they are.

    Args:
        model: any module.
        example_input: a tensor, or a tuple of arguments, on which is measured how far outputs in evaluation move.
        threshold: the least weight of a choice, in (0.5, 1].

    Returns:
        What became what, which layers are undecided and why, how far each layer's outputs and those of the model moved,
        and the way back: ``report.undo()``.

    Raises:
        ValueError: ``threshold`` is out of range, or the model itself is such a layer.

    >>> import lightning_norm
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> _ = lightning_norm.swap(model, "bcn")
    >>> report = harden(model, torch.randn(2, 3, 8, 8))
    >>> report.names("bn"), type(model[1]).__name__
    (['1'], 'BatchNorm')
    """
    if isinstance(threshold, bool) or not 0.5 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0.5, 1], got {threshold!r}. Type threshold=0.9, say.")
    layers = dict(named_normalizers(model))
    choices = {name: choice for name, layer in layers.items() if (choice := layer.choice(threshold)) is not None}
    if not choices:
        warnings.warn(
            "harden found no layer whose weights choose: sn and bcn have such.", NoEffectWarning, stacklevel=2
        )
    arguments = (
        None if example_input is None else example_input if isinstance(example_input, tuple) else (example_input,)
    )
    # The first run measures the maps, too: "in" of one element per channel would return beta and nothing of x.
    sizes: dict[str, int] = {}
    watch = {layers[name]: partial(_see_size, sizes, name) for name in choices}
    before = _outputs(model, arguments, watch)
    for name, choice in choices.items():
        if choice.norm == "in" and sizes.get(name) == 1:
            why = "chose in, and one element per sample and channel has no variance"
            choices[name] = Choice("", choice.weight, why)
    # The plain layers run beside the old ones on the same inputs before any of them is put in place.
    swap = _prepare(model, layers, choices)
    distances: dict[str, float] = {}
    pairs = {old: partial(_see_distance, distances, name, new) for name, (new, old) in swap.replaced().items()}
    if pairs:
        _outputs(model, arguments, pairs)
    swap.commit()
    rows = [_row(name, layers[name], choice, distances.get(name)) for name, choice in choices.items()]
    if not before:
        return HardenReport(rows, swap, None, None)
    # Differences of layers add up or cancel on their way, so the model's outputs are compared as well.
    after = _outputs(model, arguments, {})
    moved = max((_distance(a, b) for a, b in zip(before, after, strict=True)), default=0.0)
    return HardenReport(rows, swap, moved, max((float(t.abs().max()) for t in before if t.numel()), default=0.0))


def _prepare(model: nn.Module, layers: dict[str, Normalizer], choices: dict[str, Choice]) -> SwapReport:
    """Build the plain normalizers, and put none in place."""
    decided = {name: choice for name, choice in choices.items() if choice.norm}
    if not decided:
        return SwapReport([], [], len(choices))
    rules = {
        re.escape(name): {"class_path": choice.norm, "init_args": choice.arguments} for name, choice in decided.items()
    }
    # An ordinary swap of these layers by name: tensors, hooks and the way back are those of any other.
    swap, _, _ = prepare_swap(model, SwapOptions(rules=rules, source=[*{type(layers[name]) for name in decided}]))
    rows = {row.name: row for row in swap.layers}
    for name, (new, _) in swap.replaced().items():
        # A swap sets these for all layers alike; here each has those of the layer that it replaces.
        old = layers[name]
        new.sync, new.sync_group, new.backend = old.sync, old.sync_group, old.backend
        if old.compiled:
            new.compile(**vars(old).get("_compile_options", {}))
        rows[name].compiled, rows[name].sync = new.compiled, rows[name].sync and new.sync
    return swap


def _row(name: str, layer: Normalizer, choice: Choice, moved: float | None) -> HardenedLayer:
    source = type(layer).__name__
    target = normalizers()[choice.norm].__name__ if choice.norm else source
    return HardenedLayer(name, source, target, choice.norm, choice.weight, moved, choice.why)


@torch.no_grad()
def _outputs(
    model: nn.Module, arguments: tuple[Any, ...] | None, hooks: Mapping[Any, Callable[..., None]]
) -> list[Tensor]:
    """Return the model's outputs in evaluation, which leaves no trace; call a function at each of some layers."""
    if arguments is None:
        return []
    with random_numbers_restored(), everything_restored(model):
        model.eval()
        with _hooked(hooks):
            # Of copies, for a model may write to its input.
            return [t.detach().clone() for t in tensors_in(model(*copy.deepcopy(arguments)))]


@contextmanager
def _hooked(hooks: Mapping[Any, Callable[..., None]]) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _see_size(
    sizes: dict[str, int], name: str, layer: Any, arguments: tuple[Any, ...], options: dict[str, Any], output: Tensor
) -> None:
    size = output.numel() // max(output.shape[0] * layer.num_features, 1)
    sizes[name] = min(size, sizes.get(name, size))


def _see_distance(
    distances: dict[str, float],
    name: str,
    new: nn.Module,
    layer: nn.Module,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    output: Tensor,
) -> None:
    # The old layer runs in evaluation here; the new one is in no model yet that could have told it.
    mode = new.training
    new.eval()
    try:
        # Past its hooks, which are the user's and ran for the old layer.
        distance = _distance(output, new.forward(*arguments, **options))
    finally:
        new.train(mode)
    distances[name] = max(distance, distances.get(name, 0.0))


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0

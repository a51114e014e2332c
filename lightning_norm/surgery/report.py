"""What a swap did, layer by layer: a table, plain data, YAML, and the way back."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from torch import nn

from lightning_norm.errors import NotReachedWarning, counted
from lightning_norm.layers.arguments import arguments_of
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.behind import TakenActivation, give_activation
from lightning_norm.surgery.activations import find_activations, take_activation
from lightning_norm.surgery.convert import (
    computed_weights,
    device_and_dtype,
    restore_original,
    settings_of,
    unchanged_on_error,
)
from lightning_norm.surgery.options import SwapOptions
from lightning_norm.surgery.reach import check_reach, tell
from lightning_norm.surgery.recognize import has_running_stats
from lightning_norm.surgery.select import Left, ModuleSlot
from lightning_norm.surgery.text_tables import TableReport
from lightning_norm.surgery.torch_layers import FAMILIES

Row = TypeVar("Row")
MANY = 100_000
"""Parameters that are worth a word wherever they make a model larger by more than a tenth."""

SYNC = {
    True: "on in training with several processes",
    "running": "of the running statistics alone, once per optimizer step of several processes",
    False: "off",
}


@dataclass
class SwappedLayer:
    """One row of the report, in plain types.

    Args:
        name: dotted name; ``also`` holds the other names of a shared module.
        source: class that was there.
        target: class that is there now.
        norm: what to type to get it: ``{"class_path": ..., "init_args": {...}}``.
        num_features: channels.
        preserves_eval: the layer evaluates as the original did.
        reason: why, or why not.
        moved: Parameters and buffers taken over.
        converted: those taken over in another form.
        dropped: those that the normalizer has no place for.
        added: new parameters, name -> number of elements.
        removed: elements of the parameters that were not moved.
        activation: name of the activation module that the layer computes as well.
        backend: of the passes, and why.
        compiled: each forward pass runs under torch.compile.
        sync: statistics are pooled over ranks in training; "running" the running ones alone, once per optimizer step.
    """

    name: str
    source: str
    target: str
    norm: dict[str, Any]
    num_features: int
    preserves_eval: bool
    reason: str
    moved: list[str]
    converted: list[str]
    dropped: list[str]
    added: dict[str, int]
    backend: str
    compiled: bool
    sync: bool | str
    removed: int = 0
    activation: str = ""
    also: list[str] = field(default_factory=list)

    @property
    def num_groups(self) -> int | None:
        """In how many groups the channels lie; ``None`` where the normalizer has no groups."""
        number: int | None = self.norm["init_args"].get("num_groups")
        return number if isinstance(number, int) else None


class SwapReport(TableReport):
    """The outcome of :func:`lightning_norm.swap`: its length, a table, plain data, and the way back.

    Args:
        layers: one row per swapped layer.
        skipped: (name, type, why) of layers that look like candidates and were left alone.
        candidates: how many layers could have been swapped.
        others: the same of all other normalization layers of the model.
        frozen: the same of those that ``skip_frozen`` leaves alone.

    Attributes:
        dry_run: nothing was changed.
        total_before: parameters of the model before the swap, in elements.
        masks: where each batch's mask comes from; empty without masks.
        unchosen: (name, type, why) of candidates that the options of the swap leave alone.
        order: the names of all modules, as they come in the model.
        activations_left: (name, type, why) of activations that ``fuse_activation`` has left where they were.
    """

    def __init__(
        self,
        layers: list[SwappedLayer],
        skipped: list[Left],
        candidates: int,
        others: list[Left] | None = None,
        frozen: list[Left] | None = None,
    ) -> None:
        self.layers, self.skipped, self.candidates, self.others = layers, skipped, candidates, others or []
        self.frozen = frozen or []
        self.dry_run = True
        self.total_before = 0
        self.masks = ""
        self.unchosen: list[Left] = []
        self.order: list[str] = []
        # What a commit puts in place, and an undo takes out again.
        self._undo: list[tuple[ModuleSlot, Normalizer]] = []
        self.activations_left: list[Left] = []
        self._taken: list[tuple[ModuleSlot, TakenActivation, Normalizer]] = []

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def parameters_added(self) -> int:
        """New parameters, in elements."""
        return sum(sum(layer.added.values()) for layer in self.layers)

    @property
    def parameters_removed(self) -> int:
        """Parameters that were not moved, in elements."""
        return sum(layer.removed for layer in self.layers)

    @property
    def total_after(self) -> int:
        """Parameters of the model after the swap, in elements."""
        return self.total_before + self.parameters_added - self.parameters_removed

    def add(self, slot: ModuleSlot, layer: Normalizer, row: SwappedLayer) -> None:
        """Add a layer that is ready to be put in place."""
        self.layers.append(row)
        self._undo.append((slot, layer))
        slot.device_and_dtype, slot.settings = device_and_dtype(layer), settings_of(layer)

    def commit(self, replace: bool = True) -> set[int]:
        """Put the layers in place and return their ids; with ``replace=False`` let them go, as after a dry run.

        Args:
            replace: whether the model changes.
        """
        # A dry run lets go of the replacements, which hold the model's parameters and would keep them alive.
        if not replace:
            self._undo = []
            return set()
        self.dry_run = False
        # Every replacement was built before: a swap happens as a whole or not at all.
        for slot, layer in self._undo:
            slot.fill(layer)
        return {id(layer) for _, layer in self._undo}

    def find_activations(self, model: nn.Module, how: bool | Mapping[str, str], example: Any = None) -> dict[str, str]:
        """Return which activation each layer can compute, and note in the report which, and what is left.

        Args:
            model: the model, before or after the layers were put in place.
            how: see ``fuse_activation`` of :func:`lightning_norm.swap`.
            example: see ``example`` there.

        Raises:
            ValueError: the model fails on the example, or a layer or activation that is named is not there.
        """
        if not how:
            return {}
        # Those that a layer has behind it already are computed with it anyway.
        layers = {slot.name: (layer, slot.module) for slot, layer in self._undo if layer._taken_from is None}
        pairs, self.activations_left = find_activations(model, layers, how, example)
        for row in self.layers:
            row.activation = pairs.get(row.name, row.activation)
        return pairs

    def take_activations(self, model: nn.Module, pairs: Mapping[str, str]) -> None:
        """Let layers that are in place compute the activations that were found."""
        layers = {slot.name: layer for slot, layer in self._undo}
        self._taken += [
            (*take_activation(model, layers[name], name, place), layers[name]) for name, place in pairs.items()
        ]

    def merge(self, other: SwapReport) -> None:
        """Add the layers of a later swap of the same model.

        Args:
            other: whose layers are in place; :meth:`undo` then undoes both.
        """
        # The later swap sees the whole model, and counts what the earlier one added as parameters from before.
        known = {layer.name for layer in self.layers}
        # Counted before the rows below change it.
        changed = self.total_after - self.total_before
        self.layers += [layer for layer in other.layers if layer.name not in known]
        self._taken += other._taken
        # A layer that both have passed over is listed once, as the later one saw it.
        for mine, later in (
            (self.skipped, other.skipped),
            (self.others, other.others),
            (self.frozen, other.frozen),
            (self.unchosen, other.unchosen),
        ):
            mine[:] = {row[0]: row for row in [*mine, *later]}.values()
        self.order = list(dict.fromkeys([*other.order, *self.order]))
        self.total_before = max(self.total_before, other.total_before - changed)
        self._undo += other._undo

    def growth(self) -> str:
        """Return what to tell of a model that grows by more than a tenth, and what to do about it; else "".

        A few parameters per channel are no news, even in a tiny network.
        """
        added, before = self.parameters_added, self.total_before
        hints = {type(layer).__name__: layer.swap_advice.growth for _, layer in self._undo if layer.swap_advice.growth}
        # A normalizer that has a hint can grow large, and says how to make it smaller; another one has to add many.
        if 10 * added <= before or not before or (not hints and added < MANY):
            return ""
        ways = [*(f"{name}: {hint}" for name, hint in hints.items()), "Swap fewer layers with include or exclude"]
        return (
            f"the swap adds {_spaced(added)} parameters to the model's {_spaced(before)} (+{added / before:.0%}); "
            f"optimizer states and checkpoints grow with them. {'. '.join(ways)}."
        )

    def unsuitable(self) -> str:
        """Return what to tell of layers in whose place a method does not belong; "" if there are none."""
        told = []
        for family, kinds in FAMILIES.items():
            replaced = [(s.name, layer) for s, layer in self._undo if isinstance(s.module, kinds)]
            for cls in {type(layer): None for _, layer in replaced if family in layer.swap_advice.not_for}:
                names = [name for name, layer in replaced if type(layer) is cls]
                some = ", ".join(names[:3] + ["..."] * (len(names) > 3))
                count = counted(len(names), f"{family} layer")
                told.append(f"{cls.__name__} in place of {count} ({some}): {cls.swap_advice.not_for[family]}.")
        # Code freezes a BatchNorm by this momentum; a method that moves its statistics by another number does not see.
        still = [
            (slot.name, type(layer).__name__)
            for slot, layer in self._undo
            if getattr(slot.module, "momentum", None) == 0
            and has_running_stats(slot.module)
            and layer.has_running_stats
            and "momentum" not in arguments_of(type(layer))
        ]
        if still:
            told.append(
                f"{counted(len(still), 'layer')} (first: {still[0][0]}) had momentum=0, which keeps running "
                f"statistics as they are, and {still[0][1]} has no momentum: its statistics move. Type "
                "layer.freeze_statistics() after the swap to keep them, as NormFreeze does in a Trainer."
            )
        return " ".join(told)

    def left_alone(self, options: SwapOptions) -> str:
        """Return what to tell of layers that were passed over; "" where the options have left them out.

        Args:
            options: whoever names kinds or names of layers there has left out the others.
        """
        said = (options.source, options.include, options.rules, options.filter, options.in_block, options.every)
        chosen = any(o is not None for o in said)
        left = self.skipped if chosen else [*self.skipped, *self.others]
        if not left or not self.layers:
            return ""
        stay = (
            " source='BatchNorm' says that layers of other kinds are to stay." if len(left) > len(self.skipped) else ""
        )
        return f"the swap leaves {counted(len(left), 'normalization layer')} alone: {'; '.join(_by_class(left))}.{stay}"

    def replaced(self) -> dict[str, tuple[Normalizer, nn.Module]]:
        """Return name -> (layer, the module that it has replaced) of the layers that are in place."""
        return {slot.name: (layer, slot.module) for slot, layer in self._undo}

    def check(self, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, str]:
        """Run the model once, forward and backward in training, and name the layers of the swap that it does not reach.

        A layer that code keeps in a list or a closure besides, calls through a bound method, or replaces by a function
        of its tensors is swapped without effect. :class:`lightning_norm.NormSwap` asks the same after the first
        training step. Parameters, statistics, gradients, modes and random states are afterwards what they were.

        Args:
            model: the swapped model.
            args: an example for ``model(*args, **kwargs)``, or one function that is called with the model and returns
                outputs or a loss.
            kwargs: see ``args``.

        Returns:
            Name -> what happened, for the layers that did not run or got no gradient; a NotReachedWarning says it too.

        Raises:
            RuntimeError: the report holds no layers: it is of a dry run, changed nothing, or was undone.

        >>> import torch, lightning_norm
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> lightning_norm.swap(model, "sn").check(model, torch.randn(2, 3, 8, 8))
        {}
        """
        if not self._undo:
            raise RuntimeError("nothing to check: this report is of a dry run, changed nothing or was undone.")
        missed = check_reach(self.replaced(), model, args, kwargs)
        if missed:
            warnings.warn(tell(missed, "this step"), NotReachedWarning, stacklevel=2)
        return missed

    def undo(self) -> None:
        """Put every original module back, with the Parameters and statistics as they are now.

        Without training in between, the model is bit-identical to what it was. New parameters of the normalizers are
        gone.

        Raises:
            RuntimeError: there is nothing to undo, or a layer was replaced by something else since.
        """
        if not self._undo:
            why = "this report is of a dry run" if self.dry_run else "this swap changed nothing or was undone already"
            raise RuntimeError(f"nothing to undo: {why}.")
        # All slots are checked before the first is written to: an undo happens as a whole or not at all.
        for slot, layer in self._undo:
            if computed := computed_weights(layer):
                raise RuntimeError(f"cannot undo: {slot.name} is a {type(layer).__name__} {computed}.")
            for parent, attribute in slot.parents:
                now = getattr(parent, attribute, None)
                if now is not layer:
                    raise RuntimeError(
                        f"cannot undo: {slot.name} holds {type(now).__name__} and no longer the "
                        f"{type(layer).__name__} of this swap. Undo later swaps, and changes of your own, first."
                    )
        for slot, place, _ in self._taken:
            for parent, attribute in slot.parents:
                if getattr(parent, attribute, None) is not place:
                    raise RuntimeError(
                        f"cannot undo: {slot.name} holds {type(getattr(parent, attribute, None)).__name__} and no "
                        "longer what this swap put in the place of its activation."
                    )
        # Activations first: the layers have to give them up before they leave.
        for slot, _, layer in self._taken:
            give_activation(layer)
            slot.fill(slot.module)
        self._taken = []
        # Tensors are handed back layer by layer; where one cannot be, all are left as they were.
        with unchanged_on_error([module for slot, layer in self._undo for module in (slot.module, layer)]):
            for slot, layer in self._undo:
                restore_original(layer, slot.module, slot.device_and_dtype, slot.settings)
        for slot, _ in self._undo:
            slot.fill(slot.module)
        self._undo = []

    def to_dict(self) -> dict[str, Any]:
        """Return the report in plain types.

        >>> import lightning_norm
        >>> report = lightning_norm.swap(nn.Sequential(nn.BatchNorm2d(4)), "sn", dry_run=True)
        >>> [(row["name"], row["source"], row["target"]) for row in report.to_dict()["layers"]]
        [('0', 'BatchNorm2d', 'SwitchableNorm')]
        """
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "skipped": [{"name": n, "type": t, "reason": r} for n, t, r in self._left()],
            "candidates": self.candidates,
            "parameters_added": self.parameters_added,
        }

    def to_yaml(self) -> str:
        """Return the report as YAML, which ``NormSwap(plan=...)`` takes; a row with ``norm: null`` is left alone.

        Every normalization layer has a row, in the model's order. A row needs ``name`` and ``norm`` alone.
        """
        import yaml

        report = self.to_dict()
        left = [{"name": n, "source": t, "norm": None, "reason": why} for n, t, why in self._stay()]
        report["layers"] = self._in_order([*report["layers"], *left], lambda row: row["name"])
        return str(yaml.safe_dump(report, sort_keys=False))

    def _stay(self) -> list[Left]:
        """Return every normalization layer that stays what it is."""
        return [*self._left(), *self.unchosen]

    def _in_order(self, rows: list[Row], name: Callable[[Row], str]) -> list[Row]:
        """Return rows as their layers come in the model."""
        places = {name: place for place, name in enumerate(self.order)}
        return sorted(rows, key=lambda row: places.get(name(row), len(places)))

    def summary(self) -> str:
        """Return the few lines that a training run prints first.

        >>> import lightning_norm
        >>> report = lightning_norm.swap(nn.Sequential(nn.BatchNorm2d(4)), "sn", dry_run=True)
        >>> "sn" in report.summary()
        True
        """
        sources = " and ".join(dict.fromkeys(layer.source for layer in self.layers)) or "normalization"
        targets = Counter((layer.target, layer.norm["class_path"]) for layer in self.layers)
        names = ", ".join(_title(target, key, n if len(targets) > 1 else 0) for (target, key), n in targets.items())
        verb = "would become" if self.dry_run else "->"
        lines = [f"{len(self)} of {counted(self.candidates, f'{sources} layer')} {verb} {names or 'nothing'}"]
        if not self.layers:
            return "\n".join(lines + [f"  left alone  {line}" for line in self._left_lines()])
        total = f" ({_spaced(self.total_before)} -> {_spaced(self.total_after)})"
        # A tensor that the normalizer holds in another form is counted twice: removed as it was, and added as it is.
        removed = f" -{self.parameters_removed}" if self.parameters_removed else ""
        added = f"+{self.parameters_added}{removed}" + (total if self.total_before else "")
        converted = (
            f"     converted: {self._kinds('converted')}" if any(layer.converted for layer in self.layers) else ""
        )
        lines.append(f"  parameters  {added}     moved: {self._kinds('moved')}{converted}")
        # Tensors that are neither moved nor converted are lost with the original layer, which is worth a line.
        without = sum(1 for layer in self.layers if layer.dropped)
        if without:
            lines.append(
                f"  dropped     {self._kinds('dropped')} in {counted(without, 'layer')}, whose normalizer has no use "
                "for them"
            )
        changed = [layer for layer in self.layers if not layer.preserves_eval]
        if changed:
            why = "; ".join(dict.fromkeys(f"{layer.norm['class_path']}: {layer.reason}" for layer in changed))
            lines.append(f"  evaluation  differs from the original network in {counted(len(changed), 'layer')} ({why})")
        else:
            lines.append("  evaluation  preserved: the same as the original network's until training changes it")
        if taken := [layer for layer in self.layers if layer.activation]:
            lines.append(f"  activation  computed by the layer before it: {len(taken)} (first: {taken[0].activation})")
        lines += [f"  activation  left: {line}" for line in _by_class(self.activations_left)]
        # What num_groups="auto" came to.
        groups = Counter(n for layer in self.layers if (n := layer.num_groups) is not None)
        if groups:
            *most, (n, count) = sorted(groups.items(), reverse=True)
            counts = [*(f"{n} in {count}" for n, count in most), f"{n} in {counted(count, 'layer')}"]
            lines.append(f"  groups      {', '.join(counts)}")
        ghosts = Counter(n for layer in self.layers if (n := layer.norm["init_args"].get("virtual_batch_size")))
        lines += [
            f"  statistics  of {counted(n, 'sample')} at a time in {counted(count, 'layer')}"
            for n, count in ghosts.items()
        ]
        if self.masks:
            lines.append(f"  masks       {self.masks}: what is padding there is read by no statistic, in plain PyTorch")
        sync = SYNC[next((layer.sync for layer in self.layers if layer.sync), False)]
        lines.append(f"  backend     {self.layers[0].backend}     sync: {sync}")
        return "\n".join(lines + [f"  left alone  {line}" for line in self._left_lines()])

    def _left_lines(self) -> list[str]:
        return _by_class(self._left())

    def _left(self) -> list[Left]:
        return [*self.skipped, *self.others, *self.frozen]

    def _kinds(self, what: str) -> str:
        """Return the kinds of tensors in a column of the report, in words."""
        # The counter of batches is moved with every layer that has one, and tells nothing.
        names = dict.fromkeys(name for layer in self.layers for name in getattr(layer, what))
        names.pop("num_batches_tracked", None)
        return (
            ", ".join(dict.fromkeys("running statistics" if n.startswith("running") else n for n in names)) or "nothing"
        )

    def table(self) -> list[tuple[str, ...]]:
        """Return one row per layer that a swap could take, below a heading, in the model's order."""
        header = ("layer", "from", "to", "C", "added", "evaluation", "backend", "sync")
        rows = [(name, (name, kind, "-", "", "", f"left alone: {why}", "", "")) for name, kind, why in self._stay()]
        for layer in self.layers:
            name = layer.name + (f" (= {', '.join(layer.also)})" if layer.also else "")
            name += f" + {layer.activation}" if layer.activation else ""
            # BNET and "afn" add many tensors per layer: their number is more readable than their names.
            few = "+".join(f"{k} {v}" for k, v in layer.added.items()) or "-"
            added = few if len(layer.added) <= 6 else f"{sum(layer.added.values())} in {len(layer.added)} tensors"
            evaluation = "preserved" if layer.preserves_eval else f"differs: {layer.reason}"
            backend = layer.backend.split(":")[0] + (", compiled" if layer.compiled else "")
            row = (
                name,
                layer.source,
                layer.target + (f" ({counted(n, 'group')})" if (n := layer.num_groups) is not None else ""),
                str(layer.num_features),
                added,
                evaluation,
                backend,
                "running" if layer.sync == "running" else "on" if layer.sync else "off",
            )
            rows.append((layer.name, row))
        return [header, *(row for _, row in self._in_order(rows, lambda pair: pair[0]))]

    def __repr__(self) -> str:
        return f"SwapReport({len(self)} of {counted(self.candidates, 'layer')}{', dry run' if self.dry_run else ''})"


def _by_class(left: list[Left]) -> list[str]:
    """Return a line for each class of layers that were left alone, and reason."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, kind, why in left:
        kinds.setdefault((kind, why), []).append(name)
    return [
        f"{len(names)} {kind} ({'' if len(names) == 1 else 'first: '}{names[0]}): {why}"
        for (kind, why), names in kinds.items()
    ]


def _title(target: str, key: str, count: int) -> str:
    cls = Normalizer.registry.get(key)
    paper = f", {cls.paper.authors} {cls.paper.year}" if cls is not None and cls.paper is not None else ""
    return f"{f'{count} ' if count else ''}{target} ({key}{paper})"


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")

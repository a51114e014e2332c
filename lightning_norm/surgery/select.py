"""Which modules of a model are candidates, and which normalizer each one is to become."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_norm.errors import counted
from lightning_norm.layers.arguments import plain_value
from lightning_norm.layers.base import Normalizer
from lightning_norm.surgery.convert import can_be_swapped, computed_weights
from lightning_norm.surgery.options import Pattern, ResolvedNorm, Source, SwapOptions
from lightning_norm.surgery.positions import at_positions, blocks_of, frozen_parts
from lightning_norm.surgery.recognize import is_frozen, is_norm
from lightning_norm.surgery.residual_blocks import LAST_NORMS, LAST_OF_BLOCK, is_last_of_block
from lightning_norm.surgery.torch_layers import FAMILIES, LAZY_BATCH_NORMS
from lightning_norm.surgery.walk import names_by_module, places_by_module
from lightning_norm.surgery.whole import TORCH_CLASSES, Whole, num_channels_of, read


@dataclass
class ModuleSlot:
    """One module, and every place of the model that holds it.

    Args:
        module: the module.
        names: its dotted names; several for a shared module.
        parents: the (parent, attribute) pairs to write to.
        device_and_dtype: those of the replacement when it was made.
        settings: likewise.
        whole: what the module is beside its class.
    """

    module: nn.Module
    names: list[str] = field(default_factory=list)
    parents: list[tuple[nn.Module, str]] = field(default_factory=list)
    device_and_dtype: tuple[torch.device | None, torch.dtype | None] = (None, None)
    settings: dict[str, Any] = field(default_factory=dict)
    whole: Whole = field(default_factory=lambda: Whole(None))

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    def fill(self, module: nn.Module) -> None:
        """Put a module in every place."""
        for parent, attribute in self.parents:
            parent.add_module(attribute, module)


Left = tuple[str, str, str]
"""A layer that is left alone: its name, its class, and why."""


def find_slots(model: nn.Module, source: Source | None = None) -> tuple[list[ModuleSlot], list[Left], list[Left]]:
    """Find the candidates, each once; the near misses; and all other normalization layers that are left alone.

    Args:
        model: the network.
        source: classes, their names, or families such as "BatchNorm", "LayerNorm" and "all"; "BatchNorm" by default.

    Returns:
        The candidates; those of a class that was asked for which cannot be taken, each with the reason; and the others.

    Raises:
        ValueError: an unknown source, or the model itself is a candidate and has no parent to be replaced in.

    >>> model = nn.Sequential(nn.BatchNorm2d(4), nn.LayerNorm(4))
    >>> slots, skipped, others = find_slots(model)
    >>> [slot.name for slot in slots], others
    (['0'], [('1', 'LayerNorm', "source='LayerNorm' includes it")])
    """
    classes = _source_types(source)
    # Names are compared as well, since a class of the user's code need not be importable from a configuration.
    by_name = {s for s in _as_tuple(source) if isinstance(s, str)}
    slots: dict[nn.Module, ModuleSlot] = {}
    skipped: list[Left] = []
    others: list[Left] = []
    # Layers of one class and one set of arguments are measured once for all of them.
    known: dict[Any, Whole | str] = {}
    for module, names in names_by_module(model).items():
        kind = type(module)
        # A lazy layer becomes one of these at its first input. It is a candidate, so that `convert` can say what to do.
        lazy = isinstance(module, LAZY_BATCH_NORMS) and module.cls_to_become in classes
        named = kind in classes or kind.__name__ in by_name or getattr(kind, "key", None) in by_name - {""}
        derived = isinstance(module, classes) and not isinstance(module, Normalizer)
        if not (lazy or named or derived):
            if not isinstance(module, Normalizer) and is_norm(module):
                others += [(name, kind.__name__, _how_to_include(module, known)) for name in names]
            continue
        # A subclass may do more than normalize: it is taken where its outputs say that it does not.
        whole = Whole(None) if lazy else computed_weights(module) or read(module, known)
        if isinstance(whole, Whole) and whole.kind is None and not (named or lazy):
            whole = f"a subclass of {kind.__mro__[1].__name__}; pass source={kind.__name__!r} to include it"
        if isinstance(whole, str):
            title = kind.__name__ if not hasattr(nn, kind.__name__) else f"{kind.__module__}.{kind.__qualname__}"
            skipped += [(name, title, whole) for name in names]
        elif module is model:
            raise ValueError(f"the model itself is a {kind.__name__}: build the layer with lightning_norm.create(...).")
        else:
            slots[module] = ModuleSlot(module, names, whole=whole)
    # One walk for all slots; each may stand in several places.
    places = places_by_module(model)
    for module, slot in slots.items():
        slot.parents = places[module]
    return list(slots.values()), skipped, others


def _how_to_include(module: nn.Module, known: dict[Any, Whole | str]) -> str:
    """Return what to type so that a layer which was left alone is swapped, or why none can be."""
    kind = type(module).__name__
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return f"it normalizes over the axes {tuple(module.normalized_shape)} and has no channels"
    whole = computed_weights(module) or read(module, known) if num_channels_of(module) else None
    if isinstance(whole, str):  # asked for by name it would be refused, for this reason
        return whole
    if isinstance(module, TORCH_CLASSES) or is_frozen(module):
        return f"source={kind!r} includes it"
    return f"no layer that a swap knows{f'; source={kind!r} includes it' if num_channels_of(module) else ''}"


def assign_norms(
    model: nn.Module, slots: Sequence[ModuleSlot], options: SwapOptions
) -> tuple[list[tuple[ModuleSlot, ResolvedNorm]], list[str], list[Left], list[Left]]:
    """Give each slot the normalizer that it is to hold.

    ``rules`` come first, in order, the first match wins and ``None`` leaves the layer alone; then ``include``,
    ``exclude``, ``filter``, ``in_block`` and ``every``, in this order, choose what becomes ``norm``.

    Args:
        model: that holds the slots.
        slots: the candidates.
        options: of the swap.

    Returns:
        The slots that change, each with its normalizer; the patterns without a match, as ``include['bn1']``; what
        ``skip_frozen`` leaves alone; and what another option does.
    """
    rules, include, exclude = options.resolved_rules, options.include, options.exclude
    matched: set[str] = set()
    frozen = frozen_parts(model) if options.skip_frozen else set()
    by_rule: dict[nn.Module, ResolvedNorm | None] = {}
    chosen: list[nn.Module] = []
    why: dict[nn.Module, str] = {}
    # What is swapped already counts, or each further setup of one model would choose among the layers that are left.
    places = _with_swapped(model, slots) if options.in_block is not None or options.every is not None else slots
    candidates = {slot.module for slot in slots}
    for slot in places:
        known = matched if slot.module in candidates else set()
        # include and exclude are matched also where a rule wins, so that their patterns count as matched.
        # The first rule that matches wins, as the last line of a rule list is usually ".*".
        rule = next((p for p in rules if matches(p, slot, known, f"rules[{p!r}]")), None)
        included = include is None or matches(include, slot, known, "include")
        excluded = exclude is not None and matches(exclude, slot, known, "exclude")
        why[slot.module] = _why_left(rule, included, excluded, options)
        if rule is not None:
            by_rule[slot.module] = rules[rule]
        elif (
            included
            and not excluded
            and slot.module not in frozen
            # What is swapped has passed; it is of another class now, and would not again.
            and (slot.module not in candidates or _passes(options.filter, slot))
        ):
            chosen.append(slot.module)
    if options.in_block is not None:
        chosen = at_positions(chosen, blocks_of(model, [slot.module for slot in places]), options.in_block)
        matched |= {f"in_block[{options.in_block!r}]"} if chosen else set()
    # ``every`` comes last, and counts those that all else has left.
    norms = {**by_rule, **dict.fromkeys(chosen[:: options.every or 1], options.resolved_norm)}
    assigned = [
        (slot, norm) for slot in slots if slot.module not in frozen and (norm := norms.get(slot.module)) is not None
    ]
    patterns = [f"rules[{p!r}]" for p in rules]
    patterns += [f"{label}[{p!r}]" for label, ps in (("include", include), ("exclude", exclude)) for p in _as_list(ps)]
    patterns += [f"in_block[{options.in_block!r}]"] * (options.in_block is not None)
    left = [
        (slot.name, type(slot.module).__name__, "skip_frozen=True: nothing around it requires a gradient")
        for slot in slots
        if slot.module in frozen
    ]
    changed = {slot.module for slot, _ in assigned}
    unchosen = [
        (slot.name, type(slot.module).__name__, why[slot.module])
        for slot in slots
        if slot.module not in changed and slot.module not in frozen
    ]
    return assigned, [p for p in patterns if p not in matched], left, unchosen


def _why_left(rule: str | None, included: bool, excluded: bool, options: SwapOptions) -> str:
    """Return why a candidate stays, should it stay."""
    if rule is not None:
        return f"rules: {rule!r} leaves it alone"
    if options.norm is None:
        return "no rule names it"
    if not included:
        return "include does not name it"
    if excluded:
        return "exclude names it"
    others = [name for name in ("filter", "in_block", "every") if getattr(options, name) is not None]
    return f"not chosen by {' and '.join(others)}"


def _with_swapped(model: nn.Module, slots: Sequence[ModuleSlot]) -> list[ModuleSlot]:
    """Return the slots and one for each layer that a swap has made, in the model's order."""
    known = {slot.module: slot for slot in slots}
    places = places_by_module(model)
    return [
        known.get(m) or ModuleSlot(m, names, places.get(m, []))
        for m, names in names_by_module(model).items()
        if m in known or (isinstance(m, Normalizer) and m.origin is not None)
    ]


def _passes(function: Callable[[str, nn.Module], bool] | None, slot: ModuleSlot) -> bool:
    """Ask the user's function for each name of a layer.

    Raises:
        TypeError: it returns no truth value, as one without a return statement.
    """
    answers = [True] if function is None else [function(name, slot.module) for name in slot.names]
    for answer in answers:
        if not isinstance(plain_value(answer), bool):
            raise TypeError(
                f"filter must return True or False, got {answer!r} for {slot.name!r}: does every way through it return?"
            )
    return any(answers)


def explain_unmatched(unmatched: str, slots: Sequence[ModuleSlot]) -> str:
    """Return the error text for a pattern that matched nothing.

    Args:
        unmatched: as :func:`assign_norms` names it, ``exclude['layer5.*']`` say.
        slots: the candidates, among whose names the nearest is looked for.
    """
    # An entry reads label['pattern']; see `assign_norms`.
    label, pattern = unmatched.split("[", 1)
    pattern = pattern[:-1].strip("'\"")
    if label == "in_block":
        return (
            f"in_block={pattern} matched none of the {counted(len(slots), 'layer')}: a block is the nearest module "
            "around a layer that holds two or more of them and whose class the model has several times, and none "
            "has that many of those that are chosen."
        )
    if pattern == LAST_OF_BLOCK:
        blocks = " or ".join(f"{attribute} of a {block}" for block, attribute in LAST_NORMS.items())
        return (
            f"{label}={pattern!r} matched none of the {counted(len(slots), 'layer')}: none is the {blocks}, as in a "
            "ResNet."
        )
    names = [n for s in slots for n in s.names]
    kinds = list(dict.fromkeys(type(s.module).__name__ for s in slots)) or ["normalization"]
    kind = " and ".join([", ".join(kinds[:-1])] * (len(kinds) > 1) + kinds[-1:])
    # Without the characters of regular expressions, which no name has.
    near = difflib.get_close_matches(re.sub(r"[\\^$*+?()|\[\]]", "", pattern), names, n=1, cutoff=0.0)
    hint = (
        f" The nearest name is {near[0]!r}: a string must match the whole name as a regular expression, a list entry "
        "must be the name or its end."
        if near
        else ""
    )
    return f"{label}={pattern!r} matched none of the {counted(len(names), f'{kind} layer')}.{hint}"


def check_source(model: nn.Module, slots: Sequence[ModuleSlot], source: Source | None) -> None:
    """Check that each class name in ``source`` is that of something.

    Raises:
        ValueError: neither the model nor torch.nn has such a class.
    """
    # Candidates count as well: they were in the model when the names were looked up, and may be replaced by now. So do
    # the classes that layers were swapped from, for a second run of the same code finds none of them.
    modules = [*model.modules(), *(slot.module for slot in slots)]
    origins = [m.origin["source"] for m in modules if isinstance(m, Normalizer) and m.origin is not None]
    known = {type(m).__name__ for m in modules} | {cls.__name__ for cls in Normalizer.registry.values()} | {*origins}
    for entry in _as_tuple(source):
        if isinstance(entry, type) or entry in {"all", *FAMILIES, *Normalizer.registry, *known} or hasattr(nn, entry):
            continue
        raise ValueError(f"source={entry!r} is no class in the model or in torch.nn. {_nearest(model, [entry])}")


def explain_source(model: nn.Module, source: Source | None) -> str:
    """Return why no layer is a candidate, and what to type."""
    entries = [e if isinstance(e, str) else e.__name__ for e in _as_tuple(source)] or ["BatchNorm"]
    what = f"source={(entries[0] if len(entries) == 1 else entries)!r}" if source else "BatchNorm layers are looked for"
    return f"{what}, and the model has none. {_nearest(model, entries)}"


def _nearest(model: nn.Module, entries: Sequence[str]) -> str:
    """Return the class in the model whose name is most like the one that was asked for, as a sentence."""
    # Only what a swap would take: a hint must not lead to an error.
    kinds = [type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower() and can_be_swapped(m)]
    near = max(sorted(set(kinds)), key=lambda k: max(_likeness(k, e) for e in entries), default=None)
    if near is None:
        others = sorted({type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower()})
        if others:
            return f"It holds {', '.join(others)}, which a swap cannot take: no number of channels to normalize over."
        return "It holds no layer with 'Norm' in its class name; for another one, pass source=<its class>."
    return f"The nearest class in the model is {near} ({kinds.count(near)} of them): pass source={near!r}."


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()


def _as_list(pattern: Pattern | None) -> list[str]:
    return [] if pattern is None else [pattern] if isinstance(pattern, str) else list(pattern)


def matches(pattern: Pattern, slot: ModuleSlot, matched: set[str], label: str) -> bool:
    """Tell whether a slot's names match, and enter the patterns that do in ``matched``.

    A string is a regular expression for the whole dotted name; an entry of a list is the name, or its end behind a dot.

    Args:
        pattern: a string, or a list of them.
        slot: with all of its names.
        matched: patterns that have matched something so far.
        label: "include", "exclude" or "rules[...]".

    Raises:
        ValueError: a string that is no regular expression.

    >>> slot = ModuleSlot(nn.BatchNorm2d(4), ["layer1.0.bn1"])
    >>> [matches(pattern, slot, set(), "include") for pattern in ("layer1.*", ["bn1"], "bn1")]
    [True, True, False]
    """
    any_match = False
    # Every pattern is tried, also behind one that matched: the report is to name those that match nothing.
    for p in _as_list(pattern):
        if p == LAST_OF_BLOCK:
            match = any(is_last_of_block(parent, attribute) for parent, attribute in slot.parents)
        elif isinstance(pattern, str):
            match = any(_fullmatch(p, n) for n in slot.names)
        else:
            match = any(n == p or n.endswith(f".{p}") for n in slot.names)
        if match:
            matched.add(label if label.startswith("rules") else f"{label}[{p!r}]")
        any_match |= match
    return any_match


def choose_layers(
    model: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    include: Pattern | None,
    exclude: Pattern | None,
    who: str,
) -> dict[str, nn.Module]:
    """Return the modules of these classes that ``include`` and ``exclude`` choose, by their first names.

    Args:
        model: the network.
        kinds: classes, with all that derives from them.
        include: as in :func:`lightning_norm.swap`; ``None`` for all of them.
        exclude: likewise; ``None`` for none.
        who: asks, for messages.

    Raises:
        ValueError: a pattern matches none of them; ``who`` precedes the message.

    >>> model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    >>> list(choose_layers(model, (nn.BatchNorm2d,), None, "0", "NormFreeze"))
    ['1']
    """
    places = places_by_module(model)
    slots = [
        ModuleSlot(m, names, places.get(m, [])) for m, names in names_by_module(model).items() if isinstance(m, kinds)
    ]
    matched: set[str] = set()
    chosen = {}
    for slot in slots:
        included = include is None or matches(include, slot, matched, "include")
        excluded = exclude is not None and matches(exclude, slot, matched, "exclude")
        if included and not excluded:
            chosen[slot.name] = slot.module
    for label, pattern in (("include", include), ("exclude", exclude)):
        for p in _as_list(pattern):
            if f"{label}[{p!r}]" not in matched and slots:
                raise ValueError(f"{who}: {explain_unmatched(f'{label}[{p!r}]', slots)}")
    return chosen


def _fullmatch(pattern: str, name: str) -> bool:
    """Tell whether a regular expression matches the whole name.

    Raises:
        ValueError: it is none.
    """
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(
            f"{pattern!r} is not a regular expression: {error}. A string is matched against the whole dotted name; "
            "for exact "
            f"names pass a list: [{pattern!r}]."
        ) from error


def _as_tuple(source: Source | None) -> tuple[str | type[nn.Module], ...]:
    if isinstance(source, (str, type)):
        return (source,)
    return tuple(source or ())


def _source_types(source: Source | None) -> tuple[type[nn.Module], ...]:
    """Return the classes behind ``source``."""
    entries: Iterable[str | type[nn.Module]]
    entries = ["BatchNorm"] if source is None else _as_tuple(source)
    types: list[type[nn.Module]] = []
    for entry in entries:
        if isinstance(entry, type):
            types.append(entry)
        elif entry == "all":
            types += [t for family in FAMILIES.values() for t in family]
        elif entry in FAMILIES:
            types += FAMILIES[entry]
        elif entry in Normalizer.registry:
            types.append(Normalizer.registry[entry])
        elif not entry.isidentifier() or not entry[:1].isupper():
            raise ValueError(
                f"source={entry!r} is unknown: expected one of {[*FAMILIES, 'all']}, a class, a class name, or the "
                "key of a "
                "normalizer that is already in the model."
            )
    return tuple(types)

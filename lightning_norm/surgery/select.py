"""Which modules of a model are candidates, and which normalizer each one is to become."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import nn

from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.registry import NormSpec
from lightning_norm.surgery.rules import LAST_NORMS, LAST_OF_BLOCK, is_last_of_block

Pattern: TypeAlias = str | Sequence[str]
Source: TypeAlias = str | type[nn.Module] | Sequence[str | type[nn.Module]]

BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
LAZY = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
FAMILIES: dict[str, tuple[type[nn.Module], ...]] = {
    "BatchNorm": BATCH_NORMS,
    "LayerNorm": (nn.LayerNorm,),
    "GroupNorm": (nn.GroupNorm,),
    "InstanceNorm": (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
}


@dataclass
class ModuleSlot:
    """One module, wherever the model holds it.

    Args:
        module: the module.
        names: its dotted names; several for a shared module.
        parents: the (parent, attribute) pairs to write to.
        started: device and precision of the replacement when it was made.
    """

    module: nn.Module
    names: list[str] = field(default_factory=list)
    parents: list[tuple[nn.Module, str]] = field(default_factory=list)
    started: tuple[torch.device | None, torch.dtype | None] = (None, None)

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


def find_sites(model: nn.Module, source: Source | None = None) -> tuple[list[ModuleSlot], list[tuple[str, str, str]]]:
    """Find the candidates, each once, and the near misses: (name, type, why it was left alone).

    Raises:
        ValueError: an unknown source.
    """
    wanted = _source_types(source)
    by_name = {s for s in _as_tuple(source) if isinstance(s, str)}
    sites: dict[int, ModuleSlot] = {}
    skipped: dict[str, tuple[str, str, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        clean = clean_name(name)
        kind = type(module)
        lazy = isinstance(module, LAZY) and module.cls_to_become in wanted
        if lazy or kind in wanted or kind.__name__ in by_name or getattr(kind, "key", None) in by_name - {""}:
            if not name:
                raise ValueError(
                    f"the model itself is a {kind.__name__}: build the layer with lightning_norm.create(...)."
                )
            site = sites.setdefault(id(module), ModuleSlot(module))
            site.names.append(clean)
            parent = model.get_submodule(name.rpartition(".")[0])
            place = (parent, name.rpartition(".")[2])
            if not any(p is parent and a == place[1] for p, a in site.parents):
                site.parents.append(place)
        elif isinstance(module, wanted) and not isinstance(module, Normalizer):
            base = kind.__mro__[1].__name__
            why = f"a subclass of {base} may do more than normalize; pass source={kind.__name__!r} to include it"
            skipped[clean] = (clean, kind.__name__, why)
    return list(sites.values()), list(skipped.values())


def clean_name(name: str) -> str:
    """Return a dotted name without torch.compile's part.

    >>> clean_name("net._orig_mod.1.weight")
    'net.1.weight'
    """
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def assign(
    sites: Sequence[ModuleSlot],
    norm: NormSpec | None,
    include: Pattern | None,
    exclude: Pattern | None,
    rules: Mapping[str, NormSpec | None] | None,
) -> tuple[list[tuple[ModuleSlot, NormSpec, bool]], list[str]]:
    """Give each site its normalizer, tell whether that is ``norm``, and tell which patterns matched nothing.

    ``rules`` come first, in order, the first match wins and ``None`` leaves the layer alone; then ``include`` and
    ``exclude`` choose what becomes ``norm``.
    """
    rules = dict(rules or {})
    used: set[str] = set()
    chosen: list[tuple[ModuleSlot, NormSpec, bool]] = []
    for site in sites:
        rule = next((p for p in rules if matches(p, site, used, f"rules[{p!r}]")), None)
        included = include is None or matches(include, site, used, "include")
        excluded = exclude is not None and matches(exclude, site, used, "exclude")
        spec = rules[rule] if rule is not None else norm if included and not excluded else None
        if spec is not None:
            chosen.append((site, spec, rule is None))
    missed = [f"rules[{p!r}]" for p in rules]
    missed += [f"{label}[{p!r}]" for label, ps in (("include", include), ("exclude", exclude)) for p in _as_list(ps)]
    return chosen, [m for m in missed if m not in used]


def explain_missed(missed: str, sites: Sequence[ModuleSlot]) -> str:
    """Return the error text for a pattern that matched nothing."""
    label, pattern = missed.split("[", 1)
    pattern = pattern[:-1].strip("'\"")
    if pattern == LAST_OF_BLOCK:
        blocks = " or ".join(f"{attribute} of a {block}" for block, attribute in LAST_NORMS.items())
        return f"{label}={pattern!r} matched none of the {len(sites)} layers: none is the {blocks}, as in a ResNet."
    names = [n for s in sites for n in s.names]
    kinds = list(dict.fromkeys(type(s.module).__name__ for s in sites)) or ["normalization"]
    kind = " and ".join([", ".join(kinds[:-1])] * (len(kinds) > 1) + kinds[-1:])
    near = difflib.get_close_matches(re.sub(r"[\\^$*+?()|\[\]]", "", pattern), names, n=1, cutoff=0.0)
    hint = (
        f" The nearest name is {near[0]!r}: a string must match the whole name as a regular expression, a list entry "
        "must be the name or its end."
        if near
        else ""
    )
    return f"{label}={pattern!r} matched none of the {len(names)} {kind} layers.{hint}"


def check_source(model: nn.Module, sites: Sequence[ModuleSlot], source: Source | None) -> None:
    """Check that each class name in ``source`` is that of something.

    Raises:
        ValueError: neither the model nor torch.nn has such a class.
    """
    modules = [*model.modules(), *(site.module for site in sites)]
    origins = [m.origin["source"] for m in modules if isinstance(m, Normalizer) and m.origin is not None]
    known = {type(m).__name__ for m in modules} | {cls.__name__ for cls in Normalizer.registry.values()} | {*origins}
    for entry in _as_tuple(source):
        if isinstance(entry, type) or entry in {"all", *FAMILIES, *Normalizer.registry, *known} or hasattr(nn, entry):
            continue
        raise ValueError(f"source={entry!r} is no class in the model or in torch.nn. {_nearest(model, [entry])}")


def explain_source(model: nn.Module, source: Source | None) -> str:
    """Return why no layer is a candidate, and what to type."""
    entries = [e if isinstance(e, str) else e.__name__ for e in _as_tuple(source)] or ["BatchNorm"]
    asked = (
        f"source={(entries[0] if len(entries) == 1 else entries)!r}" if source else "BatchNorm layers are looked for"
    )
    return f"{asked}, and the model has none. {_nearest(model, entries)}"


def _nearest(model: nn.Module, entries: Sequence[str]) -> str:
    kinds = [type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower()]
    near = max(sorted(set(kinds)), key=lambda k: max(_likeness(k, e) for e in entries), default=None)
    if near is None:
        return "It holds no layer with 'Norm' in its class name; for another one, pass source=<its class>."
    return f"The nearest class in the model is {near} ({kinds.count(near)} of them): pass source={near!r}."


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()


def _as_list(pattern: Pattern | None) -> list[str]:
    return [] if pattern is None else [pattern] if isinstance(pattern, str) else list(pattern)


def matches(pattern: Pattern, site: ModuleSlot, used: set[str], label: str) -> bool:
    """Tell whether a site's names match, and enter the patterns that do in ``used``."""
    hit = False
    for p in _as_list(pattern):
        if p == LAST_OF_BLOCK:
            found = any(is_last_of_block(parent, attribute) for parent, attribute in site.parents)
        elif isinstance(pattern, str):
            found = any(_fullmatch(p, n) for n in site.names)
        else:
            found = any(n == p or n.endswith(f".{p}") for n in site.names)
        if found:
            used.add(label if label.startswith("rules") else f"{label}[{p!r}]")
        hit |= found
    return hit


def _fullmatch(pattern: str, name: str) -> bool:
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

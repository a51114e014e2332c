"""What is to be trained: normalizers, sweeps and seeds, and the runs that they make together."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from lightning_norm.errors import did_you_mean, yaml_mistake
from lightning_norm.normalizers import normalizers, resolve
from lightning_norm.surgery.yaml_text import load_yaml

BASELINE = "bn"
"""The label of the network as it is: nothing is swapped."""

LONGEST = 200
"""Bytes of a label and its swept values in the name of a file, which may have 255 with what is added."""

SET = "set"
"""Entry of a contender that holds entries of the whole configuration, for a baseline that needs a callback, say."""


@dataclass(frozen=True)
class Contender:
    """One normalizer of a comparison.

    Args:
        label: its name in tables and pictures.
        swap: entries of the section ``norm:``; empty for the network as it is.
        entries: of the whole configuration, by their dotted names, that hold for this one alone.
    """

    label: str
    swap: Mapping[str, Any]
    entries: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """Return the entries as they are typed on the command line."""
        # JSON is YAML, in which jsonargparse reads lists and mappings.
        written = ((k, v if isinstance(v, str) else json.dumps(v)) for k, v in self.entries.items())
        return [f"--{key}={value}" for key, value in written]


@dataclass(frozen=True)
class Run:
    """One training: a normalizer, one value for each swept entry of the configuration, a seed.

    Args:
        contender: the normalizer.
        sweep: (entry, value) of each entry that is swept.
        seed: of the weights, the order of the data and all else that is random.
    """

    contender: Contender
    sweep: tuple[tuple[str, str], ...]
    seed: int

    def arguments(self, job: Sequence[str]) -> list[str]:
        """Return the arguments of ``fit`` that train it, from those of the job."""
        swept = [part for key, value in self.sweep for part in (f"--{key}", value)]
        return [*job, *swept, *self.contender.arguments(), "--seed_everything", str(self.seed)]

    @property
    def name(self) -> str:
        """Return the name of the run's file: readable, and different for different runs."""
        parts = [self.contender.label, *(f"{key.rpartition('.')[2]}={value}" for key, value in self.sweep)]
        text = "-".join([re.sub(r"[^\w.=+]+", "_", part) for part in parts])
        text = text.encode()[:LONGEST].decode(errors="ignore")
        # Two entries may end in the same word, and special characters were replaced above.
        exact = json.dumps([self.contender.label, self.sweep, self.seed])
        return f"{text}-seed{self.seed}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def read_contenders(text: str) -> list[Contender]:
    """Return the normalizers of ``--norms``.

    Args:
        text: a YAML list without its brackets. An entry is a key, ``{class_path: ..., init_args: {...}}``, entries of
            the section ``norm:`` and ``set``, or ``label: entry``.

    Raises:
        ValueError: no list, an unknown normalizer, or two with one label.

    >>> [c.label for c in read_contenders("bn, sn, half: {norm: sn, include: [bn1]}")]
    ['bn', 'sn', 'half']
    """
    try:
        # With brackets the commas of YAML separate, and those inside of braces do not.
        entries = load_yaml(f"[{text}]")
    except yaml.YAMLError as error:
        # Nobody typed the bracket, and it moves the columns.
        problem = yaml_mistake(error).partition(": ")[2].replace("']'", "the end")
        raise ValueError(
            f"--norms {text!r} cannot be read: {problem}. Type keys separated by commas, and arguments like "
            "--norms 'bn,sn,{class_path: ubn, init_args: {threshold: 0.9}}'."
        ) from error
    if not entries:
        raise ValueError("compare needs at least one normalizer: --norms bn,sn.")
    contenders = [_contender(entry) for entry in entries]
    labels = [c.label for c in contenders]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(
                f"two normalizers are called {label!r}: give one of them a label of its own, "
                f"--norms '{label}, other: {{norm: {label}, norm_args: {{...}}}}'."
            )
    return contenders


def _contender(entry: Any) -> Contender:
    """Return the normalizer that one entry of ``--norms`` describes.

    Args:
        entry: as YAML reads it: a word, or a mapping.

    Raises:
        TypeError: an argument that the normalizer does not take.
        ValueError: it names no normalizer, an unknown one, or entries that the section ``norm:`` does not have.

    >>> _contender({"class_path": "ubn", "init_args": {"threshold": 0.9}}).label
    'ubn(threshold=0.9)'
    """
    from lightning_norm.callbacks import NormSwap

    known = ("class_path", SET, *inspect.signature(NormSwap).parameters)
    label = None
    # A single unknown name in front of an entry can only be a label.
    if isinstance(entry, Mapping) and len(entry) == 1 and next(iter(entry)) not in known:
        ((label, entry),) = entry.items()
    if isinstance(entry, str):
        if entry.endswith((".yaml", ".yml", ".json", ".txt")):
            raise ValueError(f'--norms takes normalizers and no file: type --norms "$(cat {entry})" for what it holds.')
        if len(words := entry.split()) > 1 and all(word in normalizers() for word in words):
            raise ValueError(f"--norms {entry!r}: normalizers are separated by commas. Type --norms {','.join(words)}.")
        # As the tables name it.
        if key := re.match(r"(\w+)\(", entry):
            raise ValueError(f"--norms: {entry!r} is no key. {_with_arguments(key[1])}")
        entry = {"norm": entry}
    if not isinstance(entry, Mapping) or not entry:
        raise ValueError(f"--norms: {entry!r} names no normalizer. Type a key, such as sn (`lightning-norm list`).")
    if "class_path" in entry:
        entry = {"norm": entry}
    unknown = sorted(map(str, set(entry) - set(known)))
    if unknown:
        guess = f" {_with_arguments(str(label))}" if label in normalizers() else did_you_mean(unknown[0], known)
        raise ValueError(
            f"--norms: {dict(entry)!r} has unknown entries: {', '.join(unknown)}.{guess} Known: those of the section "
            f"norm: and {SET}."
        )
    swap, entries = {k: v for k, v in entry.items() if k != SET}, entry.get(SET) or {}
    # Torch's own layers are the baseline, and not ours of the same name in their place.
    if swap == {"norm": BASELINE}:
        return Contender(str(label or BASELINE), {}, entries)
    if "norm" not in swap:
        return Contender(str(label or ("rules" if swap else BASELINE)), swap, entries)
    # Unknown names end here, before anything is trained.
    cls, arguments = resolve(swap["norm"])
    shown = ", ".join(f"{name}={value}" for name, value in {**arguments, **(swap.get("norm_args") or {})}.items())
    name = cls.key or cls.__name__
    return Contender(str(label or (f"{name}({shown})" if shown else name)), swap, entries)


def _with_arguments(key: str) -> str:
    """Return how a normalizer with arguments is typed.

    >>> _with_arguments("gn")
    "Type arguments like '{norm: gn, norm_args: {name: value}}'."
    """
    return f"Type arguments like '{{norm: {key}, norm_args: {{name: value}}}}'."


def read_sweeps(texts: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the entries of the configuration that are swept, each with its values.

    Args:
        texts: what was typed behind each ``--sweep``.

    Raises:
        ValueError: not of the form ENTRY=VALUE,VALUE, or an entry twice.

    >>> read_sweeps(["data.init_args.batch_size=2,8"])
    [('data.init_args.batch_size', ['2', '8'])]
    """
    sweeps: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        key = key.strip().lstrip("-")
        # The same value twice would be the same run twice.
        listed = list(dict.fromkeys(value.strip() for value in values.split(",") if value.strip()))
        if not equals or not key or not listed:
            raise ValueError(f"--sweep {text!r}: expected ENTRY=VALUE,VALUE such as data.init_args.batch_size=2,8,32.")
        if key in sweeps:
            raise ValueError(f"--sweep {key} is there twice: write its values in one list.")
        sweeps[key] = listed
    return list(sweeps.items())


def all_runs(
    contenders: Sequence[Contender], sweeps: Sequence[tuple[str, Sequence[str]]], seeds: Sequence[int]
) -> list[Run]:
    """Return every run, seeds outermost: a comparison that is stopped early has met every normalizer alike.

    Args:
        contenders: the normalizers.
        sweeps: entries of the configuration, each with its values; every combination is a run.
        seeds: of the runs.

    >>> runs = all_runs(read_contenders("bn,sn"), [("lr", ["1", "2"])], range(2))
    >>> len(runs), len({r.name for r in runs})
    (8, 8)
    """
    points = list(itertools.product(*([(key, value) for value in values] for key, values in sweeps)))
    return [Run(contender, point, seed) for seed in seeds for point in points for contender in contenders]

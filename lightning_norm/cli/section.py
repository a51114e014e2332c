"""The ``norm:`` section of a configuration: NormSwap's arguments, without a list of callbacks."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from lightning_norm.callbacks import NormSwap
from lightning_norm.callbacks.swap.norm_swap import NormSwapOptions
from lightning_norm.callbacks.swap.saved_plan import read_plan
from lightning_norm.errors import yaml_mistake
from lightning_norm.normalizers import normalizers, resolve
from lightning_norm.surgery.swap import key_or_path
from lightning_norm.surgery.yaml_text import check_entries

SECTION = "norm"
"""Its name; the swap comes first among the callbacks, where it belongs."""


def add_section(parser: LightningArgumentParser) -> None:
    """Let a parser know the section and its options, ``--norm.norm sn`` for one."""
    # Not instantiated by the parser: whether there is a swap at all is seen only when all is read.
    parser.add_class_arguments(NormSwap, SECTION, instantiate=False, fail_untyped=False)


def non_defaults(section: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a section says beyond the defaults.

    >>> non_defaults({"norm": "sn", "compile": False, "exclude": ["bn1"]})
    {'norm': 'sn', 'exclude': ['bn1']}
    """
    # A name that the callback does not know counts as said, and NormSwap tells.
    defaults = {field.name: field.default for field in fields(NormSwapOptions)}
    return {name: value for name, value in (section or {}).items() if value != defaults.get(name, value)}


def norm_swap_of(section: Mapping[str, Any] | None) -> NormSwap | None:
    """Return the callback of a section; ``None`` if it says nothing.

    Raises:
        ValueError, TypeError: what :class:`NormSwap` raises.
    """
    # The parser fills in the defaults: a section that was not written holds them all, and asks for no swap.
    arguments = non_defaults(section)
    return NormSwap(**arguments) if arguments else None


def expand_norm(args: list[str]) -> list[str]:
    """Write ``--norm sn`` as ``--norm.norm sn``.

    >>> expand_norm(["fit", "--norm", "sn", "--norm=bcn", "--norm", "section.yaml"])
    ['fit', '--norm.norm', 'sn', '--norm.norm=bcn', '--norm', 'section.yaml']
    """
    option = f"--{SECTION}"
    # Only a word or a dotted path is a norm: anything else is the path of a file, or the section itself as YAML.
    full = [
        arg.replace("=", ".norm=", 1) if arg.startswith(option + "=") and names_a_norm(arg[7:]) else arg for arg in args
    ]
    # The two-word spelling; what follows may be a key, or the path of a file.
    for i, (arg, value) in enumerate(pairwise(args)):
        if arg == option and names_a_norm(value):
            full[i] = f"{option}.norm"
    return full


def load_configuration(text: str, path: str | None = None) -> Any:
    """Load YAML as jsonargparse does, and write out what it says by a normalizer's key.

    Args:
        text: a whole configuration, or one value of the command line.
        path: jsonargparse gives it, possibly empty, with a whole configuration and with nothing else. Only there does
            the word behind ``norm:`` stand for the section: in the section itself it stands for the argument.

    >>> load_configuration("norm: sn", path="run.yaml"), load_configuration("norm: sn")
    ({'norm': {'norm': 'sn'}}, {'norm': 'sn'})
    """
    try:
        config = get_loader("yaml")(text)
        check_entries(text)
        _count(config, {}, set())
        config = _with_dotted_paths(config)
        if path is not None and not isinstance(config, dict):
            got = "nothing" if config is None else reprlib.repr(config)
            raise yaml.YAMLError(f"a configuration holds sections such as norm: sn, got {got}")
    except yaml.YAMLError as error:
        # A configuration may be one of several files, or name others.
        where = "" if path is None else f"cannot read {path or 'the configuration'}: "
        raise yaml.YAMLError(where + yaml_mistake(error)) from error
    # Anything else is the path of a file that holds the section.
    if path is not None and names_a_norm(config.get(SECTION)):
        config[SECTION] = {"norm": config[SECTION]}
    return config


MOST_VALUES = 100_000


def _count(config: Any, known: dict[int, int], open_: set[int]) -> int:
    """Return how many values a configuration has once its YAML aliases are written out.

    A few lines of aliases of aliases can stand for more values than a machine has memory.

    Args:
        config: as YAML was read, where an alias is the very object that it stands for.
        known: id of a part -> its number of values.
        open_: ids of the parts around this one.

    Raises:
        yaml.YAMLError: more than anybody would write, or an alias stands inside of what it stands for.
    """
    if not isinstance(config, (dict, list)):
        return 1
    if id(config) in open_:
        raise yaml.YAMLError("a YAML alias stands inside of what it stands for: write the value out.")
    if id(config) not in known:
        open_.add(id(config))
        parts = config.values() if isinstance(config, dict) else config
        known[id(config)] = 1 + sum(_count(part, known, open_) for part in parts)
        open_.remove(id(config))
        if known[id(config)] > MOST_VALUES:
            raise yaml.YAMLError(
                f"its YAML aliases stand for more than {MOST_VALUES} values: write out what is needed."
            )
    return known[id(config)]


def check_sections(config: Any) -> None:
    """Refuse a section that holds a value where its options should be.

    Args:
        config: of one subcommand.

    Raises:
        TypeError: there is one.

    >>> check_sections({"norm": {"norm": "sn"}, "trainer": 5})
    Traceback (most recent call last):
    TypeError: trainer: is a section of options, such as {max_epochs: 5}, got 5.
    """
    for name, example in (("trainer", "{max_epochs: 5}"), (SECTION, "{norm: sn}")):
        section = config.get(name)
        if section is not None and not hasattr(section, "items"):
            raise TypeError(f"{name}: is a section of options, such as {example}, got {section!r}.")


def names_a_norm(value: Any) -> bool:
    """Tell whether a value is a key or a dotted path, and no path of a file.

    >>> [names_a_norm(value) for value in ("sn", "my_package.Norm", "section.yaml", "{norm: sn}", 3)]
    [True, True, False, False, False]
    """
    if not isinstance(value, str) or not all(part.isidentifier() for part in value.split(".")):
        return False
    return not value.endswith((".yaml", ".yml", ".json")) and not ("." in value and Path(value).is_file())


def _with_dotted_paths(config: Any) -> Any:
    """Return a configuration in which every ``norm: {class_path: sn, ...}`` has a dotted path.

    jsonargparse imports every ``class_path`` by itself, whatever the type of the argument, and knows no keys.
    """
    if isinstance(config, list):
        return [_with_dotted_paths(entry) for entry in config]
    if not isinstance(config, dict):
        return config
    result = {name: _with_dotted_paths(value) for name, value in config.items()}
    path = result.get("class_path")
    if isinstance(path, str) and path.startswith("."):
        raise yaml.YAMLError(f"{path!r} is a relative path: type the whole one, such as 'my_package{path}'.")
    # At any depth, for a NormSwap may stand among the callbacks.
    spec = result.get("norm")
    if isinstance(spec, dict) and spec.get("class_path") in known_names():
        cls = resolve(spec["class_path"])[0]
        result["norm"] = {**spec, "class_path": f"{cls.__module__}.{cls.__qualname__}"}
    return result


def known_names() -> set[str]:
    """Return the keys and the class names of the normalizers of this package."""
    return {name for key, cls in normalizers().items() for name in (key, cls.__name__)}


PARSER_MODE = "lightning_norm"
"""How a parser says that it reads configurations with :func:`load_configuration`."""

# This adds a mode to jsonargparse and changes none: other parsers of the process read YAML as before.
set_loader(PARSER_MODE, load_configuration, exceptions=(yaml.YAMLError,))


def write_out_plan(section: Any) -> None:
    """Put what a plan file says in the section itself, so that the saved configuration does without the file.

    Args:
        section: the section ``norm:`` as it was parsed; it is changed.

    Raises:
        ValueError: the file cannot be read, or is no plan.
    """
    # A plan beside other arguments that choose layers is a mistake, and NormSwap tells.
    arguments = non_defaults(section)
    if "plan" not in arguments or any(name in arguments for name in NormSwapOptions.chooses_layers):
        return
    # The run is to be repeated from its saved configuration alone, also after the plan was edited or lost.
    rules, section.source, activations = read_plan(arguments["plan"])
    section.fuse_activation = activations or section.fuse_activation
    section.rules = {name: _plain(norm) for name, norm in rules.items()}
    section.plan = None


def _plain(norm: Any) -> Any:
    """Return a norm as YAML holds it: a plan that was read from a checkpoint names its classes by themselves."""
    if not isinstance(norm, Mapping) or not isinstance(norm["class_path"], type):
        return norm
    return {**norm, "class_path": key_or_path(norm["class_path"])}

"""Plans: which layer becomes what, read from a file that ``lightning-norm plan --save`` or a training run wrote."""

from __future__ import annotations

import re
import reprlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_norm.errors import PlanError, counted, yaml_mistake
from lightning_norm.layers.arguments import checked_arguments
from lightning_norm.normalizers import resolve
from lightning_norm.surgery.checkpoint_files import read_checkpoint
from lightning_norm.surgery.manifest import activations_of, manifest_in, rules_of
from lightning_norm.surgery.saved_rows import checked_rows
from lightning_norm.surgery.yaml_text import load_yaml


def read_plan(path: str) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Return the rules of a plan file or a checkpoint, the classes that it was made for, and layer -> activation.

    A plan is YAML with a row for each layer:

    .. code-block:: yaml

        layers:
        - {name: backbone.bn1, source: BatchNorm2d, num_features: 64, norm: {class_path: sn, init_args: {sparse: true}}}
        - {name: backbone.bn2, norm: null}

    A row needs ``name`` and ``norm`` alone; the others say what was there, and which arguments fit.

    Args:
        path: of such a file, or of a checkpoint of a swapped network, which holds the same in its manifest.

    Raises:
        PlanError: the file, and the row and the entry that are wrong.
        CheckpointError: the same of a checkpoint.
    """
    import yaml

    # A checkpoint is a zip archive and a plan is YAML, whatever the files are called. Weights are not needed: meta.
    if zipfile.is_zipfile(path):
        manifest = manifest_in(read_checkpoint(path, "meta"), repr(path))
        if manifest is None:
            raise PlanError(f"the checkpoint {path!r} is of a network that was not swapped. Type norm='sn' (say).")
        if not manifest["layers"]:
            raise PlanError(
                f"the checkpoint {path!r} swaps no layer: its manifest has no rows under layers. Type norm='sn' (say)."
            )
        return rules_of(manifest)
    try:
        plan = load_yaml(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise PlanError(_cannot_read(path, yaml_mistake(error))) from error
    except FileNotFoundError as error:
        raise PlanError(_cannot_read(path, "the file does not exist")) from error
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(_cannot_read(path, f"{type(error).__name__} {error}")) from error
    if not isinstance(plan, Mapping) or "layers" not in plan:
        raise PlanError(_cannot_read(path, f"it holds {reprlib.repr(plan)}, and a plan has layers"))
    rows = checked_rows(plan["layers"], f"cannot read the plan {path!r}", PlanError, may_stay=True)
    for row in rows:
        if row["norm"] is not None:
            _try_to_build(row, path)
    # A row without a norm becomes a rule with None, which leaves the layer alone; layers of kinds of which none is
    # swapped are no candidates, and stay without a rule.
    sources = list(dict.fromkeys(row.get("source", "all") for row in rows if row["norm"] is not None))
    known = {*sources, None}
    rules = {
        re.escape(row["name"]): row["norm"] for row in rows if row["norm"] is not None or row.get("source") in known
    }
    if all(norm is None for norm in rules.values()):
        raise PlanError(
            f"the plan {path!r} swaps no layer: it has {counted(len(rules), 'row')} under layers, none with a norm. "
            "Type norm: {class_path: sn} in a row, or leave out NormSwap."
        )
    return rules, sources, activations_of(r for r in rows if r["norm"])


def _cannot_read(path: str, why: str) -> str:
    """Return the message for a file that is no plan."""
    return (
        f"cannot read the plan {path!r}: {why}. Expected the file that `lightning-norm plan --save` or a training run "
        "writes."
    )


def _try_to_build(row: Mapping[str, Any], path: str) -> None:
    """Build the layer of a row for the sake of its arguments' checks, without a trace in the random numbers."""
    try:
        cls, arguments = resolve(row["norm"])
        arguments = checked_arguments(cls, {k: v for k, v in arguments.items() if k != "device"})
        # With its channels, for some arguments can be wrong for these alone: groups must divide them.
        if row.get("num_features"):
            with torch.random.fork_rng(devices=[]):
                cls(row["num_features"], **arguments)
    except (TypeError, ValueError) as error:
        raise PlanError(f"cannot read the plan {path!r}, row {row['name']!r}: {error}") from error

"""Plans: which layer becomes what, read from a file that ``lightning-norm plan --save`` or a training run wrote."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

from lightning_norm.surgery.checkpoint_files import read_checkpoint
from lightning_norm.surgery.manifest import manifest_in, rules_of


def read_plan(path: str) -> tuple[dict[str, Any], list[str]]:
    """Return the rules that a plan file or a checkpoint holds, and the names of the classes that it was made for."""
    import yaml

    # A checkpoint is a zip archive and a plan is YAML, whatever the files are called. Weights are not needed: meta.
    if zipfile.is_zipfile(path):
        manifest = manifest_in(read_checkpoint(path, "meta"))
        if manifest is None:
            raise ValueError(f"the checkpoint {path!r} is of a network that was not swapped. Type norm='sn' (say).")
        return rules_of(manifest)
    try:
        rows = yaml.safe_load(Path(path).read_text())["layers"]
        # A row without a norm becomes a rule with None, which leaves the layer alone.
        rules = {re.escape(row["name"]): row["norm"] for row in rows}
        sources = list(dict.fromkeys(row["source"] for row in rows))
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot read the plan {path!r}: {type(error).__name__} {error}. Expected the file that `lightning-norm "
            "plan --save` writes."
        ) from error
    if all(norm is None for norm in rules.values()):
        raise ValueError(
            f"the plan {path!r} swaps no layer: it has {len(rules)} rows under layers, none with a norm. Type "
            "norm: {class_path: sn} in a row, or leave out NormSwap."
        )
    return rules, sources

"""``lightning-norm list``: the registry as a table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from lightning_norm.normalizers.base import Normalizer
from lightning_norm.normalizers.registry import normalizers
from lightning_norm.surgery.text import aligned

EPILOG = """columns:
  added   parameters beyond weight and bias, per layer; C is its channels
  batch   training needs statistics of the batch: small batches hurt, ranks are pooled
  sample  evaluation needs the sample's own statistics: cannot be folded into a convolution
  keeps   a swapped BatchNorm evaluates as before, until training changes it

examples:
  lightning-norm list
  lightning-norm list --json
"""


def run(argv: Sequence[str]) -> None:
    """Print every registered normalizer.

    Args:
        argv: the arguments behind ``list``.

    Raises:
        SystemExit: wrong arguments.
    """
    parser = argparse.ArgumentParser(
        "lightning-norm list",
        description="The normalizers, by the key that `norm:` takes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    rows = [describe(cls) for cls in normalizers().values()]
    if parser.parse_args(argv).json:
        print(json.dumps(rows, indent=2))
        return
    header = ("key", "class", "paper", "added", "batch", "sample", "keeps")
    cells = [[row["key"], row["class"], row["paper"] or "-", added(row["added"])] for row in rows]
    flags = [[_yes(row["uses_batch"]), _yes(row["per_sample"]), _yes(row["keeps_eval"])] for row in rows]
    print(aligned([header, *(a + b for a, b in zip(cells, flags, strict=True))]))
    print("\nadded: parameters per layer. batch: training needs batch statistics. sample: evaluation needs the")
    print("sample's own statistics, so it cannot be folded. keeps: a swap keeps the evaluation. More: --help")


def describe(cls: type[Normalizer]) -> dict[str, Any]:
    """Return a normalizer's declarations in plain types."""
    return {
        "key": cls.key,
        "class": cls.__name__,
        "class_path": f"{cls.__module__}.{cls.__qualname__}",
        "paper": str(cls.paper) if cls.paper else None,
        "title": cls.paper.title if cls.paper else None,
        "added": dict(cls.learns),
        "uses_batch": cls.uses_batch,
        "per_sample": cls.per_sample,
        "keeps_eval": cls.preserves_eval,
    }


def added(learns: dict[str, str]) -> str:
    """Return the sizes of the new parameters; where there are many, their sum for 64 channels.

    >>> added({"mean_weight": "3", "var_weight": "3"})
    '3+3'
    >>> added({name: "C*max(1, C//2)" for name in "abcdefg"})
    '14336 for C=64'
    """
    if len(learns) > 6:
        return f"{sum(eval(size, {'C': 64}) for size in learns.values())} for C=64"  # a class's own expressions
    return "+".join(learns.values()) or "0"


def _yes(value: bool) -> str:
    return "yes" if value else "no"

"""``lightning-norm list``: the registry as a table.

columns:
  added   parameters of a layer of 64 channels beyond BatchNorm's 128, with the default arguments
  needs   what must be there beside NormSwap
  batch   training needs statistics of the batch: small batches hurt, ranks are pooled
  sample  evaluation needs the sample's own statistics: cannot be folded into a convolution
  keeps   a swapped BatchNorm evaluates as before, until training changes it

Examples:
  lightning-norm list
  lightning-norm list --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_norm.cli.parsing import CommandParser
from lightning_norm.surgery.text_tables import aligned

if TYPE_CHECKING:
    from lightning_norm.layers.base import Normalizer


def run(argv: Sequence[str]) -> None:
    """Print every normalizer of this package.

    Args:
        argv: the arguments behind ``list``.

    Raises:
        SystemExit: wrong arguments.
    """
    options = parser().parse_args(argv)
    # Written beforehand by docs/generate.py: to ask the classes would first import torch, which takes seconds.
    rows = json.loads(Path(__file__).with_name("normalizers.json").read_text(encoding="utf-8"))
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    # The shortest headings that tell the columns apart; the lines below the table explain them.
    header = ("key", "class", "paper", "added", "batch", "sample", "keeps", "needs")
    cells = [[row["key"], row["class"], row["paper"] or "-", _signed(row["added_to_64"])] for row in rows]
    names = ("train_uses_batch_stats", "eval_uses_input_stats", "preserves_eval")
    flags = [[*(_yes(row[name]) for name in names), row["needs"] or "-"] for row in rows]
    print(aligned([header, *(a + b for a, b in zip(cells, flags, strict=True))]))
    print(
        "\nadded: parameters to a BatchNorm of 64 channels. batch: training needs batch statistics. sample: evaluation"
    )
    print("needs the sample's own statistics, so it cannot be folded. keeps: a swap keeps the evaluation. More: --help")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    made = CommandParser("list", "The normalizers, by the key that `norm:` takes.", __doc__)
    made.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return made


def describe(cls: type[Normalizer]) -> dict[str, Any]:
    """Return a normalizer's declarations in plain types.

    Args:
        cls: a normalizer, registered or not.

    >>> from lightning_norm import BatchNorm
    >>> row = describe(BatchNorm)
    >>> row["key"], row["added_to_64"], row["train_uses_batch_stats"], row["eval_uses_input_stats"]
    ('bn', 0, True, False)
    """
    return {
        "key": cls.key,
        "class": cls.__name__,
        "class_path": f"{cls.__module__}.{cls.__qualname__}",
        "paper": str(cls.paper) if cls.paper else None,
        "title": cls.paper.title if cls.paper else None,
        "added": dict(cls.extra_parameters),
        "added_to_64": added_to(64, cls),
        "needs": cls.swap_advice.required_callback,
        "train_uses_batch_stats": cls.train_uses_batch_stats,
        "eval_uses_input_stats": cls.eval_uses_input_stats,
        "preserves_eval": preserves_eval(cls),
    }


def added_to(channels: int, cls: type[Normalizer]) -> int | None:
    """Return how many parameters a layer has beyond a BatchNorm's, ``None`` if it cannot be built by its channels.

    >>> from lightning_norm import SwitchableNorm
    >>> added_to(64, SwitchableNorm)
    6
    """
    # A normalizer of the user may need more arguments than the number of channels.
    try:
        layer = cls(channels)
    except TypeError:
        return None
    return sum(p.numel() for p in layer.parameters()) - 2 * channels


def preserves_eval(cls: type[Normalizer]) -> bool:
    """Tell whether a swapped BatchNorm evaluates as before, with the default arguments.

    >>> from lightning_norm import BatchNorm
    >>> preserves_eval(BatchNorm)
    True
    """
    try:
        return cls(64).preserves_eval
    except TypeError:  # it cannot be built by its channels alone
        return False


def _signed(number: int | None) -> str:
    return "?" if number is None else f"+{number}" if number else "0"


def _yes(value: bool) -> str:
    return "yes" if value else "no"

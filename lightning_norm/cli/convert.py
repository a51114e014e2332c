"""``lightning-norm convert``: a file of a paper's authors becomes a checkpoint of this package.

The new file says itself which layers were swapped to what: NormSwap(plan=OUT, warm_start=OUT) trains on
from it, lightning_norm.load_from_checkpoint and lightning-norm test --ckpt_path OUT load it.

Examples:
  lightning-norm convert ResNet50v1+SN.pth --norm sn --out sn50.ckpt --prefix net.
  lightning-norm convert cn.pt --norm cn --norm_args '{priors: [0.2, 0.3, 0.5]}' --out cn.ckpt
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Sequence
from typing import Any

import torch
import yaml

from lightning_norm.callbacks.lightning_compat import pl
from lightning_norm.cli.parsing import CommandParser, path_of
from lightning_norm.errors import CheckpointError, counted, yaml_mistake
from lightning_norm.layers.state import published_keys
from lightning_norm.normalizers import normalizers
from lightning_norm.surgery.checkpoint_files import read_checkpoint
from lightning_norm.surgery.load_published import WEIGHTS, convert_published
from lightning_norm.surgery.whole_files import write_whole
from lightning_norm.surgery.yaml_text import load_yaml


def run(argv: Sequence[str]) -> None:
    """Convert a file.

    Args:
        argv: the arguments behind ``convert``.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or is not of the authors' code.
        ValueError: ``--norm_args`` is no mapping, or ``--rename`` no PATTERN=REPLACEMENT.
        SystemExit: an argument is wrong.
    """
    options = parser().parse_args(argv)
    try:
        arguments, mistake = load_yaml(options.norm_args), ""
    except yaml.YAMLError as error:
        arguments, mistake = None, f" ({yaml_mistake(error)})"
    if not isinstance(arguments, dict):
        got = f"{options.norm_args!r}{mistake}"
        raise ValueError(f"--norm_args must be a mapping such as '{{eps: 1.0e-3}}', got {got}.")
    rename = dict(_pair(text) for text in options.rename)
    norm = options.norm or _only_one(options.file)
    checkpoint, report = convert_published(
        options.file, {"class_path": norm, "init_args": arguments}, rename=rename, prefix=options.prefix
    )
    # Lightning migrates checkpoints by the version that wrote them.
    header: dict[str, Any] = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": vars(pl)["__version__"]}
    content = io.BytesIO()
    torch.save({**header, **checkpoint}, content)
    write_whole(options.out, content.getvalue())
    kinds = {str(row.norm["init_args"]): row.norm["init_args"] for row in report.layers}
    print(f"{counted(len(report), 'layer')} of {norm}, with {' and '.join(kinds)}")
    print(f"written to {options.out}; swap and load it with NormSwap(plan={options.out!r}, warm_start={options.out!r})")


def _only_one(path: str) -> str:
    """Return the one normalizer whose authors' file this is.

    Args:
        path: of the file.

    Raises:
        CheckpointError: it may be of several, or of none.
    """
    keys = published_keys(normalizers(), read_checkpoint(path, entries=WEIGHTS)["state_dict"])
    if len(keys) != 1:
        kinds = f"may be of {' or '.join(keys)}: type --norm {keys[0]}, say" if keys else "is of no authors' code known"
        raise CheckpointError(f"{path!r} {kinds}.")
    return keys[0]


def _pair(text: str) -> tuple[str, str]:
    """Read what stands behind ``--rename``.

    Raises:
        ValueError: it has no equals sign, or no regular expression before it.

    >>> _pair("^backbone[.]=net.")
    ('^backbone[.]', 'net.')
    """
    pattern, equals, replacement = text.partition("=")
    if not equals:
        raise ValueError(f"--rename must read PATTERN=REPLACEMENT, got {text!r}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--rename: {pattern!r} is no regular expression: {error}.") from None
    return pattern, replacement


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    made = CommandParser("convert", "Rewrite a checkpoint of a paper's authors as one of lightning_norm.", __doc__)
    made.add_argument("file", metavar="FILE", help="what the authors' code has written")
    made.add_argument("--out", type=path_of("--out new.ckpt"), required=True, metavar="OUT", help="the new file")
    made.add_argument("--norm", metavar="KEY", help="sn, bnet, rbn, bcn, asr, afn or cn; by default what FILE holds")
    made.add_argument("--norm_args", default="{}", metavar="YAML", help="arguments that are in no file, or others")
    made.add_argument("--prefix", default="", help="put before all names: net. for a LightningModule with a net")
    made.add_argument(
        "--rename", action="append", default=[], metavar="PATTERN=REPLACEMENT", help="regular expression over names"
    )
    return made

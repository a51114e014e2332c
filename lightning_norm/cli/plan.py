"""``lightning-norm plan``: what NormSwap would do, without training.

usage: lightning-norm plan [--config FILE] [--model CLASS] [--norm KEY] [other options of fit] [--save PLAN]

Print what a swap would do to each normalization layer, those that stay and why included. Nothing is trained.

  --save PLAN   also write the plan as YAML: a row per layer, of which name and norm count (norm: null leaves it alone).
                Edit it, and apply it with --norm.plan PLAN, or in a configuration with norm: {plan: PLAN}

Examples:
  lightning-norm plan --model ImageClassifier --norm sn
  lightning-norm plan --config job.yaml --save plan.yaml
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_norm.callbacks import NormSwap
from lightning_norm.cli.norm_cli import NormCLI
from lightning_norm.cli.screen import without_noise
from lightning_norm.demo.job import ImageClassifier
from lightning_norm.errors import LeftAloneWarning
from lightning_norm.surgery.report import SwapReport
from lightning_norm.surgery.swap import swap
from lightning_norm.surgery.whole_files import write_whole

HELP = str(__doc__).partition("\n\n")[2]
"""What ``--help`` prints: this file's docstring from its second paragraph on."""


def run(argv: Sequence[str]) -> None:
    """Print the plan of every NormSwap in the configuration.

    Args:
        argv: the arguments behind ``plan``.

    Raises:
        ValueError: ``--save`` without a path, or no NormSwap in the configuration.
        SystemExit: an argument or a configuration file is wrong.
    """
    # argparse is not asked: its parser would show all options of fit.
    if not argv or "--help" in argv or "-h" in argv:
        print(HELP, end="")
        return
    arguments, save = _take_save(list(argv))
    with without_noise():
        cli = NormCLI(arguments, run=False, save_config_callback=None, parser_kwargs={"also": ["--save"]})
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]  # set by the callback connector
    swaps = [c for c in callbacks if isinstance(c, NormSwap)]
    if not swaps:
        raise ValueError("no norm, so that nothing would be swapped. Type --norm sn (say), or norm: sn in FILE.")
    # One file is applied by one NormSwap, and the second plan would overwrite the first.
    if save and len(swaps) > 1:
        raise ValueError(f"--save writes one plan, and the configuration has {len(swaps)} NormSwaps. Leave out --save.")
    # Several NormSwaps are shown one by one, each on the model as it was built.
    for callback in swaps:
        report = _dry_run(cli.model, callback)
        print(report)
        if save:
            write_whole(save, report.to_yaml())
            print(f"written to {save}; apply it with --norm.plan {save}")


def _dry_run(model: pl.LightningModule, callback: NormSwap) -> SwapReport:
    """Return what the swap would do, with the layers of ``configure_model``, and say what is not in the table.

    Args:
        model: as the configuration built it.
        callback: the NormSwap that is asked.
    """
    late = is_overridden("configure_model", model, pl.LightningModule)
    if late:
        # The Trainer calls it after setup; without one it runs here, on a model that nobody trains.
        model.configure_model()
        # To the other stream, so that the table can be piped into a file.
        print("configure_model() was called: the layers it builds are in the table.", file=sys.stderr)
    # setup may read data or need a Trainer, so it is not called; that of the built-in job builds no layer.
    if is_overridden("setup", model, pl.LightningModule) and not isinstance(model, ImageClassifier):
        print(
            f"{type(model).__name__}.setup() was not called: layers that it builds are swapped too, but not shown.",
            file=sys.stderr,
        )
    arguments = callback.swap_arguments() | {"on_empty": callback.options.on_empty}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftAloneWarning)  # the table has a row for each of them
        return swap(model, **arguments, dry_run=True, example=model.example_input_array)


def _take_save(arguments: list[str]) -> tuple[list[str], str | None]:
    """Return the arguments without ``--save``, and its path.

    >>> _take_save(["--config", "job.yaml", "--save=plan.yaml"])
    (['--config', 'job.yaml'], 'plan.yaml')
    """
    # Everything else is for NormCLI, whose parser does not know the option.
    others: list[str] = []
    save: str | None = None
    rest = iter(arguments)
    for argument in rest:
        # Both spellings that argparse would understand.
        if argument == "--save":
            save = next(rest, "")
        elif argument.startswith("--save="):
            save = argument.partition("=")[2]
        else:
            others.append(argument)
    if save is not None and (not save or save.startswith("-")):
        raise ValueError("--save needs a path: --save plan.yaml.")
    return others, save

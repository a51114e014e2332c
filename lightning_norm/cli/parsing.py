"""The parser of the commands that LightningCLI does not run: a mistake is one line, with the nearest name."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from typing_extensions import override


class CommandParser(argparse.ArgumentParser):
    """argparse's parser whose errors are one line, and which takes no abbreviations.

    Args:
        command: its name behind ``lightning-norm``.
        description: what stands above the options.
        documentation: docstring of the command's file, whose second paragraph and all behind it stand below them.
    """

    def __init__(self, command: str, description: str, documentation: str | None) -> None:
        super().__init__(
            prog=f"lightning-norm {command}",
            description=description,
            epilog=str(documentation).partition("\n\n")[2],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    @override
    def error(self, message: str) -> NoReturn:
        # Options that compare and export do not know are the job's, and told by its own parser.
        self.exit(2, f"lightning-norm: error: {with_nearest(message, self._option_string_actions)}\n")


def path_of(example: str) -> Callable[[str], str]:
    """Return the type of an option whose value is a path: nothing is no path, and would mean the current folder.

    Args:
        example: what to type, as in ``--out compare``.

    >>> path_of("--out compare")("results")
    'results'
    """

    def path(text: str) -> str:
        if not text.strip():
            raise argparse.ArgumentTypeError(f"expected a path, got {text!r}. Type {example} (say)")
        return text

    return path


def own_options(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of a parser, as they are typed.

    >>> own_options(CommandParser("list", "", None))
    ['-h', '--help']
    """
    return list(parser._option_string_actions)


def with_nearest(message: str, options: Iterable[str]) -> str:
    """Return what argparse says of an unknown option, with the nearest of those that exist.

    >>> with_nearest("unrecognized arguments: --seedz 3", ["--seeds", "--norms"])
    "unrecognized arguments: --seedz 3. Did you mean '--seeds'?"
    >>> with_nearest("unrecognized arguments: job.yaml", ["--config"])
    'unrecognized arguments: job.yaml. Type --config job.yaml.'
    """
    file = re.search(r"unrecognized arguments: ([^-\s]\S*\.ya?ml)\b", message)
    if file:
        return f"{message}. Type --config {file[1]}."
    typed = re.search(r"unrecognized arguments: (-{1,2}[\w.+-]+)", message)
    near = nearest(typed[1], options) if typed else None
    return f"{message}. Did you mean {near!r}?" if near else message


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the nearest of some names to one that is none of them, by whole names and by their first or last parts.

    Args:
        name: as it was typed.
        known: names that exist, with their dashes or without.

    >>> nearest("--max_epochs", ["--trainer.max_epochs", "--config"])
    '--trainer.max_epochs'
    """
    names = list(dict.fromkeys(known))
    head, dot, rest = name.partition(".")
    heads = {option.partition(".")[0] for option in names}
    if dot and head not in heads:
        # Arguments of a class that is chosen on the command line are no options of the parser: --mdel.arch.
        return next((f"{h}.{rest}" for h in difflib.get_close_matches(head, heads, n=1)), None)
    near: Sequence[str] = difflib.get_close_matches(name, names, n=1)
    if not near:
        # --max_epochs is meant for --trainer.max_epochs.
        ends = {option.rpartition(".")[2].lstrip("-"): option for option in reversed(names)}
        near = [ends[e] for e in difflib.get_close_matches(name.rpartition(".")[2].lstrip("-"), ends, n=1, cutoff=0.8)]
    return near[0] if near else None

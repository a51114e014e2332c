"""``lightning-norm completion``: a script by which a shell completes commands, options, norms and choices.

The script knows the options of this version: write it again after an update. Pressing TAB then starts no Python.

Examples:
  lightning-norm completion bash > ~/.local/share/bash-completion/completions/lightning-norm
  lightning-norm completion zsh > ~/.lightning-norm.zsh && echo 'source ~/.lightning-norm.zsh' >> ~/.zshrc
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from lightning_norm.cli import bench, convert, export
from lightning_norm.cli import list as list_command
from lightning_norm.cli.compare import command as compare
from lightning_norm.cli.main import COMMANDS, TRAIN
from lightning_norm.cli.norm_cli import NormCLI, built_in_data
from lightning_norm.cli.parsing import CommandParser, own_options
from lightning_norm.normalizers import normalizers

SCRIPT = """_lightning_norm() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words={commands}
    else
        case "${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
        esac
        if [ -z "$words" ]; then
            case "${{COMP_WORDS[1]}}" in
{options}
            esac
        fi
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _lightning_norm lightning-norm
"""
OWN = {"list": list_command, "bench": bench, "convert": convert, "export": export, "compare": compare}
"""The commands with a parser of their own; export and compare take the options of fit besides, and so does plan."""


def run(argv: Sequence[str]) -> None:
    """Print the script for a shell.

    Args:
        argv: the arguments behind ``completion``.

    Raises:
        SystemExit: wrong arguments.
    """
    shell = parser().parse_args(argv).shell
    if shell == "zsh":  # it reads scripts of bash
        print("autoload -U +X compinit bashcompinit && compinit && bashcompinit")
    print(script(), end="")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    made = CommandParser("completion", "Print a script by which a shell completes what you type.", __doc__)
    made.add_argument("shell", choices=("bash", "zsh"))
    return made


def script() -> str:
    """Return a script of bash: what may stand behind ``lightning-norm``, a command and an option."""
    parsers: dict[str, argparse.ArgumentParser] = {"completion": parser()}
    parsers |= {name: module.parser() for name, module in OWN.items()}
    options: dict[str, Sequence[str]] = {name: own_options(each) for name, each in parsers.items()}
    fit = _parsers_of_fit()
    options |= {name: _short(each) for name, each in fit.items()}
    options["plan"] = ["--save"]
    for name in ("plan", "export", "compare"):
        options[name] = [*options[name], *options["fit"]]
    values: dict[str, Sequence[str]] = {"--norm": [*normalizers()], "--norm.norm": [*normalizers()]}
    values |= {"--model": ["ImageClassifier"], "--data": [cls.__name__ for cls in built_in_data()]}
    for each in (*parsers.values(), *fit.values()):
        for action in each._actions:
            if action.choices and action.option_strings and not isinstance(action.choices, Mapping):
                values |= {option: [*map(str, action.choices)] for option in action.option_strings}
    return SCRIPT.format(
        commands=shlex.quote(" ".join(COMMANDS)), values=_cases(values, 8), options=_cases(options, 12)
    )


def _cases(words: Mapping[str, Sequence[str]], indent: int) -> str:
    """Return branches of a shell's case: in each, what may follow."""
    return "\n".join(f"{' ' * indent}{name}) words={shlex.quote(' '.join(each))} ;;" for name, each in words.items())


def _short(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of LightningCLI without those that only show the help of a class."""
    return [option for option in own_options(parser) if not option.endswith((".help", "+"))]


def _parsers_of_fit() -> dict[str, Any]:
    """Return the parsers of the commands that LightningCLI runs."""

    # LightningCLI has no way to make its parsers alone: an exception ends it before it reads any argument.
    class Made(Exception):  # noqa: N818  # no error
        pass

    class MadeOnly(NormCLI):
        @override
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise Made

    cli: Any = MadeOnly.__new__(MadeOnly)
    with contextlib.suppress(Made):
        cli.__init__(["fit"])
    return {name: cli._subcommand_parsers[name] for name, command in COMMANDS.items() if command.group == TRAIN}

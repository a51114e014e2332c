"""The console script ``lightning-norm``, also ``python -m lightning_norm``.

A new command is a file ``cli/NAME.py`` with a function ``run(argv)``, and its line in ``COMMANDS``.

What ends a command, and how the shell sees it:

* a mistake that this package tells of: its message and status 2, without a traceback (``LIGHTNING_NORM_TRACEBACK=1``
  shows it);
* a wrong option, told by the parser: status 2;
* any other exception, which may be a bug: the traceback and status 1;
* a reader of the output that has left, as in ``lightning-norm list | head -1``: nothing, and status 141.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import select
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TextIO

from lightning_norm.errors import did_you_mean


@dataclass(frozen=True)
class Command:
    """A command, as ``lightning-norm --help`` shows it.

    Args:
        name: what is typed; also the name of its file in this folder, unless LightningCLI runs it.
        group: the heading that it stands under; LightningCLI runs those under ``TRAIN``.
        example: arguments of a call that works.
        summary: what it is for, where the name does not say it.
    """

    name: str
    group: str
    example: str
    summary: str = ""


INTRODUCTION = """Replace the BatchNorm layers of a PyTorch Lightning model by another normalizer.
  list       the normalizers, their papers, and what each needs
  plan       what a swap would do to each layer of your model
  fit        train with a swap, and its sisters validate, test and predict
  compare    several normalizers on your own job: accuracy with intervals, time, memory
  bench      the time of each layer on this machine
  convert    a file of a paper's authors becomes a checkpoint
  export     the trained network as .pt2 or ONNX, normalizers folded
Try it:    lightning-norm fit --model ImageClassifier --norm sn
More:      lightning-norm --help        lightning-norm COMMAND --help        lightning-norm completion bash"""
TRAIN = "train"
JOB = "--model ImageClassifier"
"""The built-in job, which runs in any folder."""
COMMANDS = {
    command.name: command
    for command in (
        Command("fit", TRAIN, f"{JOB} --norm sn", "your own: --config job.yaml"),
        Command("validate", TRAIN, f"{JOB} --ckpt_path FILE.ckpt"),
        Command("test", TRAIN, f"{JOB} --ckpt_path FILE.ckpt"),
        Command("predict", TRAIN, f"{JOB} --ckpt_path FILE.ckpt"),
        Command("list", "look", "", "the normalizers"),
        Command("completion", "look", "bash > FILE", "of commands, options and norms, by TAB"),
        Command("plan", "look", f"{JOB} --norm sn", "what a swap would do"),
        Command("convert", "bring", "published.pth --norm sn --out sn.ckpt", "a file of a paper's authors"),
        Command("export", "leave", f"{JOB} --ckpt_path FILE.ckpt --shape 1x3x8x8 --out net.pt2"),
        Command("compare", "measure", "--norms bn,sn,bcn --seeds 3", "accuracy, with intervals"),
        Command("bench", "measure", "--device cpu", "time and memory"),
    )
}
SYNONYMS = {
    "train": "fit",
    "eval": "validate",
    "evaluate": "test",
    "infer": "predict",
    "swap": "plan",
    "fold": "export",
}
"""What others call a command, by our name."""
MISTAKES = (ValueError, TypeError, RuntimeError, ModuleNotFoundError, OSError)
TRACEBACK = "LIGHTNING_NORM_TRACEBACK"
"""Environment variable that asks for the traceback of an error of this package's own."""
CHECKS = (
    "lightning/pytorch/trainer/connectors/",
    "lightning/pytorch/trainer/configuration_validator",
    "lightning/pytorch/trainer/setup",
)
"""Where Lightning refuses arguments of its Trainer, and modules that lack a method."""
UNREAD = 141
"""The status of a command whose output nobody reads any more: 128 and the number of SIGPIPE, as a shell shows it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command, and end quietly where the reader of its output has left, as ``head`` does.

    Args:
        argv: the arguments behind the program's name; those of the process by default.

    Raises:
        SystemExit: with status 2 for an error of the command line, a configuration file or the package's own checks;
            with 141 where nobody reads the output any more.
    """
    try:
        try:
            _main(argv)
        finally:
            # What is still buffered would otherwise fail while Python shuts down, where nothing can catch it.
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
    except BrokenPipeError as error:
        # Any other pipe, such as that of a logger or of a worker, is an error like others.
        unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
        if not unread:
            raise
        for stream in unread:
            # Python flushes them once more at its end, and must find a place to write to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(UNREAD) from error


def _main(argv: Sequence[str] | None) -> None:
    """Run the command that the first argument names, or print the overview."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Without a command a few words are of more use than an error.
    if not arguments:
        print(INTRODUCTION)
        return
    name = arguments[0]
    if name in ("--help", "-h", "help"):
        print(overview())
        return
    if name == "--version":
        # Imported late: every other command does without.
        from importlib.metadata import version

        print(f"lightning-norm {version('lightning-norm')}")
        return
    if name not in COMMANDS:
        _exit(_unknown(name))
    here = os.getcwd()
    if here not in sys.path:  # as ``python -m`` does: a user's own module is importable by its name
        sys.path.insert(0, here)
    try:
        _run(COMMANDS[name], arguments)
    except BrokenPipeError:
        raise  # main() tells a reader that has left from any other pipe
    except Exception as error:
        if (absent := _missing_dependency(error)) and not os.environ.get(TRACEBACK):
            _exit(f"{absent} is not installed, and this command needs it. Type pip install lightning-norm.")
        if (full := _full_disk(error)) and not os.environ.get(TRACEBACK):
            _exit(f"{full}. Make room, and type the same again.")
        cause = _raised_by_this_package(error)
        if cause is None or os.environ.get(TRACEBACK):
            raise
        # A user's mistake needs the sentence and not the frames; the variable helps whoever doubts that.
        _exit(" ".join(str(cause).split("\n")))


def _is_unread(stream: TextIO) -> bool:
    """Tell whether a stream is a pipe whose reader has left; never on Windows, where that is no BrokenPipeError."""
    if sys.platform == "win32":
        return False
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def overview() -> str:
    """Return the text of ``lightning-norm --help``: an example of each command, by group.

    >>> "lightning-norm list" in overview()
    True
    """
    # Written by hand: argparse would list the commands without an example that works.
    lines = ["usage: lightning-norm COMMAND [options]        (COMMAND --help shows its options)"]
    for group, commands in groupby(COMMANDS.values(), key=lambda command: command.group):
        lines += ["", group]
        for command in commands:
            example = f"lightning-norm {command.name} {command.example}".rstrip()
            lines.append(f"  {command.name:10s}  {example:66s}  {command.summary}".rstrip())
    return "\n".join([*lines, "", f"  --version  --help        {TRACEBACK}=1 shows where an error was raised"])


def _run(command: Command, arguments: list[str]) -> None:
    """Run a command, whose file is imported only now."""
    if command.group == TRAIN:
        from lightning_norm.cli.norm_cli import NormCLI
        from lightning_norm.cli.screen import without_noise

        with without_noise():
            NormCLI(arguments)
        return
    # Each command is imported only when it is run: ``list`` shall not wait for what ``compare`` needs.
    importlib.import_module(f"lightning_norm.cli.{command.name}").run(arguments[1:])


def _unknown(name: str) -> str:
    """Return the message for a command that does not exist.

    >>> _unknown("fitt").split(" Known")[0]
    "no command 'fitt'. Did you mean 'fit'?"
    """
    guess = f" Did you mean {SYNONYMS[name]!r}?" if name in SYNONYMS else did_you_mean(name, COMMANDS)
    return f"no command {name!r}.{guess} Known: {', '.join(COMMANDS)}. lightning-norm --help shows an example of each."


def _raised_by_this_package(error: BaseException | None) -> BaseException | None:
    """Return the error in a chain that this package raised itself; any other may be a bug and keeps its traceback.

    Args:
        error: as it was caught, perhaps with others as its cause or context.
    """
    package = Path(__file__).resolve().parent.parent
    # Lightning wraps errors in its own; the one that this package raised is then further down the chain.
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        # The innermost frame decides: an error from torch below our code may be a bug of ours.
        file = Path(frames[-1].filename).resolve() if frames else Path()
        # Lightning's Trainer checks what it is given, in the same words as ours: what was expected and what came.
        raised_here = file.is_relative_to(package) or any(part in file.as_posix() for part in CHECKS)
        # Its own type of error says that it is the user's, wherever it is raised; its module is not imported here.
        if type(error).__name__ == "MisconfigurationException" or (raised_here and isinstance(error, MISTAKES)):
            return error
        error = error.__cause__ or error.__context__
    return None


def _missing_dependency(error: BaseException) -> str | None:
    """Return the dependency of this package for lack of which an import has failed, in whichever package."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    # Imported late: only a broken installation needs it.
    from importlib.metadata import requires

    lines = [line for line in requires("lightning-norm") or () if "extra ==" not in line]
    names = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in lines}
    name = error.name.partition(".")[0]
    return name if name in names else None


def _full_disk(error: BaseException | None) -> str | None:
    """Return what the system says of a full disk, if that is in the chain of an error, whoever has met it.

    Of Lightning's loggers such an error says that a number cannot be logged.
    """
    while error is not None:
        # A WriteError of this package says more than the system.
        if type(error).__name__ == "WriteError":
            return None
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _exit(message: str) -> None:
    """Print a message to stderr and end with status 2."""
    print(f"lightning-norm: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()

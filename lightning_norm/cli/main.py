"""The console script ``lightning-norm``, also ``python -m lightning_norm``."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

OVERVIEW = """usage: lightning-norm COMMAND [options]        (COMMAND --help shows its options)

train
  fit        lightning-norm fit --config examples/configs/digits_sn.yaml
  validate   lightning-norm validate --config examples/configs/digits_sn.yaml --ckpt_path last.ckpt
  test       lightning-norm test --config examples/configs/digits_sn.yaml --ckpt_path last.ckpt
  predict    lightning-norm predict --config examples/configs/digits_sn.yaml --ckpt_path last.ckpt

look
  list       lightning-norm list                                    the normalizers
  plan       lightning-norm plan --config examples/configs/digits_sn.yaml     what a swap would do

leave
  export     lightning-norm export --config your.yaml --ckpt_path last.ckpt --shape 1x3x8x8 --out net.pt2

measure
  compare    lightning-norm compare --norms bn,sn,bcn --seeds 3      accuracy, with intervals
  bench      lightning-norm bench --device cpu                       time and memory

  --version  --help
"""
TRAINING = ("fit", "validate", "test", "predict")
OTHERS = ("list", "plan", "export", "compare", "bench")
TRACEBACK = "LIGHTNING_NORM_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: the arguments behind the program's name; those of the process by default.

    Raises:
        SystemExit: with status 2 for an error of the command line, a configuration file or the package's own checks.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("--help", "-h", "help"):
        print(OVERVIEW, end="")
        return
    if command == "--version":
        from importlib.metadata import version

        print(f"lightning-norm {version('lightning-norm')}")
        return
    if command not in TRAINING + OTHERS:
        _exit(_unknown(command))
    here = os.getcwd()
    if here not in sys.path:  # as ``python -m`` does: a user's own module is importable by its name
        sys.path.insert(0, here)
    try:
        _run(command, arguments)
    except Exception as error:
        own = _own_cause(error)
        if own is None or os.environ.get(TRACEBACK):
            raise
        _exit(f"{own}\n(the traceback: {TRACEBACK}=1)")


def _run(command: str, arguments: list[str]) -> None:
    if command in TRAINING:
        from lightning_norm.cli.norm_cli import NormCLI

        NormCLI(arguments)
        return
    if command == "list":
        from lightning_norm.cli.list import run
    elif command == "plan":
        from lightning_norm.cli.plan import run
    elif command == "export":
        from lightning_norm.cli.export import run
    elif command == "compare":
        from lightning_norm.cli.compare import run
    else:
        from lightning_norm.bench import run as bench

        bench.run(arguments[1:])
        return
    run(arguments[1:])


def _unknown(command: str) -> str:
    known = TRAINING + OTHERS
    near = difflib.get_close_matches(command, known, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return f"no command {command!r}.{guess} Known: {', '.join(known)}. lightning-norm --help shows an example of each."


def _own_cause(error: BaseException | None) -> BaseException | None:
    """Return the error that this package raised itself; anything else may be a bug and keeps its traceback."""
    package = Path(__file__).resolve().parent.parent
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        raised = frames and Path(frames[-1].filename).resolve().is_relative_to(package)
        if raised and isinstance(error, (ValueError, TypeError, RuntimeError, ModuleNotFoundError)):
            return error
        error = error.__cause__ or error.__context__
    return None


def _exit(message: str) -> None:
    print(f"lightning-norm: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()

"""Print which files and lines one training forward of a layer runs through: what a reader must walk to follow it.

    python -m benchmarks.walk [--norm sn] [--backend eager | auto | triton]

Without --backend, all: in plain PyTorch; as a layer runs on the CPU by default, where some methods have a shorter way
for it; and on the Triton kernels through Triton's interpreter. For each file of the package that took part it prints

run         lines that were executed, each counted once
way         lines of the functions that were called, docstrings, decorators and branches not taken included
file        lines of the whole file

It is the first call of a fresh layer, so what is cached for later calls is walked, too.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import lightning_norm

PACKAGE = Path(lightning_norm.__file__).parent
BACKENDS = ("eager", "auto", "triton")


class Walk:
    """A context in which every line of the package that this thread runs is noted."""

    def __init__(self) -> None:
        self.run: dict[str, set[int]] = defaultdict(set)
        self.called: dict[str, set[int]] = defaultdict(set)

    def __enter__(self) -> Walk:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        code: CodeType = frame.f_code
        is_function = code.co_flags & inspect.CO_OPTIMIZED  # the bodies of modules and classes run at import, once
        if not is_function or not code.co_filename.startswith(str(PACKAGE)):
            return None
        self.called[code.co_filename].add(code.co_firstlineno)
        self.run[code.co_filename].add(frame.f_lineno)
        return self._trace

    def rows(self) -> list[tuple[str, tuple[int, int, int]]]:
        """Return for each file its name, the lines that ran, those on the way, and all of its lines."""
        rows = []
        for file in sorted(self.called):
            text = Path(file).read_text(encoding="utf-8")
            way = lines_of(text, self.called[file])
            rows.append((str(Path(file).relative_to(PACKAGE)), (len(self.run[file]), way, len(text.splitlines()))))
        return rows


def lines_of(text: str, first_lines: set[int]) -> int:
    r"""Return how many lines the functions have that begin at these lines; a function within one counts once.

    >>> lines_of("@cache\ndef f():\n    return 1\n\ndef g(): ...", {1})
    3
    """
    lines: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if {first, node.lineno} & first_lines:
                lines |= set(range(first, (node.end_lineno or first) + 1))
    return len(lines)


def show(norm: str, backend: str) -> None:
    """Walk one forward and print the table."""
    torch.manual_seed(0)
    layer, x = lightning_norm.create(norm, 16), torch.randn(4, 16, 8, 8).requires_grad_()
    layer.backend = backend
    with Walk() as walk:
        layer(x)
    rows = walk.rows()
    print(f"\n{norm}, one forward in training, backend {backend}\n\n| file | run | way | file |\n|---|---|---|---|")
    for file, numbers in rows:
        print(f"| {file} | {' | '.join(map(str, numbers))} |")
    run, way, whole = (sum(column) for column in zip(*(numbers for _, numbers in rows), strict=True))
    print(f"| {len(rows)} files | {run} | {way} | {whole} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Show one backend, or each in a process of its own: Triton reads at import whether it shall interpret."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", default="sn", help="key of the normalizer (default: %(default)s)")
    parser.add_argument("--backend", choices=BACKENDS)
    options = parser.parse_args(argv)
    if options.backend and (options.backend != "triton" or os.environ.get("TRITON_INTERPRET") == "1"):
        show(options.norm, options.backend)
        return
    for backend in [options.backend] if options.backend else BACKENDS:
        if backend == "triton" and importlib.util.find_spec("triton") is None:
            print("\nTriton is not installed.")
            continue
        command = [sys.executable, "-m", "benchmarks.walk", "--norm", options.norm, "--backend", backend]
        subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": str(int(backend == "triton"))}, check=True)


if __name__ == "__main__":
    main()

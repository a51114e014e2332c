"""Count what a reader of the package meets: sizes, arguments, docstrings, comments, types, messages of errors.

    python -m benchmarks.house [FOLDER] [--functions 5]

It prints a Markdown table with a row for the package and one for each folder in it, with an asterisk where users type,
call or subclass what is in it, then the longest functions and those with the most arguments. It reads the source alone,
so FOLDER may be any package.

files / lines      Python files and all their lines
file               lines of the files of more than one: median / 90th percentile / most
function           lines of a function without its docstring: median / 90th percentile
most args          arguments of one function, self included
docstring %        lines of docstrings, those under attributes included, of all lines
comment %          lines that hold a comment and nothing else, of all lines
typed %            arguments that are annotated, self and cls left aside
value / fix        raised messages that show a value, and that tell the reader what to do, in per cent
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

USER_FACING = ("bench", "callbacks", "cli", "layers", "normalizers", "plugins", "schedules", "surgery")
"""Folders of this package whose docstrings are to be 25 to 35 per cent of their lines.

Lines that are comments are to be 4 to 6 per cent everywhere, and 6 per cent in the kernels.
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef
FIX = re.compile(r"\b(Type|Use|Choose|Set|Pass|Give|Exclude|Leave|Put|Add|Remove|Expected|Did you mean|pip install)\b")
"""Words by which a message says what to do."""


@dataclass
class Counts:
    """What was counted in some files."""

    files: list[int] = field(default_factory=list)
    docstrings: int = 0
    comments: int = 0
    functions: list[tuple[int, str]] = field(default_factory=list)
    arguments: list[tuple[int, str]] = field(default_factory=list)
    annotated: list[bool] = field(default_factory=list)
    messages: list[ast.expr] = field(default_factory=list)

    def add(self, path: Path) -> None:
        """Count one file."""
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        self.files.append(len(text.splitlines()))
        self.comments += sum(1 for _ in comment_lines(text))
        for node in ast.walk(tree):
            self.docstrings += sum(_lines(d) for d in docstrings(node))
            if isinstance(node, Function):
                self._add_function(node, f"{path}:{node.lineno} {node.name}")
            elif (message := message_of(node)) is not None:
                self.messages.append(message)

    def _add_function(self, node: Function, where: str) -> None:
        doc = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
        self.functions.append((_lines(node) - (_lines(doc) if doc else 0), where))
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
        self.arguments.append((len(arguments), where))
        self.annotated += [a.annotation is not None for a in arguments if a.arg not in ("self", "cls")]

    def row(self, name: str) -> str:
        """Return the row of a Markdown table."""
        lines, functions = sum(self.files), [length for length, _ in self.functions] or [0]
        files = [length for length in self.files if length > 1] or [0]
        with_value = sum(any(isinstance(n, ast.FormattedValue) for n in ast.walk(m)) for m in self.messages)
        with_fix = sum(bool(FIX.search(_text(m))) for m in self.messages)
        cells = (
            name,
            f"{len(self.files)} / {lines}",
            f"{statistics.median(files):.0f} / {percentile(files, 90)} / {max(files)}",
            f"{statistics.median(functions):.0f} / {percentile(functions, 90)}",
            str(max((n for n, _ in self.arguments), default=0)),
            f"{100 * self.docstrings / lines:.0f}",
            f"{100 * self.comments / lines:.1f}",
            f"{100 * statistics.mean(self.annotated or [1]):.0f}",
            f"{_per_cent(with_value, self.messages)} / {_per_cent(with_fix, self.messages)}",
        )
        return "| " + " | ".join(cells) + " |"


def comment_lines(text: str) -> Iterator[int]:
    """Yield the numbers of the lines that hold a comment and nothing else."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            yield token.start[0]


def docstrings(node: ast.AST) -> Iterator[ast.Expr]:
    """Yield the docstring of a module, class or function, and those that stand under its assignments."""
    body = getattr(node, "body", None)
    if not isinstance(node, ast.Module | ast.ClassDef | Function) or not isinstance(body, list):
        return
    before: ast.stmt | None = None
    for i, statement in enumerate(body):
        is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if (
            is_text
            and isinstance(statement.value.value, str)
            and (i == 0 or isinstance(before, ast.Assign | ast.AnnAssign))
        ):
            yield statement
        before = statement


def message_of(node: ast.AST) -> ast.expr | None:
    """Return the message of ``raise Error("message")``; ``None`` where it is not written there."""
    if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
        return None
    message = node.exc.args[0]
    return message if isinstance(message, ast.JoinedStr | ast.Constant) else None


def percentile(values: Sequence[int], q: int) -> int:
    """Return the value that q per cent of the values stand before, in order.

    >>> percentile(range(1, 11), 90)
    10
    """
    return sorted(values)[min(len(values) * q // 100, len(values) - 1)]


def count(files: Sequence[Path]) -> Counts:
    """Count files together."""
    counts = Counts()
    for path in files:
        counts.add(path)
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent.parent / "lightning_norm")
    parser.add_argument("--functions", type=int, default=5, help="how many of the longest functions to name")
    options = parser.parse_args(argv)
    files = sorted(options.folder.rglob("*.py"))
    head = "package | files / lines | file | function | most args | docstring % | comment % | typed % | value / fix"
    print(f"| {head} |\n|{'---|' * (head.count('|') + 1)}")
    whole = count(files)
    print(whole.row(options.folder.resolve().name))
    for room in sorted({p.relative_to(options.folder).parts[0] for p in files if p.parent != options.folder}):
        of_room = count([p for p in files if p.relative_to(options.folder).parts[0] == room])
        print(of_room.row(f"{room}/{' *' * (room in USER_FACING)}"))
    for what, entries in (("lines", whole.functions), ("arguments", whole.arguments)):
        print(f"\nMost {what}:")
        for number, where in sorted(entries, reverse=True)[: options.functions]:
            print(f"  {number:4d}  {where}")


def _lines(node: ast.stmt | ast.expr) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _text(message: ast.expr) -> str:
    parts = (n.value for n in ast.walk(message) if isinstance(n, ast.Constant))
    return " ".join(part for part in parts if isinstance(part, str))


def _per_cent(part: int, whole: Sequence[object]) -> str:
    return f"{100 * part / len(whole):.0f}" if whole else "-"


if __name__ == "__main__":
    main()

"""The map of the code in CONTRIBUTING.md: one line per file, the first sentence of its docstring.

A file of normalizers has their keys in front of it. ``python docs/generate.py`` writes it.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- begin: written by docs/generate.py -->", "<!-- end -->"
FOLDERS = ("lightning_norm", "benchmarks")
PACKAGE = "__init__.py"


def first_line(file: Path) -> str:
    """Return the first line of a file's docstring.

    Raises:
        ValueError: it has none.
    """
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{file.relative_to(ROOT)} has no docstring: its first line is the file's line in the map.")
    return text.splitlines()[0].replace("``", "`")


def keys(file: Path) -> str:
    """Return the keys of the normalizers that a file defines, as users type them, in brackets."""
    classes = (node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    values = [
        str(statement.value.value)
        for node in classes
        for statement in node.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.value, ast.Constant)
        and [ast.unparse(target) for target in statement.targets] == ["key"]
    ]
    return f" ({', '.join(values)})" if values else ""


def code_map() -> str:
    """Return the map: a list per folder, the folders in the order of their names, subfolders right behind."""
    lines = []
    for folder in FOLDERS:
        files = sorted((ROOT / folder).rglob("*.py"), key=lambda f: (f.parent.as_posix(), f.name != PACKAGE, f.name))
        for file in files:
            if file.name == PACKAGE or (file.parent == ROOT / folder and file == files[0]):
                what = f": {first_line(file)}" if file.name == PACKAGE else ""
                lines += ["", f"`{file.parent.relative_to(ROOT).as_posix()}/`{what}", ""]
            if file.name != PACKAGE:
                lines.append(f"- `{file.name}`{keys(file)}: {first_line(file)}")
    return "\n".join(lines).strip()


def page() -> str:
    """Return CONTRIBUTING.md with the map in its place.

    Raises:
        ValueError: the page lacks the two marks around that place.
    """
    text = PAGE.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} must have the line {BEGIN!r} and, after it, {END!r}.")
    return f"{before}{BEGIN}\n\n{code_map()}\n\n{END}{after}"

"""Write what follows from the code: tables, navigation, references and public names, and CONTRIBUTING's map.

    python docs/generate.py             after a normalizer or a file was added, or its first line changed
    python docs/generate.py --check     say what would change, and exit with status 1 if anything would (CI)

What a file takes from here stands between the lines ``generated: NAME`` and ``end of generated``; the rest is written
by hand. ``lightning_norm/__init__.pyi`` and ``lightning_norm/cli/normalizers.json`` are generated as a whole. In
CITATION.cff a reference is added for each paper that has none; its details (all authors, pages) are then completed by
hand and stay. The map of the code is that of ``code_map.py`` beside this file.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning_norm
from lightning_norm import Normalizer, Paper
from lightning_norm.cli import list as command_list

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))  # where this file is loaded by its path, as the tests do
import code_map  # noqa: E402

METHODS = {
    key: cls for key, cls in lightning_norm.normalizers().items() if cls.__module__.startswith("lightning_norm.")
}


def summary(documented: Any) -> str:
    """Return the first sentence of a docstring, without its full stop."""
    return (documented.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").removesuffix(".")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]


def readme_table() -> list[str]:
    """Return README's table of normalizers."""
    rows = [
        (f"[`{key}`](docs/cards/{key}.md)", f"`{cls.__name__}`", summary(cls), _who(cls.paper))
        for key, cls in METHODS.items()
    ]
    return table(("key", "class", "in one line", "from"), rows)


def index_table() -> list[str]:
    """Return the table of cards in docs/index.md: what each method depends on, in training and in evaluation."""
    head = ("key", "class", "in one line", "training output of one sample depends on the others", "evaluation on")
    rows = [
        (f"[{key}](cards/{key}.md)", f"`{cls.__name__}`", summary(cls), *_depends_on(cls))
        for key, cls in METHODS.items()
    ]
    return table(head, rows)


def monitor_table() -> list[str]:
    """Return the table of docs/monitor.md: what each method's ``monitor`` returns and says that it is."""
    rows = []
    for key, cls in METHODS.items():
        names = ", ".join(f"`{name}`" for name in _with_everything(cls).monitor())
        meaning = summary(cls.monitor).removeprefix("Return ").replace("``", "`")
        if names:
            rows.append((key, names, meaning))
    return table(("normalizer", "quantities", "meaning"), rows)


def navigation() -> list[str]:
    """Return the entries of the cards in mkdocs.yml."""
    return [f"- {key}: cards/{key}.md" for key in METHODS]


def method_names() -> list[str]:
    """Return the names of the built-in classes for lightning_norm/__init__.py."""
    return [
        "_METHODS: tuple[str, ...] = (",
        *(f'    "{name}",' for name in sorted(cls.__name__ for cls in METHODS.values())),
        ")",
    ]


REGIONS: dict[str, dict[str, Callable[[], list[str]]]] = {
    "README.md": {"normalizers": readme_table},
    "docs/index.md": {"cards": index_table},
    "docs/monitor.md": {"quantities": monitor_table},
    "mkdocs.yml": {"cards": navigation},
    "lightning_norm/__init__.py": {"methods": method_names},
}
"""File -> name of a region -> what writes its lines."""


def with_region(text: str, name: str, lines: Sequence[str]) -> str:
    r"""Return a text with new lines in one of its regions, indented as its first line is.

    Raises:
        ValueError: the text has no such region.

    >>> print(with_region("# generated: a\nold\n# end of generated", "a", ["new"]))
    # generated: a
    new
    # end of generated
    """
    begin = rf"^(?P<indent>[ \t]*)(?:#|<!--) generated: {re.escape(name)}\b[^\n]*\n"
    region = re.search(begin + r"(?P<body>.*?)^[ \t]*(?:#|<!--) end of generated", text, re.M | re.S)
    if region is None:
        raise ValueError(f"expected the lines 'generated: {name}' and 'end of generated', found none of that name.")
    body = "".join(f"{region['indent']}{line}\n" for line in lines)
    return text[: region.start("body")] + body + text[region.end("body") :]


def stub(public: Mapping[str, Sequence[str]]) -> str:
    """Return ``__init__.pyi`` for a table of module -> names, sorted as ruff sorts imports."""

    def order(name: str) -> tuple[int, str]:
        return 0 if name.isupper() else 1 if name[0].isupper() else 2, name.lower()

    lines = [f"from lightning_norm.{m} import {n} as {n}" for m in sorted(public) for n in sorted(public[m], key=order)]
    head = "# Generated by docs/generate.py from __init__.py, which looks the same names up when they are first used."
    return "\n".join([head, *lines, "", "__version__: str", ""])


def with_references(citation: str) -> str:
    """Return CITATION.cff with a reference for each paper of the registry that it does not have yet."""
    entries = []
    for key, cls in METHODS.items():
        if cls.paper is not None and _identifier(cls.paper) not in citation:
            entries += _reference(key, cls.paper)
    return citation + "".join(f"{line}\n" for line in entries)


def public_names() -> dict[str, list[str]]:
    """Return the table of lightning_norm/__init__.py, with the built-in classes that are registered now."""
    package = vars(lightning_norm)  # the stub that type checkers read has no private names
    public = {module: list(names) for module, names in package["_PUBLIC"].items()}
    fixed = set(public["normalizers"]) - set(package["_METHODS"])
    return {**public, "normalizers": [*fixed, *(cls.__name__ for cls in METHODS.values())]}


def results() -> Iterator[tuple[Path, str]]:
    """Yield each file and what it should hold."""
    for name, regions in REGIONS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for region, lines in regions.items():
            text = with_region(text, region, lines())
        yield ROOT / name, text
    yield ROOT / "lightning_norm/__init__.pyi", stub(public_names())
    declared = [command_list.describe(cls) for cls in METHODS.values()]
    yield ROOT / "lightning_norm/cli/normalizers.json", json.dumps(declared, indent=1) + "\n"
    citation = ROOT / "CITATION.cff"
    yield citation, with_references(citation.read_text(encoding="utf-8"))
    yield code_map.PAGE, code_map.page()


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or compare them; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file would change")
    check = parser.parse_args(argv).check
    changed = 0
    for path, text in results():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old == text:
            continue
        changed += 1
        if check:
            name = str(path.relative_to(ROOT))
            diff = difflib.unified_diff(
                old.splitlines(), text.splitlines(), name, f"{name}, generated", lineterm="", n=0
            )
            print("\n".join(diff))
        else:
            path.write_text(text, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")
    if check and changed:
        print(f"{changed} files are not what the code says. Type: python docs/generate.py", file=sys.stderr)
    return int(check and changed > 0)


def _who(paper: Paper | None) -> str:
    return f"{paper.authors} {paper.year}" if paper else "-"


def _depends_on(cls: type[Normalizer]) -> tuple[str, str]:
    if not cls.eval_uses_input_stats and not cls.train_uses_batch_stats:
        return "no", "each element alone"
    if not cls.eval_uses_input_stats:
        return "yes" if cls.train_uses_batch_stats else "no", "running statistics"
    return ("yes", "both") if cls.train_uses_batch_stats else ("no", "the sample")


def _with_everything(cls: type[Normalizer]) -> Normalizer:
    """Build a layer with those schedulable arguments of its class switched on that are off by default."""
    layer, arguments = cls(64), inspect.signature(cls).parameters
    off = [name for name in cls.ranges if name in arguments and getattr(layer, name) is None]
    return cls(64, **{name: cls.ranges[name].high for name in off})


def _identifier(paper: Paper) -> str:
    return paper.where.replace("arXiv ", "arXiv:")


def _reference(key: str, paper: Paper) -> list[str]:
    """Return the lines of a reference of CITATION.cff, with the authors that the short form names."""
    names = re.split(r" and | (?=et al\.)", paper.authors)
    authors = [
        f'      - {{name: "{name}"}}' if name == "et al." else f"      - {{family-names: {name}}}" for name in names
    ]
    identifier = _identifier(paper)
    lines = [f"  - type: article  # {key}", f"    title: {json.dumps(paper.title)}", "    authors:", *authors]
    lines += [f"    year: {paper.year}", f'    identifiers: [{{type: other, value: "{identifier}"}}]']
    if identifier.startswith("arXiv:"):
        lines.append(f'    url: "https://arxiv.org/abs/{identifier.removeprefix("arXiv:")}"')
    return lines


if __name__ == "__main__":
    sys.exit(main())

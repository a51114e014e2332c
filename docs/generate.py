"""Write what follows from the code: tables, navigation, references and public names, and CONTRIBUTING's map.

    python docs/generate.py             after a normalizer or a file was added, or its first line changed
    python docs/generate.py --check     say what would change, and exit with status 1 if anything would (CI)

What a file takes from here stands between the lines ``generated: NAME`` and ``end of generated``, but for the number
of normalizers in three sentences; the rest is written by hand. ``lightning_norm/__init__.pyi`` and
``lightning_norm/cli/normalizers.json`` are generated as a whole. In CITATION.cff a reference is added for each paper
that has none; its details (all authors, pages) are then completed by hand and stay. The map of the code is that of
``code_map.py`` beside this file.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning_norm
from lightning_norm import Normalizer, Paper
from lightning_norm.cli import list as command_list

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))  # where this file is loaded by its path, as the tests do
import code_map  # noqa: E402
import evidence_tables  # noqa: E402
from docstrings import markdown  # noqa: E402
from evidence_tables import table  # noqa: E402

METHODS = {
    key: cls for key, cls in lightning_norm.normalizers().items() if cls.__module__.startswith("lightning_norm.")
}


def summary(documented: Any) -> str:
    """Return the first sentence of a docstring, without its full stop."""
    return (documented.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").removesuffix(".")


def readme_line() -> list[str]:
    """Return README's line of normalizers."""
    return [" · ".join(f"[{key}](docs/cards/{key}.md)" for key in METHODS)]


def badges() -> dict[str, tuple[str, str]]:
    """Return what README's badges say, from pyproject.toml: file -> label and text."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    def after(start: str) -> str:
        matches = re.search(rf"{start}[\"'= <>]*([\w.-]+)", text, re.M)
        if matches is None:
            raise ValueError(f"pyproject.toml: expected {start!r} for README's badges.")
        return matches[1].rstrip(".")

    newest = re.findall(r"Python :: (3\.\d+)", text)[-1]
    return {
        "badge_licence.svg": ("licence", after("^license =")),
        "badge_python.svg": ("Python", f"{after('^requires-python =')} to {newest}"),
        "badge_torch.svg": ("torch", f"{after('^ *.torch')} or newer"),
        "badge_lightning.svg": ("Lightning", after("^ *.lightning>")),
    }


def badge(label: str, text: str) -> str:
    """Return a badge as SVG: a label on grey, a text on violet."""
    left, right = (10 + round(6.6 * len(part)) for part in (label, text))
    style = 'font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle" fill="#fff"'
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img">',
            f"<title>{label}: {text}</title>",
            f'<rect rx="3" width="{left + right}" height="20" fill="#555"/>',
            f'<rect rx="3" x="{left}" width="{right}" height="20" fill="#5e35b1"/>',
            f'<rect x="{left}" width="4" height="20" fill="#5e35b1"/>',
            f'<g {style}><text x="{left / 2}" y="14" textLength="{left - 10}">{label}</text>',
            f'<text x="{left + right / 2}" y="14" textLength="{right - 10}">{text}</text></g></svg>\n',
        ]
    )


def monitor_table() -> list[str]:
    """Return the table of docs/monitor_quantities.md: what each method's ``monitor`` returns and says that it is."""
    rows = []
    for key, cls in METHODS.items():
        names = ", ".join(f"`{name}`" for name in _with_everything(cls).monitor())
        meaning = summary(cls.monitor).removeprefix("Return ").replace("``", "`")
        if names:
            rows.append((key, names, meaning))
    return table(("normalizer", "quantities", "meaning"), rows)


def examples_list() -> list[str]:
    """Return what each program in examples/ says that it is and how it is called."""
    files = sorted((ROOT / "examples").glob("*.py"))
    return [f"- [{file.name}]({file.name}): {code_map.first_line(file)}" for file in files]


def cards_table() -> list[str]:
    """Return the table of docs/cards/index.md: what each method is and depends on, in training and in evaluation."""
    head = ("key", "class", "in one line", "uses the batch", "evaluates on", "from")
    rows = [
        (f"[{key}]({key}.md)", f"`{cls.__name__}`", summary(cls), *_depends_on(cls), _who(cls.paper))
        for key, cls in METHODS.items()
    ]
    return table(head, rows)


def navigation() -> list[str]:
    """Return the entries of the cards in mkdocs.yml."""
    return [f"- {key}: cards/{key}.md" for key in METHODS]


REFERENCE = {
    "callbacks": (
        "Callbacks and the plugin",
        "What goes into `Trainer(callbacks=[...])`, and `NormSync` into `Trainer(plugins=[...])`.",
        ("callbacks", "plugins"),
    ),
    "swap": (
        "Swap and report",
        "What a swap takes and returns, with a Trainer or without one.",
        (
            "surgery.swap",
            "surgery.options",
            "surgery.report",
            "surgery.recognize",
            "surgery.param_groups",
            "surgery.warm_up",
        ),
    ),
    "normalizers": ("Normalizers", "One class per method; the [cards](../cards/index.md) say when to use which.", ()),
    "layers": (
        "Write your own",
        "What a normalizer is made of: [How do I write a normalizer?](../write_a_normalizer.md)",
        ("normalizers", "layers.choice", "ops.moments", "ops.normalize"),
    ),
    "statistics": (
        "Statistics",
        "Masks, pauses, re-estimation, averages and measures of statistics.",
        (
            *("surgery.masks", "surgery.pause", "surgery.recalibrate", "surgery.pool", "surgery.norm_statistics"),
            "metrics",
        ),
    ),
    "deploy": (
        "Harden, fold, load",
        "From a trained mixture to a network of plain layers, and the files of others.",
        ("surgery.harden", "surgery.deploy", "surgery.quantize", "surgery.load_published"),
    ),
    "schedules": (
        "Schedules",
        "Pure functions of the epoch or the step: [how to use them](../schedules.md)",
        ("schedules.base", "schedules.curves", "schedules.composed"),
    ),
    "errors": ("Errors and warnings", "Each has a type of its own, so that it can be caught or filtered.", ("errors",)),
    "testing": (
        "Testing",
        "What holds a normalizer of your own to what those of this package are held to.",
        ("testing",),
    ),
}
"""Page of docs/reference/ -> title, first sentence, and the modules whose public names stand there."""

BESIDE = {
    "surgery.options": ("SwapOptions",),
    "callbacks": ("swap.norm_swap.NormSwapOptions",),
    "testing": ("checks", "conform", "run_ranks"),
}
"""Documented names that ``lightning_norm`` itself does not export."""


HOOKS_ASIDE = json.dumps(["!^_", "!^on_", "!^setup$", "!^teardown$", "!state_dict$", "!^apply$", "!^revert$"])
"""What Lightning calls is no name that a reader calls."""


def reference_names(page: str) -> list[str]:
    """Return what a page of the reference documents, as dotted names, in the order of the page."""
    public = public_names()
    if page == "normalizers":
        return [f"lightning_norm.{cls.__name__}" for cls in METHODS.values()]
    names = []
    for module in REFERENCE[page][2]:
        exported = [name for name in public.get(module, ()) if name not in {cls.__name__ for cls in METHODS.values()}]
        names += [f"lightning_norm.{name}" for name in sorted(exported, key=_order)]
        names += [f"lightning_norm.{module}.{name}" for name in BESIDE.get(module, ())]
    return names


def reference_page(page: str) -> str:
    """Return a page of the reference: a title, a sentence, and a line of mkdocstrings for each name."""
    title, sentence, _ = REFERENCE[page]
    blocks = [f"::: {_documented_at(name)}" for name in reference_names(page)]
    if page == "normalizers":
        # With no names, inherited_members would show all that is inherited.
        shown = [
            f"members: {json.dumps(names)}, inherited_members: true" if names else "members: false"
            for names in map(_beyond_the_base, METHODS.values())
        ]
        blocks = [f"{block}\n    options: {{{options}}}" for block, options in zip(blocks, shown, strict=True)]
    if page == "callbacks":
        blocks = [f"{block}\n    options: {{filters: {HOOKS_ASIDE}}}" for block in blocks]
    return "\n\n".join([f"# {title}", f"<!-- Written by docs/generate.py. -->\n{sentence}", *blocks]) + "\n"


def reference_index() -> list[str]:
    """Return the table of docs/reference/index.md: every public name, in the order of the alphabet.

    Raises:
        ValueError: a public name stands on no page.
    """
    where = {name: page for page in REFERENCE for name in reference_names(page)}
    if missing := {f"lightning_norm.{name}" for name in vars(lightning_norm)["__all__"]} - set(where):
        raise ValueError(f"{', '.join(sorted(missing))}: on no page of the reference; see REFERENCE in {__file__}.")
    rows = []
    for name in sorted(where, key=lambda n: n.rpartition(".")[2].lower()):
        short = name.removeprefix("lightning_norm.")
        link = f"[`{short.removeprefix('surgery.options.').removeprefix('callbacks.swap.norm_swap.')}`]"
        rows.append(
            (f"{link}({where[name]}.md#{_documented_at(name)})", markdown(summary(_value(name))).replace("``", "`"))
        )
    return table(("name", "in one line"), rows)


def reference_navigation() -> list[str]:
    """Return the entries of the reference in mkdocs.yml."""
    return [f"- reference/{page}.md" for page in REFERENCE]


def method_names() -> list[str]:
    """Return the names of the built-in classes for lightning_norm/__init__.py."""
    return [
        "_METHODS: tuple[str, ...] = (",
        *(f'    "{name}",' for name in sorted(cls.__name__ for cls in METHODS.values())),
        ")",
    ]


REGIONS: dict[str, dict[str, Callable[[], list[str]]]] = {
    "README.md": {"normalizers": readme_line},
    "examples/README.md": {"examples": examples_list},
    "docs/cards/index.md": {"cards": cards_table},
    "docs/reference/index.md": {"names": reference_index},
    "docs/monitor_quantities.md": {"quantities": monitor_table},
    "mkdocs.yml": {"cards": navigation, "reference": reference_navigation},
    "lightning_norm/__init__.py": {"methods": method_names},
    "docs/evidence/index.md": {"overview": evidence_tables.overview},
    "docs/evidence/dbn.md": {
        "readings": evidence_tables.dbn_readings,
        "cifar": partial(evidence_tables.results, "dbn_cifar"),
    },
    "docs/evidence/bcn.md": {"results": partial(evidence_tables.results, "sn", ("bn", "bn recalibrated", "bcn"))},
    **{
        f"docs/evidence/{study}.md": {
            "results": partial(evidence_tables.results, study),
            "parts": partial(evidence_tables.parts, study),
        }
        for study in ("domains", "corruptions")
    },
    "docs/evidence/contexts.md": {"results": partial(evidence_tables.results, "contexts")},
    "docs/evidence/bnet.md": {
        "results": partial(evidence_tables.results, "bnet"),
        "epochs": partial(evidence_tables.epochs_to_target, "bnet"),
        "bottlenecks": partial(evidence_tables.results, "bnet_bottleneck"),
        "seven": partial(evidence_tables.results, "bnet_seven"),
    },
    "docs/evidence/ubn.md": {
        "results": partial(evidence_tables.results, "ubn"),
        "epochs": partial(evidence_tables.epochs_to_target, "ubn"),
        "batches": partial(evidence_tables.results, "ubn_batches"),
        "batches_32": partial(evidence_tables.results, "ubn_batches_32"),
        "condensation": evidence_tables.condensations,
    },
    "docs/evidence/sn.md": {
        "results": partial(evidence_tables.results, "sn"),
        "weights": evidence_tables.switch_weights,
    },
    "docs/evidence/cost.md": {"costs": evidence_tables.costs},
}
"""File -> name of a region -> what writes its lines."""

COUNTED = {
    "README.md": r"(?<=^\| normalizers to swap to \| )\d+(?=, )",
    "docs/index.md": r"\d+(?= in all, on one engine)",
    "docs/what_users_ask.md": r"\d+(?= normalizers\]\(cards/index\.md\))",
}
"""File -> where its text says how many normalizers there are."""


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


def with_count(text: str, place: str) -> str:
    """Return a text with the number of the normalizers in the one place that has it.

    Raises:
        ValueError: the text has no such place, or several.
    """
    counted, found = re.subn(place, str(len(METHODS)), text, flags=re.M)
    if found != 1:
        raise ValueError(f"expected the number of normalizers once, at {place!r}, found it {found} times.")
    return counted


def stub(public: Mapping[str, Sequence[str]]) -> str:
    """Return ``__init__.pyi`` for a table of module -> names, sorted as ruff sorts imports."""
    lines = [
        f"from lightning_norm.{m} import {n} as {n}" for m in sorted(public) for n in sorted(public[m], key=_order)
    ]
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
    for name in dict.fromkeys((*REGIONS, *COUNTED)):
        text = (ROOT / name).read_text(encoding="utf-8")
        for region, lines in REGIONS.get(name, {}).items():
            text = with_region(text, region, lines())
        if name in COUNTED:
            text = with_count(text, COUNTED[name])
        yield ROOT / name, text
    for page in REFERENCE:
        yield ROOT / "docs/reference" / f"{page}.md", reference_page(page)
    for name, (label, says) in badges().items():
        yield ROOT / "docs/img" / name, badge(label, says)
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


def _order(name: str) -> tuple[int, str]:
    """Sort as ruff sorts imports: constants, classes, functions."""
    return 0 if name.isupper() else 1 if name[0].isupper() else 2, name.lower()


def _value(name: str) -> Any:
    module, _, last = name.rpartition(".")
    if last in (built_in := {cls.__name__: cls for cls in METHODS.values()}):
        return built_in[last]
    return getattr(importlib.import_module(module), last)


def _beyond_the_base(cls: type[Normalizer]) -> list[str]:
    """Return the documented names of a class that its base does not have: those are documented there."""
    public = [name for name in dir(cls) if not name.startswith("_") and not hasattr(lightning_norm.MomentNorm, name)]
    return [name for name in public if inspect.getdoc(getattr(cls, name)) and callable(getattr(cls, name))]


def _documented_at(name: str) -> str:
    """Return where griffe finds a name: ``normalizers`` is a folder for it, and a function in a file of that folder."""
    return "lightning_norm.layers.registry.normalizers" if name == "lightning_norm.normalizers" else name


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

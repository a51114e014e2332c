"""The README and the docs say what is: two commands, every link, every normalizer, every argument."""

import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

import lightning_norm
from lightning_norm import normalizers

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HEADINGS = [
    "What it computes",
    "When to use it and when not",
    "What the paper claims, on what evidence",
    "What this version does differently",
    "Arguments and starting values",
    "Suggested hyper-parameters",
    "Use it",
    "Source",
]
OURS = {key: cls for key, cls in normalizers().items() if cls.__module__.startswith("lightning_norm.")}


def blocks(text, language):
    matches = re.finditer(rf"^( *)```{language}[ \t]*\n(.*?)^\1```[ \t]*$", text, re.M | re.S)
    return [textwrap.dedent(block[2]) for block in matches]


def rows(text, header):
    table = re.search(rf"^\| {re.escape(header)}.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    assert table, f"no table that starts with {header!r}"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[1].splitlines()]


def test_exactly_two_commands_of_one_line_each():
    commands = [b.strip() for b in blocks(README, "bash")]
    assert len(commands) == 2
    for command in commands:
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -e '.[")


def test_the_commands_name_what_exists():
    run, test = blocks(README, "bash")
    for command in (run, test):
        extra = re.search(r"\.\[(\w+)\]", command)[1]
        assert extra in PROJECT["project"]["optional-dependencies"]
    assert "lightning-norm" in PROJECT["project"]["scripts"]
    assert (ROOT / re.search(r"--config (\S+)", run)[1]).is_file()
    assert test.rstrip().endswith(".venv/bin/pytest")


def test_what_users_ask_is_counted():
    answers = [row[2] for row in rows((ROOT / "docs" / "what_users_ask.md").read_text(), "#")]
    yes, partly = answers.count("yes"), answers.count("partly")
    assert len(answers) == yes + partly == 38
    assert f"{yes} times yes, {partly} times partly." in (ROOT / "docs" / "what_users_ask.md").read_text()


def test_one_sentence_says_what_it_is():
    title, first = README.split("\n\n")[:2]
    assert title == "# lightning_norm"
    assert first.count(".") == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)", prose):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_yaml_blocks_are_yaml(page):
    for block in blocks(page.read_text(encoding="utf-8"), "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


@pytest.mark.parametrize("key", OURS)
def test_each_normalizer_has_its_card(key):
    card = (ROOT / "docs" / "cards" / f"{key}.md").read_text(encoding="utf-8")
    assert card.startswith(f"# {key}: {OURS[key].__name__}\n")
    assert re.findall(r"^## (.*)$", card, re.M) == HEADINGS
    assert blocks(card, "python")
    assert blocks(card, "yaml")
    assert OURS[key].paper.where.removeprefix("arXiv ") in card.split("## Source")[1]


@pytest.mark.parametrize("key", OURS)
def test_each_card_has_the_own_arguments_and_their_defaults(key):
    card = (ROOT / "docs" / "cards" / f"{key}.md").read_text(encoding="utf-8")
    table = {name: row[1] for row in rows(card, "name | start") for name in re.findall(r"`(\w+)`", row[0])}
    for name, parameter in inspect.signature(OURS[key].__init__).parameters.items():
        if name in ("self", "num_features", "device", "dtype") or parameter.kind is parameter.VAR_KEYWORD:
            continue
        assert name in table, f"{key}: {name} is not in the card"
        if table[name]:
            expected = str(parameter.default).replace("'", '"').replace("e-0", "e-")
            assert table[name] == expected, f"{key}: {name}"


@pytest.mark.parametrize("key", OURS)
def test_every_learned_parameter_is_in_the_card(key):
    card = (ROOT / "docs" / "cards" / f"{key}.md").read_text(encoding="utf-8")
    for name in OURS[key].extra_parameters:
        assert f"`{name}`" in card.split("## Arguments and starting values")[1]


def test_the_citation_has_every_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lightning_norm.__version__
    known = {i["value"].removeprefix("arXiv:") for r in citation["references"] for i in r["identifiers"]}
    assert known >= {cls.paper.where.removeprefix("arXiv ") for cls in OURS.values()}


def test_the_changelog_has_this_version():
    assert f"## [{lightning_norm.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
def test_the_check_is_bash_and_executable():
    script = ROOT / ".ci" / "run"
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o100

"""What docs/generate.py writes is what stands in the files."""

import importlib.util
import re
from pathlib import Path

import pytest

import lightning_norm
from lightning_norm import MomentNorm, Paper

ROOT = Path(__file__).parent.parent


@pytest.fixture
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NewNorm(MomentNorm):
    """Normalize in a new way.

    More about it.
    """

    key = ""  # stays out of the registry
    paper = Paper("Doe et al.", 2030, 'A "New" Way', "arXiv 3001.00001")


def test_the_files_are_what_the_code_says(generate, capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().out


def test_a_new_normalizer_appears_everywhere(generate, capsys):
    count = len(generate.METHODS)
    generate.METHODS["new"] = NewNorm
    assert generate.main(["--check"]) == 1
    shown = capsys.readouterr()
    assert "Type: python docs/generate.py" in shown.err
    for line in (
        "+| [new](new.md) | `NewNorm` | Normalize in a new way | yes | both | Doe et al. 2030 |",
        "+::: lightning_norm.NewNorm",
        "+      - new: cards/new.md",
        '+    "NewNorm",',
        "+from lightning_norm.normalizers import NewNorm as NewNorm",
        '+    title: "A \\"New\\" Way"',
        "+      - {family-names: Doe}",
        '+    identifiers: [{type: other, value: "arXiv:3001.00001"}]',
    ):
        assert line in shown.out.splitlines()
    assert " · [new](docs/cards/new.md)" in shown.out
    added = "\n".join(line for line in shown.out.splitlines() if line.startswith("+"))
    for words in ("| {}, those of seven papers", ", {} in all, on one engine", "[{} normalizers](cards/index.md)"):
        assert words.format(count + 1) in added


def test_a_public_name_without_a_page_is_told(generate, monkeypatch):
    monkeypatch.setattr(generate.lightning_norm, "__all__", [*generate.lightning_norm.__all__, "NewName"])
    with pytest.raises(ValueError, match="lightning_norm.NewName: on no page of the reference"):
        generate.reference_index()


def test_the_badges_are_true(generate):
    assert dict(generate.badges().values()) == {
        "licence": "Apache-2.0",
        "Python": "3.10 to 3.14",
        "torch": "2.11 or newer",
        "Lightning": "2.6",
    }


def test_the_map_of_the_code_is_among_them(generate):
    texts = {path.name: text for path, text in generate.results()}
    assert "- `batch_norm.py` (bn): Batch normalization" in texts["CONTRIBUTING.md"]
    for key, cls in lightning_norm.normalizers().items():
        file = f"{cls.__module__.rpartition('.')[2]}.py"
        assert re.search(rf"^- `{file}` \((.*, )?{key}(, .*)?\): ", texts["CONTRIBUTING.md"], re.MULTILINE), key


def test_a_page_that_says_the_number_nowhere_is_told(generate):
    with pytest.raises(ValueError, match="expected the number of normalizers once, at .*, found it 0 times"):
        generate.with_count("text", generate.COUNTED["docs/index.md"])


def test_a_file_without_the_region_is_told(generate):
    with pytest.raises(ValueError, match="expected the lines 'generated: cards' and 'end of generated'"):
        generate.with_region("# generated: others\n# end of generated\n", "cards", [])

"""What runs elsewhere: hosted workflows, and the pages that follow from the code."""

import re
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PINNED = re.compile(r"^\s*(?:- )?uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*$")


def unpinned(text):
    return [line for line in text.splitlines() if "uses:" in line and not PINNED.match(line)]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.name)
def test_actions_are_pinned_by_commit(file):
    text = file.read_text()
    assert "uses:" in text
    assert unpinned(text) == []


@pytest.mark.parametrize(
    "line",
    [
        "- uses: actions/checkout@v6",
        "- uses: actions/checkout@de0fac2e4500dabe0009e67214ff5f5447ce83dd",
        "uses: actions/checkout@de0fac2 # v6.0.2",
        "uses: ./.github/actions/own@main # v1",
    ],
)
def test_the_rule_can_fail(line):
    assert unpinned(line)


def test_one_commit_per_action():
    text = "".join(file.read_text() for file in WORKFLOWS)
    pins = set(re.findall(r"uses: (\S+)@(\w+) # (\S+)", text))
    assert len(pins) == len({action for action, _, _ in pins}), pins


def test_nothing_is_allowed_by_default_and_only_publishing_gets_a_token():
    for file in WORKFLOWS:
        workflow = yaml.safe_load(file.read_text())
        assert workflow["permissions"] == {"contents": "read"}, file
        for name, job in workflow["jobs"].items():
            assert job.get("permissions", {}) == ({"id-token": "write"} if name == "publish" else {}), (file, name)
            assert "secrets." not in str(job), (file, name)
            assert "timeout-minutes" in job, (file, name)


def test_every_python_of_the_classifiers_is_run():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    declared = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert jobs["run"]["strategy"]["matrix"]["python"] == declared


@pytest.fixture
def check_wheel(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    import check_wheel

    return check_wheel


@pytest.fixture
def wheel(tmp_path, check_wheel):
    """A wheel as it should be, by the names in it."""
    folder = ROOT / "lightning_norm"
    names = [p.relative_to(ROOT).as_posix() for p in folder.rglob("*") if p.suffix in (".py", ".pyi", ".json")]
    file = tmp_path / "lightning_norm-9.8.7-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name in [*names, "lightning_norm/py.typed", "lightning_norm-9.8.7.dist-info/METADATA"]:
            archive.writestr(name, "")
    return file


def test_a_right_wheel_passes(wheel, check_wheel):
    assert check_wheel.faults(wheel, "") == []


def test_a_wheel_with_tests_fails(wheel, check_wheel):
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tests/__init__.py", "")
    assert check_wheel.faults(wheel, "") == ["tests/__init__.py does not belong into it."]


def test_a_wheel_without_its_types_fails(tmp_path, check_wheel):
    file = tmp_path / "lightning_norm-9.8.7-py3-none-any.whl"
    zipfile.ZipFile(file, "w").close()
    assert "lightning_norm/py.typed is missing." in check_wheel.faults(file, "")


def test_a_tag_must_be_the_version_and_in_the_changelog(wheel, check_wheel):
    said = " ".join(check_wheel.faults(wheel, "v9.8.6"))
    assert "tag v9.8.7" in said
    assert "CHANGELOG.md has no heading '## [9.8.7]" in said


def test_no_test_has_a_time_limit_that_a_busy_machine_breaks():
    """What hangs is found by pytest's timeout; a shorter one for a part of a test fails under load instead."""
    for file in (ROOT / "tests").rglob("*.py"):
        for seconds in re.findall(r"timeout[=(](\d+)", file.read_text()):
            assert int(seconds) >= 900 or file.name == "test_sync.py", f"{file}: {seconds} s"

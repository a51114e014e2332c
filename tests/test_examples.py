"""Every example runs, and so does every page: its python blocks, in their order, with what is on the page alone."""

import importlib
import os
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from lightning_norm import Normalizer

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
LONG = {"finetune.py"}
BLOCK = re.compile(
    r'^(?P<indent> *)```(?:python| { \.python })(?: title="(?P<file>[^"]+)")?\n(?P<code>.*?)^(?P=indent)```$',
    re.M | re.S,
)
INCLUDED = re.compile(r'^--8<-- "(.+)"$', re.M)


def quiet(test):
    """Let pass what Lightning says of small data, and what torch says of Lightning 2.6."""
    test = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")(test)
    return pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")(test)


def blocks_of(page):
    """Return the python blocks of a page: the file that a block is to be saved as, the line it begins at, its code."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        code = textwrap.dedent(block["code"])
        code = INCLUDED.sub(lambda line: (ROOT / line[1]).read_text(encoding="utf-8"), code)
        yield block["file"], text.count("\n", 0, block.start("code")), code


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if any(blocks_of(page))]


def shortened(code):
    """Return code whose trainings on the digits take two steps."""
    if "Digits" not in code:
        return code
    return re.sub(r"max_epochs=\d+", "max_epochs=1, limit_train_batches=2, limit_val_batches=1", code)


@pytest.fixture
def reader(monkeypatch, tmp_path):
    """An empty folder that is looked into for modules; nothing that a page registers or imports from there stays."""
    monkeypatch.setattr(Normalizer, "registry", dict(Normalizer.registry))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    torch.manual_seed(0)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and tmp_path in Path(sys.modules[name].__file__).parents:
            del sys.modules[name]


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(s, id=s.name, marks=[pytest.mark.slow] if s.name in LONG else [])
        for s in SCRIPTS
        if s.name != "trainer.py"  # runs in the next test
    ],
)
def test_example(script, tmp_path):
    of_lightning = [f"-Wignore:`isinstance:{kind}Warning" for kind in ("Future", "Deprecation")]
    of_lightning += [f"-Wignore:The '{kind}_dataloader' does not have many workers" for kind in ("train", "val")]
    done = subprocess.run(
        [sys.executable, "-Werror", *of_lightning, script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def table_of(command, folder):
    paths = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"}
    done = subprocess.run([sys.executable, "-Wignore", *command], cwd=folder, env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (table,) = re.findall(r"^NormMonitor: sn\n(.*?)\n\n", done.stdout + done.stderr, re.M | re.S)
    return table


@pytest.mark.slow
def test_the_trainer_script_and_its_yaml_are_the_same(tmp_path):
    """To the last digit of what the layers learned."""
    config = str(ROOT / "examples" / "trainer.yaml")
    script = table_of([str(ROOT / "examples" / "trainer.py")], tmp_path)
    assert table_of(["-m", "lightning_norm", "fit", "--config", config], tmp_path) == script
    assert len(script.splitlines()) == 3


@quiet
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page, reader, monkeypatch):
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for file, line, code in blocks_of(page):
        if file is not None:
            (reader / file).write_text(code, encoding="utf-8")
            importlib.invalidate_caches()
        exec(compile("\n" * line + shortened(code), str(page), "exec"), module.__dict__)


@quiet
def test_the_trainer_of_the_readme_swaps_the_network(reader):
    """All of it but the layer that it excludes."""
    (code,) = [code for _, _, code in blocks_of(ROOT / "README.md") if "Trainer" in code]
    namespace = {}
    exec(shortened(code), namespace)
    kinds = {name: type(m).__name__ for name, m in namespace["model"].named_modules() if name.endswith(("bn1", "bn2"))}
    assert kinds.pop("net.bn1") == "BatchNorm2d"
    assert set(kinds.values()) == {"SwitchableNorm"}


NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    tables = [o["data"]["text/html"] for o in shown if "text/html" in o.get("data", {})]
    assert [table.count("<tr>") for table in tables] == [4, 4, 4]  # swap, harden, fold: three layers each
    printed = "".join(output["text"] for output in shown if output.get("name") == "stdout")
    assert "NormSwap: 3 of 3 BatchNorm2d layers" in printed
    assert "NormMonitor: sn" in printed
    assert (tmp_path / "digits.pt2").exists()

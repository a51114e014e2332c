"""Every example runs, and so does every python block of the README and the docs."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from nbclient import NotebookClient
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_norm import MomentNorm, Normalizer

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
LONG = {"finetune.py"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def quiet(test):
    """Let pass what Lightning says of small data, and what torch says of Lightning 2.6."""
    test = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")(test)
    return pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")(test)


def python_blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
            line = text.count("\n", 0, block.start(1))
            yield pytest.param(page, line, block[1], id=f"{page.relative_to(ROOT)}:{line + 1}")


class HalfInstanceNorm(MomentNorm):
    def algebra(self, m):
        batch = self.track(m.over_batch())
        return self.standardize((m.mean + batch.mean) / 2, (m.var + batch.var) / 2)


class Network(LightningModule):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential()
        self.stem.add_module("conv", torch.nn.Conv2d(3, 4, 3))
        self.stem.add_module("norm", torch.nn.BatchNorm2d(4))
        self.body = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(inplace=True))
        self.head = torch.nn.LazyLinear(2)
        self.head(torch.zeros(1, 8))

    def training_step(self, batch, _):
        x, target = batch
        return cross_entropy(self.head(self.body(self.stem(x)).mean((2, 3))), target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(8, 3, 8, 8, generator=generator)
        return DataLoader(TensorDataset(x, torch.arange(8) % 2), batch_size=4)


@pytest.fixture
def surroundings(monkeypatch, tmp_path):
    """What a page takes for granted: the reader's model, data and package; and nothing that it registers stays."""
    package = types.ModuleType("my_package")
    package.HalfInstanceNorm = HalfInstanceNorm
    monkeypatch.setitem(sys.modules, "my_package", package)
    monkeypatch.setattr(Normalizer, "registry", dict(Normalizer.registry))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return {"__name__": "page", "model": Network(), "data": Data()}


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
@pytest.mark.parametrize(("page", "line", "code"), list(python_blocks()))
def test_python_block(page, line, code, surroundings, monkeypatch):
    monkeypatch.setitem(sys.modules, "page", types.ModuleType("page"))
    exec(compile("\n" * line + code, str(page), "exec"), surroundings)


@quiet
def test_the_reader_model_is_trained_with_the_new_layers(surroundings):
    """The README's Trainer swaps one layer and leaves the excluded one."""
    code = next(p.values[2] for p in python_blocks() if p.values[0].name == "README.md" and "Trainer" in p.values[2])
    code = code.replace(
        "max_epochs=2", "max_epochs=0, logger=False, enable_checkpointing=False, enable_progress_bar=False"
    )
    code = re.sub(r"^ *NormMonitor\(\),\n", "", code, flags=re.M)
    exec(code, surroundings)
    kinds = {
        name: type(m).__name__ for name, m in surroundings["model"].named_modules() if name.endswith(("norm", "body.1"))
    }
    assert kinds == {"stem.norm": "BatchNorm2d", "body.1": "SwitchableNorm"}


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

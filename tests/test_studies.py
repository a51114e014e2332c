"""Every study of examples/studies runs, shortened, on scikit-learn's digits packed as the studies' image files are."""

import io
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from examples.studies.data import load
from lightning_norm.cli import compare
from lightning_norm.cli.compare.runs import read_contenders
from lightning_norm.cli.compare.store import RunStore

ROOT = Path(__file__).parents[1]
STUDIES = sorted(path.parent for path in (ROOT / "examples" / "studies").glob("*/study.yaml"))


def digits(side):
    """Return digits and labels, the images as uint8 of the given side."""
    data = load_digits()
    images = [Image.fromarray((image * 15.9).astype(np.uint8)).resize((side, side)) for image in data.images]
    return np.stack([np.asarray(image) for image in images]), data.target


def webp(images):
    """Return images as the studies' CIFAR files hold them: one array of bytes, and the length of each image."""
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).convert("RGB").save(file, "webp", lossless=True)
        files.append(file.getvalue())
    return np.frombuffer(b"".join(files), np.uint8), np.array([len(f) for f in files])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the studies' files, of digits."""
    root = tmp_path_factory.mktemp("data")
    x, y = digits(28)
    for name in ("mnist", "fashion_mnist"):
        np.savez(root / f"{name}.npz", x_train=x[:1200], y_train=y[:1200], x_test=x[1200:1400], y_test=y[1200:1400])
    x, y = digits(32)
    (a, a_lens), (b, b_lens), (t, t_lens) = webp(x[:600]), webp(x[600:1200]), webp(x[1200:1400])
    np.savez(root / "cifar10_webp_a.npz", blob=a, lens=a_lens, y=y[:600])
    np.savez(root / "cifar10_webp_b.npz", blob=b, lens=b_lens, y=y[600:1200], blob_t=t, lens_t=t_lens, y_t=y[1200:1400])
    return root


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, folder, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_NORM_DATA", str(folder))
    load.cache_clear()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_shortened_study(study, tmp_path):
    config = yaml.safe_load((study / "study.yaml").read_text())
    norms = (study / "contenders.txt").read_text()
    # Two batches of every contender.
    size = config["data"]["init_args"]["batch_size"]
    short = {
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 2,
        "trainer.limit_val_batches": 1,
        "trainer.limit_test_batches": 1,
        "data.init_args.train_size": max(2 * size, 100),
        "data.init_args.val_size": 200,
    }
    options = [text for name, value in short.items() for text in (f"--{name}", str(value))]
    files = ["--config", str(study / "study.yaml"), "--config", str(study / "full.yaml")]
    job = [*files, "--norms", norms, "--seeds", "1", "--metric", "test/acc"]
    compare.run([*job, *options])
    records = RunStore(tmp_path / "compare").read_all()
    assert sorted(r["label"] for r in records) == sorted(c.label for c in read_contenders(norms))
    assert all(0 <= r["test"]["test/acc"] <= 1 for r in records)
    assert (tmp_path / "compare" / "results.csv").is_file()


def test_a_missing_set_is_named_with_the_command_that_gets_it(tmp_path):
    load.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"(?s)mnist\.npz.*download=True"):
        load("mnist", tmp_path)

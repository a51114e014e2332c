"""Every study of examples/studies runs, shortened, on scikit-learn's digits packed as the studies' image files are."""

import bz2
import io
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from examples.studies.corrupt import KINDS, corrupted
from examples.studies.data import load, load_digit_sets
from examples.studies.nets import DomainBatchNorm2d
from examples.studies.shifts import DigitShift, MixtureData, RecalibrateOnTarget, ShiftClassifier
from lightning_norm import ContextNorm, contexts
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
    (m, m_y), (u, u_y), (d, d_y) = digits(32), digits(16), digits(8)
    np.savez(
        root / "digits_dg.npz", mnistm_tx=np.stack([255 - m] * 3, -1), mnistm_ty=m_y, digits_x=d, digits_y=d_y,
        usps_x=u[:1000], usps_y=u_y[:1000], usps_tx=u[1000:], usps_ty=u_y[1000:],
    )  # fmt: skip
    return root


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, folder, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_NORM_DATA", str(folder))
    load.cache_clear()
    load_digit_sets.cache_clear()


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
        **({"data.init_args.test_size": 300} if "test_size" in config["data"]["init_args"] else {}),
    }
    options = [text for name, value in short.items() for text in (f"--{name}", str(value))]
    files = ["--config", str(study / "study.yaml"), "--config", str(study / "full.yaml")]
    job = [*files, "--norms", norms, "--seeds", "1", "--metric", "test/acc"]
    compare.run([*job, *options])
    records = RunStore(tmp_path / "compare").read_all()
    assert sorted(r["label"] for r in records) == sorted(c.label for c in read_contenders(norms))
    assert all(0 <= r["test"]["test/acc"] <= 1 for r in records)
    assert (tmp_path / "compare" / "results.csv").is_file()


def test_the_list_of_a_study_has_one_command_per_line(capsys):
    study = ROOT / "examples" / "studies" / "domains"
    norms = (study / "contenders.txt").read_text()
    compare.run(
        ["--config", str(study / "study.yaml"), "--norms", norms, "--seeds", "2", "--metric", "test/acc", "--list"]
    )
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(read_contenders(norms))


def test_a_missing_set_is_named_with_the_command_that_gets_it(tmp_path):
    load.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"(?s)mnist\.npz.*download=True"):
        load("mnist", tmp_path)


def test_the_digit_sets_are_read_from_torchvisions_and_mnist_ms_own_files(tmp_path):
    images, labels = digits(16)
    for name, part in (("usps.bz2", slice(3)), ("usps.t.bz2", slice(3, 5))):
        # The format of LIBSVM: the label from 1, and numbered values in [-1, 1].
        rows = [
            f"{y + 1} " + " ".join(f"{i + 1}:{v / 127.5 - 1}" for i, v in enumerate(x.flatten()))
            for x, y in zip(images[part], labels[part], strict=True)
        ]
        (tmp_path / name).write_bytes(bz2.compress("\n".join(rows).encode()))
    (tmp_path / "mnist_m" / "mnist_m_test").mkdir(parents=True)
    Image.fromarray(np.full((32, 32, 3), 7, np.uint8)).save(tmp_path / "mnist_m" / "mnist_m_test" / "0.png")
    (tmp_path / "mnist_m" / "mnist_m_test_labels.txt").write_text("0.png 4\n")
    sets = load_digit_sets(tmp_path)
    assert {name: tuple(x.shape) for name, (x, _) in sets.items()} == {
        "mnist_m": (1, 3, 32, 32), "usps": (5, 1, 16, 16), "digits": (1797, 1, 8, 8)
    }  # fmt: skip
    assert sets["usps"][1].tolist() == labels[:5].tolist()
    assert (sets["usps"][0][:, 0].numpy().astype(int) - images[:5]).__abs__().max() <= 1
    assert sets["mnist_m"][1].tolist() == [4]


def test_missing_digit_sets_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)digits_dg\.npz.*usps\.bz2.*mnist_m_test_labels"):
        load_digit_sets(tmp_path)


def test_corruptions_are_the_same_each_time_and_grow_with_their_severity():
    images = torch.from_numpy(np.stack([digits(32)[0][:20]] * 3, 1))
    for kind in KINDS:
        one, five = corrupted(images, kind, 1), corrupted(images, kind, 5)
        assert one.dtype == torch.uint8
        assert one.shape == images.shape
        difference = [(each.float() - images.float()).square().mean() for each in (one, five)]
        assert 0 < difference[0] < difference[1]
        assert torch.equal(one, corrupted(images, kind, 1))
    with pytest.raises(ValueError, match="no corruption 'fog'"):
        corrupted(images, "fog", 1)


@pytest.mark.parametrize("mixture", ["real", "conflict"])
def test_a_mixture_has_every_image_in_one_part(mixture):
    data = MixtureData(mixture, train_size=300, val_size=150, test_size=300)
    data.setup()
    assert [len(data.splits[name]) for name in ("train", "val", *data.tests)] == [300, 150, 100, 100, 100]
    images = torch.cat([split.images for split in data.splits.values()]).flatten(1)
    # scikit-learn's digits have no two that are the same.
    assert len(images.unique(dim=0)) == len(images)
    assert data.splits["train"].labels[:, 1].bincount().tolist() == [100, 100, 100]
    with pytest.raises(ValueError, match="were asked for"):
        MixtureData(mixture, train_size=6000).setup()


@pytest.mark.parametrize("ids", ["domain", "label", "random"])
def test_ids_of_a_mixture_are_left_out_in_the_test(ids):
    data = MixtureData(ids=ids, ids_in_test=False, train_size=300, val_size=150, test_size=300)
    data.setup()
    batch = next(iter(data.test_dataloader()[1]))
    images, labels, told = data.on_after_batch_transfer(batch, 1)
    assert images.shape[1:] == (3, 28, 28)
    assert told is None
    data.ids_in_test = True
    told = data.on_after_batch_transfer(batch, 1)[2]
    expected = {"domain": torch.ones_like(labels), "label": labels, "random": told}[ids]
    assert torch.equal(told, expected)
    assert ids != "random" or told.unique().tolist() == [0, 1, 2]


def test_a_batchnorm_per_domain_is_context_norm_of_domains():
    x, domain = torch.randn(12, 4, 5, 5) + torch.arange(12).view(-1, 1, 1, 1), torch.arange(12) % 3
    reference, layer = DomainBatchNorm2d(4, 3), ContextNorm(4, context="ids")
    reference.domain = domain
    with contexts(layer, domain):
        torch.testing.assert_close(layer(x), reference(x))


def test_statistics_of_each_target_and_afterwards_those_of_the_training():
    data = DigitShift(train_size=100, val_size=200)
    model = ShiftClassifier([4], [2])
    seen = []

    class See(pl.Callback):
        def on_test_batch_end(self, trainer, pl_module, *args):
            seen.append(model.net[1].running_mean.clone())

    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[RecalibrateOnTarget(), See()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, data)
    trained = model.net[1].running_mean.clone()
    logged = trainer.test(model, data, verbose=False)[0]
    with torch.no_grad():
        for k, name in enumerate(data.tests):
            images = data.on_after_batch_transfer(data.splits[name][:], 0)[0]
            mean = model.net[0](images).mean((0, 2, 3))
            first = [len(data.splits[n]) for n in data.tests[:k]]
            torch.testing.assert_close(seen[sum(-(-n // 500) for n in first)], mean)
    assert torch.equal(model.net[1].running_mean, trained)
    targets = [logged[f"test/acc_{name}"] for name in ("mnist_m", "usps", "digits")]
    assert logged["test/acc"] == pytest.approx(sum(targets) / 3)

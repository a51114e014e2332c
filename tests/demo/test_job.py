import struct
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_norm.cli.main import main
from lightning_norm.demo.data import CIFAR10, MNIST, Digits, InMemoryLoader, stratified_split
from lightning_norm.demo.job import CIFAR100, FashionMNIST, ImageClassifier, warm_up_and_cosine

# LightningCLI 2.6 calls names that jsonargparse renamed in 4.5x.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

ARGUMENTS = ["fit", "--model", "ImageClassifier", "--trainer.fast_dev_run", "1", "--trainer.enable_progress_bar=false"]


def write_mnist(root, name="MNIST", sizes=(60, 20)):
    """Files in MNIST's format, uncompressed, as torchvision keeps them."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, n in zip(("train", "t10k"), sizes, strict=True):
        images = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
    return root


def pl_quiet(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return pl.Trainer(**quiet, enable_model_summary=False, **options)


def test_digits_are_split_the_same_way_every_time_and_stratified():
    parts = []
    for _ in range(2):
        data = Digits()
        data.setup()
        parts.append(data.splits)
        torch.manual_seed(1)
    sizes = {name: len(split) for name, split in parts[0].items()}
    assert sizes == {"train": 1437, "val": 180, "test": 180}
    for name, split in parts[0].items():
        assert torch.equal(split.images, parts[1][name].images)
        counts = split.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 0.1 * sizes[name] / 10 + 2
    everything = torch.cat([split.images for split in parts[0].values()])
    from sklearn.datasets import load_digits

    truth = torch.from_numpy(load_digits().images).to(torch.uint8)
    assert torch.equal(everything[:, 0, 1:-1, 1:-1].sort(0).values, truth.sort(0).values)


@pytest.mark.parametrize(("n", "fraction"), [(100, 0.1), (57, 0.5), (1797, 0.2)])
def test_a_split_has_its_size_and_loses_nothing(n, fraction):
    labels = torch.arange(n) % 7
    first, second = stratified_split(labels, fraction)
    assert torch.cat([first, second]).sort().values.tolist() == list(range(n))
    assert abs(len(second) - fraction * n) <= 1


def test_images_are_normalized_and_have_three_channels():
    data = Digits(batch_size=1437)
    data.setup()
    images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert images.shape == (1437, 3, 10, 10)
    assert labels.dtype == torch.int64
    assert images.mean().abs() < 1e-5
    assert (images.std() - 1).abs() < 1e-3


def test_order_changes_with_the_epoch_and_follows_the_seed():
    data = Digits(batch_size=64)
    data.setup()
    loader = data.train_dataloader()
    assert isinstance(loader, InMemoryLoader)
    first = torch.cat([labels for _, labels in loader])
    assert len(first) == 22 * 64  # the incomplete batch is left out
    loader.sampler.set_epoch(1)
    assert not torch.equal(first, torch.cat([labels for _, labels in loader]))
    again = data.train_dataloader()
    assert torch.equal(first, torch.cat([labels for _, labels in again]))
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 180


def test_workers_read_the_same_batches():
    alone, helped = Digits(batch_size=500), Digits(batch_size=500, num_workers=1)
    for data in (alone, helped):
        data.setup()
    for (a, la), (b, lb) in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_workers": -1}])
def test_bad_sizes(options):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Digits(**options)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-norm\[examples\]'"):
        Digits().setup()


def test_torchvision_files_are_read(tmp_path):
    data = MNIST(batch_size=10, root=str(write_mnist(tmp_path)))
    data.prepare_data()
    data.setup()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 54, "val": 6, "test": 20}
    raw = (tmp_path / "MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:]
    assert data.splits["test"].images.flatten().tolist() == list(raw)


def test_colour_images_keep_their_layout(monkeypatch):
    pixels = np.arange(20 * 32 * 32 * 3, dtype=np.int64).reshape(20, 32, 32, 3) % 256

    class Fake:
        def __init__(self, root, train, download):
            self.data, self.targets = pixels.astype(np.uint8), [i % 10 for i in range(20)]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    data = CIFAR10()
    data.setup()
    assert torch.equal(data.splits["test"].images, torch.from_numpy(pixels.astype(np.uint8)).permute(0, 3, 1, 2))


def test_switching_the_data_on_the_command_line(tmp_path, capfd):
    write_mnist(tmp_path, "FashionMNIST")
    main([*ARGUMENTS, "--data", "Digits", "--root", str(tmp_path), "--data", "FashionMNIST", "--data.batch_size", "4"])
    assert FashionMNIST.num_classes == 10


def test_the_number_of_classes_follows_the_data(monkeypatch):
    seen = {}
    monkeypatch.setattr(pl.Trainer, "fit", lambda self, model, datamodule, **_: seen.update(m=model, d=datamodule))
    main([*ARGUMENTS, "--data", "CIFAR100"])
    assert seen["m"].num_classes == 100
    assert seen["m"].hparams["num_classes"] == 100
    assert isinstance(seen["d"], CIFAR100)
    main(ARGUMENTS)
    assert isinstance(seen["d"], Digits)
    assert seen["m"].num_classes == 10


def test_a_mismatch_is_told():
    model = ImageClassifier(num_classes=7)
    with pytest.raises(ValueError, match=r"Digits has 10 classes, the model num_classes=7.*--model.num_classes 10"):
        pl_quiet(fast_dev_run=1).fit(model, datamodule=Digits())


def test_a_failed_download_names_root(tmp_path, monkeypatch):
    def offline(self):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", offline)
    with pytest.raises(RuntimeError, match=r"could not be downloaded \(Error downloading\).*--root DIR"):
        MNIST(root=str(tmp_path / "nothing")).prepare_data()


def test_layers_have_readable_names_and_small_stem():
    model = ImageClassifier()
    assert "net.layer1.0.bn1" in dict(model.named_modules())
    assert model.net.conv1.kernel_size == (3, 3)
    assert model.net(torch.zeros(2, 3, 12, 12)).shape == (2, 10)


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_other_networks(arch):
    assert ImageClassifier(arch, num_classes=4)(torch.zeros(2, 3, 32, 32)).shape == (2, 4)


def test_an_unknown_network_is_told():
    with pytest.raises(ValueError, match="Did you mean resnet18"):
        ImageClassifier("resnet-18")


def test_training_forever_has_a_constant_rate():
    model = ImageClassifier("resnet18")
    pl_quiet(max_epochs=-1, max_steps=-1, max_time="00:00:00:01", limit_train_batches=1, limit_val_batches=0).fit(
        model, datamodule=Digits(batch_size=4)
    )
    assert model.optimizers().param_groups[0]["lr"] == model.lr


def test_the_rate_warms_up_and_ends_at_zero():
    factors = [warm_up_and_cosine(s, 50) for s in range(60)]
    assert factors[0] == 0.2
    assert max(factors) == 1.0
    assert factors[50:] == [0.0] * 10


@pytest.mark.slow
def test_digits_reach_97_percent():
    pl.seed_everything(0, verbose=False)
    model, data = ImageClassifier(), Digits()
    trainer = pl_quiet(max_epochs=5)
    trainer.fit(model, datamodule=data)
    assert trainer.test(model, datamodule=data, verbose=False)[0]["test_acc"] >= 0.97

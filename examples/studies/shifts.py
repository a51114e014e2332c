"""Data that differ between training and test: several test sets, a classifier that tells them apart, and AdaBN."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from examples.studies.corrupt import KINDS, corrupted
from examples.studies.data import StudyData, as_tensor, load, load_digit_sets
from examples.studies.nets import DomainBatchNorm2d, StudyClassifier
from lightning_norm import NormRecalibrate
from lightning_norm.demo.data import Images


class ShiftedData(StudyData):
    """Base of what is tested on several sets, each with a loader of its own.

    Test images come in a fixed random order: what is computed from batches of them is to depend on their number alone.

    Args:
        name: set of the training images, see :class:`StudyData`.
        test_batch_size: test samples per batch, which matters to what normalizes by the statistics of test batches.
        options: see :class:`StudyData`.

    Attributes:
        metrics: name of each accuracy -> the test sets whose mean it is.
    """

    metrics: dict[str, list[str]]

    def __init__(self, name: str, test_batch_size: int = 500, **options: Any) -> None:
        super().__init__(name, **options)
        self.test_batch_size = test_batch_size

    @property
    def tests(self) -> list[str]:
        """Return the names of the test sets, in the order of their loaders."""
        return list(dict.fromkeys(test for tests in self.metrics.values() for test in tests))

    @override
    def test_dataloader(self) -> Any:
        loaders = [self._loader(name) for name in self.tests]
        for loader in loaders:
            loader.batch_size = self.test_batch_size
        return loaders


class DigitShift(ShiftedData):
    """Train on MNIST; test on MNIST and, enlarged or reduced to 28 pixels, on MNIST-M, USPS and the digits of the UCI.

    Args:
        train_size: see :class:`StudyData`.
        val_size: see :class:`StudyData`.
        batch_size: see :class:`StudyData`.
        test_batch_size: see :class:`ShiftedData`.
        root: see :class:`StudyData`.
    """

    def __init__(
        self,
        train_size: int | None = 10000,
        val_size: int = 5000,
        batch_size: int = 64,
        test_batch_size: int = 500,
        root: str | None = None,
    ) -> None:
        super().__init__(
            "mnist", test_batch_size, train_size=train_size, val_size=val_size, batch_size=batch_size, root=root
        )
        targets = ["mnist_m", "usps", "digits"]
        # The mean is over the domains that training has not seen.
        self.metrics = {f"acc_{name}": [name] for name in ["mnist", *targets]} | {"acc": targets}

    @override
    def read(self) -> dict[str, Images]:
        splits, sets = super().read(), load_digit_sets(Path(self.root))
        tests = {"mnist": splits.pop("test"), **{name: sets[name] for name in ("mnist_m", "usps", "digits")}}
        return splits | {name: shuffled(*images_28(*test)) for name, test in tests.items()}


class CorruptedCifar(ShiftedData):
    """Train on CIFAR-10 as it is; test on a fixed part of its test images, clean and with each corruption.

    Args:
        train_size: see :class:`StudyData`.
        val_size: see :class:`StudyData`.
        batch_size: see :class:`StudyData`.
        test_batch_size: see :class:`ShiftedData`.
        test_size: test images, the same ones under every corruption.
        severities: of 1 to 5, which are tested.
        flip: see :class:`StudyData`.
        root: see :class:`StudyData`.
    """

    def __init__(
        self,
        train_size: int | None = 8000,
        val_size: int = 5000,
        batch_size: int = 128,
        test_batch_size: int = 500,
        test_size: int = 2000,
        severities: tuple[int, ...] = (1, 3, 5),
        flip: bool = True,
        root: str | None = None,
    ) -> None:
        super().__init__(
            "cifar10", test_batch_size, train_size=train_size, val_size=val_size, batch_size=batch_size, flip=flip,
            root=root,
        )  # fmt: skip
        self.test_size, self.severities = test_size, tuple(severities)
        self.metrics = {"acc_clean": ["clean"]}
        self.metrics |= {f"acc_{kind}": [f"{kind}_{s}" for s in self.severities] for kind in KINDS}
        self.metrics |= {f"acc_severity_{s}": [f"{kind}_{s}" for kind in KINDS] for s in self.severities}
        self.metrics["acc"] = [f"{kind}_{s}" for kind in KINDS for s in self.severities]

    @override
    def read(self) -> dict[str, Images]:
        splits = super().read()
        del splits["test"]
        return splits | corrupted_cifar(Path(self.root), self.test_size, self.severities)


class MixtureData(ShiftedData):
    """A mixture of three domains of digits, in training and in test; a batch is (images, labels, ids).

    "real" is MNIST, MNIST-M and USPS. In "conflict" a third of MNIST is as it is, a third inverted, a third faint on
    grey. No digit is in two parts: MNIST is its training images, for MNIST-M is made of its test images.

    Args:
        mixture: "real" or "conflict".
        ids: what the third part of a batch is: the "domain" of each image, its "label", or a "random" number in
            [0, 3) that belongs to the image.
        ids_in_test: whether validation and test have it too; otherwise it is ``None`` there.
        train_size: training images, a third from each domain.
        val_size: validation images, likewise.
        test_size: test images, likewise.
        batch_size: see :class:`StudyData`.
        test_batch_size: see :class:`ShiftedData`.
        root: see :class:`StudyData`.

    Raises:
        ValueError: fewer images than that in a domain.
    """

    def __init__(
        self,
        mixture: Literal["real", "conflict"] = "real",
        ids: Literal["domain", "label", "random"] = "domain",
        ids_in_test: bool = True,
        train_size: int = 4500,
        val_size: int = 1500,
        test_size: int = 9000,
        batch_size: int = 128,
        test_batch_size: int = 500,
        root: str | None = None,
    ) -> None:
        super().__init__(
            "mnist", test_batch_size, train_size=train_size, val_size=val_size, batch_size=batch_size, root=root
        )
        self.mixture, self.ids, self.ids_in_test, self.test_size = mixture, ids, ids_in_test, test_size
        domains = ["mnist", "mnist_m", "usps"] if mixture == "real" else ["plain", "inverted", "faint"]
        self.metrics = {f"acc_{name}": [name] for name in domains} | {"acc": domains}

    @override
    def read(self) -> dict[str, Images]:
        sizes = [n // 3 for n in (self.train_size, self.val_size, self.test_size)]
        parts = []
        for k, (name, (images, labels)) in enumerate(self._domains().items()):
            if sum(sizes) > len(labels):
                raise ValueError(f"MixtureData: {name} has {len(labels)} images, and {sizes} were asked for.")
            images, labels = shuffled(images, labels)
            # Behind the label, so that the two travel as one tensor.
            labels = torch.stack([labels, self._ids(k, labels)], 1)
            used = sum(sizes)
            parts.append(list(zip(images[:used].split(sizes), labels[:used].split(sizes), strict=True)))
        train, val, test = zip(*parts, strict=True)
        joined = {
            name: tuple(map(torch.cat, zip(*split, strict=True))) for name, split in (("train", train), ("val", val))
        }
        return joined | dict(zip(self.tests, test, strict=True))

    @override
    def on_after_batch_transfer(self, batch: Images, dataloader_idx: int) -> tuple[Tensor, Tensor, Tensor | None]:
        images, both = super().on_after_batch_transfer(batch, dataloader_idx)
        told = self.ids_in_test or (self.trainer is not None and self.trainer.training)
        return images, both[:, 0], both[:, 1] if told else None

    def _domains(self) -> dict[str, Images]:
        """Return all images of each domain, with three channels of 28 x 28, and their labels."""
        x, y = (as_tensor(a) for a in load("mnist", Path(self.root))[:2])
        if self.mixture == "real":
            sets = load_digit_sets(Path(self.root))
            return {"mnist": images_28(x, y), "mnist_m": images_28(*sets["mnist_m"]), "usps": images_28(*sets["usps"])}
        changes: dict[str, Callable[[Tensor], Tensor]] = {
            "plain": lambda x: x,
            "inverted": lambda x: 255 - x,
            "faint": lambda x: 112 + x // 8,
        }
        return {name: images_28(change(x[k::3]), y[k::3]) for k, (name, change) in enumerate(changes.items())}

    def _ids(self, domain: int, labels: Tensor) -> Tensor:
        if self.ids == "label":
            return labels
        if self.ids == "domain":
            return torch.full_like(labels, domain)
        return torch.randint(3, labels.shape, generator=torch.Generator().manual_seed(domain))


class ShiftClassifier(StudyClassifier):
    """A StudyClassifier that logs in the test what ``metrics`` of a :class:`ShiftedData` lists.

    Args:
        channels: see :class:`PlainNet`.
        strides: see :class:`PlainNet`.
        lr: see :class:`StudyClassifier`.
        domains: see :class:`PlainNet`; the third part of a batch tells the domain of each sample.
    """

    def __init__(self, channels: list[int], strides: list[int], lr: float = 0.1, domains: int = 0) -> None:
        super().__init__(channels, strides, lr, domains=domains)
        self.hits: dict[int, list[Tensor]] = {}

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for module in self.modules():
            if isinstance(module, DomainBatchNorm2d):
                module.domain = batch[2]

    @override
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.on_train_batch_start(batch, batch_idx)

    on_test_batch_start = on_validation_batch_start

    @override
    def on_test_epoch_start(self) -> None:
        self.hits = {}

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        images, labels, *_ = batch
        self.hits.setdefault(dataloader_idx, []).append((self(images).argmax(1) == labels).float())

    @override
    def on_test_epoch_end(self) -> None:
        data: Any = self.trainer.datamodule
        accuracy = {name: torch.cat(self.hits[k]).mean() for k, name in enumerate(data.tests)}
        for metric, tests in data.metrics.items():
            self.log(f"test/{metric}", torch.stack([accuracy[name] for name in tests]).mean())


class RecalibrateOnTarget(pl.Callback):
    """AdaBN: before each test set running statistics are estimated on its images; at the end the training's are back.

    Li et al. 2016, arXiv 1603.04779. No label is read. It is the baseline for whatever adapts to the data in use.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            loaders: Any = trainer.test_dataloaders
            count = int(trainer.num_test_batches[dataloader_idx])
            NormRecalibrate(count, when="on_request", loader=loaders[dataloader_idx]).run(trainer, pl_module)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with torch.no_grad():
            for name, buffer in pl_module.named_buffers():
                buffer.copy_(self.buffers[name])


@functools.lru_cache(maxsize=1)  # the runs of one comparison share them
def corrupted_cifar(root: Path, size: int, severities: tuple[int, ...]) -> dict[str, Images]:
    """Return "clean" test images of CIFAR-10 and the same ones corrupted, as "jpeg_1" and so on.

    Args:
        root: folder of the files.
        size: how many images.
        severities: of each corruption.
    """
    images, labels = (part[:size] for part in shuffled(*map(as_tensor, load("cifar10", root)[2:])))
    sets = {f"{kind}_{s}": (corrupted(images, kind, s), labels) for kind in KINDS for s in severities}
    return {"clean": (images, labels), **sets}


def shuffled(images: Tensor, labels: Tensor) -> Images:
    """Return images and labels in a fixed random order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def joined(parts: Sequence[Images]) -> Images:
    """Return the images and the labels of all parts."""
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def images_28(images: Tensor, labels: Tensor) -> Images:
    """Return images as (N, 3, 28, 28) in uint8, enlarged or reduced bilinearly, and the labels."""
    if images.shape[-1] != 28:
        resized = torch.nn.functional.interpolate(images.float(), (28, 28), mode="bilinear", antialias=True)
        images = resized.round().to(torch.uint8)
    return images.expand(-1, 3, -1, -1), labels

"""Small image data sets, held in memory: scikit-learn's digits (no download) and four of torchvision's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar
from urllib.error import URLError

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from lightning_norm.surgery.extras import require

Images = tuple[Tensor, Tensor]


class InMemoryDataset(Dataset[Images]):
    """Images and labels as two tensors, read a whole batch at a time.

    Args:
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Images:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> Images:
        """Return one batch; a DataLoader looks for this method."""
        return self[torch.tensor(indices)]


class InMemoryLoader:
    """Batches of a data set that is in memory already, where worker processes would only copy.

    Args:
        dataset: what to read.
        batch_size: samples per batch.
        sampler: the order; its ``set_epoch`` is called by the Trainer.
        drop_last: leave out an incomplete last batch.
    """

    batch_sampler = None  # the Trainer looks for it beside ``sampler``

    def __init__(
        self, dataset: InMemoryDataset, batch_size: int, sampler: DistributedSampler[int], drop_last: bool
    ) -> None:
        self.dataset, self.batch_size, self.sampler, self.drop_last = dataset, batch_size, sampler, drop_last

    def __len__(self) -> int:
        full, rest = divmod(len(self.sampler), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Images]:
        # Indexed a whole batch at a time, which is much faster than picking image after image.
        order = torch.tensor(list(self.sampler))
        for batch in range(len(self)):
            yield self.dataset[order[batch * self.batch_size : (batch + 1) * self.batch_size]]


class ImageData(pl.LightningDataModule):
    """Base of the data sets below: a fixed stratified split, normalized by the training images' mean and deviation.

    Args:
        batch_size: samples per batch and process.
        num_workers: worker processes; 0 is the fastest here, for the images are in memory.
        root: folder of torchvision's files.

    Raises:
        ValueError: ``batch_size`` or ``num_workers`` out of range.
    """

    num_classes: ClassVar[int] = 10
    channels: ClassVar[int] = 3

    def __init__(self, batch_size: int = 64, num_workers: int = 0, root: str = "data") -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"{type(self).__name__}: batch_size must be at least 1 and num_workers at least 0, "
                f"got {batch_size} and {num_workers}."
            )
        self.batch_size, self.num_workers, self.root = batch_size, num_workers, root
        self.splits: dict[str, InMemoryDataset] = {}
        self.mean = self.std = torch.ones(())

    def read(self) -> dict[str, Images]:
        """Return the splits "train", "val" and "test": images (N, C, H, W) in uint8, labels (N,)."""
        raise NotImplementedError

    @classmethod
    def check_installed(cls) -> None:
        """Raise ``ModuleNotFoundError`` where something is missing that these data are read with."""

    @override
    def setup(self, stage: str | None = None) -> None:
        # The Trainer calls it once for each stage, and the data stay the same.
        if self.splits:
            return
        self.splits = {name: InMemoryDataset(*pair) for name, pair in self.read().items()}
        # Of the training images alone, so that nothing of the others enters the training.
        pixels = self.splits["train"].images.float()
        self.std, self.mean = torch.std_mean(pixels, dim=(0, 2, 3), keepdim=True)

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        # Bytes travel to the device and become floats there: a quarter of the traffic.
        images = (images.float() - self.mean.to(images.device)) / self.std.to(images.device)
        # Grey images get the three channels that a torchvision network reads.
        return images.expand(-1, self.channels, -1, -1), labels

    @override
    def train_dataloader(self) -> Any:
        return self._loader("train", shuffle=True)

    @override
    def val_dataloader(self) -> Any:
        return self._loader("val")

    @override
    def test_dataloader(self) -> Any:
        return self._loader("test")

    @override
    def predict_dataloader(self) -> Any:
        return self._loader("test")

    def _loader(self, split: str, shuffle: bool = False) -> Any:
        data = self.splits[split]
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        # The Trainer would add this sampler itself, but only to a torch DataLoader.
        sampler: DistributedSampler[int] = DistributedSampler(
            data, num_replicas=ranks, rank=rank, shuffle=shuffle, seed=torch.initial_seed() % 2**31
        )
        # A last batch of one image has no batch statistics; a data set of a single batch keeps it.
        drop_last = shuffle and len(sampler) > self.batch_size
        # Worker processes pay off only for a user who adds work per image.
        if not self.num_workers:
            return InMemoryLoader(data, self.batch_size, sampler, drop_last)
        return DataLoader(
            data,
            self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=True,
            collate_fn=_as_is,
        )


class Digits(ImageData):
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels: 1437 to train, 180 to validate, 180 to test.

    They are padded to 10 x 10, so that the last maps of a resnet are 2 x 2 and instance statistics exist there.

    Args:
        batch_size: samples per batch and process.
        num_workers: worker processes; 0 is the fastest here, for the images are in memory.
        root: not used, the images come with scikit-learn.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """

    @classmethod
    @override
    def check_installed(cls) -> None:
        other = ", or choose other data: --data FashionMNIST --root DIR"
        require("scikit-learn's Digits", "examples", "sklearn", otherwise=other)

    @override
    def read(self) -> dict[str, Images]:
        self.check_installed()
        # Imported late: the other data sets do without scikit-learn.
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.from_numpy(data.images).to(torch.uint8).unsqueeze(1)
        images = torch.nn.functional.pad(images, (1, 1, 1, 1))
        labels = torch.from_numpy(data.target).long()
        train, others = stratified_split(labels, 0.2)
        # The second split counts within the first one's rest, hence the indices of indices.
        val, test = stratified_split(labels[others], 0.5)
        parts = {"train": train, "val": others[val], "test": others[test]}
        return {name: (images[i], labels[i]) for name, i in parts.items()}


class TorchvisionData(ImageData):
    """A data set of torchvision: a tenth of its training images validates, stratified; its test images test.

    Args:
        batch_size: samples per batch and process.
        num_workers: worker processes; 0 is the fastest here, for the images are in memory.
        root: folder that holds the files, or where they are downloaded to.

    Raises:
        RuntimeError: the files are not there and cannot be downloaded.
    """

    @override
    def prepare_data(self) -> None:
        # Lightning calls this in one process per machine: here, and nowhere else, may be downloaded.
        self._open(train=True, download=True)
        self._open(train=False, download=True)

    @override
    def read(self) -> dict[str, Images]:
        images, labels = self._tensors(train=True)
        train, val = stratified_split(labels, 0.1)
        return {
            "train": (images[train], labels[train]),
            "val": (images[val], labels[val]),
            "test": self._tensors(train=False),
        }

    def _tensors(self, train: bool) -> Images:
        dataset = self._open(train, download=False)
        images = torch.as_tensor(dataset.data)
        # torchvision holds grey images as (N, H, W) and colored ones as (N, H, W, C).
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
        return images, torch.as_tensor(dataset.targets).long()

    def _open(self, train: bool, download: bool) -> Any:
        # Imported late, as scikit-learn above: each data set needs its own library alone.
        from torchvision import datasets

        name = type(self).__name__
        source = getattr(datasets, name)
        # Files that are there are used without a look at the network, which may not be there.
        try:
            return source(self.root, train=train, download=False)
        except RuntimeError as missing:  # torchvision: "Dataset not found or corrupted."
            if not download:
                raise RuntimeError(f"{name}: {missing} Looked in --root {self.root}.") from missing
        try:
            return source(self.root, train=train, download=True)
        except (RuntimeError, URLError, OSError) as error:
            raise RuntimeError(
                f"{name} is not in {self.root!r} and could not be downloaded ({str(error).splitlines()[-1]}). "
                "Name the folder that holds torchvision's files with --root DIR, or use --data Digits, "
                "which needs no download."
            ) from error


class MNIST(TorchvisionData):
    """Handwritten digits, 28 x 28: 54 000 to train, 6000 to validate, 10 000 to test."""


class FashionMNIST(TorchvisionData):
    """Articles of clothing, 28 x 28: 54 000 to train, 6000 to validate, 10 000 to test."""


class CIFAR10(TorchvisionData):
    """Photographs of ten kinds of things, 32 x 32: 45 000 to train, 5000 to validate, 10 000 to test."""


class CIFAR100(TorchvisionData):
    """Photographs of a hundred kinds of things, 32 x 32: 45 000 to train, 5000 to validate, 10 000 to test."""

    num_classes = 100


DATA_SETS: dict[str, type[ImageData]] = {cls.__name__: cls for cls in (Digits, MNIST, FashionMNIST, CIFAR10, CIFAR100)}
"""The data of the built-in job, by what a user types."""


def stratified_split(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Split indices in two, the same way every time, with ``fraction`` of each class in the second part.

    >>> first, second = stratified_split(torch.tensor([0, 1] * 10), 0.2)
    >>> len(first), len(second)
    (16, 4)
    """
    # A generator and a seed of its own: the split must not depend on the seed of the training.
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].sort(stable=True).indices]
    # Every 1/fraction-th of the images in class order, so that the parts have the size that was asked for, rounded up.
    steps = (torch.arange(len(labels) + 1, dtype=torch.float64) * fraction - 1e-9).ceil()
    is_second = steps[1:] > steps[:-1]
    return by_class[~is_second].sort().values, by_class[is_second].sort().values


def _as_is(batch: Any) -> Any:
    return batch

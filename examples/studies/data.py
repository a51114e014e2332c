"""The image sets of the studies, held in memory: packed files in one folder, or torchvision's downloads."""

from __future__ import annotations

import functools
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_norm.demo.data import ImageData, Images, stratified_split

TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
FOLDER = "LIGHTNING_NORM_DATA"
"""Environment variable that names the folder of the packed files."""


class StudyData(ImageData):
    """MNIST, Fashion-MNIST or CIFAR-10: a fixed part to train, a validation split, the whole test set.

    Choices are made on the validation split; the test set is looked at once, at the end of each run.

    Args:
        name: "mnist", "fashion_mnist" or "cifar10".
        train_size: training images, the first of a fixed stratified order; ``None`` for all that are left.
        val_size: validation images, from the training set.
        batch_size: samples per batch and process.
        flip: mirror training images at random, left to right.
        root: folder with the packed files (``mnist.npz``, ``cifar10_webp_a.npz``, ...) or with torchvision's; by
            default the environment variable LIGHTNING_NORM_DATA, or ``data``.

    Raises:
        FileNotFoundError: neither kind of file is there; the message says what was looked for.
    """

    def __init__(
        self,
        name: str = "cifar10",
        train_size: int | None = None,
        val_size: int = 5000,
        batch_size: int = 128,
        flip: bool = False,
        root: str | None = None,
    ) -> None:
        super().__init__(batch_size, root=root or os.environ.get(FOLDER, "data"))
        self.name, self.train_size, self.val_size, self.flip = name, train_size, val_size, flip

    @override
    def read(self) -> dict[str, Images]:
        x, y, x_test, y_test = (as_tensor(a) for a in load(self.name, Path(self.root)))
        rest, val = stratified_split(y, self.val_size / len(y))
        if self.train_size is not None:
            _, part = stratified_split(y[rest], self.train_size / len(rest))
            rest = rest[part]
        return {"train": (x[rest], y[rest]), "val": (x[val], y[val]), "test": (x_test, y_test)}

    @override
    def on_after_batch_transfer(self, batch: Images, dataloader_idx: int) -> Images:
        images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.flip and self.trainer is not None and self.trainer.training:
            mirrored = torch.rand(len(images), device=images.device) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
        return images, labels


def as_tensor(array: np.ndarray) -> Tensor:
    """Return images as (N, C, H, W) in uint8, labels as (N,) in int64."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if tensor.dim() == 1:
        return tensor.long()
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor.permute(0, 3, 1, 2).contiguous()


@functools.lru_cache(maxsize=1)  # the runs of one comparison read the same set
def load(name: str, root: Path) -> tuple[np.ndarray, ...]:
    """Return training images and labels, test images and labels, as uint8 arrays.

    Raises:
        FileNotFoundError: no file of the set is in the folder.
        ValueError: an unknown set.
    """
    if name not in TORCHVISION:
        raise ValueError(f"no data set {name!r}: choose one of {', '.join(TORCHVISION)}.")
    files = [
        root / f for f in (("cifar10_webp_a.npz", "cifar10_webp_b.npz") if name == "cifar10" else (f"{name}.npz",))
    ]
    if all(file.exists() for file in files):
        if name != "cifar10":
            packed = np.load(files[0])
            return packed["x_train"], packed["y_train"], packed["x_test"], packed["y_test"]
        a, b = (np.load(file) for file in files)
        x = np.concatenate([_webp(a["blob"], a["lens"]), _webp(b["blob"], b["lens"])])
        return x, np.concatenate([a["y"], b["y"]]), _webp(b["blob_t"], b["lens_t"]), b["y_t"]
    import torchvision

    cls = getattr(torchvision.datasets, TORCHVISION[name])
    try:
        train, test = (cls(str(root), train=t, download=False) for t in (True, False))
    except RuntimeError as error:
        looked = " and ".join(str(file) for file in files)
        raise FileNotFoundError(
            f"{name} is not in {root}: looked for {looked}, and for torchvision's files ({error}). Set {FOLDER} or "
            f"--data.init_args.root to their folder, or download them once: "
            f"python -c \"import torchvision; torchvision.datasets.{TORCHVISION[name]}('{root}', download=True)\""
        ) from error
    return tuple(np.asarray(part, dtype=np.uint8) for s in (train, test) for part in (s.data, s.targets))


@functools.lru_cache(maxsize=1)
def load_digit_sets(root: Path) -> dict[str, Images]:
    """Return "mnist_m" (9000), "usps" (9298) and "digits" (1797): images of different sizes, and labels.

    Raises:
        FileNotFoundError: not all of them are there.
    """
    packed = root / "digits_dg.npz"
    if packed.exists():
        file = np.load(packed)
        names = {"mnist_m": ["mnistm_t"], "usps": ["usps_", "usps_t"], "digits": ["digits_"]}
        arrays = {
            name: [np.concatenate([file[f"{part}{which}"] for part in parts]) for which in "xy"]
            for name, parts in names.items()
        }
    else:
        try:
            arrays = {"mnist_m": _mnist_m(root), "usps": _usps(root), "digits": _digits()}
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"the digit sets are not in {root}: looked for {packed}; for USPS of torchvision, usps.bz2 and "
                "usps.t.bz2, which torchvision.datasets.USPS(root, train=..., download=True) gets; and for MNIST-M of "
                f"Ganin et al., the folder mnist_m with mnist_m_test/*.png and mnist_m_test_labels.txt ({error}). Set "
                f"{FOLDER} or --data.init_args.root to their folder."
            ) from error
    return {name: (as_tensor(x), as_tensor(y)) for name, (x, y) in arrays.items()}


def _mnist_m(root: Path) -> list[np.ndarray]:
    """Return the test images of MNIST-M as its authors packed them: files, and a list of their names and labels."""
    from PIL import Image

    folder = root / "mnist_m"
    lines = [line.split() for line in (folder / "mnist_m_test_labels.txt").read_text().splitlines() if line.strip()]
    images = [np.asarray(Image.open(folder / "mnist_m_test" / name).convert("RGB")) for name, _ in lines]
    return [np.stack(images), np.array([int(label) for _, label in lines])]


def _usps(root: Path) -> list[np.ndarray]:
    import torchvision

    parts = [torchvision.datasets.USPS(str(root), train=train, download=False) for train in (True, False)]
    return [np.concatenate([np.asarray(getattr(part, name)) for part in parts]) for name in ("data", "targets")]


def _digits() -> list[np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return [(data.images * 255 / 16).astype(np.uint8), data.target]


def _webp(blob: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the images of lossless WebP files that lie behind each other in one array of bytes."""
    from PIL import Image

    ends, raw = np.cumsum(lengths, dtype=np.int64), blob.tobytes()

    def decode(i: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(raw[ends[i] - lengths[i] : ends[i]])).convert("RGB"))

    with ThreadPoolExecutor(2) as pool:
        return np.stack(list(pool.map(decode, range(len(lengths)))))

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


def _webp(blob: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the images of lossless WebP files that lie behind each other in one array of bytes."""
    from PIL import Image

    ends, raw = np.cumsum(lengths, dtype=np.int64), blob.tobytes()

    def decode(i: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(raw[ends[i] - lengths[i] : ends[i]])).convert("RGB"))

    with ThreadPoolExecutor(2) as pool:
        return np.stack(list(pool.map(decode, range(len(lengths)))))

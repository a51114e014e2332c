"""A job of one's own for ``compare``: a small network and data that no part of the package knows."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2),
        )  # fmt: skip

    def _step(self, batch, name):
        x, y = batch
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.log(f"{name}/loss", loss, on_epoch=True, on_step=False)
        self.log(f"{name}/acc", (logits.argmax(1) == y).float().mean(), on_epoch=True, on_step=False)
        return loss

    def training_step(self, batch, batch_idx):
        return self._step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self._step(batch, "val")

    def test_step(self, batch, batch_idx):
        self._step(batch, "test")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class WaitsForAFile(Classifier):
    """Trains with seed 0; with another seed once there is a file "go"."""

    def on_train_batch_start(self, batch, batch_idx):
        while os.environ.get("PL_GLOBAL_SEED") != "0" and not (Path("go").exists() or self.trainer.received_sigterm):
            time.sleep(0.05)


class Swallows(Classifier):
    """Gets a signal where an exception is dropped, as in a finalizer."""

    sent = signal.SIGTERM

    def on_train_batch_start(self, batch, batch_idx):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), self.sent)
            time.sleep(10)


class SwallowsCtrlC(Swallows):
    sent = signal.SIGINT


class Talks(Classifier):
    def on_train_start(self):
        print("x" * 1_000_000, file=sys.stderr)
        raise ValueError("it is over")


class Stripes(pl.LightningDataModule):
    """Images with bright rows or bright columns."""

    def __init__(self, batch_size: int = 8, size: int = 16):
        super().__init__()
        self.batch_size, self.size = batch_size, size

    def _loader(self, seed, shuffle=False):
        g = torch.Generator().manual_seed(seed)
        y = torch.arange(self.size) % 2
        x = torch.randn(self.size, 1, 6, 6, generator=g)
        x[y == 0, :, ::2] += 2
        x[y == 1, :, :, ::2] += 2
        return DataLoader(TensorDataset(x, y), self.batch_size, shuffle=shuffle)

    def train_dataloader(self):
        return self._loader(0, shuffle=True)

    def val_dataloader(self):
        return self._loader(1)

    def test_dataloader(self):
        return self._loader(2)

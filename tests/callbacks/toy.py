"""A LightningModule with batch norms everywhere a user may put them, and a quiet Trainer."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    """``net`` is built in __init__, ``built`` in setup, ``late`` in configure_model."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True))

    def features(self, x):
        return self.net(x)

    def forward(self, x):
        return self.features(x).mean((1, 2, 3))

    def loss(self, batch):
        x, y = batch
        return (self(x) - y).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class LateNet(Net):
    def __init__(self):
        super().__init__()
        self.built = self.late = None

    def setup(self, stage):
        if self.built is None:
            self.built = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))

    def configure_model(self):
        if self.late is None:
            self.late = nn.BatchNorm2d(6)

    def features(self, x):
        return self.late(self.built(self.net(x)))


def loader(n=8, batch_size=4):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(n, 3, 8, 8, generator=generator), torch.randn(n, generator=generator))
    return DataLoader(data, batch_size=batch_size)


def trainer(*callbacks, tmp_path=None, **kwargs):
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})

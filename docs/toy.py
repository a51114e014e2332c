"""The toy of the pages: a small network with two BatchNorm layers, and eight random images of two classes."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Toy(LightningModule):
    """Nothing in it knows of normalizers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        features: Tensor = self.body(self.stem(x))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        x, target = batch
        return nn.functional.cross_entropy(self(x), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The parameters that a swap adds are among those of the module."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


model = Toy()
data = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 2), batch_size=4)

"""One callback swaps every BatchNorm, another logs what the layers learn: python examples/trainer.py.

The same in YAML is trainer.yaml beside this file.
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_norm import NormMonitor, NormSwap
from lightning_norm.demo.data import Digits


class Classifier(pl.LightningModule):
    """A small convolutional network for the digits; it knows nothing of the swap."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        x, target = batch
        return cross_entropy(self.net(x), target)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        x, target = batch
        self.log("val_acc", (self.net(x).argmax(1) == target).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The parameters that the swap adds are among those of the module."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def main() -> None:
    """Train on scikit-learn's digits."""
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        log_every_n_steps=10,
        callbacks=[NormSwap("sn"), NormMonitor(print_table=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), datamodule=Digits(batch_size=64))
    print(f"accuracy {trainer.callback_metrics['val_acc']:.4f}. Look at it: tensorboard --logdir lightning_logs")


if __name__ == "__main__":
    main()

"""Diminishing batch normalization with its diminishing alpha: python examples/dbn_alpha.py.

Each layer normalizes by statistics that every batch moves by alpha. With alpha = 1 that is the batch alone, as in
BatchNorm; as alpha diminishes, single batches count less and less. Here alpha is 1 / m^0.5 in epoch m.
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_norm import DiminishingBatchNorm, InversePower, NormScheduler, NormSwap
from lightning_norm.demo.data import Digits


class Classifier(pl.LightningModule):
    """A small convolutional network with two BatchNorm layers, which NormSwap replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential()
        for channels, previous, stride in ((16, 3, 1), (32, 16, 2)):
            self.net.append(nn.Conv2d(previous, channels, 3, stride=stride, padding=1, bias=False))
            self.net.append(nn.BatchNorm2d(channels))
            self.net.append(nn.ReLU(inplace=True))
        self.net.extend([nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32 * 4, 10)])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        x, target = batch
        return cross_entropy(self.net(x), target)

    def on_train_epoch_end(self) -> None:
        """Show alpha, and how far the last batch lay from the statistics that it was normalized by."""
        layer = self.net[1]
        assert isinstance(layer, DiminishingBatchNorm)
        shown = {name: round(value.item(), 3) for name, value in layer.monitor().items()}
        print(f"epoch {self.current_epoch + 1}: {shown}")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        x, target = batch
        self.log("accuracy", (self.net(x).argmax(1) == target).float().mean(), batch_size=len(target))

    validation_step = test_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    """Train on scikit-learn's digits for four epochs."""
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        callbacks=[NormSwap("dbn"), NormScheduler({"alpha": InversePower(power=0.5)})],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = Classifier(), Digits(batch_size=64)
    trainer.fit(model, datamodule=data)
    (result,) = trainer.test(model, datamodule=data, verbose=False)
    print(f"test accuracy {result['accuracy']:.3f}")


if __name__ == "__main__":
    main()

"""Unified batch normalization with a threshold that falls: python examples/ubn_threshold.py.

A batch whose samples are too alike, with a condensation above the threshold, is kept out of the statistics. Early in
training features are alike by themselves; a look at the condensation says which thresholds make sense. Here nothing is
kept out in the first two epochs, and what lies above 0.55 from then on.
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_norm import NormScheduler, NormSwap, UnifiedBatchNorm
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
        """Show the threshold, the condensation of the last batch, and the share of batches that were kept out."""
        layer = self.net[1]
        assert isinstance(layer, UnifiedBatchNorm)
        shown = {name: round(layer.monitor()[name].item(), 3) for name in ("condensation", "skipped")}
        print(f"epoch {self.current_epoch + 1}: threshold {layer.threshold}, {shown}")

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
        callbacks=[
            # An epoch has 22 batches, after which the running statistics are good enough to normalize by.
            NormSwap("ubn", norm_args={"threshold": 1.0, "min_updates": 22, "condensed_grad": "renorm"}),
            NormScheduler({"threshold": {0: 1.0, 2: 0.55}}),
        ],
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

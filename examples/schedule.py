"""Sparse switchable normalization whose radius rises over training: python examples/schedule.py.

At radius 0 each layer mixes instance, layer and batch statistics freely; towards sqrt(2/3) it has to choose one.
"""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_norm import Cosine, NormScheduler, NormSwap, SwitchableNorm, Warmup, norm_param_groups


class Classifier(pl.LightningModule):
    """A small convolutional network with two BatchNorm layers, which NormSwap replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        x, target = batch
        return cross_entropy(self.net(x), target)

    def on_train_epoch_end(self) -> None:
        """Show how far the layers have chosen."""
        for name, layer in self.named_modules():
            if isinstance(layer, SwitchableNorm):
                weights = [round(w, 2) for w in layer.importance()["mean"].tolist()]
                print(f"epoch {self.current_epoch}: {name}: radius {layer.radius:.2f}, {layer.choices}: {weights}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Take biases and normalizers out of weight decay; the control parameters learn faster here."""
        groups = norm_param_groups(self, weight_decay=5e-4, switch_lr=0.2)
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def main() -> None:
    """Train on scikit-learn's digits for five epochs."""
    pl.seed_everything(0, verbose=False)
    digits = load_digits()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8)
    data = TensorDataset(x, torch.from_numpy(digits.target).long())
    trainer = pl.Trainer(
        max_epochs=5,
        accelerator="cpu",
        callbacks=[
            NormSwap("sn", norm_args={"sparse": True}),
            NormScheduler(
                {
                    "radius": Warmup(schedule=Cosine(0.4, 0.8, epochs=3), epochs=1),  # by step: fractions of an epoch
                    r"net\.4:momentum": 0.05,  # one layer, one number
                },
                interval="step",
            ),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=100, shuffle=True))


if __name__ == "__main__":
    main()

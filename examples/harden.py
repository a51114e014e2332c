"""From a learned mixture to a plain network that folds: python examples/harden.py.

BatchNorm becomes sparse switchable normalization; its radius rises, and each layer has to choose one statistic. What it
chose takes its place, and what chose batch statistics goes into the convolution before it. A layer whose mean chose one
statistic and whose variance another is no plain normalizer, and would stay.
"""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_norm import Linear, Normalizer, NormScheduler, NormSwap, SwitchableNorm, fold, harden, norm_param_groups


class Classifier(pl.LightningModule):
    """A small convolutional network with three BatchNorm layers, which NormSwap replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential()
        for channels, previous, stride in ((16, 1, 1), (32, 16, 2), (32, 32, 1)):
            self.net.append(nn.Conv2d(previous, channels, 3, stride=stride, padding=1, bias=False))
            self.net.append(nn.BatchNorm2d(channels))
            self.net.append(nn.ReLU(inplace=True))
        self.net.append(nn.Flatten())
        self.net.append(nn.Linear(32 * 4 * 4, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        x, target = batch
        return cross_entropy(self(x), target)

    def on_fit_start(self) -> None:
        """Give batch statistics a lead: a layer leaves them where the data ask for it, of its mean and its variance."""
        for layer in self.modules():
            if isinstance(layer, SwitchableNorm):
                with torch.no_grad():
                    for logits in (layer.mean_weight, layer.var_weight):
                        logits[layer.choices.index("bn")] += 0.5

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Take normalizers out of weight decay; the control parameters learn at a tenth of the rate, as published."""
        return torch.optim.SGD(norm_param_groups(self, weight_decay=5e-4, switch_lr=0.005), lr=0.05, momentum=0.9)


def main() -> None:
    """Train on scikit-learn's digits for three epochs, harden, fold."""
    pl.seed_everything(0, verbose=False)
    digits = load_digits()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8)
    target = torch.from_numpy(digits.target).long()
    train, test = slice(0, 1500), slice(1500, None)
    model = Classifier()
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[
            NormSwap("sn", norm_args={"sparse": True}),
            # From sqrt(2/3) = 0.816 on, three weights have become one.
            NormScheduler({"radius": Linear(0.0, 0.9, epochs=2)}, interval="step"),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(x[train], target[train]), batch_size=100, shuffle=True))

    def accuracy() -> float:
        with torch.no_grad():
            return (model.eval()(x[test]).argmax(1) == target[test]).float().mean().item()

    before = accuracy()
    hardened = harden(model, x[test], threshold=0.9)
    print(f"\nharden\n{hardened}")
    folded = fold(model, x[test])
    print(f"\nfold\n{folded}")
    assert not hardened.undecided
    assert not any(isinstance(module, Normalizer) for module in model.modules())
    print(f"\ntest accuracy {before:.3f} before, {accuracy():.3f} as a plain network:\n{model.net}")


if __name__ == "__main__":
    main()

"""Fine-tune a pretrained torchvision network with another normalizer: python examples/finetune.py [--norm ubn].

The weights come from a file, as one has them from torchvision (``--weights resnet18-f37072fd.pth``). Without one, a
ResNet-18 is first trained on the digits 0 to 4. Then every BatchNorm is swapped, which leaves the network's evaluation
as it was, and the network learns the digits 5 to 9.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from lightning_norm import NormSwap, norm_param_groups


class Classifier(pl.LightningModule):
    """A torchvision network for five classes."""

    def __init__(self, weights: Path | None = None, lr: float = 0.02) -> None:
        super().__init__()
        self.net, self.lr = resnet18(), lr
        if weights is not None:
            self.net.load_state_dict(torch.load(weights, weights_only=True))
            self.lr = lr / 4
        self.head = nn.Linear(1000, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.net(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        x, target = batch
        return cross_entropy(self(x), target)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        x, target = batch
        self.log("accuracy", (self(x).argmax(1) == target).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Decay the weights of convolutions alone; what a normalizer learns anew has a higher rate than the rest."""
        groups = norm_param_groups(self, weight_decay=5e-4, switch_lr=2 * self.lr)
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)


def loaders(first: int) -> tuple[DataLoader, DataLoader]:
    """Return training and validation images of five digits, (3, 32, 32)."""
    digits = load_digits()
    labels = torch.from_numpy(digits.target).long() - first
    images = interpolate(torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1, size=32, mode="bilinear")
    images = images.expand(-1, 3, -1, -1)[(labels >= 0) & (labels < 5)]
    data = TensorDataset(images, labels[(labels >= 0) & (labels < 5)])
    train, val = torch.utils.data.random_split(data, [0.8, 0.2])
    return DataLoader(train, batch_size=64, shuffle=True, drop_last=True), DataLoader(val, batch_size=len(val))


def trainer(epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    """Return a quiet Trainer."""
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def pretrain(file: Path) -> None:
    """Train on the digits 0 to 4 and save the network's weights."""
    model, (train, val) = Classifier(), loaders(first=0)
    run = trainer(4)
    run.fit(model, train, val)
    print(f"pretrained on the digits 0 to 4: accuracy {run.callback_metrics['accuracy']:.3f}")
    torch.save(model.net.state_dict(), file)


def main() -> None:
    """Pretrain if need be, swap, compare, fine-tune."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, help="state dict of torchvision's resnet18")
    parser.add_argument("--norm", default="rbn", help="see lightning-norm list")
    arguments = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        weights = arguments.weights or Path(folder) / "pretrained.pth"
        if arguments.weights is None:
            pretrain(weights)
        model = Classifier(weights)
    plain, (train, val) = copy.deepcopy(model).eval(), loaders(first=5)

    run = trainer(3, NormSwap(arguments.norm))
    run.validate(model, val, verbose=False)  # swaps, as fit does
    x, _ = next(iter(val))
    with torch.no_grad():
        before, after = plain(x), model.eval()(x)
    model.train()
    print(f"the swap moved the outputs by {(after - before).abs().max():.1e} of {before.abs().max():.2f}")

    run.fit(model, train, val)
    print(f"fine-tuned on the digits 5 to 9 with {arguments.norm}: accuracy {run.callback_metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()

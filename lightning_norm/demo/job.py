"""The main job: train an image classifier of torchvision on small images."""

from __future__ import annotations

import difflib
import math
from typing import Any

import lightning.pytorch as pl
import torch
import torchvision
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_norm.demo.data import CIFAR10 as CIFAR10
from lightning_norm.demo.data import CIFAR100 as CIFAR100
from lightning_norm.demo.data import MNIST as MNIST
from lightning_norm.demo.data import Digits as Digits
from lightning_norm.demo.data import FashionMNIST as FashionMNIST
from lightning_norm.demo.data import ImageData


class ImageClassifier(pl.LightningModule):
    """A torchvision network, trained by SGD with warm-up and a cosine to zero.

    Args:
        arch: name of a torchvision classification model; resnets get a stem for small images (3 x 3, no pooling).
        num_classes: outputs; ``None`` for those of the data on the command line, and 10 otherwise.
        lr: peak learning rate.
        momentum: of SGD, with Nesterov's step.
        weight_decay: on all parameters.

    Raises:
        ValueError: torchvision has no such model, or the data have another number of classes.

    >>> ImageClassifier("resnet18", num_classes=3)(torch.zeros(2, 3, 12, 12)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        arch: str = "resnet18",
        num_classes: int | None = None,
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__()
        # They let load_from_checkpoint rebuild the network without the configuration.
        self.save_hyperparameters()
        self.arch, self.lr, self.momentum, self.weight_decay = arch, lr, momentum, weight_decay
        self.num_classes = 10 if num_classes is None else num_classes
        self.net = build(arch, self.num_classes)
        self.loss = nn.CrossEntropyLoss()
        for split in ("train", "val", "test"):
            # One metric per split: a shared one would mix the states of training and validation.
            setattr(self, f"{split}_acc", MulticlassAccuracy(self.num_classes, average="micro"))

    @override
    def setup(self, stage: str) -> None:
        # Only the data know their classes, and they are known here for the first time.
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageData) and data.num_classes != self.num_classes:
            raise ValueError(
                f"{type(data).__name__} has {data.num_classes} classes, the model num_classes={self.num_classes}. "
                f"Type --model.num_classes {data.num_classes}, or leave num_classes out (null): it follows the data."
            )

    @override
    def forward(self, x: Tensor) -> Tensor:
        output = self.net(x)
        assert isinstance(output, Tensor)
        return output

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "val")

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "test")

    @override
    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        predicted: Tensor = self(batch[0]).argmax(1)
        return predicted

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(), self.lr, self.momentum, nesterov=self.momentum > 0, weight_decay=self.weight_decay
        )
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):  # trained until somebody stops it: a constant rate
            return optimizer
        # Per step and not per epoch, or a short training would see a few stairs of the cosine.
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_and_cosine(step, int(steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _step(self, batch: tuple[Tensor, Tensor], split: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss: Tensor = self.loss(logits, labels)
        accuracy = getattr(self, f"{split}_acc")
        # Logged as an object: Lightning then adds up batches of different sizes, and ranks, rightly.
        accuracy(logits, labels)
        shown, size = split == "val", len(labels)
        # That of training is logged at each step, where ranks would wait for each other.
        self.log(f"{split}_loss", loss, prog_bar=split == "train", batch_size=size, sync_dist=split != "train")
        self.log(f"{split}_acc", accuracy, prog_bar=shown, on_step=False, on_epoch=True, batch_size=size)
        return loss


def build(arch: str, num_classes: int) -> nn.Module:
    """Return a torchvision classification network.

    Raises:
        ValueError: torchvision has none of that name.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known:
        near = " or ".join(difflib.get_close_matches(arch, known, n=3))
        guess = f" Did you mean {near}?" if near else ""
        raise ValueError(f"torchvision has no classification model {arch!r}.{guess} Known: {', '.join(known)}.")
    # These two add auxiliary heads in training and would return tuples.
    options = {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    net: nn.Module = torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **options)
    # The ImageNet stem shrinks an image four times, which would leave nothing of 10 x 10 pixels.
    if isinstance(net, torchvision.models.ResNet):
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net


def warm_up_and_cosine(step: int, steps: int) -> float:
    """Return the factor of the learning rate: linear to 1 over the first tenth, then half a cosine to 0.

    >>> warm_up_and_cosine(9, 100), warm_up_and_cosine(100, 100)
    (1.0, 0.0)
    """
    warm = max(1, steps // 10)
    # A large rate at random weights may diverge within its first steps.
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

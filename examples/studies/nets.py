"""The networks of the studies: plain stacks of convolution, normalization and ReLU, small enough for two cores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from typing_extensions import override

import lightning_norm
from lightning_norm.ops.condensation import condensation


class PlainNet(nn.Sequential):
    """Convolutions of 3 x 3, each with its normalization and ReLU, then the mean of each channel and a linear layer.

    Args:
        channels: of each convolution.
        strides: of each convolution.
        num_classes: outputs.
        depthwise: side of a depthwise convolution behind each BatchNorm, started as the identity; 0 for none. The
            baseline that tells BNET's normalization from the convolution that it adds.
        domains: of a :class:`DomainBatchNorm2d` in place of each BatchNorm; 0 for BatchNorm.
        normalize: False leaves the normalizations out; the convolutions then have a bias.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int = 10,
        depthwise: int = 0,
        domains: int = 0,
        normalize: bool = True,
    ) -> None:
        layers: list[nn.Module] = []
        previous = 3
        for c, stride in zip(channels, strides, strict=True):
            conv = nn.Conv2d(previous, c, 3, stride, padding=1, bias=not normalize)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers.append(conv)
            if normalize:
                layers.append(DomainBatchNorm2d(c, domains) if domains else nn.BatchNorm2d(c))
            if depthwise:
                layers.append(identity_depthwise(c, depthwise))
            layers.append(nn.ReLU(inplace=True))
            previous = c
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(previous, num_classes))


class BottleneckNet(nn.Sequential):
    """Bottleneck blocks of torchvision's ResNet behind one convolution, for images of 32 x 32.

    Args:
        planes: of each block; its output has four times as many channels.
        strides: of each block.
        num_classes: outputs.
        depthwise: side of a depthwise convolution behind the last BatchNorm of each block, started as the identity; 0
            for none.
    """

    def __init__(
        self, planes: Sequence[int], strides: Sequence[int], num_classes: int = 10, depthwise: int = 0
    ) -> None:
        channels = planes[0]
        layers: list[nn.Module] = [
            nn.Conv2d(3, channels, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
        for width, stride in zip(planes, strides, strict=True):
            wide = 4 * width
            shortcut = None
            if stride != 1 or channels != wide:
                shortcut = nn.Sequential(nn.Conv2d(channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))
            block = Bottleneck(channels, width, stride, shortcut)
            if depthwise:
                block.bn3 = nn.Sequential(block.bn3, identity_depthwise(wide, depthwise))
            layers.append(block)
            channels = wide
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class DomainBatchNorm2d(nn.Module):
    """A BatchNorm2d of torch's for each domain: Chang et al., CVPR 2019. It does not know how ContextNorm computes.

    Args:
        channels: of the input (N, C, H, W).
        domains: how many.

    Attributes:
        domain: of each sample of the batch, (N,), to be set before each forward pass.
    """

    domain: Tensor

    def __init__(self, channels: int, domains: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(domains))

    @override
    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        for k, norm in enumerate(self.norms):
            members = self.domain == k
            if members.any():
                y[members] = norm(x[members])
        return y


def identity_depthwise(channels: int, side: int) -> nn.Conv2d:
    """Return a depthwise convolution that starts as the identity."""
    conv = nn.Conv2d(channels, channels, side, padding=side // 2, groups=channels, bias=False)
    nn.init.zeros_(conv.weight)
    with torch.no_grad():
        conv.weight[:, :, side // 2, side // 2] = 1
    return conv


class Classifier(pl.LightningModule):
    """Log loss and accuracy of a network's logits as ``train/loss``, ``val/acc``, ``test/acc`` and so on.

    Args:
        net: images to logits.
        lr: learning rate.
        weight_decay: on all parameters.
    """

    def __init__(self, net: nn.Module, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.net, self.lr, self.weight_decay = net, lr, weight_decay

    @override
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def _step(self, batch: Any, split: str) -> Tensor:
        # What else a batch holds, such as its domains, is for callbacks and hooks.
        images, labels, *_ = batch
        logits = self(images)
        loss = nn.functional.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        for name, value in (("loss", loss), ("acc", accuracy)):
            self.log(f"{split}/{name}", value, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "val")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "test")


class CosineClassifier(Classifier):
    """Train by SGD with momentum 0.9, warm-up over 5 % of the steps and a cosine to zero.

    Args:
        net: images to logits.
        lr: peak learning rate at a batch of 128 samples; another batch size scales it in proportion.
        weight_decay: on all parameters.
    """

    @override
    def configure_optimizers(self) -> Any:
        batch_size = getattr(self.trainer.datamodule, "batch_size", 128)
        optimizer = torch.optim.SGD(
            self.parameters(), self.lr * batch_size / 128, momentum=0.9, weight_decay=self.weight_decay
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warm = max(1, steps // 20)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class StudyClassifier(CosineClassifier):
    """Train a PlainNet as :class:`CosineClassifier` says.

    Args:
        channels: see :class:`PlainNet`.
        strides: see :class:`PlainNet`.
        lr: see :class:`CosineClassifier`.
        depthwise: see :class:`PlainNet`.
        weight_decay: on all parameters.
        domains: see :class:`PlainNet`.
        normalize: see :class:`PlainNet`.
    """

    def __init__(
        self,
        channels: list[int],
        strides: list[int],
        lr: float = 0.1,
        depthwise: int = 0,
        weight_decay: float = 5e-4,
        domains: int = 0,
        normalize: bool = True,
    ) -> None:
        net = PlainNet(channels, strides, depthwise=depthwise, domains=domains, normalize=normalize)
        super().__init__(net, lr, weight_decay)
        self.save_hyperparameters()


class BottleneckClassifier(CosineClassifier):
    """Train a BottleneckNet as :class:`CosineClassifier` says.

    Args:
        planes: see :class:`BottleneckNet`.
        strides: see :class:`BottleneckNet`.
        lr: see :class:`CosineClassifier`.
        depthwise: see :class:`BottleneckNet`.
        weight_decay: on all parameters.
    """

    def __init__(
        self,
        planes: list[int],
        strides: list[int],
        lr: float = 0.1,
        depthwise: int = 0,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__(BottleneckNet(planes, strides, depthwise=depthwise), lr, weight_decay)
        self.save_hyperparameters()


class MLPClassifier(Classifier):
    """Train linear layers, each with its normalization and ReLU, by AdaGrad: the network of the DBN paper on MNIST.

    Args:
        inputs: values of an image.
        hidden: outputs of each hidden layer; a normalization follows, so they have no bias.
        num_classes: outputs.
        lr: AdaGrad's learning rate.
        weight_decay: on all parameters, the L2 term of the paper, whose size it does not give.
    """

    def __init__(
        self,
        inputs: int = 784,
        hidden: Sequence[int] = (300, 300),
        num_classes: int = 10,
        lr: float = 0.01,
        weight_decay: float = 1e-4,
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        previous = inputs
        for width in hidden:
            layers += [nn.Linear(previous, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
            previous = width
        super().__init__(nn.Sequential(*layers, nn.Linear(previous, num_classes)), lr, weight_decay)
        self.save_hyperparameters()

    @override
    def forward(self, x: Tensor) -> Tensor:
        # Grey images arrive with three equal channels.
        return super().forward(x[:, :1])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(self.parameters(), self.lr, weight_decay=self.weight_decay)


class LayerMeans(pl.Callback):
    """Log each epoch the mean over all layers of what the normalizers report, as ``norm/mean_bn`` and so on."""

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values: dict[str, list[float]] = {}
        for module in pl_module.modules():
            if isinstance(module, lightning_norm.Normalizer):
                for name, value in module.monitor().items():
                    values.setdefault(name, []).append(float(value))
        for name, numbers in values.items():
            pl_module.log(f"norm/{name}", sum(numbers) / len(numbers))


class Condensations(pl.Callback):
    """Log each epoch the condensation of the features in each layer, on the first batch of the validation.

    ``condensed/conv_I`` is that of what the I-th convolution writes, before a normalization; ``condensed/relu_I`` that
    of what its ReLU writes, where all features are positive. The network is in evaluation.
    """

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx or trainer.sanity_checking:
            return
        counts: dict[str, int] = {}
        x = batch[0]
        for layer in pl_module.net:
            x = layer(x)
            kind = {nn.Conv2d: "conv", nn.ReLU: "relu"}.get(type(layer))
            if kind is not None:
                counts[kind] = counts.get(kind, 0) + 1
                pl_module.log(f"condensed/{kind}_{counts[kind]}", condensation(x), batch_size=len(x))

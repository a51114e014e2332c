"""Each normalizer is put into a network that BatchNorm has begun to train, and trains an epoch of real images."""

import contextlib
import copy
import functools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_norm import ContextNorm, contexts, fit_contexts, normalizers, swap


def told(model, images):
    """Tell Context Norm the images, if it is there."""
    known = any(isinstance(m, ContextNorm) for m in model.modules())
    return contexts(model, images=images) if known else contextlib.nullcontext()


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))

    def forward(self, x):
        return torch.relu(x + self.branch(x))


@functools.cache
def digits():
    data = load_digits()
    return torch.tensor(data.images / 8 - 1).float().unsqueeze(1), torch.tensor(data.target)


def epoch(model, seed):
    """Return the loss of each step of an epoch of 57 batches."""
    torch.manual_seed(seed)
    images, labels = digits()
    order = torch.randperm(len(images))
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    losses = []
    for batch in order.split(32):
        with told(model, images[batch]):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@functools.cache
def begun():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), Residual(16), Residual(16),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    epoch(model, 1)
    return model


THRESHOLD = {"threshold": 0.5, "min_updates": 10}


@pytest.mark.filterwarnings("ignore::lightning_norm.ParameterGrowthWarning")
@pytest.mark.parametrize(
    ("key", "arguments"),
    [(key, {"num_groups": 4} if key == "gn" else {}) for key in normalizers()]
    + [("ubn", {**THRESHOLD, "condensed_grad": "detach"}), ("ubn", {**THRESHOLD, "condensed_grad": "renorm"})],
)
def test_an_epoch(key, arguments):
    model = copy.deepcopy(begun())
    assert len(swap(model, key, norm_args=arguments)) == 3
    if key == "cn":
        fit_contexts(model, digits()[0])
    losses = epoch(model, 2)
    assert losses.isfinite().all()
    assert "threshold" not in arguments or any(
        layer.skipped > 5 for layer in model.modules() if hasattr(layer, "skipped")
    )
    assert losses[-10:].mean() < 0.25  # 2.3 is chance
    images, labels = digits()
    with torch.no_grad(), told(model, images):
        right = model.eval()(images).argmax(1) == labels
    assert right.float().mean() > 0.9

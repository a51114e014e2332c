"""A normalizer that says it keeps the evaluation keeps that of eight whole networks."""

import functools

import pytest
import torch

from lightning_norm import normalizers, swap
from tests.surgery.test_swap import network, warmed

ARCHITECTURES = [
    "resnet18",
    "resnext50_32x4d",
    "densenet121",
    "mobilenet_v2",
    "efficientnet_b0",
    "googlenet",
    "shufflenet_v2_x0_5",
    "regnet_y_400mf",
]


@functools.cache
def original(arch):
    torch.manual_seed(0)
    return warmed(network(arch)).eval()


def keeping():
    return [key for key, cls in normalizers().items() if cls(32).preserves_eval]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("key", keeping())
def test_evaluation_of_a_network(arch, key):
    model = original(arch)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        report = swap(model, key)
        assert all(layer.preserves_eval for layer in report.layers), report
        after = model(x)
    report.undo()
    relative = ((after - before).norm() / before.norm()).item()
    assert 0 < relative < 1e-3  # float32 rounding through 20 to 120 layers; 0 would be the same network

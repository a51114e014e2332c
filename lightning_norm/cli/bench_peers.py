"""What a normalizer's user would otherwise take, where that is not torch's BatchNorm alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PEERS = {"bnet": "torch + depthwise"}
"""Key of a normalizer -> name of its peer in the tables."""


def depthwise_peer(num_features: int) -> nn.Module:
    """Return torch's BatchNorm and a depthwise convolution behind it."""
    conv = nn.Conv2d(num_features, num_features, 3, padding=1, groups=num_features)
    taps(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(nn.BatchNorm2d(num_features), conv)


def taps(kernel: Tensor) -> Tensor:
    """Fill a kernel with numbers of which no two are the same: a Dirac would prove little."""
    return kernel.detach().copy_(torch.arange(kernel.numel()).cos().view_as(kernel))

"""torch's own normalization layers, by family."""

from __future__ import annotations

from torch import nn

from lightning_norm.surgery.torch_private import TorchRunningNormBase

TORCH_BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
LAZY_BATCH_NORMS = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)

FAMILIES: dict[str, tuple[type[nn.Module], ...]] = {
    "BatchNorm": TORCH_BATCH_NORMS,
    "LayerNorm": (nn.LayerNorm,),
    "GroupNorm": (nn.GroupNorm,),
    "InstanceNorm": (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
}
"""What ``source`` may name: only these classes themselves are swapped, for a subclass may do more than normalize."""

TORCH_NORMS = (TorchRunningNormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Every normalization layer of torch's, and the classes that others derive from them."""

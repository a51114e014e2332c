"""Which modules normalize: torch's classes, those of this package, and those of other libraries by their names."""

from __future__ import annotations

import re
import sys

from torch import nn

from lightning_norm.layers.base import Normalizer
from lightning_norm.surgery.torch_layers import TORCH_NORMS
from lightning_norm.surgery.torch_private import TorchConvBase
from lightning_norm.surgery.walk import MODULE_WRAPPERS

ELSEWHERE = {
    "timm.layers.norm": ("RmsNorm", "RmsNorm2d", "SimpleNorm", "SimpleNorm2d"),
    "timm.layers.norm_act": ("FrozenBatchNormAct2d",),
    "torchvision.ops.misc": ("FrozenBatchNorm2d",),
}
"""Classes of other libraries that normalize and derive from none of torch's: module -> names."""

NAME = re.compile(r"Norm(?!al)|^InplaceAbn$|^InPlaceABN|^FrozenBN")
CONVOLVES = (TorchConvBase, *MODULE_WRAPPERS)


def norm_types() -> tuple[type[nn.Module], ...]:
    """Return the classes of normalization layers, for ``isinstance``.

    Those of this package (one base), torch's own with all that derives from them, and those of timm and torchvision
    that derive from none of torch's, as far as these libraries are imported. :func:`is_norm` knows more.

    >>> from lightning_norm import create
    >>> isinstance(create("sn", 8), norm_types()), isinstance(nn.BatchNorm2d(8), norm_types())
    (True, True)
    """
    # Only of libraries that the process has imported: without them there is no layer of their classes.
    loaded = [
        getattr(sys.modules[module], name)
        for module, names in ELSEWHERE.items()
        if module in sys.modules
        for name in names
        if hasattr(sys.modules[module], name)
    ]
    return (Normalizer, *TORCH_NORMS, nn.LocalResponseNorm, *loaded)


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a normalization layer: of this package, of torch, or of another library.

    It stands where code asks for the class, ``isinstance(m, nn.BatchNorm2d)`` say, and is to find layers that a swap
    has put there as well. Of classes that are not in :func:`norm_types` the name counts, unless they hold a convolution
    or another normalization layer.

    >>> from lightning_norm import create
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), create("sn", 8), nn.ReLU())
    >>> [is_norm(m) for m in model]
    [False, True, False]
    """
    if isinstance(module, norm_types()):
        return True
    kind = type(module)
    # torch's parametrizations have names such as _SpectralNorm, and normalize weights.
    if kind.__module__.startswith("torch.nn.utils") or not (NAME.search(kind.__name__) or has_running_stats(module)):
        return False
    # A block called ConvNormAct holds a normalization layer and is none.
    inside = [m for m in module.modules() if m is not module]
    return not any(isinstance(m, (*norm_types(), *CONVOLVES)) or NAME.search(type(m).__name__) for m in inside)


def has_running_stats(module: nn.Module) -> bool:
    """Tell whether a module holds a running mean and variance, as every class that is made like BatchNorm does."""
    return {"running_mean", "running_var"} <= {name for name, _ in module.named_buffers(recurse=False)}


def is_frozen(module: nn.Module) -> bool:
    """Tell whether a module is a BatchNorm whose weights are buffers as well, as torchvision's FrozenBatchNorm2d.

    >>> import torchvision
    >>> is_frozen(torchvision.ops.FrozenBatchNorm2d(8)), is_frozen(nn.BatchNorm2d(8))
    (True, False)
    """
    buffers = {name for name, _ in module.named_buffers(recurse=False)}
    return {"weight", "bias", "running_mean", "running_var"} <= buffers and not isinstance(module, TORCH_NORMS)

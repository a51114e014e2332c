"""Tell the layers of a model which positions of a batch are padding, when the model's forward has no place for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.errors import MaskError, NoEffectWarning, counted
from lightning_norm.layers.base import MomentNorm, Normalizer
from lightning_norm.layers.special_calls import as_bool, hear_masks, is_lengths, of_lengths
from lightning_norm.layers.told import block, tell
from lightning_norm.surgery.recognize import is_norm
from lightning_norm.surgery.walk import named_normalizers


@contextmanager
def masks(model: nn.Module, mask: Tensor, *, size: int | None = None) -> Iterator[None]:
    """Run ``model`` with its normalizers told which positions of its input are padding.

    No statistic reads a padded position, and the output of a normalizer is 0 there. A layer whose map is smaller than
    the mask takes the mask at that size: every 2^k-th entry of an axis that was halved k times, rounded up; of one that
    shrank otherwise, the entry at the same fraction. Behind a pooling over all positions a sample counts if it has any.

    Args:
        model: a model with normalizers of this package.
        mask: of bool or 0 and 1, (N, *) with the positions of the model's input and without its channels; with fewer
            axes it is that of the last ones. Or lengths, (N,) integers, along the last axis.
        size: for lengths: how long the padded input is; by default as long as the longest.

    Raises:
        MaskError: a mask of the wrong kind or shape, or a layer that takes none.

    >>> from lightning_norm import BatchNorm
    >>> model = nn.Sequential(nn.Conv1d(3, 8, 3, stride=2, padding=1), BatchNorm(8))
    >>> with masks(model, torch.tensor([16, 11, 4])):
    ...     y = model(torch.randn(3, 3, 16))
    """
    layers = layers_with_masks(model)
    if not layers:
        raise MaskError(f"masks: {type(model).__name__} has no normalizer of lightning_norm. Swap first.")
    with block():
        assign(layers, mask, size)
        yield


def layers_with_masks(model: nn.Module, *, warn: bool = True) -> dict[str, MomentNorm]:
    """Return the layers that take masks, by name; warn of normalization layers of others, which see the padding.

    Raises:
        MaskError: a layer that uses statistics of its input and takes no mask.
    """
    layers: dict[str, MomentNorm] = {}
    for name, layer in named_normalizers(model):
        reason = layer.unsupported.mask if isinstance(layer, MomentNorm) else "its class is no MomentNorm"
        if isinstance(layer, MomentNorm) and not reason:
            hear_masks(layer).name = name
            layers[name] = layer
        elif layer.train_uses_batch_stats or layer.eval_uses_input_stats:
            raise MaskError(f"{type(layer).__name__} {name!r} cannot take a mask: {reason}.")
    others = [n for n, m in model.named_modules() if is_norm(m) and not isinstance(m, Normalizer)]
    if others and layers and warn:
        warnings.warn(
            f"masks: the padding is read by {counted(len(others), 'normalization layer')} (first: {others[0]}) that "
            "lightning_norm did not make. Swap those as well.",
            NoEffectWarning,
            stacklevel=4,
        )
    return layers


def assign(layers: Mapping[str, MomentNorm], mask: Any, size: int | None = None) -> None:
    """Tell ``layers`` the mask of a batch, until they are told another; ``None`` for none.

    Raises:
        MaskError: a mask of the wrong kind or shape.
    """
    if mask is None:
        tell({hear_masks(layer): None for layer in layers.values()})
        return
    if not isinstance(mask, Tensor) or mask.is_complex() or mask.dim() < 1:
        came = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise MaskError(f"masks: a mask is a tensor (N, *) of bool, or of 0 and 1, or lengths (N,), got {came}.")
    with torch.no_grad():
        if is_lengths(mask):
            longest = int(mask.max()) if mask.numel() else 0
            mask = of_lengths(mask, longest if size is None else size, "masks")
        else:
            mask = as_bool(mask, "masks")
    # Layers of one device share one tensor.
    on: dict[torch.device, Tensor] = {}
    news: dict[Any, Tensor | None] = {}
    for layer in layers.values():
        device = next((t.device for t in (*layer.parameters(), *layer.buffers())), mask.device)
        if device not in on:
            on[device] = mask.to(device)
        news[hear_masks(layer)] = on[device]
    tell(news)

"""Pool the running statistics of a model over the ranks, in a training loop of one's own."""

from __future__ import annotations

from torch import nn

from lightning_norm.layers.pooling import move_by_windows
from lightning_norm.surgery.walk import normalizers_of


def pool_statistics(model: nn.Module) -> None:
    """Pool and move the running statistics of layers with ``sync="running"``: all layers in one all-reduce.

    Call it on every rank after each optimizer step; :class:`lightning_norm.NormSwap` does so by itself. What a layer's
    batches since the last call have shown on all ranks moves its running statistics as one batch of all of them would.
    In one process it does nothing: there the running statistics move with each batch.

    A model that is compiled as a whole needs one call before its first step as well, which opens the windows.

    Args:
        model: the swapped model, wrapped or not.

    Raises:
        SyncError: the ranks have different layers, or one does not call it.
        ValueError: a layer's running statistics cannot wait; it says why.

    >>> import torch, lightning_norm
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> report = lightning_norm.swap(model, "bn", sync="running")
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
    >>> model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    >>> optimizer.step()
    >>> pool_statistics(model)
    """
    move_by_windows([layer for layer in normalizers_of(model) if layer.sync == "running"])

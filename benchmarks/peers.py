"""What else normalizes a batch: torch's layer compiled, without cuDNN, its synchronized kernels, apex."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def others(num_features: int, dims: int, device: str, compiled: bool) -> Iterator[tuple[str, nn.Module]]:
    """Yield what else normalizes a batch: torch's layer compiled, without cuDNN, synchronized; apex if it is there."""
    if compiled and dims in (3, 4, 5):
        layer = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 3](num_features).to(device)
        layer.compile(dynamic=False)
        yield "torch compiled", layer
    if device == "cuda":
        yield "torch native", NativeKernels(num_features).to(device)
        yield "torch sync", SyncKernels(num_features).to(device)
    if device == "cuda" and importlib.util.find_spec("apex") is not None:
        from apex.parallel import SyncBatchNorm

        yield "torch apex", SyncBatchNorm(num_features).to(device)


class NativeKernels(nn.BatchNorm2d):
    """nn.BatchNorm2d on ATen's own kernels, also where torch would take cuDNN's: in float32 and float16."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x by the statistics of this batch."""
        running = self.running_mean, self.running_var
        # The backward pass follows the choice of the forward pass.
        with torch.backends.cudnn.flags(enabled=False):
            return nn.functional.batch_norm(x, *running, self.weight, self.bias, True, self.momentum or 0.0, self.eps)


class SyncKernels(nn.BatchNorm2d):
    """nn.SyncBatchNorm without its collectives: in one process torch's own falls back to nn.BatchNorm2d. CUDA only."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x by the statistics of this batch."""
        y: Tensor = _Sync.apply(x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps)
        return y


class _Sync(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        running_mean, running_var, momentum, eps = rest
        mean, invstd = torch.batch_norm_stats(x, eps)
        count = torch.full((1,), x.numel() // x.shape[1], dtype=mean.dtype, device=x.device)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, mean[None], invstd[None], running_mean, running_var, momentum, eps, count
        )
        ctx.save_for_backward(x, weight, mean, invstd, count.to(torch.int32))
        y: Tensor = torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, count = ctx.saved_tensors
        total, dot, dweight, dbias = torch.batch_norm_backward_reduce(
            grads[0], x, mean, invstd, weight, True, True, True
        )
        dx = torch.batch_norm_backward_elemt(grads[0], x, mean, invstd, weight, total, dot, count)
        return dx, dweight, dbias, None, None, None, None

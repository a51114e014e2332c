"""Estimate running statistics anew, exactly, from batches of training data."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.errors import counted
from lightning_norm.layers.accumulators import StatisticsAccumulator
from lightning_norm.layers.arguments import check_count
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.running_stats import write_running
from lightning_norm.ops import eager
from lightning_norm.ops.layout import layout_of
from lightning_norm.ops.moments import Moments
from lightning_norm.ops.sync import Ranks, active_ranks
from lightning_norm.surgery.options import Pattern, check_pattern
from lightning_norm.surgery.restore import everything_restored, random_numbers_restored
from lightning_norm.surgery.select import ModuleSlot, matches
from lightning_norm.surgery.text_tables import TableReport
from lightning_norm.surgery.torch_private import TorchBatchNormBase, without_iterator
from lightning_norm.surgery.walk import names_by_module


@dataclass
class Recalibration(TableReport):
    """What :func:`recalibrate` did; its length is the number of layers.

    Args:
        layers: names of the layers whose running statistics are new.
        unused: names of those that no batch went through, and that are as they were.
        batches: batches behind the statistics, of all ranks.
        skipped: batches left out by a layer, for a NaN or an infinity in its input.
    """

    layers: list[str]
    unused: list[str]
    batches: int
    skipped: int

    def __len__(self) -> int:
        return len(self.layers)

    def table(self) -> list[tuple[str, ...]]:
        """Return one row per layer, below a heading."""
        rows: list[tuple[str, ...]] = [("layer", "running statistics")]
        rows += [(name, "re-estimated") for name in self.layers]
        return rows + [(name, "as they were: no batch went through") for name in self.unused]

    def summary(self) -> str:
        """Return what was done in one line."""
        text = f"running statistics of {counted(len(self), 'layer')} re-estimated"
        text += f" on {counted(self.batches, 'batch', 'batches')}"
        text += f", {self.skipped} left out for a NaN or an infinity" if self.skipped else ""
        return text + (f"; no batch reached {', '.join(self.unused)}" if self.unused else "")

    def __str__(self) -> str:
        return self.summary()


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    num_batches: int = 200,
    *,
    forward: Callable[[Any], Any] | None = None,
    exclude: Pattern | None = None,
    progress: bool = False,
) -> Recalibration:
    """Replace running statistics by those of ``num_batches`` batches, as if they were one batch.

    The layers normalize by the statistics of each batch, as in training; everything else, dropout included, is in
    evaluation mode. Means and variances are merged in float64, weighted by their counts, and the variance between the
    batches' means is included. torch's own BatchNorm layers are re-estimated too. In a distributed run every rank takes
    the batches of its own loader, which may be of different lengths, and all ranks end with the same statistics: those
    of one process that takes all batches.

    Nothing else changes. What the forward pass does to parameters, buffers and other attributes of the modules (queues
    and pointers, momentum encoders, metrics) is put back, and so are random numbers, those of the loader included.

    Args:
        model: any module.
        loader: batches.
        num_batches: how many to take at most, on each rank.
        forward: runs the model on a batch; by default the model itself on the batch, or on its first part if it is a
            tuple or a list, moved to the model's device.
        exclude: which layers not; as in :func:`lightning_norm.swap`.
        progress: show a progress bar.

    Raises:
        ValueError: no layer has running statistics, one cannot be re-estimated (it says why), or there is no batch.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> print(recalibrate(model, [torch.randn(4, 3, 8, 8) for _ in range(5)]))
    running statistics of 1 layer re-estimated on 5 batches
    """
    num_batches = check_count("recalibrate: num_batches", num_batches)
    layers = layers_of(model, exclude)
    if not layers:
        raise ValueError("recalibrate: the model has no layer with running statistics (or all are excluded).")
    ranks = active_ranks(sync=True, training=True)
    with random_numbers_restored(loader), _estimating(model, layers) as pools, torch.no_grad(), _uncompiled():
        for batch in _shown(itertools.islice(without_iterator(loader), num_batches), num_batches, loader, progress):
            (forward or _ForwardOnBatch(model))(batch)
    return _write_statistics(layers, pools, ranks)


def try_on(model: nn.Module, batch: Any, forward: Callable[[Any], Any], exclude: Pattern | None = None) -> None:
    """Run a model on one batch as :func:`recalibrate` would, and leave everything as it was."""
    with _estimating(model, layers_of(model, exclude)), torch.no_grad(), _uncompiled():
        forward(batch)


def layers_of(model: nn.Module, exclude: Pattern | None = None) -> dict[str, nn.Module]:
    """Return the layers that have running statistics, by name.

    Raises:
        ValueError: the statistics of one cannot be re-estimated.
    """
    layers: dict[str, nn.Module] = {}
    exclude = check_pattern("recalibrate: exclude", exclude)
    for module, (name, *_) in names_by_module(model).items():
        if not isinstance(module, (Normalizer, TorchBatchNormBase)) or not module.track_running_stats:
            continue
        if exclude is not None and matches(exclude, ModuleSlot(module, [name]), set(), "exclude"):
            continue
        # Statistics that are no average over batches, such as clusters, cannot be estimated anew from batches.
        if isinstance(module, Normalizer) and module.unsupported.recalibration:
            raise ValueError(
                f"recalibrate: {name} is {type(module).__name__}: {module.unsupported.recalibration}. Leave it out: "
                f"exclude={[name]!r}."
            )
        if getattr(module, "running_mean", None) is not None:
            layers[name] = module
    return layers


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which nothing compiled runs: an accumulator reads values, which no graph does."""
    # Without torch._dynamo nothing can have been compiled, and importing it takes seconds.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    eager_only: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager_only


@contextlib.contextmanager
def _estimating(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[dict[str, StatisticsAccumulator]]:
    """Only the layers are in training mode, each with a pool; everything is put back, whatever happens."""
    with everything_restored(model), contextlib.ExitStack() as hooks:
        # Dropout and the like are in evaluation mode, as they are when the statistics will be used.
        model.eval()
        yield {
            name: _accumulate_in_layer(layer) if isinstance(layer, Normalizer) else _accumulate_before(layer, hooks)
            for name, layer in layers.items()
        }


def _accumulate_in_layer(layer: Any) -> StatisticsAccumulator:
    """Let a normalizer of this package give the moments of each batch to an accumulator."""
    stat = layer._buffers[layer.running_names[0]]
    pool = layer._accumulator = StatisticsAccumulator(
        (stat.numel() // layer.num_features, layer.num_features), layer._includes_between_var, stat.dtype
    )
    # Loaders may be uneven, so that ranks cannot meet in each batch: their statistics are merged at the end.
    layer.sync = layer.compiled = False
    layer.training = True
    return pool


def _accumulate_before(layer: Any, hooks: contextlib.ExitStack) -> StatisticsAccumulator:
    """Give the moments of each batch that reaches a BatchNorm layer of torch's to an accumulator."""
    pool = StatisticsAccumulator((1, layer.num_features), dtype=layer.running_mean.dtype)

    def see(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        # The input of a BatchNorm; a hook sees arguments by position, which is how it is called.
        x = arguments[0]
        layout = layout_of(x, layer.num_features)
        m = Moments(*eager.moments(x.detach(), layout), layout.size).over_batch()
        pool.add(m.mean, m.var, m.count)

    hooks.callback(layer.register_forward_pre_hook(see).remove)
    # Without running statistics it normalizes by those of the batch, in evaluation mode too, and never synchronizes.
    layer._buffers.update(running_mean=None, running_var=None)
    return pool


@torch.no_grad()
def _write_statistics(
    layers: dict[str, nn.Module], pools: dict[str, StatisticsAccumulator], ranks: Ranks | None
) -> Recalibration:
    """Merge what the ranks have seen, and write it into the layers; nothing is written if anything is wrong."""
    # This is a collective call: every rank makes it, also one whose loader gave nothing.
    moments = {name: pool.over(ranks) for name, pool in pools.items()}
    batches = max(pool.batches for pool in pools.values())
    if not batches:
        seen = max(pool.skipped for pool in pools.values())
        why = "every batch has a NaN or an infinity, or statistics that overflow the running ones"
        if not seen:
            why = "the loader gave no batch that reaches a layer"
        raise ValueError(f"recalibrate: {why}. The running statistics are as they were.")
    for name, pool in pools.items():
        # Each batch is within range by itself, and the variance between them need not be.
        if not torch.isfinite(torch.stack([moments[name].mean, moments[name].var]).to(pool.dtype)).all():
            raise ValueError(
                f"recalibrate: the variance between the batches of {name} is beyond {pool.dtype}. The running "
                "statistics are as they were."
            )
    # A layer that no batch went through, such as an auxiliary head in evaluation mode, keeps its statistics.
    used = [name for name, pool in pools.items() if pool.batches]
    for name in used:
        layer: Any = layers[name]
        m = moments[name]
        if isinstance(layer, Normalizer):
            write_running(layer, m)
        else:
            # torch keeps the unbiased variance.
            layer.running_mean.copy_(m.mean.reshape(-1))
            layer.running_var.copy_(m.unbiased().var.reshape(-1))
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(pools[name].batches)
    # The most of any layer: a batch with a NaN spoils the layers behind it, and not those before.
    skipped = max(pool.skipped for pool in pools.values())
    return Recalibration(used, [name for name in pools if name not in used], batches, skipped)


class _ForwardOnBatch:
    """Run the model on a batch, or on its first part, moved to the model's device."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
        self.device = None if tensor is None else tensor.device

    def __call__(self, batch: Any) -> Any:
        # Most loaders give (inputs, targets), and a network takes the inputs.
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self.model(x.to(self.device) if isinstance(x, Tensor) else x)


def _shown(batches: Iterable[Any], most: int, loader: Any, progress: bool) -> Iterable[Any]:
    """Return the batches, with a progress bar if one is wanted."""
    if not progress:
        return batches
    from tqdm import tqdm  # type: ignore[import-untyped]

    with contextlib.suppress(TypeError, NotImplementedError):  # an iterable of unknown length
        most = min(most, len(loader))
    shown: Iterable[Any] = tqdm(batches, total=most, desc="Recalibrating", unit="batch", leave=False)
    return shown

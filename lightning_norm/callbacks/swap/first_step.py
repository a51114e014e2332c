"""After the first training step: was every swapped layer reached, and was it treated as BatchNorm is?"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_norm.callbacks.lightning_compat import callbacks_of, pl, rank_zero_warn
from lightning_norm.callbacks.norm_freeze import NormFreeze
from lightning_norm.errors import ConflictWarning, NotReachedWarning, counted
from lightning_norm.layers.base import Normalizer
from lightning_norm.surgery.reach import Reach, tell
from lightning_norm.surgery.recognize import has_running_stats
from lightning_norm.surgery.report import SwapReport
from lightning_norm.surgery.walk import names_by_module, normalizers_of

SHARDED = ("FSDP", "DeepSpeed", "ModelParallel")
"""Strategies, by parts of their names, under which a rank holds pieces of parameters."""


class FirstStep:
    """Watch the swapped layers until each optimizer has stepped, and name those that were not reached, once.

    A layer may be swapped and never called: the network may keep a reference to the old one, call a function in its
    place, or leave the branch out. A run with such layers looks like any other, and compares something else.

    Batches of an accumulation window and optimizers that take turns count together. Nothing is told of a run without
    a backward pass.
    """

    def __init__(self) -> None:
        self._reach: Reach | None = None
        self._stepped: set[int] = set()
        self._epoch_is_new = self._evaluation_told = False
        self._still: set[tuple[str, int]] = set()
        """What BatchNorms were frozen by at the swap, which could see it and take it over."""

    def note(self, pl_module: pl.LightningModule) -> None:
        """Take note of what is frozen at the swap: what is so later on was chosen behind it."""
        self._still = {(way, id(module)) for way, modules, _ in _frozen_by_class(pl_module) for module in modules}

    def start(self, pl_module: pl.LightningModule, report: SwapReport | None) -> None:
        """Begin to watch."""
        self.stop()
        self._epoch_is_new, self._evaluation_told = True, False
        layers = {} if report is None else report.replaced()
        # Another callback may have replaced a layer since the swap.
        in_place = {id(m) for m in normalizers_of(pl_module)}
        layers = {name: pair for name, pair in layers.items() if id(pair[0]) in in_place}
        if layers:
            self._reach, self._stepped = Reach(layers, hooks=not _is_compiled(pl_module)), set()

    def start_epoch(self) -> None:
        """Take note of a new epoch, in whose hooks layers may have been put in evaluation."""
        self._epoch_is_new = True

    def after_backward(self) -> None:
        """Take note of gradients."""
        if self._reach is not None:
            self._reach.look_at_gradients()

    def before_step(self, optimizer: Any) -> None:
        """Take note of gradients, and of the step of an optimizer that has some."""
        if self._reach is None:
            return
        self._reach.look_at_gradients()
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            self._stepped.add(id(optimizer))

    def after_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell, once all optimizers have stepped."""
        if self._epoch_is_new:
            self._epoch_is_new = False
            self._tell_of_evaluation(trainer, pl_module)
        # The layers of a GAN's second network are reached only when its own optimizer steps.
        if self._reach is not None and len(self._stepped) >= max(1, len(trainer.optimizers)):
            self._tell(trainer)

    def end_epoch(self, trainer: pl.Trainer) -> None:
        """Tell, where one of several optimizers has waited for a whole epoch."""
        if self._reach is not None and self._stepped:
            self._tell(trainer)

    def stop(self) -> None:
        """Stop to watch."""
        if self._reach is not None:
            self._reach.stop()
            self._reach = None

    def _tell(self, trainer: pl.Trainer) -> None:
        """Name the layers that were missed, and stop to watch."""
        assert self._reach is not None
        # A rank's shard may hold nothing of a layer's parameters, and then no gradient of it.
        sharded = any(name in type(trainer.strategy).__name__ for name in SHARDED)
        missed = self._reach.missed(gradients=not sharded)
        self.stop()
        if missed:
            rank_zero_warn(tell(missed, "the first training step"), category=NotReachedWarning)

    def _tell_of_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn, once, where code froze torch's BatchNorm layers by their class, and not ours."""
        if self._evaluation_told:
            return
        ours = [layer for layer in normalizers_of(pl_module) if layer.training and layer.origin is not None]
        names = names_by_module(pl_module)
        # NormFreeze has chosen its layers by their names.
        freezing = [each for each in callbacks_of(trainer) if isinstance(each, NormFreeze)]
        by_name = {layer for each in freezing for layer in each.layers.values()}
        # A layer that was put in evaluation with all that is around it was not chosen by its class.
        alone = [
            names[child][0]
            for parent in pl_module.modules()
            if parent.training
            for child in parent.children()
            if not child.training
            and not isinstance(child, Normalizer)
            and has_running_stats(child)
            and child not in by_name
            and any(True for _ in child.parameters(recurse=False))
        ]
        frozen = [
            (
                [names[m][0] for m in modules if m not in by_name and (way, id(m)) not in self._still],
                left,
                f"given {way}",
            )
            for way, modules, left in _frozen_by_class(pl_module)
        ]
        for found, left, what in ((alone, ours, "put in evaluation one by one"), *frozen):
            if found and left:
                self._evaluation_told = True
                rank_zero_warn(
                    f"{what}: {counted(len(found), 'BatchNorm layer')} (first: {found[0]}), and none of the "
                    f"{counted(len(left), 'layer')} of this package: code that looks for torch's class does not find "
                    "them. lightning_norm.is_norm(module) finds both.",
                    category=ConflictWarning,
                )


def _frozen_by_class(model: nn.Module) -> list[tuple[str, list[nn.Module], list[Normalizer]]]:
    """Return how recipes freeze BatchNorm: the setting, layers of torch's that have it, and swapped ones without it."""
    torchs = [module for module in model.modules() if not isinstance(module, Normalizer) and has_running_stats(module)]
    ours = [layer for layer in normalizers_of(model) if layer.origin is not None]
    moving = [layer for layer in ours if layer.has_running_stats and layer.training]
    # A layer that is frozen with the convolution beside it was not chosen by its class.
    beside = [
        child
        for parent in model.modules()
        if any(p.requires_grad for c in parent.children() if not has_running_stats(c) for p in c.parameters())
        for child in parent.children()
        if child in torchs and any(True for _ in child.parameters())
    ]
    learning = [layer for layer in ours if any(p.requires_grad for p in layer.parameters())]
    return [
        (
            "momentum=0",
            [module for module in torchs if getattr(module, "momentum", None) == 0],
            [layer for layer in moving if getattr(layer, "momentum", None) != 0],
        ),
        (
            "track_running_stats=False",
            [module for module in torchs if getattr(module, "track_running_stats", None) is False],
            [layer for layer in moving if layer.track_running_stats],
        ),
        (
            "requires_grad=False",
            [module for module in beside if not any(p.requires_grad for p in module.parameters())],
            # Where some are frozen as well, the choice was not one of torch's class.
            learning if len(learning) == len(ours) else [],
        ),
    ]


def _is_compiled(model: nn.Module) -> bool:
    """Tell whether the network, or a part of it, was handed to ``torch.compile``."""
    # A hook in a compiled network would have it compiled once more.
    return any(
        getattr(m, "_compiled_call_impl", None) is not None or type(m).__name__ == "OptimizedModule"
        for m in model.modules()
    )

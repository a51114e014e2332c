"""NormRecalibrate: running statistics estimated anew from training batches, at the right moment of a run."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torchmetrics import Metric
from typing_extensions import override

from lightning_norm.callbacks.lightning_compat import (
    Callback,
    StochasticWeightAveraging,
    WeightAveraging,
    callbacks_of,
    is_instance,
    is_overridden,
    isolate_rng,
    pl,
    rank_zero_info,
)
from lightning_norm.callbacks.lightning_private import metric_state, without_iterator
from lightning_norm.callbacks.patching import Patches
from lightning_norm.callbacks.training_data import generators_restored
from lightning_norm.surgery.recalibrate import Recalibration, layers_of, recalibrate

WHEN = ("fit_end", "before_validation", "on_request")


class NormRecalibrate(Callback):
    """Re-estimate running statistics over training batches, exactly: see :func:`lightning_norm.recalibrate`.

    For weights that were averaged (SWA, EMA), whose running statistics belong to no network that ever ran; for small or
    noisy batches; for switchable normalization, whose authors evaluate on batch averages.

    Args:
        num_batches: training batches to take at most, on each rank.
        when: "fit_end", once after training; "before_validation", each time, so that checkpoints written after it hold
            the new statistics; "on_request", when somebody calls :meth:`run`.
        exclude: which layers not; as in :func:`lightning_norm.swap`.
        inputs: which part of a batch ``forward`` is called with: an index, a key, or ``None`` for the whole batch. By
            default the first part of a tuple or list, and else the whole. A module without ``forward`` runs its
            ``training_step``, with logging off and metrics as they were.

    Attributes:
        result: what the last call did.

    Raises:
        ValueError: ``num_batches`` or ``when`` out of range, or statistics that cannot be re-estimated.
        RuntimeError: a callback that averages weights stands behind this one.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[NormRecalibrate(100)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        num_batches: int = 200,
        when: Literal["fit_end", "before_validation", "on_request"] = "fit_end",
        exclude: str | list[str] | None = None,
        inputs: int | str | None = "first",
    ) -> None:
        if num_batches < 1:
            raise ValueError(f"NormRecalibrate: num_batches must be at least 1, got {num_batches!r}.")
        if when not in WHEN:
            raise ValueError(f"NormRecalibrate: when must be one of {WHEN}, got {when!r}.")
        self.num_batches, self.when, self.exclude, self.inputs = num_batches, when, exclude, inputs
        self.result: Recalibration | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks = callbacks_of(trainer)
        # Hooks are called in the order of the callbacks, so only those behind this one act after it.
        behind = callbacks[callbacks.index(self) :] if self in callbacks else []
        for callback in behind:
            if is_instance(callback, WeightAveraging, StochasticWeightAveraging):
                raise RuntimeError(
                    f"{type(callback).__name__} stands behind NormRecalibrate in the callbacks and would put its "
                    "weights in place after the statistics were estimated. Put NormRecalibrate last."
                )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Raises for what cannot be re-estimated: better before the training than after it.
        layers_of(pl_module, self.exclude)

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Before the first step there is nothing to re-estimate, and no training data outside of fit.
        if self.when == "before_validation" and not trainer.sanity_checking and trainer.train_dataloader is not None:
            self.run(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.when == "fit_end":
            self.run(trainer, pl_module)

    def run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Recalibration:
        """Re-estimate now, on the Trainer's training batches, which the training itself does not notice.

        Raises:
            ValueError: there is no training data, or there are several loaders.
        """
        loader = trainer.train_dataloader
        # Which of several loaders belongs to forward, only the user knows.
        if loader is None or isinstance(loader, (dict, list, tuple)):
            count = "none" if loader is None else "several"
            raise ValueError(
                f"NormRecalibrate needs one training loader, the Trainer has {count}. "
                "Call lightning_norm.recalibrate(model, loader) with the one to use."
            )
        with isolate_rng(), generators_restored([loader]), _without_traces(pl_module):
            self.result = recalibrate(
                pl_module,
                without_iterator(loader),
                self.num_batches,
                forward=self._forward(trainer, pl_module),
                exclude=self.exclude,
                progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
            )
        rank_zero_info(f"NormRecalibrate: {self.result}")
        return self.result

    def _forward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[[Any], Any]:
        # Without a forward the training_step is the only way through the network, if it does not also optimize.
        has_forward = is_overridden("forward", pl_module)
        if not has_forward and not pl_module.automatic_optimization:
            raise ValueError(
                f"NormRecalibrate: {type(pl_module).__name__} has no forward, and its training_step optimizes by "
                "itself. Define forward, or call lightning_norm.recalibrate(model, loader, forward=...)."
            )

        def forward(batch: Any) -> Any:
            # The same precision and device as in training, which hands over batches in just this way.
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            if not has_forward:
                with trainer.precision_plugin.forward_context():
                    return pl_module.training_step(*(batch, 0)[: _arguments(pl_module.training_step)])
            # A batch is mostly (inputs, targets), and forward takes the inputs.
            if self.inputs == "first":
                x = batch[0] if isinstance(batch, (tuple, list)) else batch
            else:
                x = batch if self.inputs is None else batch[self.inputs]
            with trainer.precision_plugin.forward_context():
                return pl_module(x)

        return forward


def _arguments(step: Callable[..., Any]) -> int:
    """Return 1 if a training_step takes the batch alone, and 2 if it takes its index as well."""
    return min(2, len(inspect.signature(step).parameters))


@contextmanager
def _without_traces(pl_module: pl.LightningModule) -> Iterator[None]:
    """Within it nothing is logged, and after it metrics are as they were."""
    # Metrics count the batches that pass through training_step and would report on these as well.
    metrics = [m for m in pl_module.modules() if isinstance(m, Metric)]
    names = [(m, name) for m in metrics for name in metric_state(m)]
    values = [(m, name, copy.deepcopy(getattr(m, name))) for m, name in names]
    try:
        with Patches() as patches:
            # A training_step that is run outside of the loop may not log: Lightning would raise an error.
            for name in ("log", "log_dict"):
                patches.wrap(pl_module, name, lambda *_, **__: None)
            yield
    finally:
        for metric, name, value in values:
            setattr(metric, name, value)

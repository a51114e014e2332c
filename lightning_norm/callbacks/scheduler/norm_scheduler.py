"""NormScheduler: hyper-parameters of the normalizers that change during training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from typing_extensions import override

from lightning_norm.callbacks.agreement import agree
from lightning_norm.callbacks.patching import WrappedMethods
from lightning_norm.callbacks.scheduler.targets import Target, check_run, check_value, find_targets, split_key
from lightning_norm.layers.scheduled import set_scheduled, was_scheduled
from lightning_norm.schedules.base import Schedule
from lightning_norm.schedules.composed import as_schedule

STEPS_PER_EPOCH = "lightning_norm_steps_per_epoch"
"""Entry of a checkpoint, where a schedule by step has its duration in epochs."""


class NormScheduler(Callback):
    """Let hyper-parameters of the normalizers follow schedules: a sparse radius, a momentum, an alpha, a threshold.

    A value follows from the epoch (or the optimizer step) alone. Nothing is stored, a resumed run has the values of
    the uninterrupted one, and so has each rank. Values live in tensors, so that no change compiles anything anew.
    Names, patterns and the values of the whole planned run are checked before the first step.

    Evaluation uses the value of the last training step: in validation during training, after it, and in
    ``trainer.test(ckpt_path=...)`` that of the checkpoint. A model that was never trained has the first value.

    Args:
        schedules: ``alpha``, or ``layer regex:alpha`` for the layers whose whole dotted name the regular expression
            matches, -> a schedule, or a number. Of several keys for one value the first wins.
        interval: "epoch" or "step": when values change, and the unit of time of the schedules. A step is an optimizer
            step, ``trainer.global_step``. With "step", a duration in ``epochs`` advances by fractions of an epoch.

    Raises:
        ValueError, TypeError: not a schedule, a name that no layer has, a pattern that matches nothing, a value outside
            the range of a layer, or a duration in a unit that the interval does not have.

    >>> from lightning_norm import Linear
    >>> callback = NormScheduler({"radius": Linear(0.0, 1.0, epochs=10), "net.bn1:momentum": 0.05})
    """

    def __init__(self, schedules: dict[str, float | Schedule], interval: Literal["epoch", "step"] = "epoch") -> None:
        if interval not in ("epoch", "step"):
            raise ValueError(f"NormScheduler: interval must be 'epoch' or 'step', got {interval!r}.")
        if not schedules:
            raise ValueError("NormScheduler needs schedules={'alpha': InversePower(power=0.5)}, say.")
        self.interval = interval
        self.schedules = {key: as_schedule(f"schedules[{key!r}]", value) for key, value in schedules.items()}
        for key, schedule in self.schedules.items():
            split_key(key)
            if interval == "epoch" and "steps" in schedule.units():
                raise ValueError(f"schedules[{key!r}] = {schedule} has a duration in steps: type interval='step'.")
        self._targets: list[Target] = []
        self._wrapped = WrappedMethods()
        self._steps_per_epoch: float | None = None
        self._loaded: float | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._loaded = None
        self._wrapped.clear()
        self._wrapped.clean_up(trainer.strategy, self._wrapped.clear)
        if stage == "fit":  # before on_fit_start, where the learning-rate and batch-size finders train
            self._wrapped.wrap(pl_module, "configure_optimizers", lambda make: self._early(trainer, pl_module, make))
        else:
            self._wrapped.wrap(pl_module, "on_load_checkpoint", self._read)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._wrapped.clear()
        self._find(trainer, pl_module)
        lines = [f"{t.name}:{t.value} {t.schedule} by {self.interval}" for t in self._targets]
        agree("the schedules", "values", lines, "Every rank must use the same NormScheduler.")
        self._set(self._now(trainer))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps_per_epoch = steps_per_epoch(trainer, pl_module)
        check_run(self._targets, self._last(trainer), self._epoch(), self.interval)
        self._set(self._now(trainer))

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._set(self._now(trainer))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.interval == "step":
            self._set(self._now(trainer))

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == dataloader_idx == 0:  # WeightAveraging has put averages of all buffers in their place
            self._refresh()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refresh()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._evaluate(trainer, pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate(trainer, pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._steps_per_epoch is not None and self._needs_epochs():
            checkpoint[STEPS_PER_EPOCH] = self._steps_per_epoch

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._wrapped.clear()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._wrapped.clear()

    def _early(self, trainer: pl.Trainer, pl_module: pl.LightningModule, make: Callable[[], Any]) -> Any:
        self._find(trainer, pl_module)
        self._set(self._now(trainer))
        return make()

    def _read(self, original: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        """Remember the time of a checkpoint's last training step."""
        original(checkpoint)
        if self.interval == "step":
            self._loaded = max(checkpoint["global_step"] - 1, 0)
        else:  # counted from the epochs begun: at the end of training the checkpoint's "epoch" is one too many
            self._loaded = max(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"] - 1, 0)
        self._steps_per_epoch = checkpoint.get(STEPS_PER_EPOCH, self._steps_per_epoch)
        if self._steps_per_epoch is None and self._needs_epochs():
            raise ValueError(
                "NormScheduler: the checkpoint does not tell how many steps an epoch had (it holds weights only), and "
                "a schedule by step has its duration in epochs. Write steps= in place of epochs=, or leave out "
                "NormScheduler."
            )

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._wrapped.clear()
        self._find(trainer, pl_module)
        if self._loaded is not None:
            self._set(self._loaded)
        else:
            self._set(0, [t for t in self._targets if not was_scheduled(t.layer, t.value)])
            self._refresh()

    def _find(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._targets = find_targets(pl_module, self.schedules)
        mine = {(id(t.layer), t.value) for t in self._targets}
        for other in trainer.callbacks:  # type: ignore[attr-defined]  # set by the callback connector
            if isinstance(other, NormScheduler) and other is not self:
                for target in other._targets:
                    if (id(target.layer), target.value) in mine:
                        raise ValueError(f"two NormSchedulers schedule {target.value} of {target.name}. Leave out one.")

    def _set(self, time: float, targets: list[Target] | None = None) -> None:
        values: dict[int, float] = {}
        for target in self._targets if targets is None else targets:
            key = id(target.schedule)
            if key not in values:
                values[key] = target.schedule(time, self._epoch())
            if getattr(target.layer, target.value) != values[key] or not was_scheduled(target.layer, target.value):
                check_value(target, time, values[key], self.interval)
                set_scheduled(target.layer, target.value, values[key])

    def _refresh(self) -> None:
        for target in self._targets:
            set_scheduled(target.layer, target.value, getattr(target.layer, target.value))

    def _now(self, trainer: pl.Trainer) -> int:
        return trainer.current_epoch if self.interval == "epoch" else trainer.global_step

    def _epoch(self) -> float:
        return 1.0 if self.interval == "epoch" else self._steps_per_epoch or 1.0

    def _needs_epochs(self) -> bool:
        return self.interval == "step" and any("epochs" in s.units() for s in self.schedules.values())

    def _last(self, trainer: pl.Trainer) -> float:
        """Return the time of the last step that is planned."""
        steps = self._steps_per_epoch
        if steps is None and self._needs_epochs():
            raise ValueError(
                "NormScheduler: a schedule by step has its duration in epochs, and how many steps an epoch has is not "
                "known: the training data have no length or are reloaded, optimizers are stepped by hand, or "
                "GradientAccumulationScheduler changes it. Write steps= in place of epochs=, or interval='epoch'."
            )
        epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
        most = math.inf if trainer.max_steps == -1 else trainer.max_steps
        if self.interval == "step":
            return max(min(most, epochs * steps if steps else math.inf) - 1, 0)
        return max(min(epochs, math.ceil(most / steps) if steps and math.isfinite(most) else math.inf) - 1, 0)


def steps_per_epoch(trainer: pl.Trainer, pl_module: pl.LightningModule) -> float | None:
    """Return the optimizer steps of each epoch, ``None`` where they are not known or not always the same."""
    batches = trainer.num_training_batches
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by the callback connector
    changing = any(isinstance(c, GradientAccumulationScheduler) for c in callbacks)
    reloaded = trainer.reload_dataloaders_every_n_epochs > 0  # type: ignore[attr-defined]
    if changing or reloaded or not pl_module.automatic_optimization or math.isinf(batches):
        return None
    return math.ceil(batches / trainer.accumulate_grad_batches)

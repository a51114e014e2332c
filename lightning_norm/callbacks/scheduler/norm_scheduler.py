"""NormScheduler: hyper-parameters of the normalizers that change during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from typing_extensions import override

from lightning_norm.callbacks.described import Described
from lightning_norm.callbacks.lightning_compat import (
    Callback,
    GradientAccumulationScheduler,
    callbacks_of,
    is_instance,
    pl,
)
from lightning_norm.callbacks.patching import Patches
from lightning_norm.callbacks.rank_checks import check_same_on_ranks
from lightning_norm.callbacks.saved_state import SavedState, refuse_twins
from lightning_norm.callbacks.scheduler.scheduled_parameters import (
    ScheduledParameter,
    check_run,
    check_value,
    find_scheduled_parameters,
    split_key,
    value_at,
)
from lightning_norm.layers.arguments import plain_value
from lightning_norm.schedules.base import Schedule
from lightning_norm.schedules.composed import as_schedule


class NormScheduler(Described, SavedState, Callback):
    """Let hyper-parameters of the normalizers follow schedules: a sparse radius, a momentum, an alpha, a threshold.

    ``momentum`` is also that of torch's own BatchNorm layers, in a network that was never swapped and in what a swap
    has left.

    A value follows from the epoch (or the optimizer step) alone, so that a resumed run has the values of the
    uninterrupted one, and so has each rank. Values live in tensors, so that no change compiles anything anew. Names,
    patterns and the values of the whole run are checked before the first step. The state of the callback in a
    checkpoint is the number of steps of an epoch, where a schedule by step needs it.

    Evaluation uses the value of the last training step: in validation during training, after it, and in
    ``trainer.test(ckpt_path=...)`` that of the checkpoint. A model that was never trained has the first value.

    The callback logs nothing itself: :class:`NormMonitor` shows every scheduled value beside what the layers learn.
    ``layer.ranges`` names the arguments of a layer that may be scheduled, and their ranges.

    Args:
        schedules: ``alpha``, or ``layer regex:alpha`` for the layers whose whole dotted name the regular expression
            matches, -> a schedule, a number, or ``{0: 0.9, 10: 0.1}`` for :class:`lightning_norm.Steps`. Of several
            keys for one value the first wins.
        interval: "epoch" or "step": when values change, and the unit of time of the schedules. A step is an optimizer
            step, ``trainer.global_step``. With "step", a duration in ``epochs`` advances by fractions of an epoch.

    Attributes:
        parameters: what is scheduled, a :class:`ScheduledParameter` per argument and layer.

    Raises:
        ValueError, TypeError: not a schedule, a name that no layer has, a pattern that matches nothing, a value outside
            the range of a layer, or a duration in a unit that the interval does not have.

    >>> from lightning_norm import Linear
    >>> callback = NormScheduler({"radius": Linear(0.0, 1.0, epochs=10), "net.bn1:momentum": 0.05})

    The first key that matches wins, so the special one comes first:

    >>> callback = NormScheduler({"net.layer4.*:radius": 1.0, "radius": Linear(0.0, 1.0, steps=500)}, interval="step")
    """

    def __init__(
        self,
        schedules: dict[str, float | Schedule | dict[int, float]],
        interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        if interval not in ("epoch", "step"):
            raise ValueError(f"NormScheduler: interval must be 'epoch' or 'step', got {interval!r}.")
        if not schedules:
            raise ValueError("NormScheduler needs schedules={'alpha': InversePower(power=0.5)}, say.")
        if not isinstance(schedules, Mapping):
            raise TypeError(f"NormScheduler: schedules must be a mapping such as {{'alpha': 0.1}}, got {schedules!r}.")
        self.interval = interval
        self.schedules = {
            key: as_schedule(f"schedules[{key!r}]", value) for key, value in plain_value(schedules).items()
        }
        for key, schedule in self.schedules.items():
            split_key(key)
            # A step has no length in epochs, while an epoch may have one in steps.
            if interval == "epoch" and "steps" in schedule.units():
                raise ValueError(f"schedules[{key!r}] = {schedule} has a duration in steps: type interval='step'.")
        self.parameters: list[ScheduledParameter] = []
        self._patches = Patches()
        self._steps_per_epoch: float | None = None
        self._checkpoint_time: float | None = None

    @property
    @override
    def state_key(self) -> str:
        # Of the names alone: a changed schedule still finds the state of the run that it continues.
        arguments = {"interval": self.interval, "schedules": list(self.schedules)}
        return f"{type(self).__qualname__}{arguments!r}"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Arrange that finders, which train before a fit starts, and evaluation know the values."""
        refuse_twins(
            trainer, self, f"would schedule the same values, {', '.join(self.schedules)}. Put all schedules into one."
        )
        self._checkpoint_time = None
        self._patches.undo()
        self._patches.undo_on_exception(trainer.strategy, self._patches.undo)
        if stage == "fit":
            # Learning-rate and batch-size finders train before this callback's on_fit_start.
            self._patches.wrap(pl_module, "configure_optimizers", lambda make: self._early(trainer, pl_module, make))
        else:
            # Outside of fit, Lightning calls no callback with the checkpoint.
            self._patches.wrap(pl_module, "on_load_checkpoint", self._read_time)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look up what the keys name, compare it between ranks, and set the first values.

        Raises:
            ValueError: a name that no layer has, or one value that two NormSchedulers would set.
        """
        self._patches.undo()
        self._find_parameters(trainer, pl_module)
        # Ranks with different schedules would train different networks without an error.
        lines = [f"{p.layer_name}:{p.argument} {p.schedule} by {self.interval}" for p in self.parameters]
        check_same_on_ranks("the schedules", "values", lines, "Every rank must use the same NormScheduler.")
        self.set_values(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check every value of the whole run against the ranges of the layers, before the first step.

        Raises:
            ValueError: one is outside of its range, or a duration in epochs has no known number of steps.
        """
        # Lightning knows the number of batches only from here on.
        self._steps_per_epoch = steps_per_epoch(trainer, pl_module)
        check_run(self.parameters, self._last(trainer), self._epoch_length(), self.interval)
        self.set_values(trainer)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the values of this epoch, or of its first step."""
        self.set_values(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the values of this step with ``interval="step"``."""
        if self.interval == "step":
            self.set_values(trainer)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Set the values once more, before the first batch."""
        if batch_idx == dataloader_idx == 0:
            # WeightAveraging validates with averages of all buffers, those of scheduled values included.
            self._write_again()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the values once more: callbacks that average weights have put averages of buffers in the network."""
        self._write_again()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the values of an evaluation outside of a fit; the same in test and in prediction."""
        if trainer.state.fn != "fit":
            self._evaluate(trainer, pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate(trainer, pl_module)

    @override
    def saved_state(self) -> dict[str, Any]:
        """Return how many steps an epoch has, if a schedule by step has its duration in epochs."""
        return {"steps_per_epoch": self._steps_per_epoch} if self._steps_per_epoch and self._needs_epochs() else {}

    @override
    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Take over how many steps an epoch had."""
        self._steps_per_epoch = state["steps_per_epoch"]

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._patches.undo()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._patches.undo()

    def set_values(self, trainer: pl.Trainer) -> None:
        """Set every scheduled argument to its value in the Trainer's current epoch or step.

        Args:
            trainer: whose ``current_epoch`` or ``global_step`` is the time.

        Raises:
            ValueError: the value is outside the range of a layer.
        """
        self._set(self.parameters, trainer.current_epoch if self.interval == "epoch" else trainer.global_step)

    def _early(self, trainer: pl.Trainer, pl_module: pl.LightningModule, make: Callable[[], Any]) -> Any:
        """Set the first values before the optimizers are built: a finder trains before this callback's on_fit_start."""
        self._find_parameters(trainer, pl_module)
        self.set_values(trainer)
        return make()

    def _read_time(self, original: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        """Remember the time of a checkpoint's last training step."""
        original(checkpoint)
        if self.interval == "step":
            self._checkpoint_time = max(checkpoint["global_step"] - 1, 0)
        else:
            # Counted from the epochs that began: at the end of training the checkpoint's "epoch" is one too many.
            progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
            self._checkpoint_time = max(progress["current"]["ready"] - 1, 0)
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        # Present where the whole checkpoint was written, missing in one of weights only.
        if state:
            self.load_saved_state(state)
        if self._steps_per_epoch is None and self._needs_epochs():
            raise ValueError(
                "NormScheduler: the checkpoint does not tell how many steps an epoch had (it holds weights only, or "
                "was written without this NormScheduler), and a schedule by step has its duration in epochs. Write "
                "steps= in place of epochs=, or leave out NormScheduler."
            )

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the values of an evaluation that is not part of a fit."""
        self._patches.undo()
        self._find_parameters(trainer, pl_module, trains=False)
        # What a fit in this process has set stays; what was never set gets the first value.
        if self._checkpoint_time is not None:
            self._set(self.parameters, self._checkpoint_time)
        else:
            self._set([p for p in self.parameters if not p.was_set], 0)
            self._write_again()

    def _find_parameters(self, trainer: pl.Trainer, pl_module: pl.LightningModule, trains: bool = True) -> None:
        """Look up what the keys name, and refuse what another NormScheduler of the Trainer schedules as well."""
        self.parameters = find_scheduled_parameters(pl_module, self.schedules, trains)
        # By the layer itself: two callbacks may name it by different patterns.
        mine = {(id(p.layer), p.argument) for p in self.parameters}
        for other in callbacks_of(trainer):
            if isinstance(other, NormScheduler) and other is not self:
                for p in other.parameters:
                    if (id(p.layer), p.argument) in mine:
                        raise ValueError(f"two NormSchedulers schedule {p.argument} of {p.layer_name}. Leave out one.")

    def _set(self, parameters: Iterable[ScheduledParameter], time: float) -> None:
        """Set the values of a time, in epochs or steps, where they differ from those that are set."""
        # A schedule is asked once, however many layers follow it.
        values: dict[int, float] = {}
        for p in parameters:
            key = id(p.schedule)
            if key not in values:
                values[key] = value_at(p, time, self._epoch_length())
            # Writing into a layer's tensor costs a launch per layer and step on a GPU, so only changes are written.
            if getattr(p.layer, p.argument) != values[key] or not p.was_set:
                check_value(p, time, values[key], self.interval)
                p.set(values[key])

    def _write_again(self) -> None:
        """Write the current values into the layers' tensors, whatever was put there."""
        # Even where nothing has changed: what is in the tensor may be an average of other values.
        for p in self.parameters:
            p.set(getattr(p.layer, p.argument))

    def _epoch_length(self) -> float:
        return 1.0 if self.interval == "epoch" else self._steps_per_epoch or 1.0

    def _needs_epochs(self) -> bool:
        return self.interval == "step" and any("epochs" in s.units() for s in self.schedules.values())

    def _last(self, trainer: pl.Trainer) -> float:
        """Return the time of the last step that the Trainer will take, infinite where it has no end."""
        steps = self._steps_per_epoch
        if steps is None and self._needs_epochs():
            raise ValueError(
                "NormScheduler: a schedule by step has its duration in epochs, and how many steps an epoch has is not "
                "known: the training data have no length or are reloaded, optimizers are stepped by hand, or "
                "GradientAccumulationScheduler changes it. Write steps= in place of epochs=, or interval='epoch'."
            )
        # Of max_epochs and max_steps, whichever comes first ends the run.
        epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
        most = math.inf if trainer.max_steps == -1 else trainer.max_steps
        if self.interval == "step":
            return max(min(most, epochs * steps if steps else math.inf) - 1, 0)
        # Steps are turned into epochs by rounding up: the last epoch may be a part of one.
        return max(min(epochs, math.ceil(most / steps) if steps and math.isfinite(most) else math.inf) - 1, 0)


def steps_per_epoch(trainer: pl.Trainer, pl_module: pl.LightningModule) -> float | None:
    r"""Return the optimizer steps of each epoch, ``None`` where they are not known or not always the same.

    They are :math:`\lceil \mathrm{batches} / \mathrm{accumulate\_grad\_batches} \rceil`, for Lightning steps on the
    last batch of an epoch in any case. They are not known if the optimizer is stepped by hand, if the data have no
    length or are reloaded, or if a GradientAccumulationScheduler changes the divisor.
    """
    batches = trainer.num_training_batches
    changing = any(is_instance(c, GradientAccumulationScheduler) for c in callbacks_of(trainer))
    reloaded = trainer.reload_dataloaders_every_n_epochs > 0  # type: ignore[attr-defined]
    # Each of these changes the number of steps between epochs, or hides it.
    if changing or reloaded or not pl_module.automatic_optimization or math.isinf(batches):
        return None
    return math.ceil(batches / trainer.accumulate_grad_batches)

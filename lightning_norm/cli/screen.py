"""What a training command shows: the swap, how long it will take, the progress, the result; nothing of other products.

Only the commands do this. A script that uses the package prints what Lightning prints.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import itertools
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar
from torch import Tensor
from typing_extensions import override

from lightning_norm.callbacks import NormSwap
from lightning_norm.demo.data import ImageData
from lightning_norm.demo.job import ImageClassifier
from lightning_norm.errors import counted
from lightning_norm.ops.sync import end_gloo_before_exit
from lightning_norm.surgery.walk import normalizers_of

HIDDEN = (
    "Seed set to ",
    "GPU available: ",
    "TPU available: ",
    "LOCAL_RANK: ",
    "\N{ELECTRIC LIGHT BULB} Tip: ",
    "Loading `train_dataloader` to estimate",
    "`Trainer.fit` stopped: `max_epochs=",
    "=1.0)` was configured so 100% of the batches",
)
"""Parts of lines that say nothing about this training."""
LOGGERS = (
    *(f"{lightning}.utilities.rank_zero" for lightning in ("lightning.pytorch", "lightning.fabric")),
    *(f"{lightning}.utilities.rank_zero" for lightning in ("pytorch_lightning", "lightning_fabric")),
    *("lightning.fabric.utilities.seed", "lightning.pytorch.accelerators.cuda", "lightning_utilities.core.rank_zero"),
)
"""Which log them: a filter of a logger does not see what its descendants log, so each is named."""
MOST_METRICS = 4
"""How many metrics a line has where the module puts none in the progress bar."""
DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
PACKAGE = Path(__file__).parent.parent


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Show no line of ``HIDDEN``, and no deprecation in an installed package, which the user of it cannot mend."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_shown)
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_ours(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            path = Path(filename)
            installed = {"site-packages", "dist-packages"} & {*path.parts} and not path.is_relative_to(PACKAGE)
            if not (installed and issubclass(category, DEPRECATIONS)):
                show(message, category, filename, lineno, file, line)

        # Shown or not is decided here and not by a filter, so that whoever turns warnings into errors still can.
        warnings.showwarning = show_ours
        try:
            yield
        finally:
            for name in LOGGERS:
                logging.getLogger(name).removeFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(part in message for part in HIDDEN)


class QuietWorkers(Callback):
    """Do in the processes that ``ddp_spawn`` starts what the command does in its own: hide noise, and end gloo in time.

    Such a process shares no loggers with the one that started it, and gets the Trainer with its callbacks.
    """

    def __init__(self) -> None:
        self._hidden = _is_shown in logging.getLogger(LOGGERS[0]).filters
        self._process = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._process == os.getpid():  # a copy in this process changes nothing
            return
        end_gloo_before_exit()
        if self._hidden:
            until_the_end = contextlib.ExitStack()
            until_the_end.enter_context(without_noise())
            atexit.register(until_the_end.close)


def screen_callbacks(trainer: Any, callbacks: list[Any]) -> list[Callback]:
    """Return the callbacks that speak of the progress of a training.

    Args:
        trainer: the section of the configuration.
        callbacks: those of the configuration.
    """
    return [Forecast(), EpochLines()] if bar_is_unreadable(trainer, callbacks) else [Forecast()]


def bar_is_unreadable(trainer: Any, callbacks: list[Any]) -> bool:
    """Tell whether Lightning would draw its bar where there is no terminal: it moves the cursor.

    Args:
        trainer: the section of the configuration.
        callbacks: those of the configuration; a bar among them was chosen.
    """
    wanted = trainer.get("enable_progress_bar") is not False
    return wanted and not sys.stdout.isatty() and not any(isinstance(c, ProgressBar) for c in callbacks)


class EpochLines(ProgressBar):
    """The progress as one line per epoch, for output that is no terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._shown, self._start = True, 0.0

    @override
    def disable(self) -> None:
        self._shown = False

    @override
    def enable(self) -> None:
        self._shown = True

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what a bar would show at the end of an epoch, or else the first metrics that the module logged."""
        if not self._shown:
            return
        metrics = self.get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # of the logger's folder, and no metric
        if not metrics:
            # Modules that log without prog_bar=True are the most common ones, and a bare time says nothing of them.
            logged = itertools.islice(trainer.callback_metrics.items(), MOST_METRICS)
            metrics = {name: value.item() for name, value in logged}
        of = f"/{trainer.max_epochs}" if (trainer.max_epochs or 0) > 0 else ""
        shown = [
            f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
        ]
        seconds = time.perf_counter() - self._start
        print("  ".join([f"Epoch {trainer.current_epoch + 1}{of}", *shown, f"{seconds:.0f} s"]), flush=True)


class Forecast(Callback):
    """Say how long the training will take: before it for the built-in job, after four steps for any other.

    The built-in network can be copied and timed beside the training. Nobody knows what steps of another module do
    beside computing, so that its own first ones are timed.
    """

    def __init__(self) -> None:
        self._due, self._start = False, 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the sentence, if the network can be timed."""
        steps, epochs = trainer.num_training_batches, (trainer.max_epochs or 0) - trainer.current_epoch
        ends = math.isfinite(steps) and epochs > 0 and trainer.max_steps == -1
        self._due = False
        if not ends or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        self._due = not can_be_timed(trainer, pl_module)
        if not self._due:
            print(self._sentence(trainer, *seconds_per_batch(trainer, pl_module)), flush=True)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print the sentence after four steps, of which the first one is not timed: it allocates."""
        if not self._due:
            return
        if batch_idx == 0:
            self._start = time.perf_counter()
        elif batch_idx == min(3, trainer.num_training_batches - 1):
            self._due = False
            step = (time.perf_counter() - self._start) / batch_idx
            sentence = self._sentence(trainer, step, step / 3)
            bar = trainer.progress_bar_callback
            print(sentence, flush=True) if bar is None else bar.print(sentence)

    def _sentence(self, trainer: pl.Trainer, training: float, evaluation: float) -> str:
        """Return the length of the whole, given the seconds of a batch.

        Args:
            trainer: that knows how many batches and epochs there are.
            training: seconds of a training step.
            evaluation: seconds of a batch of validation.
        """
        steps, epochs = int(trainer.num_training_batches), (trainer.max_epochs or 0) - trainer.current_epoch
        checked = sum(n for n in trainer.num_val_batches if math.isfinite(n))
        seconds = epochs * (steps * training + checked * evaluation)
        return f"{counted(epochs, 'epoch')} of {counted(steps, 'step')}, {duration(seconds)} on this machine"


def can_be_timed(trainer: Any, model: pl.LightningModule) -> bool:
    """Tell whether a copy of the network can take a step on its own, without a trace in the training.

    Args:
        trainer: whose strategy and precision decide, too.
        model: the job.
    """
    return (
        isinstance(model, ImageClassifier)
        and isinstance(trainer.datamodule, ImageData)
        and trainer.world_size == 1  # ranks would wait for each other
        and not any(isinstance(c, NormSwap) and c.options.compile for c in trainer.callbacks)
        and not any(layer.swap_advice.required_callback for layer in normalizers_of(model))
    )


def seconds_per_batch(trainer: Any, model: Any) -> tuple[float, float]:
    """Return how long a step and an evaluation of one batch take, measured on a copy of the network.

    Args:
        trainer: whose first training batch is taken.
        model: the job, which stays as it is.

    Returns:
        Seconds of a training step, and of a batch of validation.
    """
    data = trainer.datamodule
    images, labels = (part.to(model.device) for part in data.splits["train"][: data.batch_size])
    images, labels = data.on_after_batch_transfer((images, labels), 0)
    net = copy.deepcopy(model.net)

    def step() -> None:
        with trainer.precision_plugin.forward_context():
            loss: Tensor = model.loss(net.train()(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def evaluate() -> None:
        net.eval()(images)

    # Random numbers of a dropout are those of the training, and would change it.
    with torch.random.fork_rng():
        step()  # the first one allocates
        return min(_seconds(step, images.device) for _ in range(2)), _seconds(evaluate, images.device)


def _seconds(call: Any, device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def duration(seconds: float) -> str:
    """Return a time in the words of an estimate.

    >>> [duration(s) for s in (2, 34, 70, 200, 8000)]
    ['a few seconds', 'about 30 seconds', 'about 1 minute', 'about 3 minutes', 'about 2.2 hours']
    """
    if seconds < 10:
        return "a few seconds"
    if seconds < 55:
        return f"about {round(seconds, -1):.0f} seconds"
    if seconds < 5400:
        minutes = max(1, round(seconds / 60))
        return f"about {counted(minutes, 'minute')}"
    return f"about {seconds / 3600:.1f} hours"

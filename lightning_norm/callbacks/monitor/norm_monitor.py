"""NormMonitor: what the normalizers have learned, in any logger, and a page of its own in TensorBoard."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_norm.callbacks.described import Described, print_report
from lightning_norm.callbacks.lightning_compat import (
    Callback,
    TensorBoardLogger,
    callbacks_of,
    is_instance,
    pl,
    rank_zero_info,
)
from lightning_norm.callbacks.lightning_private import tag_prefix
from lightning_norm.callbacks.monitor import page as page
from lightning_norm.callbacks.monitor import pictures as pictures
from lightning_norm.callbacks.monitor.quantities import (
    Quantities,
    Series,
    depth_means,
    families,
    hyper_parameters,
    layer_names,
    notes,
)
from lightning_norm.callbacks.patching import Patches
from lightning_norm.callbacks.saved_state import SavedState, refuse_twins
from lightning_norm.callbacks.scheduler.norm_scheduler import NormScheduler
from lightning_norm.errors import MissingDependencyWarning, NoEffectWarning, did_you_mean
from lightning_norm.layers.arguments import check_count, check_flags
from lightning_norm.layers.base import Normalizer
from lightning_norm.surgery.text_tables import aligned, markdown


class NormMonitor(Described, SavedState, Callback):
    """Log each layer's learned quantities, such as the importance weights of switchable normalization.

    Every logger gets the scalars: ``norm/<key>/<quantity>/<layer name>``, as in ``norm/sn/mean_bn/net.layer1.0.bn1``,
    and their means over the early, middle and late layers, ``norm_early/<key>/<quantity>``. A TensorBoard
    logger also gets the page "Custom scalars" with these means, pictures under "Images", histograms, and at the end of
    fit a table under "Text". The norm, its arguments and the metric become columns under "HParams".

    Only global rank zero reads and logs, without any collective. All values of a step leave the device in one transfer,
    and only in the steps that are logged and at the end of an epoch.

    The x axis is ``trainer.global_step``, as for everything else that Lightning logs. The state of the callback in a
    checkpoint is the history, one number per epoch and quantity, so that the pictures of a resumed run begin at its
    start. Where nothing can be logged (no logger, no layer with anything to show, parameters that are sharded), it says
    so once.

    Args:
        every_n_steps: cadence; the Trainer's ``log_every_n_steps`` by default.
        prefix: first part of the tags.
        logging_interval: "step", or "epoch" to log scalars at the start of each epoch only; ``None`` is "step".
        extras: log for every layer the condition of gamma, its share near zero, and the drift of the running statistics
            since they were last read, relative to their size.
        pictures: draw pictures at the end of fit; they need matplotlib.
        pictures_every_n_epochs: and during it.
        histograms: of gamma and the other learned values, at the end of each epoch.
        page: write the page of charts, the table and the HParams.
        metric: name of the metric among the HParams; by default what ModelCheckpoint or EarlyStopping monitors, or else
            every metric that was logged.
        progress_bar: show two means over all layers in the progress bar, or those of the quantities listed here.
        print_table: print the table at the end of fit, the weight that leads in a mixture between asterisks.

    Attributes:
        history: number of finished epochs -> (key, quantity, layer) -> value; 0 is the state before the training.

    Raises:
        ValueError: a cadence is not a positive int, or there is no such interval.

    .. code-block:: yaml

        norm: sn
        trainer: {callbacks: [{class_path: NormMonitor, init_args: {every_n_steps: 50, progress_bar: true}}]}

    >>> from lightning.pytorch import Trainer
    >>> monitor = NormMonitor(every_n_steps=50, progress_bar=["mean_bn"])
    >>> trainer = Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        prefix: str = "norm",
        logging_interval: Literal["step", "epoch"] | None = None,
        extras: bool = True,
        pictures: bool = True,
        pictures_every_n_epochs: int | None = None,
        histograms: bool = True,
        page: bool = True,
        metric: str | None = None,
        progress_bar: bool | list[str] = False,
        print_table: bool = False,
    ) -> None:
        # Told at construction, where the traceback leads to the user's own line.
        if every_n_steps is not None:
            every_n_steps = check_count("NormMonitor: every_n_steps", every_n_steps)
        if pictures_every_n_epochs is not None:
            pictures_every_n_epochs = check_count("NormMonitor: pictures_every_n_epochs", pictures_every_n_epochs)
        flags = {"extras": extras, "pictures": pictures, "histograms": histograms, "page": page}
        check_flags("NormMonitor: ", **flags, print_table=print_table)
        if logging_interval not in (None, "step", "epoch"):
            raise ValueError(
                f"NormMonitor: logging_interval must be 'step', 'epoch' or None, got {logging_interval!r}."
            )
        self.every_n_steps, self.prefix, self.logging_interval = every_n_steps, prefix, logging_interval
        self.extras, self.histograms, self.page, self.metric = extras, histograms, page, metric
        self.pictures, self.pictures_every_n_epochs = pictures, pictures_every_n_epochs
        self.progress_bar, self.print_table = progress_bar, print_table
        self.history: dict[int, dict[Series, float]] = {}
        self._quantities = Quantities(extras)
        self._patches = Patches()
        self._read_at = self._logged_at = -1  # steps
        self._values: dict[Series, float] = {}
        self._active = self._writes_row = False

    @property
    @override
    def state_key(self) -> str:
        # Several monitors in one Trainer differ in their prefix.
        return f"{type(self).__qualname__}{ {'prefix': self.prefix}!r}"

    def quantities(self, pl_module: torch.nn.Module) -> dict[str, Tensor]:
        """Return tag -> 0-dim tensor for every layer that has something to show.

        Nothing is transferred: the tensors are where the layers are, and none needs a gradient.

        >>> from lightning_norm import SwitchableNorm
        >>> len(NormMonitor(extras=False).quantities(torch.nn.Sequential(SwitchableNorm(4))))
        6
        """
        return {self.tag(series): value for series, value in self._quantities.tensors(pl_module).items()}

    def tag(self, series: Series, group: str = "") -> str:
        """Return the tag of a quantity of a layer.

        >>> NormMonitor().tag(("sn", "mean_bn", "net.bn1"))
        'norm/sn/mean_bn/net.bn1'
        """
        return "/".join((f"{self.prefix}{group}", *series))

    def depth_tag(self, series: Series) -> str:
        """Return the tag of the mean over the layers of a depth; short, because legends show it.

        >>> NormMonitor().depth_tag(("sn", "mean_bn", "early"))
        'norm_early/sn/mean_bn'
        """
        key, quantity, depth = series
        return f"{self.prefix}_{depth}/{key}/{quantity}"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep Lightning's own row out of the page "HParams"; that of a user stands, and this one is left out."""
        other = f"{self.prefix}2"
        refuse_twins(
            trainer,
            self,
            f"log under the same names, with the prefix {self.prefix!r}. Give each another one: "
            f"NormMonitor(prefix={other!r}), in YAML init_args: {{prefix: {other}}}.",
        )
        self._active = False
        self._patches.undo()
        self._writes_row = self.page and trainer.is_global_zero
        for logger in trainer.loggers if self._writes_row else ():
            if page.writes_rows(logger):
                self._patches.wrap(logger, "log_hyperparams", self._log_hyperparams)
                self._patches.undo_on_exception(trainer.strategy, self._patches.undo)

    def _log_hyperparams(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Log hyper-parameters without Lightning's row, and note whether the user has written one."""
        self._writes_row &= not (kwargs.get("metrics") or args[1:2] not in ((), (None,)))
        return page.without_default_row(original, *args, **kwargs)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the state before the training, and lay out the page of charts; warn where nothing can be logged."""
        step = trainer.global_step
        if step != self._logged_at:
            self._logged_at = -1  # this is not the continuation of the last fit
        self._read_at = -1
        # A drift from the end of an earlier fit would be that of another run.
        self._quantities.restart()
        # Other ranks have the same weights, and reading them takes no collective.
        self._active = trainer.is_global_zero and self._has_effect(trainer, pl_module)
        if not self._active:
            return
        self._begin_history(trainer.current_epoch, self._read(pl_module, step))
        logged, told = self._quantities.series(pl_module), notes(pl_module)
        for key, of_quantity in told.items():
            rank_zero_info(f"NormMonitor: {key}: {'; '.join(of_quantity.values())}")
        for logger in self._tensorboards(trainer):
            if self.page:
                # TensorBoard looks charts up by the whole tag, which the logger's prefix begins.
                group = f"{tag_prefix(logger)}{self.prefix}"
                logger.experiment.add_custom_scalars(page.layout(logged, group, told))
        if self._writes_row:
            page.add_hparams(trainer, pl_module, self.prefix)

    def _begin_history(self, epoch: int, values: dict[Series, float]) -> None:
        """Keep what a resumed run has of the epochs before this one; a run that starts at 0 begins anew."""
        self.history = {before: values for before, values in self.history.items() if 0 < epoch >= before}
        self.history.setdefault(epoch, values)

    def _has_effect(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Tell whether anything can be logged; warn where not, and of what will be missing."""
        strategy = type(trainer.strategy).__name__
        reason = ""
        if not (trainer.loggers or self.progress_bar or self.print_table):
            reason = "the Trainer has no logger. Pass logger=True."
        # By name, because some of these classes need packages that may not be installed.
        elif any(name in strategy for name in ("FSDP", "DeepSpeed", "ModelParallel")):
            reason = f"{strategy} shards the parameters, and no rank holds a whole layer."
        elif not (self._read(pl_module, trainer.global_step) or _scheduled_in_torch(trainer)):
            reason = "no layer of the model has anything to show."
        if reason:
            warnings.warn(f"NormMonitor logs nothing: {reason}", NoEffectWarning, stacklevel=2)
            return False
        # A misspelled quantity would show an empty progress bar without a word.
        known = {quantity for _, quantity, _ in self._quantities.series(pl_module)}
        if isinstance(self.progress_bar, list) and set(self.progress_bar) - known:
            warnings.warn(
                f"NormMonitor: progress_bar={self.progress_bar}, and the layers have {sorted(known)}.",
                NoEffectWarning,
                stacklevel=2,
            )
        if self.pictures and self._tensorboards(trainer) and not pictures.can_draw():
            warnings.warn(
                "NormMonitor draws no pictures: matplotlib is not installed. Type pip install "
                "'lightning-norm[examples]', or pass pictures=False.",
                MissingDependencyWarning,
                stacklevel=2,
            )
        return True

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the scalars with ``logging_interval="epoch"``."""
        # At the start of an epoch, when scheduled values of the epoch are in place.
        if self._active and self.logging_interval == "epoch":
            self._log(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log the scalars every ``every_n_steps`` optimizer steps."""
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._active and self.logging_interval != "epoch" and trainer.global_step % every == 0:
            self._log(trainer, pl_module)

    def _check_metric(self, trainer: pl.Trainer) -> None:
        """Refuse a metric that the model has not logged by the end of an epoch with validation, on every rank alike.

        Raises:
            ValueError: it has not; the nearest name is given.
        """
        every = trainer.check_val_every_n_epoch or 1
        validated = sum(trainer.num_val_batches) > 0 and (trainer.current_epoch + 1) % every == 0
        # What a test logs is not known before it.
        if self.metric is None or not validated or "test" in self.metric or self.metric in trainer.callback_metrics:
            return
        guess = did_you_mean(self.metric, trainer.callback_metrics)
        raise ValueError(
            f"NormMonitor: the model has logged no metric {self.metric!r}.{guess} Logged: "
            f"{', '.join(trainer.callback_metrics) or 'none'}."
        )

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the epoch into the history; write histograms, and pictures if they are due."""
        self._check_metric(trainer)
        boards = self._tensorboards(trainer)
        if not self._active or not boards:
            return
        step, epochs = trainer.global_step, trainer.current_epoch + 1
        # One reading serves the histograms, the history and the scalars of this step.
        values, learned = self._quantities.read(pl_module, self.histograms)
        self._read_at, self._values = step, values
        # Keyed by the number of epochs that are over; 0 is the state before the training.
        self.history[epochs] = values
        for board in boards:
            for series, value in learned.items():
                # SummaryWriter raises an error for a histogram of NaN or infinity, which would end the training.
                if value.isfinite().all():
                    board.experiment.add_histogram(self.tag(series, "_histograms"), value, step)
        if self.pictures_every_n_epochs is not None and epochs % self.pictures_every_n_epochs == 0:
            self._draw(trainer, step, notes(pl_module))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the last values, and write or print the tables, the columns under "HParams" and the pictures."""
        if not self._active:
            return
        self._log(trainer, pl_module, end=True)
        told = notes(pl_module)
        if self.print_table:
            self._print_tables(told)
        if self.page:
            self._write_tables(trainer, told)
            if self._writes_row:
                page.add_metrics(trainer, self.metric)
        self._draw(trainer, trainer.global_step, told)

    def _print_tables(self, told: dict[str, dict[str, str]]) -> None:
        """Print one table per key: layers down, quantities across."""
        for key in families(self._values):
            tables = [aligned(table, numbers=True) for table in page.tables(self._values, key, mark="*")]
            print_report("\n\n".join((f"NormMonitor: {key}\n{tables[0]}", *tables[1:], *told.get(key, {}).values())))

    def _write_tables(self, trainer: pl.Trainer, told: dict[str, dict[str, str]]) -> None:
        """Write the same tables under "Text", as Markdown."""
        for board in self._tensorboards(trainer):
            for key in families(self._values):
                tables = (markdown(rows, numbers=True) for rows in page.tables(self._values, key, mark="**"))
                text = "\n\n".join((*tables, *told.get(key, {}).values()))
                board.experiment.add_text(f"{self.prefix}/{key}/table", text, trainer.global_step)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._patches.undo()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._patches.undo()
        if self._active and self._writes_row:
            page.add_metrics(trainer, self.metric, finished=False)

    @override
    def saved_state(self) -> dict[str, Any]:
        """Return the history, so that the pictures of a resumed run are whole.

        ``epochs`` (E,) ints, ``places`` of the Q quantities, and ``values``, a tensor (E, Q) with NaN where an epoch
        had none.
        """
        logged = list(dict.fromkeys(series for values in self.history.values() for series in values))
        # A table of numbers: checkpoints are read with weights_only, which allows plain types and tensors.
        rows = [[values.get(series, float("nan")) for series in logged] for values in self.history.values()]
        return {"epochs": list(self.history), "places": logged, "values": torch.tensor(rows)}

    @override
    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Take over the history of the run that is continued."""
        # NaN stands where a quantity had no value in an epoch; it is left out again.
        rows = state["values"].tolist()
        logged = [tuple(series) for series in state["places"]]
        self.history = {
            epoch: {series: value for series, value in zip(logged, row, strict=True) if value == value}
            for epoch, row in zip(state["epochs"], rows, strict=True)
        }

    def _read(self, pl_module: pl.LightningModule, step: int) -> dict[Series, float]:
        """Return the values of a step, read from the layers at most once."""
        # The scalars and the end of an epoch may fall on the same step; one transfer is enough.
        if step != self._read_at:
            self._values, _ = self._quantities.read(pl_module)
            self._read_at = step
        return self._values

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, end: bool = False) -> None:
        """Hand the scalars of this step to every logger and to the progress bar, at most once per step."""
        step = trainer.global_step
        if step == self._logged_at:
            return  # gradients accumulate, and the optimizer has not stepped since
        self._logged_at = step
        if not end:
            # Each step is logged with its own values, also where the scheduler stands behind the monitor.
            for callback in callbacks_of(trainer):
                if isinstance(callback, NormScheduler):
                    callback.set_values(trainer)
        scheduled = {**hyper_parameters(pl_module, only_scheduled=True), **_scheduled_in_torch(trainer)}
        values = {**self._read(pl_module, step), **scheduled}
        scalars = {self.tag(series): value for series, value in values.items()}
        scalars.update({self.depth_tag(series): value for series, value in depth_means(values).items()})
        for logger in trainer.loggers:
            page.log_scalars(logger, scalars, step)
        if not end:
            for name, value in self._progress_bar_values(values).items():
                # The module's own log: a callback has no other way into the progress bar.
                pl_module.log(name, value, prog_bar=True, logger=False, rank_zero_only=True)

    def _progress_bar_values(self, values: dict[Series, float]) -> dict[str, float]:
        """Return the means over all layers that the progress bar shows."""
        chosen = self.progress_bar if isinstance(self.progress_bar, list) else None
        means: dict[str, float] = {}
        for key, grouped in families(values).items() if self.progress_bar else ():
            # Without a choice: of each of the first two families the weight of "bn", or else the first quantity.
            first = [next((q for q in members if q.endswith("_bn")), members[0]) for members in grouped.values()]
            for quantity in chosen if chosen is not None else first[: 2 - len(means)]:
                numbers = [values[key, quantity, layer] for layer in layer_names(values, key, quantity)]
                if numbers:
                    means[f"{key}/{quantity}"] = sum(numbers) / len(numbers)
        return means

    def _draw(self, trainer: pl.Trainer, step: int, told: dict[str, dict[str, str]]) -> None:
        """Add the pictures of the history so far to TensorBoard."""
        boards = self._tensorboards(trainer)
        if not self.pictures or not boards or not pictures.can_draw():
            return
        for (key, title), image in pictures.draw(self.history, told).items():
            for board in boards:
                board.experiment.add_image(f"{self.prefix}/{key}/{title}", image, step, dataformats="HWC")

    @staticmethod
    def _tensorboards(trainer: pl.Trainer) -> list[TensorBoardLogger]:
        return [logger for logger in trainer.loggers if is_instance(logger, TensorBoardLogger)]


def _scheduled_in_torch(trainer: pl.Trainer) -> dict[Series, float]:
    """Return the values of torch's own layers that a NormScheduler drives."""
    schedulers = [c for c in callbacks_of(trainer) if isinstance(c, NormScheduler)]
    return {
        (type(p.layer).__name__, p.argument, p.layer_name): float(getattr(p.layer, p.argument))
        for scheduler in schedulers
        for p in scheduler.parameters
        if not isinstance(p.layer, Normalizer)
    }

"""NormMonitor: what the normalizers have learned, in any logger, and a page of its own in TensorBoard."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_norm.callbacks.monitor import page as page
from lightning_norm.callbacks.monitor import pictures as pictures
from lightning_norm.callbacks.monitor.quantities import Place, Quantities, depth_means, families, layer_names, scheduled
from lightning_norm.callbacks.patching import WrappedMethods
from lightning_norm.callbacks.scheduler.norm_scheduler import NormScheduler
from lightning_norm.errors import MissingDependencyWarning, NoEffectWarning
from lightning_norm.surgery.tables import aligned


class NormMonitor(Callback):
    """Log each layer's learned quantities, such as the importance weights of switchable normalization.

    Every logger gets the scalars: ``norm/<key>/<quantity>/<layer name>``, as in ``norm/sn/mean_bn/net.layer1.0.bn1``,
    and their means over the early, middle and late layers, ``norm_by_depth/<key>/<quantity>/<depth>``. A TensorBoard
    logger also gets the page "Custom scalars" with these means, pictures under "Images", histograms, and at the end of
    fit a table under "Text". The norm, its arguments and the metric become columns under "HParams".

    Only global rank zero reads and logs, without any collective. All values of a step leave the device in one transfer,
    and only in the steps that are logged and at the end of an epoch.

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
        metric: tag of the metric among the HParams; by default what ModelCheckpoint or EarlyStopping monitors.
        progress_bar: show two means over all layers in the progress bar, or those of the quantities listed here.
        print_table: print the table at the end of fit, the greatest weight of a mixture between asterisks.

    Raises:
        ValueError: a cadence is not a positive int, or there is no such interval.
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
        for name, value in (("every_n_steps", every_n_steps), ("pictures_every_n_epochs", pictures_every_n_epochs)):
            if value is not None and value < 1:
                raise ValueError(f"NormMonitor: {name} must be at least 1 or None, got {value!r}.")
        if logging_interval not in (None, "step", "epoch"):
            raise ValueError(
                f"NormMonitor: logging_interval must be 'step', 'epoch' or None, got {logging_interval!r}."
            )
        self.every_n_steps, self.prefix, self.logging_interval = every_n_steps, prefix, logging_interval
        self.extras, self.histograms, self.page, self.metric = extras, histograms, page, metric
        self.pictures, self.pictures_every_n_epochs = pictures, pictures_every_n_epochs
        self.progress_bar, self.print_table = progress_bar, print_table
        self.history: dict[int, dict[Place, float]] = {}
        self._quantities = Quantities(extras)
        self._wrapped = WrappedMethods()
        self._read_at = self._logged_at = -1
        self._values: dict[Place, float] = {}
        self._active = False

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(prefix=self.prefix)

    def quantities(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """Return tag -> 0-dim tensor for every layer that has something to show."""
        return {self.tag(place): value for place, value in self._quantities.tensors(model).items()}

    def tag(self, place: Place, group: str = "") -> str:
        """Return the tag of a quantity of a layer or, with ``group="_by_depth"``, of a depth."""
        return "/".join((f"{self.prefix}{group}", *place))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._active = False
        self._wrapped.clear()
        if self.page and trainer.is_global_zero:  # after the user's own hook, before Lightning's hyper-parameters
            self._wrapped.wrap(pl_module, "on_fit_start", lambda original: self._hparams(trainer, pl_module, original))
            self._wrapped.clean_up(trainer.strategy, self._wrapped.clear)

    def _hparams(self, trainer: pl.Trainer, pl_module: pl.LightningModule, original: Any) -> Any:
        returned = original()
        page.add_hparams(trainer, pl_module, self.prefix, self.metric, end=False)
        return returned

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._wrapped.clear()
        step = _step(trainer)
        if step != self._logged_at:  # not the continuation of the last fit
            self._logged_at = -1
        self._read_at = -1
        self._quantities.restart()
        self._active = trainer.is_global_zero and self._has_effect(trainer, pl_module)
        if not self._active:
            return
        done = trainer.current_epoch
        self.history = {epoch: values for epoch, values in self.history.items() if 0 < done >= epoch}
        values = self._read(pl_module, step)
        self.history.setdefault(done, values)
        places = self._quantities.places(pl_module)
        for logger in self._tensorboards(trainer):
            if self.page:
                group = f"{page.prefix_of(logger)}{self.prefix}_by_depth"
                logger.experiment.add_custom_scalars(page.layout(places, group))

    def _has_effect(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        strategy = type(trainer.strategy).__name__
        reason = ""
        if not (trainer.loggers or self.progress_bar or self.print_table):
            reason = "the Trainer has no logger. Pass logger=True."
        elif any(name in strategy for name in ("FSDP", "DeepSpeed", "ModelParallel")):
            reason = f"{strategy} shards the parameters, and no rank holds a whole layer."
        elif not self._read(pl_module, _step(trainer)):
            reason = "no layer of the model has anything to show."
        if reason:
            warnings.warn(f"NormMonitor logs nothing: {reason}", NoEffectWarning, stacklevel=2)
            return False
        known = {quantity for _, quantity, _ in self._quantities.places(pl_module)}
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
        if self._active and self.logging_interval == "epoch":
            self._log(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._active and self.logging_interval != "epoch" and _step(trainer) % every == 0:
            self._log(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        boards = self._tensorboards(trainer)
        if not self._active or not boards:
            return
        step, done = _step(trainer), trainer.current_epoch + 1
        values, learned = self._quantities.read(pl_module, self.histograms)
        self._read_at, self._values = step, values
        self.history[done] = values
        for board in boards:
            for place, value in learned.items():
                if value.isfinite().all():
                    board.experiment.add_histogram(self.tag(place, "_histograms"), value, step)
        if self.pictures_every_n_epochs is not None and done % self.pictures_every_n_epochs == 0:
            self._draw(trainer, step)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._active:
            return
        self._log(trainer, pl_module, end=True)
        step = _step(trainer)
        if self.print_table:
            for key in families(self._values):
                rows = page.tables(self._values, key, mark="*")
                text = "\n\n".join(aligned(table, numbers=True) for table in rows)
                rank_zero_info(f"NormMonitor: {key}\n{text}")
        if self.page:
            for board in self._tensorboards(trainer):
                for key in families(self._values):
                    text = "\n\n".join(map(page.markdown, page.tables(self._values, key, mark="**")))
                    board.experiment.add_text(f"{self.prefix}/{key}/table", text, step)
            page.add_hparams(trainer, pl_module, self.prefix, self.metric, end=True)
        self._draw(trainer, step)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._wrapped.clear()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._wrapped.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the history, so that the pictures of a resumed run are whole."""
        places = list(dict.fromkeys(place for values in self.history.values() for place in values))
        rows = [[values.get(place, float("nan")) for place in places] for values in self.history.values()]
        return {"epochs": list(self.history), "places": places, "values": torch.tensor(rows)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rows = state_dict["values"].tolist()
        places = [tuple(place) for place in state_dict["places"]]
        self.history = {
            epoch: {place: value for place, value in zip(places, row, strict=True) if value == value}
            for epoch, row in zip(state_dict["epochs"], rows, strict=True)
        }

    def _read(self, pl_module: pl.LightningModule, step: int) -> dict[Place, float]:
        if step != self._read_at:
            self._values, _ = self._quantities.read(pl_module)
            self._read_at = step
        return self._values

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, end: bool = False) -> None:
        step = _step(trainer)
        if step == self._logged_at:  # gradients accumulate: same step
            return
        self._logged_at = step
        if not end:  # whatever the order of the callbacks, each step is logged with its own values
            for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by the callback connector
                if isinstance(callback, NormScheduler):
                    callback.on_train_epoch_start(trainer, pl_module)
        values = {**self._read(pl_module, step), **scheduled(pl_module, given=False)}
        scalars = {self.tag(place): value for place, value in values.items()}
        scalars.update({self.tag(place, "_by_depth"): value for place, value in depth_means(values).items()})
        for logger in trainer.loggers:
            page.log_scalars(logger, scalars, step)
        if not end:
            for name, value in self._bar(values).items():
                pl_module.log(name, value, prog_bar=True, logger=False, rank_zero_only=True)

    def _bar(self, values: dict[Place, float]) -> dict[str, float]:
        """Return the means over all layers that the progress bar shows."""
        wanted = self.progress_bar if isinstance(self.progress_bar, list) else None
        found: dict[str, float] = {}
        for key, grouped in families(values).items() if self.progress_bar else ():
            first = [next((q for q in own if q.endswith("_bn")), own[0]) for own in grouped.values()]
            for quantity in wanted if wanted is not None else first[: 2 - len(found)]:
                own = [values[key, quantity, layer] for layer in layer_names(values, key, quantity)]
                if own:
                    found[f"{key}/{quantity}"] = sum(own) / len(own)
        return found

    def _draw(self, trainer: pl.Trainer, step: int) -> None:
        boards = self._tensorboards(trainer)
        if not self.pictures or not boards or not pictures.can_draw():
            return
        for (key, title), image in pictures.draw(self.history).items():
            for board in boards:
                board.experiment.add_image(f"{self.prefix}/{key}/{title}", image, step, dataformats="HWC")

    @staticmethod
    def _tensorboards(trainer: pl.Trainer) -> list[TensorBoardLogger]:
        return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _step(trainer: pl.Trainer) -> int:
    """Return the step that Lightning's own monitors log at."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped

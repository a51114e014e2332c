"""One run of a comparison: the user's own job, trained and tested once, and what is written down of it."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_norm.callbacks import NormContext, NormSwap
from lightning_norm.cli.compare.runs import Run
from lightning_norm.cli.norm_cli import NormCLI, class_path
from lightning_norm.cli.section import SECTION, non_defaults
from lightning_norm.demo.job import ImageClassifier
from lightning_norm.errors import NoEffectWarning
from lightning_norm.normalizers.context.context_norm import ContextNorm
from lightning_norm.surgery.swap import swap

REPLACED = ("norm", "norm_args", "rules", "plan")
"""Entries of the job's own section ``norm:`` that say which normalizer: each contender brings its own."""

WARM_UP = 3
"""Steps that are not timed: the first ones allocate, and compile where that was asked for."""

CLEAR_PEAK = Path("/proc/self/clear_refs")


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger without its HParams: the report writes those for all runs at once, with equal columns."""

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class JobCLI(NormCLI):
    """Build the user's job with one contender's normalizer; everything else is as the configuration says.

    Args:
        args: of the command line of ``fit``, without the command.
        swap: the contender's entries of the section ``norm:``; empty for the network as it is.
        callbacks: added behind those of the job.
        folder: of logs, and of checkpoints where the job writes some.
        name: of the run.
        options: of :class:`lightning_norm.cli.norm_cli.NormCLI`.

    Attributes:
        settings: the configuration as dotted names and text, without what each contender replaces.
    """

    def __init__(
        self,
        args: Sequence[str],
        swap: Mapping[str, Any],
        callbacks: Sequence[Callback],
        folder: Path,
        name: str,
        **options: Any,
    ) -> None:
        self._swap, self._recorders, self._folder, self._name = swap, list(callbacks), folder, name
        self.settings: dict[str, Any] = {}
        super().__init__(args, run=False, save_config_callback=None, **options)

    @override
    def before_instantiate_classes(self) -> None:
        # Taken out before the callbacks are built, for the contender brings a swap of its own.
        written = _take_out_swaps(self.config.trainer)
        super().before_instantiate_classes()
        written |= non_defaults(self.config[SECTION])
        self._arguments = (
            {**{k: v for k, v in written.items() if k not in REPLACED}, **self._swap} if self._swap else {}
        )
        # As text, to be compared with those of other runs and shown in the report.
        self.settings = flat(self.config.clone(), written)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the Trainer with this run's normalizer, its folder and what records it."""
        callbacks = self.config_init.get("trainer", {}).get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        swaps: list[Callback] = []
        if self._arguments:
            swap = NormSwap(**self._arguments)
            swaps.append(swap)
            # Users compare keys; that one of them needs a second callback they should not have to know.
            if _uses_contexts(swap) and not any(isinstance(c, NormContext) for c in callbacks):
                swaps.append(NormContext())
        kwargs |= {
            "callbacks": [*swaps, *callbacks, *self._recorders],
            "logger": RunLogger(
                str(self._folder / "tensorboard"), name="", version=self._name, default_hp_metric=False
            ),
            "default_root_dir": str(self._folder / "work" / self._name),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        }
        # Past NormCLI, which would add the swap of the section again.
        return super(NormCLI, self).instantiate_trainer(**kwargs)


class Recorder(Callback):
    """Keep every logged metric epoch by epoch, and the time of each step.

    Args:
        check: called before each step; it raises what is to end the training.

    Attributes:
        history: name of a metric -> its value at the end of each epoch.
        step_ms: milliseconds of each training step, from the batch on the device to the end of the optimizer's step.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self.check = check
        self.history: dict[str, list[float]] = {}
        self.step_ms: list[float] = []
        self._start = 0.0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to time the step."""
        self.check()
        # Between the hooks lies the step alone, without the loading of its batch.
        self._start = _now(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time of the step."""
        self.step_ms.append(1e3 * (_now(pl_module) - self._start))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            self.history.setdefault(name, []).append(float(value))


@contextlib.contextmanager
def _interruptions_of(trainer: pl.Trainer) -> Iterator[None]:
    """Raise the KeyboardInterrupt in place of which Lightning ends the process without a word."""
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
        raise KeyboardInterrupt from None
    if trainer.interrupted:
        raise KeyboardInterrupt


def train(
    run: Run, args: Sequence[str], folder: Path, best: bool, check: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Train and test once; return the record of the run.

    The record is what the run's file holds, in JSON's types: ``history``, name -> a value for each epoch; ``test``,
    name -> value; ``steps`` of the optimizer; ``step_ms``, the median time of a training step; ``peak_mb`` of memory
    beyond what was in use before; ``parameters``; ``seconds``; and what was trained: ``label``, ``swap``, ``set``,
    ``sweep``, ``seed``, ``settings``, ``versions``, ``device``.

    Args:
        run: normalizer, swept values and seed.
        args: the job, as on the command line of ``fit``.
        folder: of the comparison.
        best: test the best checkpoint where the job monitors one, and not the last weights.
        check: called before each step; it raises what is to end the training.

    Raises:
        KeyboardInterrupt: the training was interrupted.
    """
    started, memory, recorder = time.perf_counter(), _start_peak(), Recorder(check)
    cli = JobCLI(run.arguments(args), run.contender.swap, [recorder], folder, run.name)
    trainer, model = cli.trainer, cli.model
    with _interruptions_of(trainer):
        trainer.fit(model, datamodule=cli.datamodule)
    # Read before the test, which may load an earlier checkpoint.
    steps = trainer.global_step
    tested: Mapping[str, float] = {}
    if is_overridden("test_step", model) and _has_test_data(cli):
        checkpoint: Any = trainer.checkpoint_callback
        monitored = best and getattr(checkpoint, "monitor", None) and checkpoint.best_model_path
        path = "best" if monitored else None
        with _interruptions_of(trainer):
            (tested, *_) = trainer.test(
                None if path else model, datamodule=cli.datamodule, ckpt_path=path, verbose=False
            )
    # A run of fewer steps has at least its last one timed.
    timed = recorder.step_ms[min(WARM_UP, len(recorder.step_ms) - 1) :]
    return {
        "name": run.name,
        "label": run.contender.label,
        "swap": plain(run.contender.swap),
        "set": plain(run.contender.entries),
        "sweep": dict(run.sweep),
        "seed": run.seed,
        "settings": cli.settings,
        "history": recorder.history,
        "test": {name: float(value) for name, value in tested.items()},
        "steps": steps,
        "step_ms": statistics.median(timed) if timed else None,
        "peak_mb": _peak(memory),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {
            "torch": torch.__version__,
            "lightning": version("lightning"),
            "lightning_norm": version("lightning-norm"),
        },
        "device": str(model.device),
    }


def plan_swap(run: Run, args: Sequence[str], folder: Path) -> None:
    """Build the model and say what the run's swap would refuse, without training.

    Args:
        run: of a contender that swaps.
        args: of the command line of ``fit``.
        folder: of the comparison; nothing is written into it.

    Raises:
        TypeError: the normalizer takes no such argument.
        ValueError: the normalizer or the choice of layers does not fit the model.
    """
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself says it
        cli = JobCLI(args, run.contender.swap, [], folder, run.name)
        model = cli.model
        # Of layers that are built there, a Trainer alone can tell.
        if not isinstance(model, ImageClassifier) and any(
            is_overridden(hook, model, pl.LightningModule) for hook in ("configure_model", "setup")
        ):
            return
        for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]  # set by the callback connector
            if isinstance(callback, NormSwap):
                arguments = callback.swap_arguments() | {"on_empty": callback.options.on_empty}
                swap(model, **arguments, dry_run=True, example=model.example_input_array)


def flat(config: Any, swap: Mapping[str, Any]) -> dict[str, str]:
    """Return a configuration as dotted names and text, but for the seed and for what each contender replaces.

    Args:
        config: as the parser made it.
        swap: what the job's own section ``norm:`` says.
    """
    entries: dict[str, str] = {}

    def add(prefix: str, value: Any) -> None:
        # jsonargparse's namespaces are no mappings.
        if hasattr(value, "as_dict"):
            value = value.as_dict()
        if isinstance(value, Mapping) and value:
            for name, inner in value.items():
                add(f"{prefix}.{name}" if prefix else str(name), inner)
        else:
            entries[prefix] = str(value)

    for name, value in vars(config).items():
        if name not in (SECTION, "seed_everything", "config"):
            add(name, value)
    for name, value in swap.items():
        if name not in REPLACED:
            add(f"{SECTION}.{name}", value)
    return entries


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the Trainer's introduction of itself, the seed and hints, which would come once per run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Hints on loaders and logging intervals, and what other packages deprecate: the same for every run.
            warnings.simplefilter("ignore", PossibleUserWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            # The network as it is, bn, has nothing that a NormMonitor of the job could log.
            warnings.filterwarnings("ignore", "NormMonitor logs nothing: no layer", NoEffectWarning)
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _take_out_swaps(trainer: Any) -> dict[str, Any]:
    """Remove each NormSwap from the callbacks of a configuration; return what they said beyond the defaults.

    Args:
        trainer: the section of that name, as it was parsed; it is changed.
    """
    callbacks = trainer.get("callbacks")
    entries = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    written: dict[str, Any] = {}
    others = []
    for entry in entries:
        if entry.get("class_path") in (class_path(NormSwap), "NormSwap", "lightning_norm.NormSwap"):
            written |= non_defaults(entry.get("init_args") or {})
        else:
            others.append(entry)
    # Untouched otherwise: a single callback may be written without a list.
    if len(others) < len(entries):
        trainer.callbacks = others
    return written


def _uses_contexts(swap: NormSwap) -> bool:
    """Tell whether a swap makes layers of ContextNorm, which need NormContext."""
    return any(issubclass(cls, ContextNorm) for cls in swap.options.targets)


def _has_test_data(cli: JobCLI) -> bool:
    """Tell whether the data, or the model itself, has a loader for the test."""
    # A LightningModule may bring its own loaders.
    data = cli.datamodule
    return is_overridden("test_dataloader", data if data is not None else cli.model)


def plain(value: Any) -> Any:
    """Return entries of the section in JSON's types.

    >>> plain({"layers": (1, 2), "dtype": torch.float32})
    {'layers': [1, 2], 'dtype': 'torch.float32'}
    """
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _now(module: pl.LightningModule) -> float:
    """Return the time, once the device has done its work."""
    # The device works on after the call has returned.
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()


def _start_peak() -> float | None:
    """Forget the peak of memory so far and return what is in use, in MB; ``None`` where the system cannot say.

    Of the GPU where there is one, else of this process as Linux counts it.
    """
    # Of the device where there is one: there lies what limits the batch size.
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    try:
        CLEAR_PEAK.write_text("5")  # Linux: resets VmHWM
        return _status("VmRSS")
    except (OSError, ValueError):
        return None


def _peak(before: float | None) -> float | None:
    """Return the peak of memory since :func:`_start_peak`, less what was in use then, in MB."""
    if before is None:
        return None
    peak = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else _status("VmHWM")
    return round(peak - before, 1)


def _status(name: str) -> float:
    """Return an entry of this process's status in MB.

    Raises:
        ValueError: there is none.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1e3
    raise ValueError(f"/proc/self/status has no {name}.")

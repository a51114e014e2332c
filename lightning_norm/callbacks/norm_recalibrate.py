"""NormRecalibrate: running statistics estimated anew from training batches, at the right moment of a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from typing_extensions import override

from lightning_norm.callbacks.described import Described, print_report
from lightning_norm.callbacks.lightning_compat import (
    Callback,
    CombinedLoader,
    StochasticWeightAveraging,
    WeightAveraging,
    callbacks_of,
    is_instance,
    is_overridden,
    pl,
)
from lightning_norm.callbacks.patching import Patches
from lightning_norm.callbacks.training_data import as_in_training, import_function, loader_of, refuse_stream
from lightning_norm.layers.arguments import check_count
from lightning_norm.surgery.options import check_pattern
from lightning_norm.surgery.recalibrate import Recalibration, layers_of, recalibrate, try_on
from lightning_norm.surgery.restore import random_numbers_restored
from lightning_norm.surgery.torch_private import without_iterator

WHEN = ("fit_end", "before_validation", "on_request")


class NormRecalibrate(Described, Callback):
    r"""Re-estimate running statistics over training batches, exactly: see :func:`lightning_norm.recalibrate`.

    For weights that were averaged (SWA, EMA), whose running statistics belong to no network that ever ran; for small or
    noisy batches; for switchable normalization, whose authors evaluate on batch averages. With batches b of
    :math:`n_b` elements each, over all ranks,

    .. math:: \mu = \sum_b \frac{n_b}{n} \mu_b, \qquad
        \sigma^2 = \sum_b \frac{n_b}{n} (\sigma^2_b + (\mu_b - \mu)^2), \qquad n = \sum_b n_b

    and the running variance is :math:`\sigma^2 n / (n - 1)`, as torch's; a class that keeps the mean of its samples'
    variances gets that one. Weights, gradients, random numbers and the order of the training's batches stay as they
    are, and nothing is logged but one line that says what was done. The statistics are saved as the layers' buffers;
    the callback itself has no state.

    Put it last: callbacks act in their order, and one that averages weights has to be done before.

    Args:
        num_batches: training batches to take at most, on each rank.
        when: "fit_end", once after training; "before_validation", each time, so that checkpoints written after it hold
            the new statistics; "on_request", when somebody calls :meth:`run`.
        exclude: which layers not; as in :func:`lightning_norm.swap`.
        inputs: which part of a batch ``forward`` is called with: an index, a key, or ``None`` for the whole batch. By
            default the first part of a tuple or list, and else the whole. A module without ``forward`` runs its
            ``training_step``, with logging off.
        forward: a function of the module and a batch, or its dotted path, that runs the network in place of that.
        loader: batches in place of the Trainer's training data, or a function (or its dotted path) that returns them:
            where that has several loaders, or is a stream, whose samples another reading may not get again. Its first
            batch is tried before the training; an iterator, which can be read once, is refused.

    Attributes:
        result: what the last call did.

    Raises:
        ValueError: ``num_batches`` or ``when`` out of range; or, before the first step, statistics that cannot be
            re-estimated, data that cannot be read again, or a module that cannot be run on a batch.
        RuntimeError: a callback that averages weights stands behind this one.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[NormRecalibrate(100)], logger=False, enable_checkpointing=False)

    A network that is called with a part of a dictionary:

    >>> callback = NormRecalibrate(100, when="before_validation", inputs="image")
    """

    def __init__(
        self,
        num_batches: int = 200,
        when: Literal["fit_end", "before_validation", "on_request"] = "fit_end",
        exclude: str | list[str] | None = None,
        inputs: int | str | None = "first",
        forward: str | Callable[[Any, Any], Any] | None = None,
        loader: Any = None,
    ) -> None:
        self.num_batches = check_count("NormRecalibrate: num_batches", num_batches)
        self.exclude = check_pattern("NormRecalibrate: exclude", exclude)
        if when not in WHEN:
            raise ValueError(f"NormRecalibrate: when must be one of {WHEN}, got {when!r}.")
        self.when, self.inputs = when, inputs
        # Read at the first of several times, and before the training, it would be empty at the next.
        if isinstance(loader, Iterator):
            raise ValueError(
                f"NormRecalibrate: loader is an iterator ({type(loader).__name__}), which can be read once. Type a "
                "function that makes it, NormRecalibrate(loader=lambda: ...), or what it iterates over."
            )
        self.forward, self.loader = forward, loader
        self.result: Recalibration | None = None
        self._function = import_function("NormRecalibrate", "forward", forward)
        # Whether the module was run on a batch once; hours of training shall not end in a mistake that the first shows.
        self._tried = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the order of the callbacks.

        Raises:
            RuntimeError: one that averages weights stands behind this one.
        """
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
        """Check the layers, the data and the module before the first step, and not hours later.

        Raises:
            ValueError: statistics that cannot be re-estimated, data that cannot be read again, or no way to run the
                module.
        """
        # Raises for what cannot be re-estimated: better before the training than after it.
        layers = layers_of(pl_module, self.exclude)
        self._tried = not layers or self.when == "on_request"
        if self._tried:
            return
        loader, _ = self._loader(trainer)
        self._forward(trainer, pl_module)
        if self.loader is None:
            refuse_stream("NormRecalibrate", [loader])
            return
        # Its own batches may be of another form than the training's.
        with random_numbers_restored(loader):
            batch = next(iter(without_iterator(loader)), None)
        if batch is None:
            raise ValueError(
                "NormRecalibrate: the loader gave no batch. Type NormRecalibrate(loader=...) with another."
            )
        self._try(trainer, pl_module, as_in_training(trainer, pl_module, batch), "a batch of its loader")
        self._tried = True

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Try once, on the first batch, whether the module can be run on it.

        Raises:
            ValueError: it cannot.
        """
        # The first batch is here anyway.
        if not self._tried:
            self._try(trainer, pl_module, batch, "a training batch")
        self._tried = True

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Re-estimate with ``when="before_validation"``, but for the sanity check and ``trainer.validate``."""
        # Before the first step there is nothing to re-estimate, and no training data outside of fit.
        if self.when == "before_validation" and not trainer.sanity_checking and trainer.train_dataloader is not None:
            self.run(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Re-estimate with ``when="fit_end"``."""
        if self.when == "fit_end":
            self.run(trainer, pl_module)

    def run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Recalibration:
        """Re-estimate now, on the Trainer's training batches or on those of ``loader``; the training does not notice.

        Every rank must call it: what the ranks have seen is merged at the end.

        Args:
            trainer: whose precision, device and hooks on transfers each batch goes through.
            pl_module: whose layers get new statistics.

        Returns:
            How many layers and batches there were; also :attr:`result`.

        Raises:
            ValueError: there is no training data, or it cannot be used; the message says why.
        """
        loader, limit = self._loader(trainer)
        # Told before the training otherwise, when nothing has begun to read from it.
        if self.when == "on_request" and self.loader is None:
            refuse_stream("NormRecalibrate", [loader])
        forward = self._forward(trainer, pl_module)
        with random_numbers_restored(loader), _without_logging(pl_module):
            # Batches go through the hooks and the precision of the training: other numbers would give other statistics.
            self.result = recalibrate(
                pl_module,
                loader,
                limit,
                forward=lambda batch: forward(as_in_training(trainer, pl_module, batch)),
                exclude=self.exclude,
                progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
            )
        print_report(f"NormRecalibrate: {self.result}")
        return self.result

    def _loader(self, trainer: pl.Trainer) -> tuple[Any, int]:
        """Return the batches to read, and how many at most."""
        if self.loader is not None:
            return loader_of("NormRecalibrate", self.loader), self.num_batches
        loader = trainer.train_dataloader
        # Which of several loaders belongs to forward, only the user knows.
        if loader is None or isinstance(loader, (dict, list, tuple)) or is_instance(loader, CombinedLoader):
            count = "none" if loader is None else "several"
            raise ValueError(
                f"NormRecalibrate needs one training loader, the Trainer has {count}. Type NormRecalibrate(loader=...) "
                "with the one to use."
            )
        # Batches beyond limit_train_batches are none of the training's.
        return loader, int(min(self.num_batches, trainer.num_training_batches))

    def _forward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[[Any], Any]:
        """Return what runs the module on a batch that is on its device."""
        # Without a forward the training_step is the only way through the network, if it does not also optimize.
        has_forward = is_overridden("forward", pl_module)
        if self._function is None and not has_forward and not pl_module.automatic_optimization:
            raise ValueError(
                f"NormRecalibrate: {type(pl_module).__name__} has no forward, and its training_step optimizes by "
                "itself. Define forward, or type NormRecalibrate(forward=...)."
            )

        def forward(batch: Any) -> Any:
            with trainer.precision_plugin.forward_context():
                if self._function is not None:
                    return self._function(pl_module, batch)
                if not has_forward:
                    return pl_module.training_step(*(batch, 0)[: _arguments(pl_module.training_step)])
                # A batch is mostly (inputs, targets), and forward takes the inputs.
                if self.inputs == "first":
                    return pl_module(batch[0] if isinstance(batch, (tuple, list)) else batch)
                return pl_module(batch if self.inputs is None else batch[self.inputs])

        return forward

    def _try(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, what: str) -> None:
        """Run the module on a batch and forget it, so that what cannot work is told before the first step."""
        forward = self._forward(trainer, pl_module)
        try:
            with random_numbers_restored(), _without_logging(pl_module):
                try_on(pl_module, batch, forward, self.exclude)
        except Exception as error:
            how = "forward" if self._function is not None else f"inputs={self.inputs!r}"
            raise ValueError(
                f"NormRecalibrate cannot run {type(pl_module).__name__} on {what} with {how}: "
                f"{type(error).__name__}: {error}. Type NormRecalibrate(inputs=...) with the part of the batch that "
                "forward takes, or NormRecalibrate(forward='my_module.function'), a function of the module and a batch."
            ) from error


def _arguments(step: Callable[..., Any]) -> int:
    """Return 1 if a training_step takes the batch alone, and 2 if it takes its index as well."""
    return min(2, len(inspect.signature(step).parameters))


@contextmanager
def _without_logging(pl_module: pl.LightningModule) -> Iterator[None]:
    """Make ``log`` and ``log_dict`` of a module do nothing for a while."""
    # A training_step that is run outside of the loop may not log: Lightning would raise an error.
    with Patches() as patches:
        for name in ("log", "log_dict"):
            patches.wrap(pl_module, name, lambda *_, **__: None)
        yield

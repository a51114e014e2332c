"""NormContext: tell ContextNorm layers the contexts of each batch, and fit those that come from the images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_norm.callbacks.described import Described
from lightning_norm.callbacks.lightning_compat import (
    Callback,
    CombinedLoader,
    callbacks_of,
    pl,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_norm.callbacks.lightning_private import fresh_training_loader
from lightning_norm.callbacks.training_data import (
    as_in_training,
    import_function,
    loader_of,
    part_of,
    refuse_stream,
    shape_of,
)
from lightning_norm.errors import NoEffectWarning, counted
from lightning_norm.layers.arguments import check_count
from lightning_norm.normalizers.context.assignment import assign, context_layers, set_centroids
from lightning_norm.ops import kmeans
from lightning_norm.surgery.restore import random_numbers_restored


class NormContext(Described, Callback):
    """Give each batch's contexts to the layers with ``context="ids"``, and each batch's images to those with "input".

    For "input" the contexts are the clusters of the images' channel statistics, found by k-means on training batches
    before the first step, on rank 0, and kept in the checkpoint: a resumed run does not look for them again. That
    reading of the data changes no random number of the training.

    A training batch without contexts stops the run. In validation, test and prediction it does not: the layers then do
    what their argument ``missing`` says. Contexts are forgotten at the end of each batch, so that no layer applies them
    to what is called in between.

    Nothing is logged but two lines of information while k-means runs. The callback saves nothing: the centroids are
    buffers of the layers, ``centroids`` (K, D) and ``descriptor_scale`` (D,), for D numbers that describe an image.

    Args:
        context_fn: dotted path of a function from the batch, on its device, to its contexts: integers (N,) or
            probabilities (N, K); ``None`` where they are missing.
        key: instead of it, where the batch holds them: a key, or the index in a tuple.
        views: how many times the batch that the layers see holds these samples, one after the other.
        images: where the batch holds the images for "input"; by default its first tensor (N, C, *, *) of
            floating-point numbers or bytes.
        fit_batches: training batches that k-means looks at, at most.
        seed: of the start of k-means.
        loader: batches for k-means in place of the Trainer's training data, or a function (or its dotted path) that
            returns them. A stream, whose samples another reading may not get again, is read in no other way.

    Raises:
        ValueError: both ``context_fn`` and ``key``, a function that cannot be imported, or a number out of range.
        RuntimeError: once the model is known: the layers need what this callback was not told, or not what it was told;
            a training batch without contexts or without images; or images in which no contexts can be found.

    .. code-block:: yaml

        norm: {norm: cn, norm_args: {context: ids, num_contexts: 3}}
        trainer: {callbacks: [{class_path: NormContext, init_args: {key: domain}}]}

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[NormContext(key="domain")], logger=False, enable_checkpointing=False)

    A function in its place, here of batches (images, labels, cameras):

    >>> callback = NormContext(context_fn=lambda batch: batch[2])
    """

    def __init__(
        self,
        context_fn: str | Callable[[Any], Tensor | None] | None = None,
        key: str | int | None = None,
        views: int = 1,
        images: str | int | None = None,
        fit_batches: int = 50,
        seed: int = 0,
        loader: Any = None,
    ) -> None:
        if context_fn is not None and key is not None:
            raise ValueError("NormContext: context_fn and key exclude each other.")
        self.context_fn, self.key, self.images = context_fn, key, images
        # Told at construction, where the traceback leads to the user's own line.
        self.views = check_count("NormContext: views", views)
        self.fit_batches, self.seed = check_count("NormContext: fit_batches", fit_batches), seed
        self.loader = loader
        self._function = import_function("NormContext", "context_fn", context_fn)
        # Looked up at the start of each stage, since a swap may put other layers there.
        self._layers: dict[str, Any] = {}
        self._needs: set[str] = set()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look the layers up, and warn where there is none."""
        self._look_up_layers(pl_module)
        if not self._layers:
            rank_zero_warn("NormContext has no effect: the model holds no ContextNorm.", category=NoEffectWarning)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit the centroids of layers with ``context="input"`` that no checkpoint has brought."""
        self._look_up_layers(pl_module)
        # Centroids of a checkpoint are in the layers' buffers by now, and are not looked for again.
        waiting = [layer for layer in self._layers.values() if layer.context == "input" and not layer.is_fitted()]
        if waiting:
            self._fit_centroids(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look the layers up: there may have been no fit before."""
        self._look_up_layers(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look_up_layers(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look_up_layers(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Give the layers the contexts of this batch.

        Raises:
            RuntimeError: the batch has none, or no images.
        """
        self._give_contexts(batch, training=True)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Give the layers the contexts of this batch, if it has any; so in test and in prediction."""
        self._give_contexts(batch, training=False)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the contexts away."""
        self._forget_contexts()

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the contexts away; so in test and in prediction."""
        self._forget_contexts()

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the contexts away, and forget the layers: a callback must not keep a model alive."""
        self._forget_contexts()
        self._layers = {}

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._forget_contexts()
        self._layers = {}

    def _give_contexts(self, batch: Any, training: bool) -> None:
        """Read the contexts, the images or both out of a batch, as the layers need them, and hand them over."""
        ids = images = None
        if "ids" in self._needs:
            ids = self._function(batch) if self._function else part_of(batch, self.key)
            # Evaluation goes on without contexts: layers have an answer for missing ones, which training should not
            # need.
            if ids is None and training:
                place = f"context_fn={self.context_fn!r}" if self._function else f"key={self.key!r}"
                raise RuntimeError(f"NormContext: {place} found no contexts in a training batch ({shape_of(batch)}).")
        if "input" in self._needs:
            images = _images(batch, self.images)
            if images is None and training:
                raise RuntimeError(
                    f"NormContext found no images in a training batch ({shape_of(batch)}). Type images=KEY."
                )
        assign(self._layers, ids, images, self.views)

    def _forget_contexts(self) -> None:
        # A layer must not apply the contexts of a finished batch to whatever is called next.
        assign(self._layers)

    def _look_up_layers(self, pl_module: pl.LightningModule) -> None:
        """Look up the layers, once per stage, and check that they need what this callback has to give."""
        self._layers = context_layers(pl_module)
        self._needs = {layer.context for layer in self._layers.values()} - {"gate"}
        # Each mismatch is told before the first batch: layers that wait in vain, or contexts that nobody wants.
        has_ids = self._function is not None or self.key is not None
        first = next((name for name, layer in self._layers.items() if layer.context == "ids"), None)
        if first is not None and not has_ids:
            raise RuntimeError(
                f"NormContext does not know where the contexts of {first!r} (context='ids') are: type "
                "NormContext(context_fn='my_module.my_function') or NormContext(key='domain')."
            )
        if self._layers and has_ids and first is None:
            sources = ", ".join(sorted({layer.context for layer in self._layers.values()}))
            raise RuntimeError(
                f"NormContext gives contexts to layers with context='ids', and the model's have {sources!r}: swap with "
                "norm_args={'context': 'ids'}, or leave out context_fn and key."
            )

    def _fit_centroids(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run k-means on rank 0, and write what it found into the layers of every rank."""
        # One rank looks and the others take its result: k-means on each rank's own data would give other clusters.
        fitted: Any = None
        cause: Exception | None = None
        if trainer.is_global_zero:
            try:
                fitted = self._fit_on_rank_zero(trainer, pl_module)
            except Exception as error:
                fitted, cause = str(error), error
        # An error is broadcast like a result: the other ranks would wait for it forever.
        fitted = trainer.strategy.broadcast(fitted)
        if isinstance(fitted, str):
            raise RuntimeError(f"NormContext found no contexts in the training images: {fitted}") from cause
        for name, layer in _of_input(self._layers):
            # In place: the buffer is registered, and wrappers of the model know it.
            layer.centroids.copy_(fitted[name][0])
            layer.descriptor_scale.copy_(fitted[name][1])

    def _fit_on_rank_zero(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the name of each layer -> its centroids and the scale of its descriptors, on the CPU."""
        if self.loader is None:
            loader = fresh_training_loader(trainer)
            refuse_stream("NormContext", loader.flattened)
        else:
            loader = CombinedLoader([loader_of("NormContext", self.loader)], "sequential")
        with random_numbers_restored(*loader.flattened):
            # Neither the random numbers nor the order of the training's own batches must change by this reading.
            descriptors = torch.cat(list(self._describe_batches(trainer, pl_module, loader)))
        # One fit for all layers: they look at the same images.
        set_centroids(self._layers, descriptors, self.seed)
        rank_zero_info(f"NormContext: contexts found in {counted(len(descriptors), 'training image')}.")
        return {name: (y.centroids.cpu(), y.descriptor_scale.cpu()) for name, y in _of_input(self._layers)}

    def _describe_batches(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loader: CombinedLoader
    ) -> Iterator[Tensor]:
        """Yield the descriptors of each batch, as the training loop would hand it to the model."""
        # The number of batches may be infinite, for a loader without a length.
        limit = int(min(self.fit_batches, trainer.num_training_batches if self.loader is None else self.fit_batches))
        rank_zero_info(
            f"NormContext: looking for contexts in up to {counted(limit, 'training batch', 'training batches')} ..."
        )
        for batch, _, _ in itertools.islice(loader, limit):
            batch = as_in_training(trainer, pl_module, batch)
            images = _images(batch, self.images)
            if images is None:
                raise ValueError(f"no images in a batch ({shape_of(batch)}). Type images=KEY.")
            # Only the descriptors are kept: a few numbers per image.
            yield kmeans.describe(images).cpu()
        loader.reset()


def check_contexts(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Stop a fit in which layers would wait for contexts that no callback gives.

    Args:
        trainer: with all callbacks.
        pl_module: the swapped module.

    Raises:
        RuntimeError: there is no NormContext.
    """
    waiting = {n: layer for n, layer in context_layers(pl_module).items() if layer.context != "gate"}
    # Before the first batch, where the first layer would stop the run with less to say.
    if waiting and not any(isinstance(callback, NormContext) for callback in callbacks_of(trainer)):
        first, layer = next(iter(waiting.items()))
        example = "NormContext(key='domain')" if layer.context == "ids" else "NormContext()"
        raise RuntimeError(
            f"{counted(len(waiting), 'ContextNorm layer')} (first: {first}) with context={layer.context!r}, and nobody "
            f"gives them contexts. Add {example} to the callbacks, or swap with norm_args={{'context': 'gate'}}. If "
            "training_step itself uses `with contexts(self, ids):`, call lightning_norm.swap in the module's "
            "__init__ and leave NormSwap out."
        )


def _images(batch: Any, key: str | int | None) -> Tensor | None:
    """Return the images in a batch: those under ``key``, or the first tensor that looks like some, depth first."""
    if key is not None:
        # An absent key is answered with the same message as one that holds no images.
        part = part_of(batch, key)
        return part if isinstance(part, Tensor) else None
    if isinstance(batch, Tensor):
        return batch if batch.dim() > 2 and (batch.dtype.is_floating_point or batch.dtype == torch.uint8) else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    # The first part that looks like images, depth first.
    return next((images for part in parts if (images := _images(part, None)) is not None), None)


def _of_input(layers: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in layers.items() if layer.context == "input")

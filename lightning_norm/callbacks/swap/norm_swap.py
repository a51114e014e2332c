"""NormSwap: the callback that swaps the normalizers of whatever is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from typing_extensions import override

from lightning_norm.callbacks.lightning_compat import Callback, pl, rank_zero_info, rank_zero_warn
from lightning_norm.callbacks.norm_context import check_contexts
from lightning_norm.callbacks.patching import Patches
from lightning_norm.callbacks.rank_checks import check_batches, check_layers, warn_ignored
from lightning_norm.callbacks.swap.accumulation import Accumulation
from lightning_norm.callbacks.swap.conflicts import (
    check_copies,
    check_launcher,
    check_order,
    check_settings,
    tell_frozen,
)
from lightning_norm.callbacks.swap.kernel_freeze import KernelFreeze
from lightning_norm.callbacks.swap.manifest_hooks import patch_checkpoint_hooks, reading, start_from, write_manifest
from lightning_norm.callbacks.swap.optimizers import add_missing, check_owned, optimizers_in
from lightning_norm.callbacks.swap.regroup import check_number, regroup, schedulers_in
from lightning_norm.callbacks.swap.saved_plan import read_plan
from lightning_norm.errors import ParameterGrowthWarning
from lightning_norm.normalizers import resolve
from lightning_norm.ops.compiled import on_compile
from lightning_norm.surgery.report import SwapReport
from lightning_norm.surgery.select import ModuleSlot
from lightning_norm.surgery.swap import check_result, check_specs, try_swap


class NormSwap(Callback):
    """Swap the normalization layers of the model in ``setup``, for every stage.

    Layers that ``LightningModule.setup`` or ``configure_model`` build are swapped as well. Parameters and statistics
    move; new parameters join the optimizer group of their layer, also where LightningCLI built the optimizer
    beforehand, and before training starts it is proved that none was forgotten.

    Args:
        norm: a key ("sn"), a dotted path, or ``{"class_path": ..., "init_args": {...}}``, in YAML with the key or path
            as ``class_path`` (Lightning's own CLI wants a path); may be left out with ``rules`` or ``plan``.
        norm_args: arguments of ``norm``.
        include: which layers; a string is a regular expression for the whole dotted name, a list holds names or their
            ends, and "last_of_block" is the last one of each residual block of a ResNet.
        exclude: which layers not; likewise.
        source: kinds of layers to look at; "BatchNorm" by default, see :func:`lightning_norm.swap`.
        rules: ordered mapping from regular expression to a norm or ``None`` (leave alone); the first match wins.
        plan: path of a YAML file written by ``lightning-norm plan --save``, or of a checkpoint: swap as it was swapped
            there; excludes the arguments above.
        backend: "auto", "eager" or "triton".
        compile: compile each layer; every new input shape takes seconds once.
        sync: pool statistics over ranks in training.
        sync_group: with which ranks: "world", "node" (those of one host) or a number of consecutive ranks.
        norm_weight_decay: weight decay of our layers' parameters, whatever the optimizer has; 0 takes them out of it.
        switch_lr_scale: factor of the learning rate of what our layers learn beyond weight and bias, such as the
            control parameters of "sn"; learning-rate schedules apply on top.
        accumulate_statistics: merge the statistics of the batches between two optimizer steps exactly, and move the
            running ones once per step, in all layers of this package.
        check_optimizer: stop before training if a trainable parameter of a normalizer is in no optimizer, or in
            several.
        warm_start: path of a checkpoint whose weights the run starts from, of the network before or after the swap;
            optimizer, epoch and step start anew. A ``ckpt_path`` given to the Trainer wins.
        freeze_kernel_at: first epoch, counted from 0, in which the kernels and biases of BNET layers move no longer.

    Attributes:
        report: the :class:`lightning_norm.SwapReport` once the model was set up.

    Raises:
        ValueError, TypeError: a norm, pattern or argument that does not exist or matches nothing.
        OptimizerError: see ``check_optimizer``.
        RuntimeError: layers that wait for contexts, and no :class:`NormContext` in the Trainer.
        ConflictError: another callback or the strategy would lose what the layers learn; it says what to type.
        CheckpointError: a checkpoint cannot be read or is of another swap.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[NormSwap("sn")], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        norm: str | dict[str, Any] | None = None,
        norm_args: dict[str, Any] | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        source: str | list[str] | None = None,
        rules: dict[str, str | dict[str, Any] | None] | None = None,
        plan: str | None = None,
        backend: Literal["auto", "eager", "triton"] = "auto",
        compile: bool = False,
        sync: bool = True,
        sync_group: str | int = "world",
        norm_weight_decay: float | None = None,
        switch_lr_scale: float | None = None,
        accumulate_statistics: bool = False,
        check_optimizer: bool = True,
        warm_start: str | None = None,
        freeze_kernel_at: int | None = None,
    ) -> None:
        self._freeze = KernelFreeze(freeze_kernel_at)
        if plan is not None:
            if any(a is not None for a in (norm, norm_args, include, exclude, source, rules)):
                raise ValueError(
                    "NormSwap: plan says all there is to say: leave out norm, norm_args, include, exclude, source, "
                    "rules."
                )
            rules, source = read_plan(plan)
        elif norm is None and not rules:
            raise ValueError("NormSwap needs norm='sn' (say), rules={'layer1.*': 'sn', ...} or plan='plan.yaml'.")
        check_specs(norm, norm_args, rules)
        self.norm, self.norm_args, self.rules = norm, norm_args, rules
        self.include, self.exclude, self.source = include, exclude, source
        self.backend, self.compile, self.sync, self.sync_group = backend, compile, sync, sync_group
        check_number("norm_weight_decay", norm_weight_decay)
        check_number("switch_lr_scale", switch_lr_scale)
        self.norm_weight_decay, self.switch_lr_scale = norm_weight_decay, switch_lr_scale
        self.accumulate_statistics = accumulate_statistics
        self._accumulation = Accumulation(accumulate_statistics)
        self.check_optimizer, self.warm_start = check_optimizer, warm_start
        self.report: SwapReport | None = None
        self._model: pl.LightningModule | None = None
        self._missed: set[str] = set()
        self._sites: list[ModuleSlot] = []
        self._made: set[int] = set()
        self._setup_patches = Patches()
        self._run_patches = Patches()
        self._warm = self._untold = False
        self._stop_observing: Callable[[], None] | None = None

    def swap_arguments(self) -> dict[str, Any]:
        """Return the arguments that :func:`lightning_norm.swap` is called with."""
        names = ["norm", "norm_args", "include", "exclude", "source", "rules"]
        names += ["backend", "compile", "sync", "sync_group"]
        return {name: getattr(self, name) for name in names}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_order(trainer, self)
        check_settings(trainer, self)
        self._take(pl_module)
        self._clean()
        self._untold = self._untold or self.report is None
        self._run_patches.undo_on_exception(trainer.strategy, self._clean)
        arrived_swapped = self.report is not None
        self._swap(pl_module)
        check_launcher(trainer, stage, arrived_swapped or not self.report)
        self._setup_patches.wrap(
            pl_module, "configure_model", lambda original: self._late(trainer, pl_module, original)
        )
        self._setup_patches.wrap(
            pl_module, "configure_optimizers", lambda original: self._optimizers(pl_module, original)
        )
        self._setup_patches.wrap(trainer.strategy, "load_checkpoint", reading)
        patch_checkpoint_hooks(self._run_patches, pl_module, resumes=stage == "fit")
        if self.compile and self._stop_observing is None:
            self._stop_observing = on_compile(lambda what: rank_zero_info(f"NormSwap: compiling {what} ..."))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._setup_patches.undo()
        check_contexts(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_batches(trainer, pl_module)
        check_copies(trainer, pl_module)
        tell_frozen(trainer, pl_module)
        self._check_optimizers(trainer, pl_module)
        self._freeze.warn_if_nothing_to_freeze(pl_module)
        self._freeze.freeze_if_due(trainer, pl_module)  # a resumed epoch has no on_train_epoch_start
        self._accumulation.start(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._freeze.freeze_if_due(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self._freeze.drop_gradients(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._accumulation.after_batch(trainer)

    def _check_optimizers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.optimizers or not self.check_optimizer:
            return
        if any(name in type(trainer.strategy).__name__ for name in ("FSDP", "DeepSpeed", "ModelParallel")):
            rank_zero_info("NormSwap: parameters are sharded by this strategy; the optimizer check is skipped.")
            return
        add_missing(pl_module, trainer.optimizers)
        check_owned(pl_module, trainer.optimizers)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._setup_patches.undo()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._setup_patches.undo()

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._setup_patches.undo()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        write_manifest(pl_module, checkpoint)  # after the fit the module's hook is gone

    @property
    @override
    def state_key(self) -> str:
        # Several NormSwaps in one Trainer differ in what they select or in what they put there.
        names = ("norm", "norm_args", "include", "exclude", "source", "rules")
        arguments = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return f"{type(self).__qualname__}{arguments!r}"

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._accumulation.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._accumulation.load_state_dict(state_dict)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._clean()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._clean()

    def _clean(self) -> None:
        self._setup_patches.undo()
        self._run_patches.undo()
        self._accumulation.stop()
        if self._stop_observing is not None:
            self._stop_observing()
            self._stop_observing = None

    def _take(self, pl_module: pl.LightningModule) -> None:
        if self._model is not pl_module:
            self._model, self.report, self._missed, self._sites = pl_module, None, set(), []
            self._made, self._warm = set(), False

    def swap_before_launch(self, pl_module: pl.LightningModule) -> None:
        """Swap before ``trainer.fit``, for strategies whose workers train copies of the network in other processes.

        ``ddp_spawn`` and ``ddp_notebook`` send what was learned back into the network of the process that called
        ``fit``, and drop what finds no place there. No hook of a callback is called in that process beforehand.

        >>> from torch import nn
        >>> model = pl.LightningModule()
        >>> model.bn = nn.BatchNorm2d(4)
        >>> NormSwap("sn").swap_before_launch(model)
        >>> type(model.bn).__name__
        'SwitchableNorm'
        """
        self._take(pl_module)
        self._untold = True  # the workers tell what was swapped, once every layer is built
        self._swap(pl_module)

    def _swap(self, pl_module: pl.LightningModule) -> None:
        report, missed, sites = try_swap(pl_module, **self.swap_arguments(), leave=self._made)
        self._made |= report.commit()
        self._sites = list({id(site.module): site for site in [*self._sites, *sites]}.values())
        if self.report is None:
            self.report, self._missed = report, set(missed)
        else:
            self.report.merge(report)
            self._missed &= set(missed)
        self.report.candidates = len(self._sites)

    def _late(self, trainer: pl.Trainer, pl_module: pl.LightningModule, original: Callable[[], Any]) -> None:
        original()
        self._swap(pl_module)
        check_layers(pl_module)
        if self.warm_start is not None and not self._warm:
            start_from(pl_module, self.warm_start)
            self._warm = True
        if self._untold and self.report is not None:
            self._untold = False  # WeightAveraging calls configure_model once more
            specs = [spec for spec in [self.norm, *(self.rules or {}).values()] if spec is not None]
            wanted = {resolve(spec)[0] for spec in specs}
            check_result(
                pl_module, self.report, sorted(self._missed), self._sites, "warn", source=self.source, fine=wanted
            )
            if growth := self.report.growth():
                rank_zero_warn(growth, category=ParameterGrowthWarning)
            warn_ignored(trainer, pl_module)
            if len(self.report):
                rank_zero_info(f"NormSwap: {self.report.summary()}")

    def _optimizers(self, pl_module: pl.LightningModule, original: Callable[[], Any]) -> Any:
        configured = original()
        optimizers = list(optimizers_in(configured))
        add_missing(pl_module, optimizers)
        wanted = {"weight_decay": self.norm_weight_decay, "lr_scale": self.switch_lr_scale}
        if any(value is not None for value in wanted.values()):
            counts = regroup(pl_module, optimizers, schedulers_in(configured), **wanted)
            rank_zero_info(
                f"NormSwap: parameter groups {', '.join(f'{k} ({n} parameters)' for k, n in counts.items()) or 'none'}"
            )
        return configured

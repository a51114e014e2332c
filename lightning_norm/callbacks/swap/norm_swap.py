"""NormSwap: the callback that swaps the normalizers of whatever is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_norm.callbacks.described import Described, print_report
from lightning_norm.callbacks.lightning_compat import Callback, pl, rank_zero_info, rank_zero_warn
from lightning_norm.callbacks.norm_context import check_contexts
from lightning_norm.callbacks.patching import Patches
from lightning_norm.callbacks.rank_checks import check_batches, check_layers, warn_ignored
from lightning_norm.callbacks.saved_state import SavedState, refuse_twins
from lightning_norm.callbacks.swap.accumulation import Accumulation
from lightning_norm.callbacks.swap.batch_masks import BatchMasks
from lightning_norm.callbacks.swap.conflicts import (
    check_copies,
    check_launcher,
    check_order,
    check_settings,
    tell_frozen,
)
from lightning_norm.callbacks.swap.first_step import SHARDED, FirstStep
from lightning_norm.callbacks.swap.kernel_freeze import KernelFreeze
from lightning_norm.callbacks.swap.manifest_hooks import patch_checkpoint_hooks, reading, start_from
from lightning_norm.callbacks.swap.norm_name import names_are_checked
from lightning_norm.callbacks.swap.optimizers import add_missing, check_owned, decayed_norms, empty_group, optimizers_in
from lightning_norm.callbacks.swap.regroup import check_number, regroup, schedulers_in
from lightning_norm.callbacks.swap.saved_plan import read_plan
from lightning_norm.callbacks.swap.warmed_up import warm_up_module
from lightning_norm.errors import (
    ConflictWarning,
    LeftAloneWarning,
    ParameterGrowthWarning,
    PlanError,
    UnsuitableNormWarning,
    WeightDecayWarning,
    counted,
)
from lightning_norm.ops.compiled import on_compile
from lightning_norm.surgery.manifest import write_manifest
from lightning_norm.surgery.options import SwapOptions, takes_options, with_fields
from lightning_norm.surgery.report import SwapReport
from lightning_norm.surgery.select import ModuleSlot
from lightning_norm.surgery.swap import check_not_empty, check_patterns, prepare_swap


@dataclass(frozen=True, kw_only=True)
class NormSwapOptions(SwapOptions):
    """What :class:`NormSwap` takes beside the options of every swap.

    Args:
        plan: path of a YAML file written by ``lightning-norm plan --save``, or of a checkpoint: swap as it was swapped
            there; excludes norm, norm_args, source, rules and whatever chooses layers.
        norm_weight_decay: weight decay of the normalizers' parameters, whatever the optimizer has; 0 takes them out of
            it.
        switch_lr_scale: factor of the learning rate of what the normalizers learn beyond weight and bias, such as the
            control parameters of "sn"; learning-rate schedules apply on top.
        accumulate_statistics: merge the statistics of the batches between two optimizer steps exactly, and move the
            running ones once per step, in all layers of this package.
        check_optimizer: stop before training if a trainable parameter of a normalizer is in no optimizer, or in
            several.
        warm_start: path of a checkpoint whose weights the run starts from, of the network before or after the swap;
            optimizer, epoch and step start anew. A ``ckpt_path`` given to the Trainer wins.
        freeze_kernel_at: first epoch, counted from 0, in which the kernels and biases of BNET layers move no longer.
        mask_key: where each batch holds which positions are no padding, a key or an index in a tuple: a mask (N, *) or
            lengths (N,), see :func:`lightning_norm.masks`; all normalizers of this package follow it, in every stage.
        mask_fn: instead of it, a function from the batch, on its device, to its mask, or its dotted path.
        mask_size: for lengths: how long the padded input is; by default as long as the longest of the batch.
        warm_up: compile the Triton kernels before training, side by side, see :func:`lightning_norm.warm_up`: the shape
            of a batch, as in ``[64, 3, 224, 224]``, or True for the module's ``example_input_array``.
        on_empty: what to do where no layer is swapped: "error", or "warn" (NoEffectWarning).
    """

    plan: str | None = None
    norm_weight_decay: float | None = None
    switch_lr_scale: float | None = None
    accumulate_statistics: bool = False
    check_optimizer: bool = True
    warm_start: str | None = None
    freeze_kernel_at: int | None = None
    mask_key: str | int | None = None
    mask_fn: str | Callable[[Any], Any] | None = None
    mask_size: int | None = None
    warm_up: bool | list[int] = False
    on_empty: Literal["error", "warn"] = "error"

    chooses_layers: ClassVar[tuple[str, ...]] = (
        *("norm", "norm_args", "include", "exclude", "source", "rules"),
        *("filter", "skip_frozen", "in_block", "every"),
    )
    what_to_type: ClassVar[str] = "NormSwap needs norm='sn' (say), rules={'layer1.*': 'sn', ...} or plan='plan.yaml'."

    def __post_init__(self) -> None:
        self._make_plain()
        for name in ("plan", "warm_start"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise TypeError(f"{name} must be the path of a file, got {getattr(self, name)!r}.")
        if self.plan is None:
            super().__post_init__()
        elif self.choice():
            raise ValueError(
                f"NormSwap: plan says which layers become what: leave out {', '.join(self.chooses_layers)}."
            )
        if self.on_empty not in ("error", "warn"):
            raise ValueError(f'on_empty must be "error" or "warn", got {self.on_empty!r}.')
        check_number("norm_weight_decay", self.norm_weight_decay)
        check_number("switch_lr_scale", self.switch_lr_scale)

    def choice(self) -> dict[str, Any]:
        """Return the arguments that choose layers and what they become, as far as they were given."""
        chosen = {name: getattr(self, name) for name in self.chooses_layers}
        return {name: value for name, value in chosen.items() if value is not None and value is not False}

    def with_plan_read(self) -> NormSwapOptions:
        """Return options that say themselves what the file ``plan`` says.

        Raises:
            PlanError: the file cannot be read, or does not say what becomes of which layer.
            CheckpointError: the same of a checkpoint.
        """
        if self.plan is None:
            return self
        rules, source, activations = read_plan(self.plan)
        fuse = activations or self.fuse_activation
        try:
            return replace(self, plan=None, rules=rules, source=source, fuse_activation=fuse)
        except (TypeError, ValueError) as error:
            raise PlanError(f"cannot read the plan {self.plan!r}: {error}") from error


class NormSwap(Described, SavedState, Callback):
    """Swap the normalization layers of the model in ``setup``, for every stage.

    Layers that ``LightningModule.setup`` or ``configure_model`` build are swapped as well. Parameters and statistics
    move; new parameters join the optimizer group of their layer, also where LightningCLI built the optimizer
    beforehand, and before training starts it is proved that none was forgotten. In YAML a norm with arguments is
    ``{class_path: sn, init_args: {...}}``; Lightning's own CLI wants a dotted path there.

    It prints one line that says what was swapped, and warns of each thing that the swap leaves or that would surprise:
    layers that were left alone, parameters that it adds, settings that contradict each other. It logs nothing. In a
    checkpoint it saves a manifest, what every swapped layer was and is, in plain types: by it
    :func:`lightning_norm.load_from_checkpoint` builds the network again, and a checkpoint of the network before the
    swap loads into the swapped one. Its own state is the open window of ``accumulate_statistics``.

    Args:
        options: the fields of :class:`lightning_norm.surgery.options.SwapOptions` and :class:`NormSwapOptions`, as
            keyword arguments.

    Attributes:
        options: the arguments; what a plan says has taken the place of its path.
        report: the :class:`lightning_norm.SwapReport` once the model was set up.

    Raises:
        ValueError, TypeError: a norm, pattern or argument that does not exist or matches nothing.
        OptimizerError: see ``check_optimizer``.
        RuntimeError: layers that wait for contexts, and no :class:`NormContext` in the Trainer.
        ConflictError: another callback or the strategy would lose what the layers learn; it says what to type.
        CheckpointError: a checkpoint cannot be read or is of another swap.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[NormSwap("sn")], logger=False, enable_checkpointing=False)

    Another norm for the last stage, the first layer left alone, and no weight decay on any of them:

    >>> callback = NormSwap(rules={"bn1": None, "layer4.*": "gn", ".*": "sn"}, norm_weight_decay=0.0)
    """

    __doc__ = with_fields(__doc__, NormSwapOptions)

    @names_are_checked
    @takes_options(NormSwapOptions)
    def __init__(self, options: NormSwapOptions) -> None:
        self.options, self._plan = options.with_plan_read(), options.plan
        self._freeze = KernelFreeze(options.freeze_kernel_at)
        self._accumulation = Accumulation(options.accumulate_statistics)
        self._masks = BatchMasks(options.mask_key, options.mask_fn, options.mask_size)
        self._first_step = FirstStep()
        self.report: SwapReport | None = None
        self._model: pl.LightningModule | None = None
        self._unmatched: set[str] = set()
        self._slots: list[ModuleSlot] = []
        self._made: set[int] = set()
        self._setup_patches = Patches()
        self._run_patches = Patches()
        self._warm = self._untold = self._arrived_swapped = False
        self._told_by_worker: Tensor | None = None
        self._stop_observing: Callable[[], None] | None = None

    def _arguments(self) -> dict[str, Any]:
        return {field.name: getattr(self.options, field.name) for field in fields(self.options)}

    def swap_arguments(self) -> dict[str, Any]:
        """Return the arguments that :func:`lightning_norm.swap` is called with.

        >>> NormSwap("sn", exclude="fc.*").swap_arguments()["exclude"]
        'fc.*'
        """
        return {field.name: getattr(self.options, field.name) for field in fields(SwapOptions)}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Swap what is there, and arrange that layers and optimizers which are built later are seen to.

        Raises:
            ConflictError: another callback or the strategy would lose what the layers learn.
            ValueError, TypeError: a norm, pattern or argument that does not exist or matches nothing.
        """
        # What cannot go together is told before anything is changed.
        refuse_twins(trainer, self, f"would make the same swap, {self!r}. Leave one out; the section norm: is one.")
        check_order(trainer, self)
        check_settings(trainer, self)
        self._take(pl_module)
        self._clean()
        self._untold = self._untold or self.report is None
        # Tuners and finders swap the Trainer's callbacks for a while: an error then never reaches on_exception of ours.
        self._run_patches.undo_on_exception(trainer.strategy, self._clean)
        # Layers of __init__ and of LightningModule.setup are there by now. Those of configure_model are built after all
        # setups, and the optimizer after those: Lightning has no callback hook at either place.
        self._arrived_swapped = self.report is not None
        with self._undone_on_error():
            self._swap(pl_module)
            check_launcher(trainer, stage, self._arrived_swapped or not self.report)
        self._setup_patches.wrap(
            pl_module, "configure_model", lambda original: self._late(trainer, pl_module, original)
        )
        self._setup_patches.wrap(
            pl_module, "configure_optimizers", lambda original: self._optimizers(pl_module, original)
        )
        self._setup_patches.wrap(trainer.strategy, "load_checkpoint", reading)
        # Callbacks are not asked for weights-only files; the module's own hooks are.
        patch_checkpoint_hooks(self._run_patches, pl_module, resumes=stage == "fit")
        # The first step of each input shape takes seconds: a line says what the run is waiting for.
        if self.options.compile and self._stop_observing is None:
            self._stop_observing = on_compile(lambda what: rank_zero_info(f"NormSwap: compiling {what} ..."))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the module's methods as they were, for every layer is built by now, and compile kernels if asked to.

        Raises:
            RuntimeError: layers wait for contexts that no callback gives.
            ValueError: ``warm_up=True`` and no ``example_input_array``.
        """
        self._setup_patches.undo()
        check_contexts(trainer, pl_module)
        if self.options.warm_up:
            warm_up_module(trainer, pl_module, self.options.warm_up)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prove that each trainable parameter of a normalizer is in exactly one optimizer; begin to watch the layers.

        Raises:
            OptimizerError: one is in none, or in several.
            ConflictError: a callback that averages weights has copied the network before the swap.
            ValueError: layers that cannot accumulate statistics.
        """
        check_batches(trainer, pl_module)
        check_copies(trainer, pl_module)
        tell_frozen(trainer, pl_module)
        self._check_optimizers(trainer, pl_module)
        self._freeze.warn_if_nothing_to_freeze(pl_module)
        # An epoch that is resumed in its middle has no on_train_epoch_start.
        self._freeze.freeze_if_due(trainer, pl_module)
        self._accumulation.start(trainer, pl_module)
        self._masks.start(pl_module)
        self._first_step.start(pl_module, self.report)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze the kernels if the epoch ``freeze_kernel_at`` begins."""
        self._freeze.freeze_if_due(trainer, pl_module)
        self._first_step.start_epoch()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name layers that no gradient reached, where one of several optimizers never stepped in the first epoch."""
        self._first_step.end_epoch(trainer)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take note of the layers that have gradients, until the first step is done."""
        self._first_step.after_backward()

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Take note of the optimizer that steps, and drop the gradients of frozen kernels."""
        self._first_step.before_step(optimizer)
        self._freeze.drop_gradients(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move accumulated statistics if the optimizer has stepped; after the first step, name what it missed."""
        self._masks.forget()
        self._accumulation.after_batch(trainer)
        self._first_step.after_batch(trainer, pl_module)

    def _check_optimizers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add new parameters where they belong, and prove that each one is in exactly one optimizer."""
        if not trainer.optimizers or not self.options.check_optimizer:
            return
        # A sharded parameter is no longer the object that the optimizer holds.
        if any(name in type(trainer.strategy).__name__ for name in SHARDED):
            rank_zero_info("NormSwap: parameters are sharded by this strategy; the optimizer check is skipped.")
            return
        # Once more: an optimizer may have been built without configure_optimizers being asked again.
        add_missing(pl_module, trainer.optimizers)
        check_owned(pl_module, trainer.optimizers)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._masks.give(batch)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._masks.give(batch)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

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
        self._masks.forget()

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the module's methods as they were; the same in test and in prediction."""
        self._setup_patches.undo()
        self._masks.start(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._setup_patches.undo()
        self._masks.start(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._setup_patches.undo()
        self._masks.start(pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the manifest: what every swapped layer was and is; and the state."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        # After the fit, trainer.save_checkpoint still calls this, and the hook on the module is gone.
        write_manifest(pl_module, checkpoint)

    @property
    @override
    def state_key(self) -> str:
        # Several NormSwaps in one Trainer differ in what they select or in what they put there.
        arguments = self.options.choice()
        if self.options.filter is not None:
            # Its own repr holds an address, which is another one in the process that resumes.
            arguments["filter"] = getattr(self.options.filter, "__qualname__", type(self.options.filter).__qualname__)
        return f"{type(self).__qualname__}{arguments!r}"

    @override
    def saved_state(self) -> dict[str, Any]:
        """Return what ``accumulate_statistics`` gathered since the last optimizer step; empty without it."""
        return self._accumulation.state_dict()

    @override
    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Take it over; it goes on with the next batch."""
        self._accumulation.load_state_dict(state)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take off everything that was put on the module, the strategy and the layers for this run; the layers stay."""
        self._clean()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._clean()

    def _clean(self) -> None:
        """Undo what was patched and opened for this run. It may be called twice."""
        self._setup_patches.undo()
        self._run_patches.undo()
        self._accumulation.stop()
        self._masks.stop()
        self._first_step.stop()
        if self._stop_observing is not None:
            self._stop_observing()
            self._stop_observing = None

    def _take(self, pl_module: pl.LightningModule) -> None:
        """Begin anew if the model is another one than before."""
        # One callback may be used for several models, one after the other, and for several stages of one model.
        if self._model is not pl_module:
            self._model, self.report, self._unmatched, self._slots = pl_module, None, set(), []
            self._made, self._warm = set(), False

    def swap_before_launch(self, pl_module: pl.LightningModule) -> None:
        """Swap before ``trainer.fit``, for strategies whose workers train copies of the network in other processes.

        ``ddp_spawn`` and ``ddp_notebook`` send what was learned back into the network of the process that called
        ``fit``, and drop what finds no place there. No hook of a callback is called in that process beforehand.

        Args:
            pl_module: the model that ``trainer.fit`` will be called with; the Trainer must have this very callback.

        Raises:
            ValueError, TypeError: a norm, pattern or argument that does not exist.

        >>> from torch import nn
        >>> model = pl.LightningModule()
        >>> model.bn = nn.BatchNorm2d(4)
        >>> NormSwap("sn").swap_before_launch(model)
        >>> type(model.bn).__name__
        'SwitchableNorm'
        """
        self._take(pl_module)
        # The workers tell what was swapped, once every layer is built. Those of fit and those of test are others, and
        # what they have in common is memory.
        self._untold = True
        self._told_by_worker = torch.zeros((), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]
        self._swap(pl_module)

    def _swap(self, pl_module: pl.LightningModule) -> None:
        """Swap the layers that were built since the last call, and add them to the report."""
        with self._fits():
            report, unmatched, slots = prepare_swap(pl_module, self.options, skip=self._made)
        # Layers that this callback has made are no candidates later: source may name their class as well.
        self._made |= report.commit()
        self._slots = list({id(slot.module): slot for slot in [*self._slots, *slots]}.values())
        if self.report is None:
            self.report, self._unmatched = report, set(unmatched)
        else:
            # A pattern is unmatched if it matched neither the layers of __init__ nor those that were built later.
            self.report.merge(report)
            self._unmatched &= set(unmatched)
        self.report.candidates = len(self._slots)

    @contextlib.contextmanager
    def _fits(self) -> Iterator[None]:
        """Name the plan in an error that comes of what it says."""
        try:
            yield
        except (TypeError, ValueError) as error:
            if self._plan is None:
                raise
            raise PlanError(f"the plan {self._plan!r} does not fit this model: {error}") from error

    @contextlib.contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Give the model back as it was where the swap of this very run cannot be finished."""
        try:
            yield
        except BaseException:
            if self.report and not self._arrived_swapped:
                with contextlib.suppress(RuntimeError):  # another callback has replaced a layer meanwhile
                    self.report.undo()
                self.report, self._made, self._slots = None, set(), []
            raise

    def _late(self, trainer: pl.Trainer, pl_module: pl.LightningModule, original: Callable[[], Any]) -> None:
        """Let ``configure_model`` build its layers, swap them as well, and finish."""
        # The layers are there only after the module has built them.
        original()
        with self._undone_on_error():
            self._finish_swap(trainer, pl_module)

    def _finish_swap(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do what needs all layers: compare ranks, take over a warm start, check the patterns, tell what was done."""
        self._swap(pl_module)
        if self.report and self._untold:
            # Only now is the network whole, so that it can be run on an example; once, for that takes a while.
            example = getattr(pl_module, "example_input_array", None)
            with self._fits():
                activations = self.report.find_activations(pl_module, self.options.fuse_activation, example)
            self.report.take_activations(pl_module, activations)
        check_layers(pl_module)
        self._first_step.note(pl_module)
        if self.options.warm_start is not None and not self._warm:
            start_from(pl_module, self.options.warm_start)
            self._warm = True
        if self._untold and self.report is not None:
            # WeightAveraging calls configure_model once more, and the report is to be printed once.
            self._untold = False
            source = self.options.source
            with self._fits():
                check_patterns(pl_module, self._slots, sorted(self._unmatched), source)
            on_empty, targets = self.options.on_empty, self.options.targets
            check_not_empty(pl_module, self.report, self._slots, source, on_empty, already_present=targets)
            self.report.masks = self._masks.source
            self._tell(trainer, pl_module, self.report)

    def _tell(self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: SwapReport) -> None:
        """Print what was swapped and warn of what would surprise, unless workers that have ended did so."""
        if self._told_by_worker is not None and self._told_by_worker:
            return
        if growth := report.growth():
            rank_zero_warn(growth, category=ParameterGrowthWarning)
        if unsuitable := report.unsuitable():
            rank_zero_warn(unsuitable, category=UnsuitableNormWarning)
        if left := report.left_alone(self.options):
            rank_zero_warn(left, category=LeftAloneWarning)
        warn_ignored(trainer, pl_module)
        if len(report):
            print_report(f"NormSwap: {report.summary()}")
        if self._told_by_worker is not None and trainer.is_global_zero:
            self._told_by_worker.fill_(True)

    def _optimizers(self, pl_module: pl.LightningModule, original: Callable[[], Any]) -> Any:
        """Let the module build its optimizers, and put the new parameters in their groups."""
        # Optimizers of LightningCLI were built before the swap, those of the module's own method after it. New
        # parameters are missing in the former only, and `add_missing` leaves the latter as they are.
        configured = original()
        optimizers = list(optimizers_in(configured))
        add_missing(pl_module, optimizers)
        wanted = {"weight_decay": self.options.norm_weight_decay, "lr_scale": self.options.switch_lr_scale}
        if any(value is not None for value in wanted.values()):
            counts = regroup(pl_module, optimizers, schedulers_in(configured), **wanted)
            said = ", ".join(f"{k} ({counted(n, 'parameter')})" for k, n in counts.items())
            rank_zero_info(f"NormSwap: parameter groups {said or 'none'}")
        elif decayed := decayed_norms(pl_module, optimizers):
            rank_zero_warn(decayed, category=WeightDecayWarning)
            return configured
        if self.report and (empty := empty_group(optimizers)):
            rank_zero_warn(empty, category=ConflictWarning)
        return configured

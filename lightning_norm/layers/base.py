"""What every normalizer shares: its arguments, its place in the registry, how it is loaded and how it is converted.

A normalizer is a plain ``nn.Module`` and never a subclass of torch's ``_BatchNorm``: ``Trainer(sync_batchnorm=True)``
rebuilds each of those and would erase ours.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_norm.errors import NoEffectWarning, counted
from lightning_norm.layers import on_cpu
from lightning_norm.layers.arguments import (
    arguments_of,
    check_call,
    check_count,
    check_zero_weight,
    is_at_least_zero,
    merged_signature,
)
from lightning_norm.layers.behind import call_behind, fuse_behind, keep_in_evaluation
from lightning_norm.layers.choice import Choice
from lightning_norm.layers.declared import SwapAdvice
from lightning_norm.layers.fused_specs import SPECS, same_as_before, spec_of
from lightning_norm.layers.inference import Evaluation
from lightning_norm.layers.paper import Paper as Paper
from lightning_norm.layers.pausing import is_paused
from lightning_norm.layers.pooling import ready_window
from lightning_norm.layers.recomputation import FirstRun, may_run_again, second_run, tell_of_graph
from lightning_norm.layers.running_stats import keep_float32, moves_running_stats
from lightning_norm.layers.scheduled import Scheduled, keep_exact
from lightning_norm.layers.special_calls import SpecialCalls
from lightning_norm.layers.state import Loading, restore_precision
from lightning_norm.layers.swap_record import SwapRecord
from lightning_norm.ops import torch_private
from lightning_norm.ops.compiled import GRAPH_KEY, compiled_forward
from lightning_norm.ops.fused.elementwise import ElementwiseSpec
from lightning_norm.ops.layout import Layout, at_least_float32, layout_of
from lightning_norm.ops.masked import mask_of, run_masked
from lightning_norm.ops.moments import Affine, Moments
from lightning_norm.ops.normalize import Call, FusedSpec, activated, ended, run
from lightning_norm.ops.per_token import Tokens, normalize_tokens
from lightning_norm.ops.sync import Ranks, active_ranks, is_running
from lightning_norm.ops.torch_private import is_update_bn


class Normalizer(Loading, Evaluation, SwapRecord):
    """Abstract: a layer that normalizes. Subclasses that set ``key`` in their own body enter the registry.

    The class attributes are declarations; the conformance suite checks each against what the layer does.
    """

    key: ClassVar[str] = ""
    paper: ClassVar[Paper | None] = None
    train_uses_batch_stats: ClassVar[bool] = True
    """In training, the output for one sample depends on the other samples."""
    eval_uses_input_stats: ClassVar[bool] = True
    """In evaluation, the output depends on the sample's own statistics."""
    extra_parameters: ClassVar[dict[str, str]] = {}
    """Parameters beyond weight and bias: name -> number of elements, C being the channels."""
    swap_advice: ClassVar[SwapAdvice] = SwapAdvice()
    """What a swap tells the user of it."""

    test_arguments: ClassVar[dict[str, Any]] = {}
    """Arguments that the conformance suite adds, whose layers have 6 channels."""

    _aten_on_cpu: ClassVar[bool] = False
    """Whether :meth:`_on_cpu` is ATen's batch or group normalization, which outruns graphs of channels-last maps."""

    _fused_spec_holds: ClassVar[bool] = False
    """``fused_spec`` says the same as this class's methods: the class itself defines it, and no instance differs."""

    fused_spec_varies: bool = False
    """``fused_spec`` looks at more than the shape of x and the layer's attributes and tensors.

    True for a class outside of this package that defines ``fused_spec``, unless it says False.
    """

    fused_spec_key: Any = None
    """What else ``fused_spec`` looks at, such as the value of a tensor, as one hashable object.

    A description is remembered under it, beside the shape of x: where it changes, ``fused_spec`` is asked again.
    """

    registry: ClassVar[dict[str, type[Normalizer]]] = {}

    num_features: int
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    sync: bool | str
    """Pool statistics over the ranks in training; "running" for the running ones alone. As in a swap."""
    sync_group: str | int
    """With which ranks; as in a swap."""
    _sync_paused: bool = False
    """``sync`` is off for a while, as ``NormSync`` asks for."""
    _agreed_in: str = ""
    """The process group in which ranks have compared their layers."""
    compiled: bool
    """:meth:`MomentNorm.compile` was called: the forward pass runs as a graph of its own."""
    backend: str
    """"auto", "eager" or "triton"; as in a swap."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # One truth per equation: whatever a subclass changes, its inherited fused_spec no longer counts.
        cls._fused_spec_holds = "fused_spec" in vars(cls)
        outside = cls.__module__.partition(".")[0] != __name__.partition(".")[0]
        if cls._fused_spec_holds and outside and "fused_spec_varies" not in vars(cls):
            cls.fused_spec_varies = True
        # Only what the class itself says: a subclass of a registered class must not take the place of it.
        key = cls.__dict__.get("key", "")
        other = Normalizer.registry.get(key)
        # The same class may be defined twice, when a notebook's cell runs again or a module is reloaded.
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"the key {key!r} is taken by {other.__module__}.{other.__qualname__}. Choose another key."
            )
        if key:
            Normalizer.registry[key] = cls
        # torch.nn.utils.skip_init, for one, looks for ``device`` there, which **options would hide.
        cls.__signature__ = merged_signature(cls)  # type: ignore[attr-defined]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check the arguments before ``__init__`` does: Python's error names neither the nearest one nor what to type.

        Raises:
            TypeError: too many arguments by position, or one that the class does not take.
            ValueError: a value that is none of those in the argument's ``Literal``.
        """
        check_call(cls, args, kwargs)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        # What the layer has told the kernels of itself may have been read from this attribute.
        self.__dict__.pop(SPECS, None)
        # A scheduled value is a tensor that the graph reads, so that its change needs no new graph.
        if name not in self.ranges:
            self.__dict__.pop(GRAPH_KEY, None)
        super().__setattr__(name, value)
        _look_for_replaced_methods(self, name)

    def __delattr__(self, name: str) -> None:
        self.__dict__.pop(SPECS, None)
        super().__delattr__(name)
        _look_for_replaced_methods(self, name)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield the layer, and tell ``torch.optim.swa_utils.update_bn`` that it re-estimates torch's layers alone."""
        if is_update_bn():
            warnings.warn(
                f"update_bn re-estimates torch's BatchNorm layers alone and leaves the running statistics of "
                f"{type(self).__name__} as they are: call lightning_norm.recalibrate(model, loader) in its place.",
                NoEffectWarning,
                stacklevel=2,
            )
        modules: Iterator[tuple[str, nn.Module]] = super().named_modules(*args, **kwargs)
        return modules

    @property
    def _of_batch_alone(self) -> bool:
        """Whether no statistic is that of a single sample: a batch may be measured as one of all its positions."""
        return False

    @property
    def gradient_is_exact(self) -> bool:
        """Whether training's gradient is that of the output; not so where a method holds statistics constant in it."""
        return True

    @property
    def preserves_eval(self) -> bool:
        """Whether a layer made from a BatchNorm, with these arguments, has the outputs of that one in evaluation.

        A class for which it always does writes ``preserves_eval = True``.
        """
        return False

    @property
    def translated_tensors(self) -> tuple[str, ...]:
        """Names of a BatchNorm's tensors that a swap takes over in another form: their values, not the objects."""
        return tuple(t.source for t in self._translations if t.swapped)

    def take_from(self, source: nn.Module) -> None:
        """Take over Parameters and running statistics: the same objects, but for ``translated_tensors``.

        Running statistics narrower than float32 are widened.

        Args:
            source: a BatchNorm of torch's, or another normalizer.

        Raises:
            ValueError: the layer brings a weight, and ``zero_weight`` asks for one of zeros.

        >>> from lightning_norm import SwitchableNorm
        >>> old, new = nn.BatchNorm2d(8), SwitchableNorm(8)
        >>> new.take_from(old)
        >>> new.weight is old.weight, new.running_mean is old.running_mean
        (True, True)
        """
        check_zero_weight(self, source)
        # The values come from a layer that holds them in another form, such as one row per context.
        values = source._as_batch_norm() if isinstance(source, Normalizer) else {}
        # A source may have a bias and no weight, or the other way round: what it lacks is not made up here.
        present = [name for name in ("weight", "bias") if has_affine(source, name)]
        for name in {"weight", "bias"} - {*present} if present else ():
            setattr(self, name, None)
        for name in self._taken_names(source):
            new, old = getattr(self, name, None), getattr(source, name, None)
            if new is None or name in self.translated_tensors:
                continue
            if name in values:
                new.data.copy_(values[name])
            elif old is not None:
                # A frozen layer holds its weight and bias as buffers: here they are parameters that do not train. All
                # others are the objects themselves: an optimizer that holds them goes on training them.
                buffer = isinstance(new, nn.Parameter) and not isinstance(old, nn.Parameter)
                setattr(self, name, nn.Parameter(old.detach(), requires_grad=False) if buffer else old)
        # After the running statistics: what is translated may replace one of them.
        for translation in self._translations:
            translation.take(self, source)
        # A network that was built in bfloat16 has its statistics in it, which would lose small updates.
        restore_precision(self)

    def _taken_names(self, source: nn.Module) -> tuple[str, ...]:
        """Return the names of the tensors that are taken from a layer where both have them."""
        # Another class's counter of the same name may count something else.
        counters = self.extra_buffers.counters if type(source) is type(self) else ()
        return ("weight", "bias", *self.running_names, "num_batches_tracked", *counters)

    def _as_batch_norm(self) -> dict[str, Tensor]:
        """Return the values, (C,), of those of a BatchNorm's tensors that this class holds in another form."""
        return {}

    def _follow(self, name: str, before: Tensor, now: Tensor) -> None:
        """Change a tensor that :meth:`as_batch_norm` gives in another form as that form, (C,), was changed."""

    def return_to(self, source: nn.Module) -> None:
        """Give a layer what was taken from it, as it is now: the inverse of :meth:`take_from`.

        A class with ``translated_tensors`` writes those values into the layer's own tensors, where they changed since.

        Args:
            source: the layer, as it was when :meth:`take_from` read it.
        """
        # What both have and the swap did not take, such as the importance weights of two SwitchableNorms or a scheduled
        # value, is the source's as it was.
        names = self._taken_names(source)
        values = source._as_batch_norm() if isinstance(source, Normalizer) else {}
        for name, old in (*source.named_parameters(recurse=False), *source.named_buffers(recurse=False)):
            new = getattr(self, name, None) if name in names else None
            if isinstance(new, Tensor) and name in values and name not in self.translated_tensors:
                source._follow(name, values[name].to(new), new.detach())  # type: ignore[operator]  # a Normalizer
            elif isinstance(new, Tensor) and name not in self.translated_tensors:
                # A network built in bfloat16 gets its statistics back in it.
                narrow = name in self.running_names and old.dtype.itemsize < 4
                new = new.to(old.dtype) if narrow else new
                setattr(source, name, new if isinstance(old, nn.Parameter) else new.detach())
        for translation in self._translations:
            translation.return_to(self, source)

    def freeze_statistics(self, frozen: bool = True) -> Self:
        """Normalize by the running statistics in training as well, and leave them as they are; ``train()`` keeps that.

        What the layer learns goes on learning, modules behind it keep their mode, and "afn" drops nothing. A checkpoint
        says in its manifest that the statistics are frozen.

        Args:
            frozen: ``False`` ends it.

        Raises:
            ValueError: there are no running statistics.

        >>> from lightning_norm import create
        >>> layer = create("bnet", 8).freeze_statistics().train()
        >>> layer.training, layer.kernel.requires_grad
        (False, True)
        """
        if frozen and not self.has_running_stats:
            why = "track_running_stats=True keeps some" if self.train_uses_batch_stats else "it needs none"
            raise ValueError(f"{type(self).__name__} has no running statistics to normalize by: {why}.")
        keep_in_evaluation(self, frozen)
        return self

    def _settled_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that the layer was built with, with what follows from the channels written out."""
        return dict(arguments)

    @classmethod
    def _earlier_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a checkpoint, with those that it leaves out since their default was another one."""
        return dict(arguments)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay is to leave alone, as timm asks for them: all."""
        return {name for name, _ in self.named_parameters()}

    def monitor(self) -> dict[str, Tensor]:
        """Return what the layer has learned, as quantity -> 0-dim tensor, for the loggers.

        NaN stands for what was not measured yet: it is not drawn.
        """
        return {}

    def shared_quantities(self) -> tuple[str, ...]:
        """Return the quantities of :meth:`monitor` that all layers of a network have in common, to be drawn once."""
        return ()

    def monitor_notes(self) -> dict[str, str]:
        """Return quantity -> what its reader must know at this moment, for charts, the table and one line of the log.

        It may read from the device: it is called at the start and at the end of a fit alone.
        """
        return {}

    def choice(self, threshold: float) -> Choice | None:
        """Return which plain normalizer the weights have chosen, each by ``threshold`` at least, in (0.5, 1].

        ``None`` in a class whose weights choose nothing; :func:`lightning_norm.harden` leaves its layers alone.
        """
        return None


def has_affine(layer: nn.Module, name: str) -> bool:
    """Tell whether a layer has a "weight" or a "bias", in another form perhaps."""
    forms = layer._translations if isinstance(layer, Normalizer) else ()
    return any(getattr(layer, n, None) is not None for n in (name, *(t.target for t in forms if t.source == name)))


def _adds_method(cls: type, name: str) -> bool:
    """Tell whether a class has a method of that name that is not one of ``nn.Module``, which holds no equation."""
    return not hasattr(nn.Module, name) and inspect.isroutine(getattr(cls, name, None))


def _look_for_replaced_methods(layer: Normalizer, name: str) -> None:
    """Leave the kernels while an attribute of this instance stands in for one of its class's methods."""
    cls = type(layer)
    if not _adds_method(cls, name):
        return
    # A method may be replaced twice: what counts is whether any replacement is left.
    if any(_adds_method(cls, attribute) for attribute in vars(layer)):
        vars(layer)["_fused_spec_holds"] = False
    else:
        vars(layer).pop("_fused_spec_holds", None)


class MomentNorm(SpecialCalls, Normalizer):
    r"""Abstract: a normalizer whose output is affine in x, with coefficients that depend on the moments of x alone.

    Write :meth:`algebra`; gradients, precision, ranks, swap and tests follow.

    .. math:: y = s\,(x - c) + t, \qquad (c, s, t) = \mathrm{algebra}(\mu_{nc}, \sigma^2_{nc})

    Args:
        num_features: channels, the C of an input (N, C, *).
        eps: added to the variance, inside the root.
        momentum: weight of the new batch in the running statistics; ``None`` for the average of all batches.
        affine: learn ``weight`` (gamma) and ``bias`` (beta), each (C,).
        bias: ``False`` for no bias beside the weight.
        track_running_stats: keep running statistics and evaluate on them; otherwise always use those of the input.
        channel_dim: 1, or -1 for tokens (N, L, C).
        virtual_batch_size: in training, take the statistics of so many consecutive samples at a time ("ghost batches"),
            with each of which the running ones move; what is left over joins the last. ``None`` for the whole batch.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W), or (N, ..., C) with ``channel_dim=-1``; output as input.

    Raises:
        TypeError: the input is not a floating-point tensor.
        ValueError: an argument out of range, a wrong number of dimensions or channels, or one value per statistic.

    A subclass with half of each sample's and half of the batch's statistics, which trains, pools over ranks, saves,
    loads and swaps as the built-in ones do:

    >>> class HalfNorm(MomentNorm):
    ...     def algebra(self, m):
    ...         batch = self.track(m.over_batch())
    ...         return self.standardize((m.mean + batch.mean) / 2, (m.var + batch.var) / 2)
    >>> layer = HalfNorm(8)
    >>> layer(torch.randn(4, 8, 5, 5)).shape, int(layer.num_batches_tracked)
    (torch.Size([4, 8, 5, 5]), 1)
    """

    per_token: bool = False
    """A statistic is that of each token, so that y is not affine per (sample, channel)."""

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: Annotated[float | None, Scheduled(0, 1, training_only=True)] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bias: bool = True,
        virtual_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        vars(self)["_made_on"] = device  # for a layer without parameters and running statistics
        name = type(self).__name__
        features = check_count(f"{name}: num_features", num_features)
        if not is_at_least_zero(eps):
            raise ValueError(f"{name}: eps must be a number >= 0, got {eps!r}.")
        if channel_dim not in (1, -1):
            raise ValueError(f"{name}: channel_dim must be 1 (images) or -1 (tokens), got {channel_dim!r}.")
        self.num_features, self.eps, self.affine, self.channel_dim = features, float(eps), affine, int(channel_dim)
        self.sync, self.sync_group, self.compiled, self.backend = True, "world", False, "auto"
        # Also ``None`` is registered, so that state_dict and ``named_parameters`` know the names, as in torch.
        for parameter, wanted in (("weight", affine), ("bias", affine and bias)):
            value = nn.Parameter(torch.empty(features, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(parameter, value)
        self._make_running_stats(features, track_running_stats, device, dtype)
        # Only now: the tensor behind it goes where the running statistics are.
        self.momentum = momentum
        self.virtual_batch_size = virtual_batch_size
        self.reset_parameters()

    def _add_parameters(self, options: Mapping[str, Any], **shapes: tuple[int, ...] | None) -> None:
        """Register parameters of these shapes at their ``start_values``, where and in which dtype ``options`` say.

        One without a shape is registered as ``None``, which torch's layers do with a bias that they do not have.
        """
        where = {"device": options.get("device"), "dtype": options.get("dtype")}
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, **where)))
        self.reset_parameters()

    def algebra(self, m: Moments) -> Affine:
        """Turn the moments of x into ``y = scale * (x - center) + shift``: the paper's equations."""
        raise NotImplementedError(f"{type(self).__name__} must define algebra(self, m: Moments) -> Affine.")

    def algebra_of(self, x: Tensor, layout: Layout) -> Callable[[Moments], Affine]:
        """Return the algebra for this input: a method that looks at more than the moments of x binds it here."""
        return self.algebra

    def fused_spec(self, layout: Layout) -> FusedSpec | ElementwiseSpec | None:
        """Return the same equations as the kernels know them; ``None`` where they do not."""
        return None

    def _on_cpu(self, x: Tensor, layout: Layout) -> Tensor | None:
        """Return y of the input's statistics by a function of torch's, and move the running ones.

        ``None`` where torch has none, or would compute another y: then the algebra does it, and nothing may have moved.
        """
        return None

    def _agree_once(self, ranks: Ranks, x: Tensor) -> None:
        """Compare the layer with that of the other ranks, before the first time that they pool."""
        # In a graph nothing can be told; what differs there is told by torch, or by NormSwap before the training.
        if self._agreed_in != ranks.group and not torch.compiler.is_compiling():
            parameters = [name for name, _ in self.named_parameters(recurse=False)]
            settings = f"sync_group={self.sync_group!r}, affine={parameters}"
            ranks.agree(f"{self._place or 'a layer'}: {type(self).__name__}({self.extra_repr()}, {settings})", x.device)
            self._agreed_in = ranks.group

    def depthwise_conv(self) -> tuple[Tensor, Tensor | None] | None:
        """Return kernel and bias of the depthwise convolution that follows, ``None`` for none."""
        return None

    def floor(self) -> Tensor | None:
        """Return tau, (C,), where y is max(y, tau) and the algebra gives y - tau; ``None`` where nothing follows it."""
        return None

    def of_tokens(self, t: Tokens) -> Tensor:
        """Return y of the statistics of each token, where :attr:`per_token` is set; in place of :meth:`algebra`."""
        raise NotImplementedError(f"{type(self).__name__} must define of_tokens(self, t: Tokens) -> Tensor.")

    def standardize(self, mean: Tensor, var: Tensor) -> Affine:
        r"""Return the Affine of :math:`\gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta`."""
        scale = (var + self._eps).rsqrt()  # without the property, which looks at who reads it
        return Affine(mean, scale if self.weight is None else scale * self.weight.to(scale.dtype), self.bias)

    def statistic_size(self, n: int, size: int) -> int:
        """Return the elements behind the smallest statistic, for n samples of ``size`` elements per channel."""
        return n * size

    def forward(
        self, input: Tensor, activation: str = "none", residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        r"""Normalize the input x: :math:`\mathrm{act}(y + \mathrm{residual})`, on the GPU in the pass that writes y.

        Args:
            input: x.
            activation: "none", "relu" or "silu".
            residual: added before the activation, in the shape of x.
            mask: which positions are no padding, of bool or 0 and 1: (N, *) without the channels, (N,) for whole
                samples; or lengths along the last axis, (N,) integers. No statistic reads the others, whatever they
                hold, and y is 0 there.

        Raises:
            MaskError: a mask that does not fit x.
        """
        if mask is not None or self._special or self._behind or not isinstance(input, Tensor):
            return self._call_whole(input, activation, residual, mask)
        return self._normalize(input, activation, residual)

    def _call_whole(self, input: Tensor, activation: str, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        """Call the layer with a mask, in ghost batches, or with its modules behind; for torch.fx, note the call."""
        if torch_private.is_proxy(input):  # torch.fx traces
            return _node_of(self, input, activation, residual, mask)
        activation, modules = fuse_behind(self, activation)
        if (mask is not None or self._special) and isinstance(input, Tensor) and input.dim() > 1:
            y = self._call_with_mask_or_ghost_batches(input, activation, residual, mask)
        else:
            y = self._normalize(input, activation, residual)
        return call_behind(self, y, modules)

    def _normalize(
        self, input: Tensor, activation: str, residual: Tensor | None, valid: Tensor | None = None
    ) -> Tensor:
        """Normalize the input: as the last call did where nothing has changed, and else by what this call needs."""
        if self.sync == "running":
            ready_window(self)
        if not torch.compiler.is_compiling():
            # Under activation checkpointing a forward pass runs twice, and its statistics move once.
            twice = torch_private.in_backward_pass() or (self.train_uses_running_stats and may_run_again())
            twice = twice and self.training and isinstance(input, Tensor)
            if SPECS in vars(self) and valid is None and not (twice or self.compiled) and _ranks_of(self) is None:
                y = same_as_before(self, input, activation, residual)
                if y is not None:
                    return y
            # FSDP's mixed precision narrows every buffer but those of torch's own BatchNorm.
            if not _KEPT.issuperset([b.dtype for b in self._buffers.values() if b is not None]):
                keep_float32(self)
                keep_exact(self)
            if twice:
                return self._normalize_checkpointed(input, activation, residual, valid)
            if self.compiled or torch_private.is_transformed():
                return self._normalize_in_graph_or_transform(input, activation, residual, valid)
        elif moves_running_stats(self) and torch_private.is_traced_in_checkpoint():
            tell_of_graph(type(self).__name__)
        return _forward(self, input, activation, residual, valid)

    def _normalize_checkpointed(
        self, input: Tensor, activation: str, residual: Tensor | None, valid: Tensor | None
    ) -> Tensor:
        """Normalize for activation checkpointing: the first time, or once more in the backward pass."""
        if torch_private.in_backward_pass():
            with second_run(self, input):
                return self._normalize_in_graph_or_transform(input, activation, residual, valid)
        first_run = FirstRun(self, input)
        y = self._normalize_in_graph_or_transform(input, activation, residual, valid)
        first_run.keep(self, y)
        return y

    def _normalize_in_graph_or_transform(
        self, input: Tensor, activation: str, residual: Tensor | None, valid: Tensor | None
    ) -> Tensor:
        """Normalize by the layer's own graph, or where a transform may refuse that running statistics move."""
        # A graph knows no thread: where only another one has paused the statistics, this one runs without.
        of_this_thread = not self._statistics_paused or is_paused(self)
        in_graph = self.compiled and of_this_thread and isinstance(input, Tensor)
        in_graph = in_graph and not torch_private.is_transformed()
        if in_graph and not (valid is None and on_cpu.outruns_graphs(self, input) and _ranks_of(self) is None):
            options = vars(self).get("_compile_options")
            if valid is not None:
                # As numbers, which a CPU loads as vectors.
                valid = valid.to(at_least_float32(input.dtype))
                y = compiled_forward(self, input, _forward_masked, _ranks_of(self), options, valid)
                return activated(y, activation, residual)
            # The activation belongs in the graph, where it costs no pass of its own.
            forward = _WITH_ACTIVATION.get(activation, _forward) if residual is None else _forward
            y = compiled_forward(self, input, forward, _ranks_of(self), options)
            return y if forward is not _forward else activated(y, activation, residual)
        try:
            return _forward(self, input, activation, residual, valid)
        except RuntimeError as error:
            tracked = self.num_batches_tracked if moves_running_stats(self) else None
            if tracked is not None and torch_private.is_captured(tracked):
                raise RuntimeError(_REFUSED_CHANGE.format(who=type(self).__name__)) from error
            raise

    def _ranks(self) -> Ranks | None:
        """Return the ranks that the next forward pass pools statistics with."""
        return _ranks_of(self)

    def __prepare_scriptable__(self) -> NoReturn:
        """Name what works in place of ``torch.jit.script``, which asks each layer for this method.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: torch.jit.script cannot compile a layer of lightning_norm. Type "
            "torch.jit.trace(model.eval(), example), to_torchscript(method='trace', example_inputs=example) in "
            "Lightning, or lightning_norm.to_plain(model, example) first, where every normalizer becomes a layer of "
            "torch's."
        )

    def compile(self, **options: Any) -> None:
        """Compile the forward pass, by default fullgraph and at static shapes; equal layers share their graphs.

        The graph is made at the first call, and once more for each new shape, dtype and mode. None is made on the CPU
        in training where ATen's kernels are faster: of channels-last maps, for bn, gn, ln, dbn and brn.

        Args:
            options: of ``torch.compile``, such as ``mode="max-autotune"``.

        Raises:
            TypeError: ``torch.compile`` takes no such argument.

        >>> from lightning_norm import BatchNorm
        >>> layer = BatchNorm(8)
        >>> layer.compile(dynamic=False)
        >>> layer.compiled
        True
        """
        # From torch's signature, so that arguments of later versions pass as well.
        known = list(inspect.signature(torch.compile).parameters)[1:]
        for name in options:
            if name not in known:
                raise TypeError(f"{type(self).__name__}.compile() takes {', '.join(known)}, got {name!r}.")
        self._compile_options = options
        self.compiled = True

    def start_values(self) -> dict[str, float | Tensor]:
        """Return the starting values of parameters: of those beside weight and bias, and of these if not 1 and 0."""
        return {}

    def reset_parameters(self) -> None:
        """Set weight to 1, or with ``zero_weight`` to 0, bias to 0, and all else to its start."""
        self.reset_running_stats()
        weight = 0.0 if getattr(self, "zero_weight", False) else 1.0
        starts: dict[str, float | Tensor] = {"weight": weight, "bias": 0.0, **self.start_values()}
        parameters = dict(self.named_parameters(recurse=False))
        with torch.no_grad():
            # The first call comes from this class's __init__, before a subclass has made its parameters.
            for name in starts.keys() & parameters.keys():
                start = starts[name]
                parameters[name].copy_(start) if isinstance(start, Tensor) else parameters[name].fill_(start)

    def extra_repr(self) -> str:
        """Show the arguments."""
        names = ["eps", "momentum", "affine", "track_running_stats", *["channel_dim"] * (self.channel_dim != 1)]
        # A class that fixes an argument, and takes it from nobody, does not show it.
        names = [name for name in names if name in arguments_of(type(self))]
        shown = [f"{name}={getattr(self, name)!r}" for name in (*names, *self.repr_arguments)]
        shown += ["bias=False"] * (self.affine and self.bias is None)
        shown += ["statistics=frozen"] * self._always_eval
        shown += [f"virtual_batch_size={self.virtual_batch_size}"] * (self.virtual_batch_size is not None)
        return ", ".join([str(self.num_features), *shown])

    repr_arguments: ClassVar[tuple[str, ...]] = ()
    """A subclass's own arguments, for ``repr``."""


_KEPT = frozenset((torch.float64, torch.float32, torch.int64, torch.int32, torch.bool))
"""The dtypes that no buffer has been narrowed from."""

_REFUSED_CHANGE = (
    "{who} in training cannot move its running statistics inside of torch.func, and neither can torch's BatchNorm: "
    "they are no argument of the function that is transformed. Type model.eval(), or track_running_stats=False, or "
    "pass the buffers in: torch.func.functional_call(model, (parameters, buffers), x) with dict(model.named_buffers())."
)


def _node_of(layer: MomentNorm, x: Any, activation: str, residual: Any, mask: Any = None) -> Tensor:
    """Return the node of torch.fx that calls the layer: it is a leaf, as torch's own layers are."""
    name = x.tracer.path_of_module(layer)
    if not name:
        raise ValueError(
            f"{type(layer).__name__} is a leaf for torch.fx. Trace a module that holds it: nn.Sequential(layer)."
        )
    options = {} if activation == "none" else {"activation": activation}
    options |= {} if residual is None else {"residual": residual}
    options |= {} if mask is None else {"mask": mask}
    node: Tensor = x.tracer.create_proxy("call_module", name, (x,), options)  # a proxy stands for a tensor
    return node


def _ranks_of(layer: MomentNorm) -> Ranks | None:
    pools = is_running() and (layer.train_uses_batch_stats or moves_running_stats(layer))
    now = bool(layer.sync) and layer.sync != "running" and not layer._sync_paused
    return active_ranks(now, layer.training, layer.sync_group) if pools else None


def _of_empty(layer: MomentNorm, x: Tensor, activation: str, residual: Tensor | None) -> Tensor:
    """Return the output for a batch without samples in training: as in torch, the batch counts and moves nothing."""
    if moves_running_stats(layer) and layer.num_batches_tracked is not None and layer._accumulator is None:
        layer.num_batches_tracked.add_(1)
    y = x
    for parameter in layer._parameters.values():
        if parameter is not None:  # each has a gradient, of zeros: DistributedDataParallel waits for all of them
            y = y + parameter.sum().to(y.dtype)
    return activated(y + 0, activation, residual)


def _forward_masked(layer: MomentNorm, x: Tensor, valid: Tensor) -> Tensor:
    return _forward(layer, x, valid=valid)


def _forward(
    layer: MomentNorm, x: Tensor, activation: str = "none", residual: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Check the input, and hand it with the layer's algebra to the engine; ``valid`` is the mask."""
    layout = layout_of(x, layer.num_features, layer.channel_dim, type(layer).__name__)
    ranks = _ranks_of(layer)
    if ranks is not None:
        layer._agree_once(ranks, x)
    # Which statistics are used decides how many values must be there.
    of_input = layer.training or not layer.has_running_stats
    if layout.n == 0 and of_input and ranks is None:
        return _of_empty(layer, x, activation, residual)
    if of_input and layer.statistic_size(layout.n, layout.size) < 2:
        _check_values(layer, layout, ranks)
    moments = None if of_input or layer.eval_uses_input_stats else layer.running()
    if valid is not None or layer.per_token:
        return _forward_positions(layer, x, layout, moments, ranks, activation, residual, valid)
    # The kernels move the running statistics themselves and know nothing of an accumulator.
    accumulates = layer.training and layer._accumulator is not None
    if of_input and layer._fused_spec_holds and ranks is None and not accumulates and layer.backend == "auto":
        y = layer._on_cpu(x, layout)
        if y is not None:
            return ended(y, activation, residual)
        if on_cpu.is_read_as_one_sample(layer, x, layout):
            layout = layout.as_one_sample()
    fused_spec = functools.partial(spec_of, layer) if layer._fused_spec_holds and not accumulates else None
    algebra, ending = layer.algebra_of(x, layout), (activation, residual, layer.depthwise_conv(), layer.floor())
    return run(x, Call(algebra, layout, moments, ranks, layer.backend, fused_spec, *ending))


def _forward_positions(
    layer: MomentNorm,
    x: Tensor,
    layout: Layout,
    moments: Moments | None,
    ranks: Ranks | None,
    activation: str,
    residual: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """Normalize where positions differ: some are padding, or each token has statistics of its own. Not on the kernels.

    Args:
        layer: the normalizer.
        x: the input.
        layout: of x.
        moments: those of x where ``None``.
        ranks: to pool with.
        activation: as in :meth:`MomentNorm.forward`; likewise the residual.
        residual: is added before the activation.
        valid: which positions count; ``None`` for all.
    """
    mask = None if valid is None else mask_of(valid, x, layout)
    looks_at_x = layer.per_token or type(layer).algebra_of is not MomentNorm.algebra_of
    seen = x if mask is None or not looks_at_x else mask.zeroed(x)
    ending: dict[str, Any] = {"activation": activation, "residual": residual}
    if layer.per_token:
        return normalize_tokens(seen, layer.of_tokens, layout, ranks, mask, layer.backend, **ending)
    assert mask is not None
    algebra, conv = layer.algebra_of(seen, layout), layer.depthwise_conv()
    call = Call(algebra, layout, moments, ranks, layer.backend, depthwise_conv=conv, **ending)
    return run_masked(x, call, mask)


def _forward_relu(layer: MomentNorm, x: Tensor) -> Tensor:
    return _forward(layer, x, "relu")


def _forward_silu(layer: MomentNorm, x: Tensor) -> Tensor:
    return _forward(layer, x, "silu")


_WITH_ACTIVATION: dict[str, Callable[[Any, Tensor], Tensor]] = {"relu": _forward_relu, "silu": _forward_silu}
"""Functions of a layer and its input alone, by which graphs are kept apart."""


def _check_values(layer: MomentNorm, layout: Layout, ranks: Ranks | None) -> None:
    """Refuse an input with one value per statistic, unless other ranks may bring more."""
    by_more_samples = layer.statistic_size(2, layout.size) > 1
    # Over ranks the number of values is known only after the statistics have met.
    if ranks is not None and layer.train_uses_batch_stats and by_more_samples:
        return
    remedy = "Use a larger batch, drop_last=True in the DataLoader, or layer.eval()."
    # Evaluation of such a layer would be refused as well.
    if not layer.training or not layer.has_running_stats:
        remedy = "Use a larger batch, or a layer with running statistics: track_running_stats=True."
    if not by_more_samples:
        remedy = "Use larger feature maps, or leave this layer out of the swap: exclude=[its name]."
    raise ValueError(
        f"{type(layer).__name__}: expected more than one value per statistic, got {counted(layout.n, 'sample')} of "
        f"{counted(layout.size, 'element')} per channel. {remedy}"
    )

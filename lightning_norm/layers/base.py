"""What every normalizer shares: its arguments, its place in the registry, how it is loaded and how it is converted.

A normalizer is a plain ``nn.Module`` and never a subclass of torch's ``_BatchNorm``: ``Trainer(sync_batchnorm=True)``
rebuilds each of those and would erase ours.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_norm.layers.arguments import check_call
from lightning_norm.layers.fused_specs import SPECS, same_as_before, spec_of
from lightning_norm.layers.inference import Evaluation
from lightning_norm.layers.paper import Paper as Paper
from lightning_norm.layers.running_stats import keep_float32
from lightning_norm.layers.scheduled import Scheduled, keep_exact
from lightning_norm.layers.state import Loading, restore_precision
from lightning_norm.layers.swap_record import SwapRecord
from lightning_norm.ops.compiled import GRAPH_KEY, compiled_forward
from lightning_norm.ops.fused.encoder_decoder import EncoderDecoderSpec
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.fused.per_channel import PerChannelSpec
from lightning_norm.ops.layout import Layout, layout_of
from lightning_norm.ops.moments import Affine, Moments
from lightning_norm.ops.normalize import activated, normalize
from lightning_norm.ops.sync import Ranks, active_ranks


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
    required_callback: ClassVar[str] = ""
    """The callback that it does not work without."""

    growth_hint: ClassVar[str] = ""
    """What the user can do about the parameters it adds, for the warning of a swap that adds many."""

    test_arguments: ClassVar[dict[str, Any]] = {}
    """Arguments that the conformance suite adds, whose layers have 6 channels."""

    _fused_spec_holds: ClassVar[bool] = False
    """``fused_spec`` says the same as this class's methods: the class itself defines it, and no instance differs."""

    fused_spec_varies: bool = False
    """``fused_spec`` looks at more than the shape of x and the layer's attributes and tensors."""

    registry: ClassVar[dict[str, type[Normalizer]]] = {}

    num_features: int
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    sync: bool
    sync_group: str | int
    sync_paused: bool = False
    compiled: bool
    backend: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # One truth per equation: whatever a subclass changes, its inherited fused_spec no longer counts.
        cls._fused_spec_holds = "fused_spec" in vars(cls)
        key = cls.__dict__.get("key", "")
        other = Normalizer.registry.get(key)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"the key {key!r} is taken by {other.__module__}.{other.__qualname__}. Choose another key."
            )
        if key:
            Normalizer.registry[key] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check the arguments before ``__init__``, where Python's own error would name neither the nearest nor a fix.

        Raises:
            TypeError: too many arguments by position, or one that the class does not take.
            ValueError: a value that is none of those in the argument's ``Literal``.
        """
        check_call(cls, args, kwargs)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.pop(SPECS, None)
        if name not in self.ranges:  # a scheduled value changes without a new graph
            self.__dict__.pop(GRAPH_KEY, None)
        super().__setattr__(name, value)
        _look_for_replaced_methods(self, name)

    def __delattr__(self, name: str) -> None:
        self.__dict__.pop(SPECS, None)
        super().__delattr__(name)
        _look_for_replaced_methods(self, name)

    @property
    def preserves_eval(self) -> bool:
        """Whether a layer made from a BatchNorm, with these arguments, evaluates to what that did.

        A class for which it always does writes ``preserves_eval = True``.
        """
        return False

    @property
    def translated_tensors(self) -> tuple[str, ...]:
        """Names of a BatchNorm's tensors that a swap takes over in another form: their values, not the objects."""
        return tuple(t.source for t in self.translations if t.swapped)

    def take_from(self, source: nn.Module) -> None:
        """Take over Parameters and running statistics: the same objects, but for ``translated_tensors``.

        Running statistics narrower than float32 are widened.
        """
        values = source.as_batch_norm() if isinstance(source, Normalizer) else {}
        counters = self.counters if type(source) is type(self) else ()
        for name in ("weight", "bias", *self.running_names, "num_batches_tracked", *counters):
            new, old = getattr(self, name, None), getattr(source, name, None)
            if new is None or name in self.translated_tensors:
                continue
            if name in values:
                new.data.copy_(values[name])
            elif old is not None:
                setattr(self, name, old)
        # After the running statistics: what is translated may replace one of them.
        for translation in self.translations:
            translation.take(self, source)
        restore_precision(self)  # a network built in bfloat16 holds its statistics in it

    def as_batch_norm(self) -> dict[str, Tensor]:
        """Return the values, (C,), of those of a BatchNorm's tensors that this class holds in another form."""
        return {}

    def return_to(self, source: nn.Module) -> None:
        """Give a layer what was taken from it, as it is now: the inverse of :meth:`take_from`.

        A class with ``translated_tensors`` writes those values into the layer's own tensors, where they changed since.
        """
        for name, old in (*source.named_parameters(recurse=False), *source.named_buffers(recurse=False)):
            new = getattr(self, name, None)
            if isinstance(new, Tensor) and name not in self.translated_tensors:
                # A network built in bfloat16 gets its statistics back in it.
                narrow = name in self.running_names and old.dtype.itemsize < 4
                setattr(source, name, new.to(old.dtype) if narrow else new)
        for translation in self.translations:
            translation.give_back(self, source)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay is to leave alone, as timm asks for them: all."""
        return {name for name, _ in self.named_parameters()}

    def monitor(self) -> dict[str, Tensor]:
        """Return what the layer has learned, as quantity -> 0-dim tensor, for the loggers."""
        return {}


def _is_own_method(cls: type, name: str) -> bool:
    """Tell whether a class has a method of that name that is not one of ``nn.Module``, which holds no equation."""
    return not hasattr(nn.Module, name) and inspect.isroutine(getattr(cls, name, None))


def _look_for_replaced_methods(layer: Normalizer, name: str) -> None:
    """Leave the kernels while an attribute of this instance stands in for one of its class's methods."""
    cls = type(layer)
    if not _is_own_method(cls, name):
        return
    if any(_is_own_method(cls, attribute) for attribute in vars(layer)):
        vars(layer)["_fused_spec_holds"] = False
    else:
        vars(layer).pop("_fused_spec_holds", None)


class MomentNorm(Normalizer):
    r"""Abstract: a normalizer whose output is affine in x, with coefficients that depend on the moments of x alone.

    Write :meth:`algebra`; gradients, precision, ranks, swap and tests follow.

    .. math:: y = s\,(x - c) + t, \qquad (c, s, t) = \mathrm{algebra}(\mu_{nc}, \sigma^2_{nc})

    Args:
        num_features: channels, the C of an input (N, C, *).
        eps: added to the variance, inside the root.
        momentum: weight of the new batch in the running statistics; ``None`` for the average of all batches.
        affine: learn ``weight`` (gamma) and ``bias`` (beta), each (C,).
        track_running_stats: keep running statistics and evaluate on them; otherwise always use those of the input.
        channel_dim: 1, or -1 for tokens (N, L, C).
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W), or (N, ..., C) with ``channel_dim=-1``; output as input.

    Raises:
        TypeError: the input is not a floating-point tensor.
        ValueError: an argument out of range, a wrong number of dimensions or channels, or one value per statistic.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: Annotated[float | None, Scheduled(0, 1)] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(num_features, int) or isinstance(num_features, bool) or num_features < 1:
            raise ValueError(f"{name}: num_features must be a positive int, got {num_features!r}.")
        if isinstance(eps, str) or not 0 <= eps < float("inf"):
            raise ValueError(f"{name}: eps must be a number >= 0, got {eps!r}.")
        if channel_dim not in (1, -1):
            raise ValueError(f"{name}: channel_dim must be 1 (images) or -1 (tokens), got {channel_dim!r}.")
        self.num_features, self.eps, self.affine, self.channel_dim = num_features, float(eps), affine, channel_dim
        self.sync, self.sync_group, self.compiled, self.backend = True, "world", False, "auto"
        for parameter in ("weight", "bias"):
            value = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
            self.register_parameter(parameter, value)
        self._make_running_stats(num_features, track_running_stats, device, dtype)
        self.momentum = momentum
        self.reset_parameters()

    def _add_parameters(self, options: Mapping[str, Any], **shapes: tuple[int, ...]) -> None:
        """Register parameters of these shapes at their ``start_values``, where and in which dtype ``options`` say."""
        for name, shape in shapes.items():
            empty = torch.empty(shape, device=options.get("device"), dtype=options.get("dtype"))
            self.register_parameter(name, nn.Parameter(empty))
        self.reset_parameters()

    def algebra(self, m: Moments) -> Affine:
        """Turn the moments of x into ``y = scale * (x - center) + shift``: the paper's equations."""
        raise NotImplementedError(f"{type(self).__name__} must define algebra(self, m: Moments) -> Affine.")

    def algebra_of(self, x: Tensor, layout: Layout) -> Callable[[Moments], Affine]:
        """Return the algebra for this input: a method that looks at more than the moments of x binds it here."""
        return self.algebra

    def fused_spec(self, layout: Layout) -> MixtureSpec | PerChannelSpec | EncoderDecoderSpec | None:
        """Return the same equations as the kernels know them; ``None`` where they do not."""
        return None

    def depthwise_conv(self) -> tuple[Tensor, Tensor | None] | None:
        """Return kernel and bias of the depthwise convolution that follows, ``None`` for none."""
        return None

    def standardize(self, mean: Tensor, var: Tensor) -> Affine:
        r"""Return the Affine of :math:`\gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta`."""
        scale = (var + self.eps).rsqrt()
        return Affine(mean, scale if self.weight is None else scale * self.weight.to(scale.dtype), self.bias)

    def statistic_size(self, n: int, size: int) -> int:
        """Return the elements behind the smallest statistic, for n samples of ``size`` elements per channel."""
        return n * size

    def forward(self, input: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        r"""Normalize the input x: :math:`\mathrm{act}(y + \mathrm{residual})`, on the GPU in the pass that writes y.

        Args:
            input: x.
            activation: "none", "relu" or "silu".
            residual: added before the activation, in the shape of x.
        """
        if not torch.compiler.is_compiling():
            keep_float32(self)
            keep_exact(self)
            if self.compiled:
                options = vars(self).get("_compile_options")
                y = compiled_forward(self, input, _forward, _ranks_of(self), options)
                return activated(y, activation, residual)
            if SPECS in vars(self) and _ranks_of(self) is None:
                again = same_as_before(self, input, activation, residual)
                if again is not None:
                    return again
        return _forward(self, input, activation, residual)

    def compile(self, **options: Any) -> None:
        """Compile the forward pass, by default fullgraph and at static shapes; equal layers share their graphs.

        Args:
            options: of ``torch.compile``, such as ``mode="max-autotune"``.

        Raises:
            TypeError: ``torch.compile`` takes no such argument.
        """
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
        """Set weight to 1, bias to 0, the running statistics to their start and what else there is to its own."""
        self.reset_running_stats()
        starts: dict[str, float | Tensor] = {"weight": 1.0, "bias": 0.0, **self.start_values()}
        parameters = dict(self.named_parameters(recurse=False))
        with torch.no_grad():
            for name in starts.keys() & parameters.keys():  # __init__ may not have made all of them yet
                start = starts[name]
                parameters[name].copy_(start) if isinstance(start, Tensor) else parameters[name].fill_(start)

    def extra_repr(self) -> str:
        """Show the arguments."""
        names = ["eps", "momentum", "affine", "track_running_stats", *["channel_dim"] * (self.channel_dim != 1)]
        shown = [f"{name}={getattr(self, name)!r}" for name in (*names, *self.repr_arguments)]
        return ", ".join([str(self.num_features), *shown])

    repr_arguments: ClassVar[tuple[str, ...]] = ()
    """A subclass's own arguments, for ``repr``."""


def _ranks_of(layer: MomentNorm) -> Ranks | None:
    pools = layer.train_uses_batch_stats or layer.track_running_stats
    return active_ranks(layer.sync and not layer.sync_paused, layer.training, layer.sync_group) if pools else None


def _forward(layer: MomentNorm, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
    who = type(layer).__name__
    layout = layout_of(x, layer.num_features, layer.channel_dim, who)
    ranks = _ranks_of(layer)
    of_input = layer.training or not layer.track_running_stats
    pooled = (
        ranks is not None and layer.train_uses_batch_stats
    )  # how many values there are in all is known only after pooling
    if of_input and not pooled and layer.statistic_size(layout.n, layout.size) < 2:
        remedy = "Use a larger batch, drop_last=True in the DataLoader, or layer.eval()."
        if not layer.train_uses_batch_stats:
            remedy = "Use larger feature maps, or leave this layer out of the swap: exclude=[its name]."
        raise ValueError(
            f"{who}: expected more than one value per statistic, got {layout.n} sample(s) of {layout.size} "
            f"element(s) per channel. {remedy}"
        )
    moments = None if of_input or layer.eval_uses_input_stats else layer.running()
    accumulates = layer.training and layer.accumulator is not None  # which the kernels do not know
    algebra = layer.algebra_of(x, layout)
    fused_spec = functools.partial(spec_of, layer) if layer._fused_spec_holds and not accumulates else None
    return normalize(
        x,
        algebra,
        layout=layout,
        moments=moments,
        ranks=ranks,
        backend=layer.backend,
        fused_spec=fused_spec,
        depthwise_conv=layer.depthwise_conv(),
        activation=activation,
        residual=residual,
    )

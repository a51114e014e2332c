"""What a layer is in evaluation: a fixed affine map per channel, a layer of torch's, or neither."""

from __future__ import annotations

import copy
import sys
import types
import warnings
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lightning_norm.errors import FusionError, NoEffectWarning
from lightning_norm.layers.behind import Behind, with_modules_behind
from lightning_norm.ops.layout import at_least_float32
from lightning_norm.ops.moments import Affine

Layer = TypeVar("Layer", bound=nn.Module)

BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

FROZEN = {"torchvision.ops.misc": "FrozenBatchNorm2d", "timm.layers.norm_act": "FrozenBatchNormAct2d"}
"""Module of another library -> its class whose statistics and weights stay."""

EPS = 2.0**-20
"""torch takes no eps of 0; with this one, 1 - eps and their sum 1 are exact in float32."""


class Evaluation(Behind):
    """Mixin: a class whose evaluation is a fixed map under conditions of its own says so.

    By :meth:`evaluates_on_running_stats` where the map is that of its algebra, otherwise by :meth:`eval_affine`; one
    that is a layer of torch's other than BatchNorm overrides :meth:`plain`.

    What follows from it: ``lightning_norm.to_plain`` and ``fold``, the export to other runtimes, timm's
    ``reparameterize_model``, and the answer to code that fuses BatchNorm layers by itself.
    """

    eval_uses_input_stats: ClassVar[bool]
    num_features: int
    channel_dim: int
    affine: bool
    track_running_stats: bool
    _eps: float

    @property
    def eps(self) -> float:
        """Added to the variance.

        Raises:
            FusionError: code outside of this package, which names ``running_var`` as well, is about to multiply both
                into a convolution, and this layer is no such map in evaluation.
        """
        # Every fusion of a BatchNorm reads eps and running_var in one function, and hardly any other code does. What
        # a layer's own method reads of itself is no fusion. The graph that torch.compile traces has no frames.
        if not torch.compiler.is_compiling():
            frame = sys._getframe(1)
            if "running_var" in frame.f_code.co_names and not _may_read(self, frame):
                raise FusionError(fuses(self, frame))
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = value

    @property
    def has_running_stats(self) -> bool:
        """Whether there are running statistics."""
        raise NotImplementedError

    def evaluates_on_running_stats(self) -> bool:
        """Tell whether evaluation, with the present parameters, looks at the running statistics alone."""
        return self.has_running_stats and not self.eval_uses_input_stats

    def eval_affine(self) -> Affine | None:
        """Return the map that the layer is in evaluation, (C,) each in float64; ``None`` if it looks at the sample.

        >>> from lightning_norm import BatchNorm, SwitchableNorm
        >>> BatchNorm(3, eps=0.0).eval_affine().scale
        tensor([1., 1., 1.], dtype=torch.float64)
        >>> SwitchableNorm(3).eval_affine()
        """
        # In float64, because the map is folded into other layers, and each rounding would be theirs.
        layer: Any = double_copy(self)
        if not hasattr(layer, "algebra") or not layer.evaluates_on_running_stats():
            return None
        return per_channel(layer.algebra(layer.running()), self.num_features)

    def eval_parts(self, dims: int | None = None) -> tuple[Affine, nn.Module | None] | None:
        """Return the map that comes first in evaluation, and what stays behind it as a layer of torch's.

        Args:
            dims: dimensions of the input.

        Returns:
            As :meth:`eval_affine`, and ``None`` behind it unless a subclass has more; ``None`` if the map is not fixed.
        """
        affine = self.eval_affine()
        return None if affine is None else (affine, None)

    def plain(self, dims: int | None = None) -> nn.Module | None:
        """Return torch's own layer that evaluates to the same, or ``None`` if there is none.

        Parameters and running statistics are handed on as they are where torch's layer means the same by them.
        Elsewhere the map goes into weight and bias, over a running variance of 1.

        Args:
            dims: dimensions of the input, which tell BatchNorm1d, 2d and 3d apart.

        >>> from lightning_norm import DiminishingBatchNorm
        >>> type(DiminishingBatchNorm(3).plain(dims=4)).__name__
        'BatchNorm2d'
        """
        # torch's BatchNorm takes channels on axis 1 and 2 to 5 dimensions, nothing else.
        affine = self.eval_affine() if dims in BATCH_NORMS and self.channel_dim == 1 else None
        return None if affine is None else batch_norm(self, affine, BATCH_NORMS[dims or 4])

    def why_not_plain(self, dims: int | None = None) -> str:
        """Return why :meth:`plain` gives ``None``.

        >>> from lightning_norm import SwitchableNorm
        >>> SwitchableNorm(3).why_not_plain(dims=4)
        'looks at the sample in evaluation'
        """
        if self.channel_dim != 1:
            return "torch's own layer takes channels from axis 1, this one from the last"
        if self.eval_affine() is None:
            return "looks at the sample in evaluation" if self.eval_uses_input_stats else "has no running statistics"
        return f"an input of {dims} dimensions" if dims else "dimensions of its input unknown: pass example_input"

    def fuse(self) -> nn.Module:
        """Return torch's own layer where there is one, else itself; timm's ``reparameterize_model`` calls it."""
        # The layer that stood here before the swap tells how many dimensions the input has.
        kind = str((getattr(self, "origin", None) or {}).get("source", ""))
        plain = deployed(self, dims_of(kind))
        return self if plain is None else plain.train(self.training)

    def switch_to_deploy(self) -> None:
        """Become torch's own layer in place, where there is one; RepVGG and timm call every module's.

        >>> from lightning_norm import swap
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        >>> _ = swap(model, "dbn")
        >>> model.eval()[1].switch_to_deploy()
        >>> type(model[1]).__name__
        'BatchNorm2d'
        """
        plain = self.fuse()
        if plain is self:
            return
        # Whoever holds the layer holds torch's from now on, with the hooks that were put on it.
        hooks = {name: value for name, value in vars(self).items() if name.endswith("_hooks") and value}
        vars(plain).update(hooks)
        self.__class__ = type(plain)  # type: ignore[assignment]
        object.__setattr__(self, "__dict__", vars(plain))


def deployed(layer: Evaluation, dims: int | None = None) -> nn.Module | None:
    """Return :meth:`Evaluation.plain` with the modules that the layer calls behind its normalization.

    A layer that a swap made of a frozen class of torchvision's or timm's becomes that class again; torch's own layers
    cannot be frozen, and a warning says so.
    """
    plain = layer.plain(dims)
    if plain is None:
        return None
    if layer._always_eval and isinstance(plain, tuple(BATCH_NORMS.values())):
        frozen = _frozen_class(layer, plain)
        if frozen is not None:
            return frozen
        warnings.warn(
            f"{type(plain).__name__} of torch's has no frozen statistics, and the {type(layer).__name__} that becomes "
            "one has: model.train() would let them move. Leave the model in eval(), or train the network as it was "
            "before lightning_norm.to_plain or fold.",
            NoEffectWarning,
            stacklevel=4,
        )
    return with_modules_behind(layer, plain)


def _frozen_class(layer: Evaluation, plain: nn.Module) -> nn.Module | None:
    """Return the layer's tensors in the frozen class that a swap made it of, ``None`` where they are not of one."""
    source = str((getattr(layer, "origin", None) or {}).get("source"))
    module = next((m for m, name in FROZEN.items() if name == source and m in sys.modules), None)
    tensors = {name: getattr(plain, name) for name in ("weight", "bias", "running_mean", "running_var")}
    if module is None or any(t is None or t.requires_grad for t in tensors.values()):
        return None
    kind: type[nn.Module] = getattr(sys.modules[module], source)
    frozen: nn.Module = kind.__new__(kind)
    nn.Module.__init__(frozen)
    vars(frozen)["eps"] = plain.eps
    for name, t in tensors.items():
        frozen.register_buffer(name, t.detach())
    for name in layer._behind:
        frozen.add_module(name, layer._modules[name])
    return frozen


def fuses(layer: Any, frame: types.FrameType) -> str:
    """Return the message for a function that is about to take a layer for a BatchNorm."""
    return (
        f"{frame.f_code.co_name}() reads eps and running_var of {type(layer).__name__}, as code does that fuses a "
        "BatchNorm into a convolution. In evaluation this layer is not the map that a BatchNorm with these tensors is, "
        "and the network would compute something else. Use lightning_norm.fold(model, example_input), which folds what "
        "can be folded and says why the rest stays."
    )


def fused_without_variance(layer: Any, frame: types.FrameType) -> bool:
    """Tell whether a function that reads ``running_var`` of a layer that has none is about to fuse it.

    Code that asks whether it is there, by ``hasattr`` or ``getattr``, hears no.
    """
    names = frame.f_code.co_names
    return "eps" in names and not {"hasattr", "getattr"} & {*names} and not _may_read(layer, frame)


def _may_read(layer: Any, frame: types.FrameType) -> bool:
    """Tell whether a function may read eps beside running_var: one of ours or the layer's, or any, of a BatchNorm."""
    code = frame.f_code
    if str(frame.f_globals.get("__name__")).partition(".")[0] == __name__.partition(".")[0]:
        return True
    if code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is layer:
        return True
    affine = layer.eval_affine()
    return affine is not None and is_batch_norm(layer, affine)


def is_batch_norm(layer: nn.Module, affine: Affine) -> bool:
    """Tell whether ``affine`` is the map of a BatchNorm with the layer's own tensors.

    Compared in float64, to a relative 1e-12: one rounding of float32 is 6e-8.
    """
    tensors = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    mean, var, weight = (tensors.get(name) for name in ("running_mean", "running_var", "weight"))
    if mean is None or var is None or not mean.shape == var.shape == (len(affine.scale),):
        return False
    scale = (_exact(var) + float(getattr(layer, "eps", 0.0))).rsqrt()
    scale = scale if weight is None else scale * _exact(weight)
    shift = _exact(tensors["bias"]) if "bias" in tensors else torch.zeros_like(scale)
    return all(
        torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in _pairs(Affine(_exact(mean), scale, shift), affine)
    )


@torch.no_grad()
def double_copy(layer: Layer) -> Layer:
    """Return a copy of the layer in float64 on the CPU, in evaluation, without a graph."""
    return copy.deepcopy(layer).cpu().double().eval().requires_grad_(False)


def per_channel(affine: Affine, channels: int) -> Affine:
    """Return an Affine with (C,) tensors of float64.

    >>> affine = per_channel(Affine(torch.zeros(1, 3), torch.ones(1)), 3)
    >>> affine.scale.shape, affine.shift.dtype
    (torch.Size([3]), torch.float64)
    """
    fields = (t.detach().double().expand(1, channels).squeeze(0) for t in affine.fields(1, channels))
    return Affine(*fields)


def share_parameters(layer: nn.Module, plain: nn.Module) -> nn.Module:
    """Return ``plain`` with the layer's own weight and bias, or without where it has none."""
    for name in ("weight", "bias"):
        setattr(plain, name, getattr(layer, name))
    return plain


def dims_of(kind: str) -> int | None:
    """Return the dimensions of the input of torch's layer of that name, ``None`` where it takes several.

    >>> dims_of("BatchNorm2d"), dims_of("SyncBatchNorm")
    (4, None)
    """
    return {"1d": 3, "2d": 4, "3d": 5}.get(kind[-2:])


def batch_norm(layer: nn.Module, affine: Affine, kind: type[nn.Module]) -> nn.Module:
    """Return torch's BatchNorm that evaluates to ``affine``, with the layer's own tensors if those say the same.

    Args:
        layer: whose tensors, device, precision, eps and momentum are taken over.
        affine: (C,) each, in float64.
        kind: BatchNorm1d, 2d or 3d.
    """
    tensors = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    # A layer without tensors says neither device nor precision, and the map has both.
    like = next((t for t in tensors.values() if t.is_floating_point()), affine.scale)
    # torch's BatchNorm takes narrow inputs if all its tensors are wide.
    wide = at_least_float32(like.dtype)
    options = {"device": like.device, "dtype": wide}
    c, eps = len(affine.scale), float(getattr(layer, "eps", 0.0))
    if is_batch_norm(layer, affine):
        # The same objects can be handed on, and training can continue with them.
        affine_too = "weight" in tensors or "bias" in tensors
        plain = kind(c, eps=eps, momentum=getattr(layer, "momentum", 0.1), affine=affine_too, **options)
        for name in ("weight", "bias"):
            if name not in tensors:
                plain.register_parameter(name, None)
        for name, value in tensors.items():
            if hasattr(plain, name):
                # A cast makes a new object, so it is left out where nothing changes.
                narrow = value.is_floating_point() and value.dtype != wide
                setattr(plain, name, _cast(value, wide) if narrow else value)
        return plain
    assert affine.shift is not None
    # Otherwise the map goes into weight and bias, over running statistics that normalize by exactly 1.
    plain = kind(c, eps=EPS, **options)
    with torch.no_grad():
        plain.get_buffer("running_mean").copy_(affine.center)
        plain.get_buffer("running_var").fill_(1 - EPS)
        plain.get_parameter("weight").copy_(affine.scale)
        plain.get_parameter("bias").copy_(affine.shift)
    if "bias" not in tensors and not plain.get_parameter("bias").any():
        plain.register_parameter("bias", None)
    # What did not train before does not begin to.
    return plain.requires_grad_(any(p.requires_grad for p in layer.parameters(recurse=False)))


def _exact(t: Tensor) -> Tensor:
    """Return the value in float64 on the CPU."""
    return t.detach().cpu().double()


def _cast(value: Any, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another dtype, a Parameter as a Parameter."""
    cast: Tensor = value.detach().to(dtype)
    return nn.Parameter(cast, value.requires_grad) if isinstance(value, nn.Parameter) else cast


def _pairs(a: Affine, b: Affine) -> list[tuple[Tensor, Tensor]]:
    """Return the fields of two maps side by side."""
    assert a.shift is not None
    assert b.shift is not None
    return [(a.center, b.center), (a.scale, b.scale), (a.shift, b.shift)]

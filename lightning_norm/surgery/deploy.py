"""Deployment: turn normalizers into torch's own layers, or fold them into the convolutions before them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.errors import counted
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.behind import stays_in_evaluation, with_modules_behind, without_normalization
from lightning_norm.layers.inference import deployed, dims_of, per_channel
from lightning_norm.ops.moments import Affine
from lightning_norm.surgery.activations import return_activations
from lightning_norm.surgery.conv_norm_pairs import layers_before
from lightning_norm.surgery.recognize import is_frozen
from lightning_norm.surgery.text_tables import TableReport, outputs_moved
from lightning_norm.surgery.torch_layers import TORCH_BATCH_NORMS
from lightning_norm.surgery.torch_private import has_hooks, move_hooks
from lightning_norm.surgery.walk import names_by_module, places_by_module, tensors_in

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class DeployedLayer:
    """One row of the report.

    Args:
        name: dotted name.
        source: class that was there.
        target: class that is there now.
        what: "plain", "folded" or "stays".
        reason: into what it was folded, or why it stays.
    """

    name: str
    source: str
    target: str
    what: str
    reason: str


class DeployReport(TableReport):
    """What :func:`to_plain` or :func:`fold` did: its length is the number of layers changed.

    Args:
        layers: one row per normalizer.
        moved: the largest absolute difference of the outputs on the example, ``None`` without one.
        largest: the largest absolute output on the example.
    """

    def __init__(self, layers: list[DeployedLayer], moved: float | None, largest: float | None) -> None:
        self.layers, self.moved, self.largest = layers, moved, largest

    def __len__(self) -> int:
        return sum(layer.what != "stays" for layer in self.layers)

    def names(self, what: str) -> list[str]:
        """Return the names of the layers that became "plain", were "folded", or "stay".

        Args:
            what: "plain", "folded" or "stays".
        """
        return [layer.name for layer in self.layers if layer.what == what]

    def table(self) -> list[tuple[str, ...]]:
        """Return one row per layer, below a heading."""
        rows: list[tuple[str, ...]] = [("layer", "from", "to", "", "why")]
        return rows + [(r.name, r.source, r.target, r.what, r.reason) for r in self.layers]

    def summary(self) -> str:
        """Return how many layers became what, and how far the outputs moved."""
        counts = ", ".join(f"{n} {what}" for what in ("plain", "folded", "stays") if (n := len(self.names(what))))
        return f"{counts or 'nothing to do'}     {outputs_moved(self.moved, self.largest)}"

    def __repr__(self) -> str:
        return f"DeployReport({len(self)} of {counted(len(self.layers), 'layer')}, moved={self.moved})"


def to_plain(model: nn.Module, example_input: Any = None) -> DeployReport:
    """Turn every normalizer that is a layer of torch's in evaluation into that layer, in place.

    Batch normalization, whatever is at that moment a fixed map per channel, and instance, group and layer
    normalization. Parameters and running statistics are handed on as they are where torch means the same by them, so
    that the ``state_dict`` is the original network's. The model is put into evaluation mode.

    A layer that looks at the sample in evaluation in a way that no layer of torch's does, such as "sn", stays; the
    report says why.

    Args:
        model: any module.
        example_input: a tensor, or a tuple of arguments: the outputs on it are compared, and inputs of layers that
            were built without a swap are known to be 1d, 2d or 3d.

    Returns:
        What became plain, what stays and why, and how far the outputs moved.

    >>> import lightning_norm
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> _ = lightning_norm.swap(model, "bcn")
    >>> print(len(to_plain(model)), type(model[1]).__name__)
    1 BatchNorm2d
    """
    watch = _Watch(model, example_input)
    return watch.report(_all_plain(model, watch))


def fold(model: nn.Module, example_input: Any = None) -> DeployReport:
    r"""Fold what is a fixed map per channel in evaluation into the convolution or linear layer before it, in place.

    With the map s (x - c) + t of the normalizer and the layer's weight W and bias b, in float64,

    .. math:: W' = s\,W, \qquad b' = s\,(b - c) + t

    torch's own BatchNorm layers are folded as well, and of "bnet" what normalizes: its depthwise convolution stays. A
    layer is folded where its input comes from that convolution alone and goes nowhere else, which is read from the
    graph that torch.fx traces, part by part where the whole cannot be traced. What cannot be folded becomes plain as
    with :func:`to_plain`. The model is put into evaluation mode.

    Args:
        model: any module.
        example_input: as for :func:`to_plain`; needed where a linear layer is followed.

    Returns:
        What was folded, what became plain, what stays and why, and how far the outputs moved.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> print(fold(model, torch.randn(1, 3, 8, 8)).names("folded"), model[1])
    ['1'] Identity()
    """
    watch = _Watch(model, example_input)
    rows = []
    reasons = {}
    for norm, before in layers_before(model, (Normalizer, *TORCH_BATCH_NORMS)).items():
        affine, behind = _parts_of(norm, watch.dims_of(norm))
        # What depends on the sample is no fixed map, and `_all_plain` says so.
        if affine is None:
            if not isinstance(norm, Normalizer) and type(norm) not in TORCH_BATCH_NORMS:
                reasons[norm] = "a subclass of torch's may do more than normalize; swap it to 'bn' first"
            continue
        why = before if isinstance(before, str) else _obstacle(norm, before, watch)
        if why or isinstance(before, str):
            reasons[norm] = str(why)
            continue
        _fold_into(before, affine)
        name = watch.names[norm]
        into = f"into {watch.names[before]} ({type(before).__name__})"
        into += "; the convolution behind it stays" if behind else ""
        rows.append(DeployedLayer(name, type(norm).__name__, type(behind or nn.Identity()).__name__, "folded", into))
        left: nn.Module = nn.Identity()
        if isinstance(norm, Normalizer):
            left = with_modules_behind(norm, behind) if behind else without_normalization(norm)
        watch.replace(norm, left)
    return watch.report([*rows, *_all_plain(model, watch, reasons)])


def _parts_of(norm: Any, dims: int | None) -> tuple[Affine | None, nn.Module | None]:
    """Return the fixed map per channel that comes first in a layer in evaluation, and what stays behind it."""
    if isinstance(norm, Normalizer):
        return norm.eval_parts(dims) or (None, None)
    return affine_of(norm), None


def affine_of(module: nn.Module) -> Affine | None:
    """Return what a layer is in evaluation, per channel in float64, or ``None`` if that depends on the sample."""
    if isinstance(module, Normalizer):
        return module.eval_affine()
    mean: Tensor | None = getattr(module, "running_mean", None)
    var: Tensor | None = getattr(module, "running_var", None)
    if type(module) not in TORCH_BATCH_NORMS or mean is None or var is None:
        return None
    norm: Any = module
    center, scale = mean.detach().cpu().double(), (var.detach().cpu().double() + norm.eps).rsqrt()
    weight, bias = (None if t is None else t.detach().cpu().double() for t in (norm.weight, norm.bias))
    return per_channel(Affine(center, scale if weight is None else scale * weight, bias), len(center))


class _Watch:
    """The model before and after: names, input dimensions, outputs on the example."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = model
        # Layers of torch's compute no activation: it goes back to its place, under the original network's names.
        return_activations(model)
        self.arguments = None if example is None else example if isinstance(example, tuple) else (example,)
        # Names and places are those of the model as it was: a layer that was replaced is still looked up by itself.
        self.names = {module: names[0] for module, names in names_by_module(model).items()}
        self.places = places_by_module(model)
        self.dims: dict[nn.Module, int] = {}
        # The dimensions of a layer's input tell which of torch's classes it becomes (1d, 2d or 3d).
        model.eval()
        # Normalizers and modules without children normalize or convolve; containers may be called with anything.
        seen = [m for m in model.modules() if isinstance(m, Normalizer) or not list(m.children())]
        hooks = [m.register_forward_pre_hook(self._see) for m in seen]
        try:
            self.outputs_before = self._outputs()
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            self.dims[module] = arguments[0].dim()

    @torch.no_grad()
    def _outputs(self) -> list[Tensor]:
        """Return what the model makes of the example, as a list of tensors."""
        if self.arguments is None:
            return []
        # A model may write into its arguments or return one of its buffers.
        return [t.clone() for t in tensors_in(self.model(*copy.deepcopy(self.arguments)))]

    def dims_of(self, module: nn.Module) -> int | None:
        origin: dict[str, Any] = getattr(module, "origin", None) or {}
        return self.dims.get(module) or dims_of(str(origin.get("source", "")))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put a module in every place of another one, in its mode."""
        new.train(old.training)  # bnet becomes a BatchNorm and a convolution, in a module
        # A shared layer is replaced in every place, so that it stays shared.
        for parent, attribute in self.places[old]:
            parent.add_module(attribute, new)

    def report(self, rows: list[DeployedLayer]) -> DeployReport:
        """Return the report, its rows in the order of the model, with how far the outputs have moved."""
        # Folded layers were found in the order of the graph; the table is in the order of the model.
        order = list(self.names.values())
        rows.sort(key=lambda row: order.index(row.name))
        if not self.outputs_before:
            return DeployReport(rows, None, None)
        pairs = list(zip(self.outputs_before, self._outputs(), strict=True))
        moved = max((float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel()), default=0.0)
        return DeployReport(rows, moved, max((float(a.abs().max()) for a, _ in pairs if a.numel()), default=0.0))


def _all_plain(model: nn.Module, watch: _Watch, reasons: Mapping[nn.Module, str] | None = None) -> list[DeployedLayer]:
    """Turn what is left into torch's layers, and return a row for each normalizer."""
    rows = []
    for module in list(model.modules()):
        name, kind, why = watch.names.get(module, ""), type(module).__name__, (reasons or {}).get(module, "")
        if not isinstance(module, Normalizer):
            if why:
                rows.append(DeployedLayer(name, kind, kind, "stays", why))
            continue
        dims = watch.dims_of(module)
        plain = deployed(module, dims) if name else None
        if plain is None:
            why = module.why_not_plain(dims) if name else "is the model itself"
            rows.append(DeployedLayer(name, kind, kind, "stays", why))
            continue
        if stays_in_evaluation(module) and isinstance(plain, nn.Module) and not is_frozen(plain):
            why = "frozen no longer: train() lets its statistics move"
        move_hooks(module, plain)
        watch.replace(module, plain)
        rows.append(DeployedLayer(name, kind, type(plain).__name__, "plain", why))
    return rows


def _obstacle(norm: nn.Module, before: nn.Module, watch: _Watch) -> str:
    """Return why a normalizer cannot be folded into the layer before it, or nothing."""
    if not isinstance(before, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)):
        return f"follows {type(before).__name__}, no convolution or linear layer"
    channels = getattr(norm, "num_features", None)
    last = getattr(norm, "channel_dim", 1) == -1
    if has_hooks(norm) or has_hooks(before):
        return "a hook is on it or on the layer before it"
    if hasattr(before, "parametrizations"):
        return "the weight before it is parametrized"
    # Other modules may share the weight, which would then be scaled for them as well.
    owners = [m for m in watch.model.modules() for p in m.parameters(False) if p is before.weight or p is before.bias]
    if any(m is not before for m in owners):
        return "the weight before it belongs to another layer as well"
    # A linear layer's outputs are the last axis, and the channels are the second: they agree for (N, C) inputs only.
    if isinstance(before, nn.Linear):
        if not last and watch.dims.get(norm) != 2:
            return "channels may not be the linear layer's outputs: pass example_input"
        return "" if before.out_features == channels else "normalizes another axis than the linear layer's outputs"
    return "" if before.out_channels == channels and not last else "normalizes another axis than the convolution's"


@torch.no_grad()
def _fold_into(layer: Any, affine: Affine) -> None:
    """Let a convolution or linear layer do what the map behind it does: W' = sW, b' = s(b - c) + t."""
    # In float64, so that folding adds one rounding to the weights and no more.
    weight = layer.weight
    weight64 = weight.detach().double()
    # A normalizer's map is computed on a copy of the layer on the CPU.
    center, scale = affine.center.to(weight.device), affine.scale.to(weight.device)
    shift = affine.shift
    assert shift is not None
    if isinstance(layer, TRANSPOSED_CONVOLUTIONS):
        # The weight is (in, out / groups, ...), with the input channels group by group.
        # Each group of outputs has input channels of its own.
        groups = layer.groups
        by_group = weight64.reshape(groups, weight64.shape[0] // groups, weight64.shape[1], -1)
        new = (by_group * scale.reshape(groups, 1, -1, 1)).reshape(weight64.shape)
    else:
        new = weight64 * scale.reshape(-1, *(1,) * (weight64.dim() - 1))
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().double()
    bias = scale * (bias - center) + shift.to(weight.device)
    layer.weight = nn.Parameter(new.to(weight.dtype), weight.requires_grad)
    layer.bias = nn.Parameter(bias.to(weight.dtype), weight.requires_grad)

"""What a layer that a swap has made does beside normalizing: modules called behind it, and staying in evaluation.

Libraries derive classes from torch's that hold an activation and a dropout as children, such as timm's
``BatchNormAct2d``. A swap takes such a layer as a whole: the children keep their names, for checkpoints and code that
reads ``bn1.act``.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_norm.errors import NotReachedWarning
from lightning_norm.ops import torch_private
from lightning_norm.ops.torch_private import has_hooks

FUSED: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu"}
"""Activations that the pass which writes y computes as well."""

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


ACTIVATION = "activation"
"""Name of the child that a swap with ``fuse_activation`` has taken from its place behind the layer."""


class TakenActivation(nn.Module):
    """Stands where an activation was that a normalizer now computes: it passes on what that layer returns.

    What comes from anywhere else gets the activation here, and a NotReachedWarning says so once; so does an output of
    the layer that went elsewhere, which has the activation in it.

    Args:
        activation: the module that stood here.
        name: its name in the model, for messages.
        layer: the name of the layer that computes it.

    >>> import lightning_norm
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> _ = lightning_norm.swap(model, "sn", fuse_activation=True)
    >>> model[2]
    TakenActivation(ReLU, computed by 1)
    """

    def __init__(self, activation: nn.Module, name: str, layer: str) -> None:
        super().__init__()
        # Not a child: it is one of the layer's, and a module is to have one place.
        vars(self)["taken"] = activation
        self.name, self.layer = name, layer
        self.train(activation.training)
        self._due: dict[int, tuple[weakref.ref[Tensor], bool]] = {}
        self._told = False

    def expect(self, y: Tensor) -> None:
        """Note an output of the layer, which is due here."""
        # An output that was freed and has not come by was used by something else, or by nothing.
        lost = [(key, first) for key, (ref, first) in self._due.items() if ref() is None]
        for key, _ in lost:
            del self._due[key]
        # A recomputation of checkpointed activations ends where it has all that it needs.
        if any(first for _, first in lost):
            self._tell(f"an output of {self.layer} did not come to {self.name}, and has its activation in it")
        # By id, with a weak reference: it keeps no memory alive, and tells whether another tensor has taken over the
        # id.
        self._due[id(y)] = (weakref.ref(y), not torch_private.in_backward_pass())

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output as it is, and anything else with the activation."""
        # A graph was made from calls that were looked at before, and its tensors are others in each call.
        if torch.compiler.is_compiling() or torch_private.is_proxy(input) or torch_private.tracing_state() is not None:
            return input
        due = self._due.pop(id(input), None)
        if due is not None and due[0]() is input:
            return input
        for key, (ref, _) in list(self._due.items()):
            y = ref()
            # A view of the whole output, or the output detached.
            if y is not None and y.shape == input.shape and not y.is_meta and y.is_set_to(input):
                del self._due[key]
                return input
        if not torch_private.is_transformed():
            self._tell(
                f"{self.name} was called with a tensor that does not come from {self.layer}: it is computed here"
            )
        computed: Tensor = vars(self)["taken"](input)
        return computed

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                f"fuse_activation: {what}. Leave this layer's activation where it was: report.undo() and swap with "
                f"fuse_activation=False, or with a mapping that leaves {self.layer!r} out.",
                NotReachedWarning,
                stacklevel=4,
            )

    def extra_repr(self) -> str:
        """Show who computes it."""
        return f"{type(vars(self)['taken']).__name__}, computed by {self.layer}"

    def __getstate__(self) -> dict[str, Any]:
        # Outputs of this moment are no part of a copy, and weak references cannot be pickled.
        return {**vars(self), "_due": {}}


class Behind(nn.Module):
    """Mixin: children that a layer calls behind its normalization, and a layer that stays in evaluation.

    A ReLU or SiLU right behind is computed in the pass that writes y, unless a hook is registered on it.
    """

    _behind: tuple[str, ...] = ()
    """Names of the children that are called behind the normalization, in this order."""

    _taken_from: TakenActivation | None = None
    """What stands in the place of the activation that the layer has taken over."""

    _always_eval: bool = False
    """``train()`` leaves the layer itself in evaluation: its statistics are frozen."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the layer and its children; see :func:`stays_in_evaluation`."""
        super().train(mode)
        # nn.Module.train() sets the children as well, which follow the model; this layer alone stays behind. What was
        # asked for is noted for whoever ends the freeze.
        if self._always_eval:
            vars(self)["_mode"], self.training = mode, False
        return self


def add_children(layer: Behind, children: dict[str, nn.Module | None], behind: tuple[str, ...]) -> None:
    """Take children under their names, and call those that are named in ``behind``.

    Args:
        layer: that takes them.
        children: name -> module, as the replaced layer held them.
        behind: names of those to call, in the order in which they are called.

    Raises:
        TypeError: the layer has an attribute of such a name.
    """
    for name, child in children.items():
        if hasattr(layer, name) and name not in layer._modules:
            raise TypeError(f"{type(layer).__name__} has an attribute {name!r}, and the layer a module of that name")
        layer.add_module(name, child)
    if behind:
        layer._behind = behind


def compute_activation(layer: Behind, activation: nn.Module, place: TakenActivation) -> None:
    """Compute an activation that stood behind the layer, in ``place``.

    Raises:
        TypeError: the layer has a module of that name.
    """
    add_children(layer, {ACTIVATION: activation}, (*layer._behind, ACTIVATION))
    # By vars: as an attribute it would be a child, and have two places in the model.
    vars(layer)["_taken_from"] = place


def give_activation(layer: Behind) -> nn.Module | None:
    """Give up an activation that was taken over, and return it; ``None`` if there is none."""
    place = vars(layer).pop("_taken_from", None)
    if place is None:
        return None
    layer._behind = tuple(name for name in layer._behind if name != ACTIVATION)
    return layer._modules.pop(ACTIVATION)


def modules_behind(layer: Behind) -> list[nn.Module]:
    """Return the modules that are called behind the normalization, in their order."""
    children_behind = [layer._modules.get(name) for name in layer._behind]
    return [module for module in children_behind if module is not None]


def keep_in_evaluation(layer: Behind, always: bool, mode: bool | None = None) -> None:
    """Set :attr:`Behind._always_eval`, with a mode or the one last asked for; the layer's children are left alone."""
    mode = requested_mode(layer) if mode is None else mode
    layer._always_eval, layer.training = always, mode and not always
    vars(layer)["_mode"] = mode


def stays_in_evaluation(layer: nn.Module) -> bool:
    """Tell whether ``train()`` leaves a normalizer in evaluation; torch's layers never stay."""
    return getattr(layer, "_always_eval", False)


def requested_mode(layer: nn.Module) -> bool:
    """Return the mode that ``train()`` or ``eval()`` last asked for."""
    return bool(vars(layer).get("_mode", True)) if stays_in_evaluation(layer) else layer.training


def fuse_behind(layer: Behind, activation: str) -> tuple[str, list[nn.Module]]:
    """Return the activation to compute with the normalization, and the modules that are left to be called."""
    modules = modules_behind(layer)
    if activation != "none":
        return activation, modules
    # A dropout in evaluation, between the layer and its ReLU, is in nobody's way.
    while modules and _does_nothing(modules[0]):
        modules = modules[1:]
    if modules and type(modules[0]) in FUSED and not has_hooks(modules[0]):
        return FUSED[type(modules[0])], modules[1:]
    return activation, modules


def with_modules_behind(layer: Behind, plain: nn.Module) -> nn.Module:
    """Return ``plain``, one of torch's layers, with this layer's modules behind it.

    As the class of timm's that does so, where timm is loaded: keys of the ``state_dict`` and attributes are then
    those of the original network. Otherwise an ``nn.Sequential``.
    """
    children = {name: m for name, m in layer._modules.items() if m is not None and name in layer._behind}
    if not children:
        return plain
    # Looked up and not imported: whoever has such a layer has imported timm.
    timm: Any = sys.modules.get("timm.layers.norm_act")
    if timm is not None and type(plain) is nn.BatchNorm2d and children.keys() == {"drop", "act"}:
        # Without its __init__, which would make parameters that are thrown away at once.
        whole: nn.Module = timm.BatchNormAct2d.__new__(timm.BatchNormAct2d)
        vars(whole).update(vars(plain))
        for name, module in children.items():
            whole.add_module(name, module)
        return whole
    return nn.Sequential(OrderedDict(norm=plain, **{name: children[name] for name in layer._behind}))


def without_normalization(layer: Behind) -> nn.Module:
    """Return what is left of the layer once its normalization is folded into another one."""
    children = OrderedDict((name, m) for name in layer._behind if (m := layer._modules.get(name)) is not None)
    if all(type(m) is nn.Identity for m in children.values()):
        return nn.Identity()
    return nn.Sequential(children)


def call_behind(layer: Behind, y: Tensor, modules: list[nn.Module]) -> Tensor:
    """Return what ``modules`` make of y, one after the other."""
    for module in modules:
        y = module(y)
    if layer._taken_from is not None and not torch.compiler.is_compiling():
        layer._taken_from.expect(y)
    return y


def _does_nothing(module: nn.Module) -> bool:
    if has_hooks(module):
        return False
    # Exactly these classes: one that is derived from them may do anything.
    if type(module) is nn.Identity:
        return True
    return type(module) in DROPOUTS and (not module.training or getattr(module, "p", None) == 0)

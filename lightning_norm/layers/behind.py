"""What a layer that a swap has made does beside normalizing: modules called behind it, and staying in evaluation.

Libraries derive classes from torch's that hold an activation and a dropout as children, such as timm's
``BatchNormAct2d``. A swap takes such a layer as a whole: the children keep their names, for checkpoints and code that
reads ``bn1.act``.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from lightning_norm.ops.torch_private import has_hooks

FUSED: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu"}
"""Activations that the pass which writes y computes as well."""

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Behind(nn.Module):
    """Mixin: children that a layer calls behind its normalization, and a layer that stays in evaluation.

    A ReLU or SiLU right behind is computed in the pass that writes y, unless a hook is registered on it.
    """

    behind: tuple[str, ...] = ()
    """Names of the children that are called behind the normalization, in this order."""

    always_eval: bool = False
    """``train()`` leaves the layer itself in evaluation: its statistics are frozen."""

    def add_children(self, children: dict[str, nn.Module | None], behind: tuple[str, ...]) -> None:
        """Take children under their names, and call those that are named in ``behind``.

        Args:
            children: name -> module, as the replaced layer held them.
            behind: names of those to call, in the order in which they are called.

        Raises:
            TypeError: the layer has an attribute of such a name.
        """
        for name, child in children.items():
            if hasattr(self, name) and name not in self._modules:
                raise TypeError(f"{type(self).__name__} has an attribute {name!r}, and the layer a module of that name")
            self.add_module(name, child)
        if behind:
            self.behind = behind

    def modules_behind(self) -> list[nn.Module]:
        """Return the modules that are called behind the normalization, in their order."""
        found = [self._modules.get(name) for name in self.behind]
        return [module for module in found if module is not None]

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the layer and its children; see :attr:`always_eval`."""
        super().train(mode)
        if self.always_eval:
            vars(self)["_mode"], self.training = mode, False
        return self

    def keep_in_evaluation(self, always: bool, mode: bool | None = None) -> None:
        """Set :attr:`always_eval`, with a mode or the one last asked for; the layer's children are left alone."""
        mode = self.requested_mode if mode is None else mode
        self.always_eval, self.training = always, mode and not always
        vars(self)["_mode"] = mode

    @property
    def requested_mode(self) -> bool:
        """The mode that ``train()`` or ``eval()`` last asked for."""
        return bool(vars(self).get("_mode", True)) if self.always_eval else self.training

    def fuse_behind(self, activation: str) -> tuple[str, list[nn.Module]]:
        """Return the activation to compute with the normalization, and the modules that are left to be called."""
        modules = self.modules_behind()
        if activation != "none":
            return activation, modules
        while modules and _does_nothing(modules[0]):
            modules = modules[1:]
        if modules and type(modules[0]) in FUSED and not has_hooks(modules[0]):
            return FUSED[type(modules[0])], modules[1:]
        return activation, modules

    def followed(self, plain: nn.Module) -> nn.Module:
        """Return ``plain``, one of torch's layers, with this layer's modules behind it.

        As the class of timm's that does so, where timm is loaded: keys of the ``state_dict`` and attributes are then
        those of the original network. Otherwise an ``nn.Sequential``.
        """
        children = {name: m for name, m in self._modules.items() if m is not None and name in self.behind}
        if not children:
            return plain
        timm: Any = sys.modules.get("timm.layers.norm_act")
        if timm is not None and type(plain) is nn.BatchNorm2d and children.keys() == {"drop", "act"}:
            whole: nn.Module = timm.BatchNormAct2d.__new__(timm.BatchNormAct2d)
            vars(whole).update(vars(plain))
            for name, module in children.items():
                whole.add_module(name, module)
            return whole
        return nn.Sequential(OrderedDict(norm=plain, **{name: children[name] for name in self.behind}))

    def remainder(self) -> nn.Module:
        """Return what is left of the layer once its normalization is folded into another one."""
        children = OrderedDict((name, m) for name in self.behind if (m := self._modules.get(name)) is not None)
        if all(type(m) is nn.Identity for m in children.values()):
            return nn.Identity()
        return nn.Sequential(children)

    def call_behind(self, y: Tensor, modules: list[nn.Module]) -> Tensor:
        """Return what ``modules`` make of y, one after the other."""
        for module in modules:
            y = module(y)
        return y


def _does_nothing(module: nn.Module) -> bool:
    if has_hooks(module):
        return False
    # Exactly these classes: one that is derived from them may do anything.
    if type(module) is nn.Identity:
        return True
    return type(module) in DROPOUTS and (not module.training or getattr(module, "p", None) == 0)

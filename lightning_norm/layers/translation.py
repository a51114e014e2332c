"""Tensors that a class stores in another form than the layers it is made from, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_norm.ops.moments import to_std, to_var


@dataclass(frozen=True)
class Translation:
    """One tensor of another layer, and the form in which a normalizer stores it.

    A swap, its undoing and ``load_state_dict`` all follow from it.

    Args:
        source: name of the tensor in the other layer and in its checkpoint, such as "running_var".
        target: name of the tensor of this class, such as "running_std".
        forward: from the other layer's values to those of this class.
        backward: the inverse.
        swapped: a swap takes the values over too, and not only ``load_state_dict``.

    >>> Translation("running_var", "running_std", torch.sqrt, torch.square).forward(torch.tensor([4.0]))
    tensor([2.])
    """

    source: str
    target: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]
    swapped: bool = True

    def take(self, layer: nn.Module, source: nn.Module) -> None:
        """Fill the layer's tensor from that of ``source``, where both exist."""
        new, old = getattr(layer, self.target, None), getattr(source, self.source, None)
        if new is None or old is None or not self.swapped:
            return
        if isinstance(new, nn.Parameter):
            # The Parameter stays the object that the layer registered; its values and its shape are the source's.
            new.data = self.forward(old.detach())
            # A layer that was frozen stays frozen.
            new.requires_grad_(old.requires_grad)
        else:
            setattr(layer, self.target, self.forward(old))

    def return_to(self, layer: nn.Module, source: nn.Module) -> None:
        """Fill the tensor of ``source`` from the layer's, where both exist and the layer's has changed."""
        new, old = getattr(layer, self.target, None), getattr(source, self.source, None)
        if new is None or old is None or new.is_meta or not self.swapped:
            return
        # Back and forth rounds: what training left alone must return bit by bit.
        if not torch.equal(new.detach().to(old), self.forward(old.detach()).to(old)):
            # The values and not the object, for an optimizer may hold the object.
            old.data = self.backward(new.detach()).to(old).view_as(old)

    def load(self, state: dict[str, Tensor], prefix: str) -> None:
        """Write the tensor of another layer's checkpoint in this class's form, unless the checkpoint has it so."""
        if prefix + self.source in state:
            state.setdefault(prefix + self.target, self.forward(state[prefix + self.source]))
            del state[prefix + self.source]


def std_of_var(eps: float, kind: str = "running") -> Translation:
    """Return the translation of a variance, stored as the standard deviation that evaluates to the same."""
    return Translation(f"{kind}_var", f"{kind}_std", lambda var: to_std(var, eps), lambda std: to_var(std, eps))


def var_of_std(eps: float, kind: str = "running") -> Translation:
    """Return the inverse of :func:`std_of_var`: a standard deviation, stored as a variance."""
    return Translation(f"{kind}_std", f"{kind}_var", lambda std: to_var(std, eps), lambda var: to_std(var, eps))


def renamed(source: str, target: str) -> Translation:
    """Return the translation of a tensor that a published checkpoint has in the same form, under another name."""
    return Translation(source, target, lambda t: t, lambda t: t, swapped=False)

"""Whether the layers of a swap are reached: they run in a training step, and their parameters get gradients.

Code may keep a layer beside the attribute that a swap writes to, in a list, a closure or as a bound method, or use its
tensors by itself. The layer that was replaced then goes on computing, and the new one learns nothing.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_norm.errors import counted
from lightning_norm.layers.base import Normalizer
from lightning_norm.surgery.walk import tensors_in


class Reach:
    """Watch layers through a training step.

    Args:
        layers: name -> the layer, and the module that it has replaced.
        hooks: see which layers run; otherwise only which parameters have gradients.

    Attributes:
        ran: ids of the layers, and of replaced modules, that were called.
        learning: ids of the parameters that have had a gradient.

    >>> from lightning_norm import create
    >>> watched, called = create("bn", 8), create("bn", 8)
    >>> reach = Reach({"bn1": (watched, nn.BatchNorm2d(8))})
    >>> called(torch.randn(2, 8, 3, 3)).sum().backward()
    >>> list(reach.missed())
    ['bn1']
    """

    def __init__(self, layers: Mapping[str, tuple[Normalizer, nn.Module]], *, hooks: bool = True) -> None:
        self.layers = dict(layers)
        self.hooks = hooks
        self.ran: set[int] = set()
        self.learning: set[int] = set()
        # A replacement has the dictionaries of hooks of what it replaces: a hook on either is called for both.
        watched = [layer for layer, _ in self.layers.values()] if hooks else []
        self._handles = [layer.register_forward_hook(self._see) for layer in watched]

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        self.ran.add(id(module))

    def look_at_gradients(self) -> bool:
        """Take note of the parameters that have a gradient now, and tell whether any has one."""
        # Gradients are looked at beside the calls: a layer may run under no_grad, and learn nothing.
        parameters = [p for layer, _ in self.layers.values() for p in layer.parameters()]
        self.learning |= {id(p) for p in parameters if p.grad is not None}
        return bool(self.learning)

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def missed(self, *, gradients: bool = True) -> dict[str, str]:
        """Return the layers that were not reached: name -> what happened in their place.

        Args:
            gradients: look at them too; parameters that are split over ranks have none of their own.
        """
        reasons = {name: self._why(*pair, gradients) for name, pair in self.layers.items()}
        return {name: why for name, why in reasons.items() if why}

    def _why(self, layer: Normalizer, replaced: nn.Module, gradients: bool) -> str:
        """Return what happened in place of a layer; "" if it was reached."""
        # What is frozen gets no gradient, and says nothing.
        trainable = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        silent = [n for n, p in trainable.items() if id(p) not in self.learning]
        if id(replaced) in self.ran:
            also = "as well" if id(layer) in self.ran else "in its place"
            return f"the {type(replaced).__name__} that it has replaced ran {also}: a list, dict or closure holds that"
        # What only its own forward reads has a gradient: that was called by itself, and no hook with it.
        own = not silent and not {"weight", "bias"}.issuperset(trainable)
        if self.hooks and id(layer) not in self.ran and not own:
            # Some of its tensors have a gradient although it did not run.
            if len(silent) < len(trainable):
                return (
                    "was not called, and code that uses its tensors was: self.bn.forward(x), a bound method, or a "
                    "call of a function"
                )
            return "did not run: this step does not use it, or calls a bound method of what it has replaced"
        return f"ran, and {', '.join(silent)} got no gradient" if gradients and silent else ""


def tell(missed: Mapping[str, str], when: str) -> str:
    """Return the text of a warning that names layers which were not reached.

    >>> tell({"bn1": "did not run"}, "the first training step").partition(". ")[0]
    '1 layer of the swap learned nothing in the first training step: bn1 (did not run)'
    """
    kinds: dict[str, list[str]] = {}
    for name, why in missed.items():
        kinds.setdefault(why, []).append(name)
    named = "; ".join(f"{', '.join(names)} ({why})" for why, names in kinds.items())
    return (
        f"{counted(len(missed), 'layer')} of the swap learned nothing in {when}: {named}. Call layers by "
        "the attribute of their parent, self.bn(x), when they are used; exclude those that are not to be swapped."
    )


def check_reach(
    layers: Mapping[str, tuple[Normalizer, nn.Module]], model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """Run a model forward and backward in training, and return what :meth:`Reach.missed` says.

    Parameters, buffers, gradients, modes and random states are afterwards what they were.

    Args:
        layers: as for :class:`Reach`.
        model: the model.
        args: what it is called with; a function by itself is called with the model, and returns outputs or a loss.
        kwargs: likewise.
    """
    reach = Reach(layers)
    with unchanged(model), torch.enable_grad():
        try:
            model.train()
            is_function = len(args) == 1 and callable(args[0]) and not isinstance(args[0], (Tensor, nn.Module))
            # A LightningModule may need its own training_step, which only a function of the user's can call.
            with eagerly():
                outputs = args[0](model) if is_function else model(*args, **kwargs)
            # A random weighting: the plain sum of normalized outputs has gradients of zero, which are gradients, and
            # may be cancelled by autograd where a constant is left.
            losses = [(t * torch.randn_like(t)).sum() for t in tensors_in(outputs) if t.requires_grad]
            if losses:
                torch.autograd.backward(losses)
            reach.look_at_gradients()
        finally:
            reach.stop()
    return reach.missed()


def eagerly() -> Any:
    """Run without the graphs of torch.compile: one that is there already sees no hook that is registered now."""
    # Without the compiler, whose import takes a second, there is no graph.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the model's tensors, gradients and modes, and the random states."""
    modes = [(module, module.training) for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    values = [(t, t.detach().clone(), t.grad) for t in tensors]
    # A forward may put another tensor in a buffer's place.
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(devices)):
        # Without the gradients of an accumulation that is under way, which would look like those of this step.
        for t in tensors:
            t.grad = None
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, before in buffers:
                module._buffers.update(before)
            with torch.no_grad():
                for t, value, grad in values:
                    t.grad = grad
                    if not torch.equal(t, value):
                        t.copy_(value)
            random.setstate(python_state)
            np.random.set_state(numpy_state)

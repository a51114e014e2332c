"""The activation behind a normalizer: found where it serves that layer alone, and handed to it."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.layers.base import MomentNorm, Normalizer
from lightning_norm.layers.behind import (
    FUSED,
    TakenActivation,
    compute_activation,
    give_activation,
    modules_behind,
)
from lightning_norm.ops.torch_private import has_hooks
from lightning_norm.surgery.restore import everything_restored, random_numbers_restored
from lightning_norm.surgery.select import Left, ModuleSlot
from lightning_norm.surgery.torch_private import TorchDispatchMode, tree_leaves
from lightning_norm.surgery.walk import modules_by_name, names_by_module, normalizers_of, places_by_module

Layers = Mapping[str, tuple[Normalizer, nn.Module]]
"""Name -> the normalizer, and the module that it replaces: one of the two is in the model."""


def find_activations(
    model: nn.Module, layers: Layers, how: bool | Mapping[str, str], example: Any = None
) -> tuple[dict[str, str], list[Left]]:
    """Return layer -> the activation that follows it and serves it alone, and the activations that are left, and why.

    Args:
        model: the model.
        layers: the layers of the swap.
        how: ``True`` to look for them; or layer -> activation, which is taken at its word.
        example: a tensor, a tuple of arguments or a mapping of keyword arguments.

    Raises:
        ValueError: the model fails on the example, or a name of ``how`` is none of a layer or of an activation.

    >>> from lightning_norm import create
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), create("sn", 8), nn.ReLU())
    >>> find_activations(model, {"1": (model[1], nn.BatchNorm2d(8))}, True)
    ({'1': '2'}, [])
    """
    if isinstance(how, Mapping):
        return _named(model, layers, how), []
    names = {module: each[0] for module, each in names_by_module(model).items()}
    # An activation inside of a layer, such as timm's bn1.act, is computed by that layer already.
    inner = {child for layer in normalizers_of(model) for child in layer.modules()}
    inner |= {child for _, module in layers.values() for child in module.modules()}
    activations = [m for m in model.modules() if type(m) in FUSED and m not in inner]
    # Before the swap the original modules are in the model, after it the normalizers: either can be watched.
    here = {m: n for n, pair in layers.items() for m in pair if m in names and isinstance(pair[0], MomentNorm)}
    norms = {m: n for m, n in here.items() if not any(type(b) in FUSED for b in modules_behind(layers[n][0]))}
    reasons: dict[nn.Module, str] = dict.fromkeys(activations, "no nn.Sequential shows what it follows: pass example")
    # A module that stands in an nn.Sequential twice follows two layers, of which the run of an example knows more.
    places = places_by_module(model)
    reasons |= {
        m: f"it has {len(places[m])} places in the model: pass example" for m in activations if len(places[m]) > 1
    }
    pairs = _by_sequence(model, norms, names)
    if example is not None:
        run = _Run(model, norms, activations)
        run.on(example)
        # What the example does not reach, such as a second encoder, is judged by its nn.Sequential.
        pairs = {n: a for n, a in pairs.items() if not run.reaches(n) and not run.reaches(a)}
        for activation in activations:
            norm, reason = run.norm_before(activation)
            if norm is not None:
                pairs[norm] = activation
            elif activation not in pairs.values():
                reasons[activation] = reason
    for norm, activation in list(pairs.items()):
        if has_hooks(norm) or has_hooks(activation):
            reasons[activation] = "a hook is on it or on the layer before it"
            del pairs[norm]
    taken = set(pairs.values())
    left = [(names[m], type(m).__name__, reasons[m]) for m in activations if m not in taken and reasons[m]]
    return {norms[norm]: names[activation] for norm, activation in pairs.items()}, left


def take_activation(model: nn.Module, layer: Normalizer, name: str, place: str) -> tuple[ModuleSlot, TakenActivation]:
    """Hand the activation named ``place`` to a layer, and return where it was and what stands there now.

    Args:
        model: that holds both.
        layer: that is to compute it.
        name: of the layer.
        place: of the activation.
    """
    activation = modules_by_name(model)[place]
    slot = ModuleSlot(activation, [place], places_by_module(model)[activation])
    taken = TakenActivation(activation, place, name)
    compute_activation(layer, activation, taken)
    slot.fill(taken)
    if layer.origin is not None:
        layer.origin = {**layer.origin, "activation": place}
    return slot, taken


def return_activations(model: nn.Module) -> None:
    """Put every activation that a layer of the model has taken over back into its place."""
    places = places_by_module(model)
    for layer in normalizers_of(model):
        if (taken := layer._taken_from) is not None:
            activation = give_activation(layer)
            assert activation is not None
            layer.origin = {k: v for k, v in (layer.origin or {}).items() if k != "activation"} or None
            for parent, attribute in places.get(taken, []):
                parent.add_module(attribute, activation)


def _named(model: nn.Module, layers: Layers, how: Mapping[str, str]) -> dict[str, str]:
    modules = modules_by_name(model)
    for name, place in how.items():
        if name not in layers:
            # A layer that was swapped earlier, and has it already.
            if isinstance(there := modules.get(name), Normalizer) and there._taken_from is not None:
                continue
            raise ValueError(f"fuse_activation names the layer {name!r}, which is none of this swap's. Take it out.")
        if type(modules.get(place)) not in FUSED:
            kinds = " or ".join(kind.__name__ for kind in FUSED)
            there = modules.get(place)
            raise ValueError(
                f"fuse_activation: {place!r} is {'nothing' if there is None else type(there).__name__} in this model, "
                f"and not a {kinds} for {name!r} to compute. Take the two out."
            )
    return {name: place for name, place in how.items() if name in layers}


def _by_sequence(
    model: nn.Module, norms: Mapping[nn.Module, str], names: Mapping[nn.Module, str]
) -> dict[nn.Module, nn.Module]:
    """Return norm -> the activation right behind it in an ``nn.Sequential``, where both have this one place."""
    places = places_by_module(model)
    pairs = {}
    for parent in model.modules():
        if not isinstance(parent, nn.Sequential) or type(parent).forward is not nn.Sequential.forward:
            continue
        # An Identity in between, as libraries leave one behind for a dropout of 0, changes nothing.
        children = [child for child in parent._modules.values() if type(child) is not nn.Identity]
        for norm, behind in itertools.pairwise(children):
            # With a second place in the model, either of them may be called from elsewhere as well.
            if norm in norms and type(behind) in FUSED and len(places[norm]) == len(places[behind]) == 1:
                pairs[norm] = behind
    return pairs


class _Run:
    """One run of the model: which tensors each activation was called with, and who else has used them.

    Args:
        model: the model.
        norms: the modules that a layer of the swap is or becomes, and their names.
        activations: the candidates.
    """

    def __init__(self, model: nn.Module, norms: Mapping[nn.Module, str], activations: list[nn.Module]) -> None:
        self.model, self.norms, self.activations = model, norms, activations
        self.calls: dict[nn.Module, list[nn.Module | None]] = {m: [] for m in activations}
        self.runs: dict[nn.Module, int] = dict.fromkeys(norms, 0)
        self.used_elsewhere: set[nn.Module] = set()
        self._outputs: dict[int, tuple[nn.Module, Tensor]] = {}
        self._inside: list[nn.Module] = []

    def on(self, example: Any) -> None:
        """Run the model on an example, in training and in evaluation: dropout between the two shows in one alone.

        Raises:
            ValueError: the model fails on it.
        """
        arguments = () if isinstance(example, Mapping) else example if isinstance(example, tuple) else (example,)
        keywords = dict(example) if isinstance(example, Mapping) else {}
        for training in (True, False):
            with everything_restored(self.model), random_numbers_restored(), torch.no_grad(), _uncompiled():
                self.model.train(training)
                for norm in self.norms:
                    if isinstance(norm, Normalizer):
                        # Other ranks do not run this example, and inside of a compiled layer no operator can be
                        # watched.
                        norm.sync = norm.compiled = False
                try:
                    with self._watched():
                        results = self.model(*arguments, **keywords)
                except Exception as error:
                    mode = "training" if training else "evaluation"
                    raise ValueError(
                        f"fuse_activation: {type(self.model).__name__} fails on the example in {mode}: "
                        f"{type(error).__name__}: {error}. Pass an example that it can be trained on, or none."
                    ) from error
                # What the model returns is used by whoever called it.
                for tensor in tree_leaves(results):
                    self._use(tensor)
            self._outputs.clear()

    def reaches(self, module: nn.Module) -> bool:
        """Tell whether a norm or an activation was called."""
        return bool(self.runs.get(module) or self.calls.get(module))

    def norm_before(self, activation: nn.Module) -> tuple[nn.Module | None, str]:
        """Return the norm that an activation serves alone; or why there is none, "" where it follows none."""
        calls = self.calls[activation]
        norm = next((n for n in calls if n is not None), None)
        if not calls:
            return None, "the example does not reach it"
        if norm is None:
            return None, ""
        if any(n is not norm for n in calls):
            return None, "it is called behind a swapped layer and elsewhere"
        # Each output of the layer must have come here, and to nothing else.
        if norm in self.used_elsewhere or self.runs[norm] != len(calls):
            return None, "the output of the layer before it is used elsewhere as well"
        return norm, ""

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        handles = [norm.register_forward_hook(self._after_norm) for norm in self.norms]
        for activation in self.activations:
            handles.append(activation.register_forward_pre_hook(self._before))
            handles.append(activation.register_forward_hook(self._after))
        try:
            # Hooks see calls of modules alone, and a sum between two modules is none: the dispatch mode sees every
            # operator.
            with _Uses(self):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _after_norm(self, module: nn.Module, _: Any, y: Any) -> None:
        self.runs[module] += 1
        if isinstance(y, Tensor):
            # With the tensor itself, whose id another one could have soon otherwise.
            self._outputs[id(y)] = (module, y)

    def _before(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        norm, _ = self._outputs.get(id(arguments[0]), (None, None)) if arguments else (None, None)
        self.calls[module].append(norm)
        self._inside.append(module)

    def _after(self, module: nn.Module, arguments: tuple[Any, ...], y: Any) -> None:
        self._inside.pop()
        # In place the same tensor has the activation in it from here on, for whoever uses it.
        if y is arguments[0]:
            self._outputs.pop(id(y), None)

    def _use(self, value: Any) -> None:
        # Operators inside of the activation are its own use of the output.
        if isinstance(value, Tensor) and id(value) in self._outputs and not self._inside:
            self.used_elsewhere.add(self._outputs[id(value)][0])


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own has no types
    """Tell a run of every tensor that an operator takes."""

    def __init__(self, run: _Run) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            self.run._use(value)
        return func(*args, **(kwargs or {}))


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    # Without torch._dynamo nothing can have been compiled, and importing it takes seconds.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    eager_only: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager_only

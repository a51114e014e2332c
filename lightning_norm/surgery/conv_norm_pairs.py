"""Which convolution or linear layer feeds a normalizer, and nothing else: read from the graph that torch.fx traces."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.fx
from torch import nn


class _NormTracer(torch.fx.Tracer):
    """Trace through a model's own modules; normalizers and torch's own layers stay one node each."""

    def __init__(self, norms: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.norms = norms

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.norms) or super().is_leaf_module(m, module_qualified_name)


def layers_before(model: nn.Module, norms: tuple[type[nn.Module], ...]) -> dict[nn.Module, nn.Module | str]:
    """Return, for every module of the classes ``norms``, the module whose output it alone takes, or why there is none.

    Only then may the normalizer's map be multiplied into that module's weight: nobody else sees the output that
    changes.

    Args:
        model: the network; parts whose code torch.fx cannot trace are looked into one by one.
        norms: the classes of the normalizers.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> layers_before(model, (nn.BatchNorm2d,))[model[1]] is model[0]
    True
    >>> layers_before(nn.Sequential(nn.BatchNorm2d(8)), (nn.BatchNorm2d,)).popitem()[1]
    'its input does not come from a layer'
    """
    result: dict[nn.Module, nn.Module | str] = {}
    _trace(model, norms, result)
    for module in model.modules():
        if isinstance(module, norms):
            result.setdefault(module, "torch.fx cannot trace the code that calls it")
    return result


def _trace(part: nn.Module, norms: tuple[type[nn.Module], ...], result: dict[nn.Module, nn.Module | str]) -> None:
    """Enter what a part's graph says into ``result``; where it cannot be traced, what its children's graphs say."""
    if not any(isinstance(m, norms) for m in part.modules()) or isinstance(part, norms):
        return
    try:
        graph = _NormTracer(norms).trace(part)
    except Exception:
        # A user's forward may do anything that torch.fx does not understand; its parts may still be traceable.
        for child in part.children():
            _trace(child, norms, result)
        return
    # A module of two names is one layer with one weight: calls are counted by module and not by name.
    modules = dict(part.named_modules(remove_duplicate=False))
    calls = Counter(modules[str(node.target)] for node in graph.nodes if node.op == "call_module")
    attributes = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if norm is not None and isinstance(norm, norms):
            result[norm] = _layer_before(node, norm, modules, calls, attributes)


def _layer_before(
    node: torch.fx.Node,
    norm: nn.Module,
    modules: dict[str, nn.Module],
    calls: Counter[nn.Module],
    attributes: set[str],
) -> nn.Module | str:
    """Return the module whose output alone goes into a call of a normalizer, or why there is none."""
    # Folding is exact only if nothing but the normalizer sees the layer's output and nothing but the layer its weight.
    # The input may come as a keyword, too; then nothing is folded, and nothing is wrong.
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, torch.fx.Node) or source.op != "call_module":
        return "its input does not come from a layer"
    before = modules[str(source.target)]
    if calls[norm] > 1 or calls[before] > 1:
        return "it or the layer before it is called more than once"
    if len(source.users) > 1:
        return "the output before it is used elsewhere as well"
    if any(name.rpartition(".")[0] == str(source.target) for name in attributes):
        return "the weight before it is read elsewhere as well"
    return before

"""Which layer feeds a normalizer, and nothing else: read from the graph that torch.fx traces."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.fx
from torch import nn


class _Leaves(torch.fx.Tracer):
    """Trace through a model's own modules; those of ``leaves`` and torch's stay whole."""

    def __init__(self, leaves: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)


def find_pairs(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[nn.Module, nn.Module | str]:
    """Return, for every module of ``kinds``, the module whose output it alone takes, or why there is none."""
    found: dict[nn.Module, nn.Module | str] = {}
    _search(model, kinds, found)
    for module in model.modules():
        if isinstance(module, kinds):
            found.setdefault(module, "torch.fx cannot trace the code that calls it")
    return found


def _search(part: nn.Module, kinds: tuple[type[nn.Module], ...], found: dict[nn.Module, nn.Module | str]) -> None:
    if not any(isinstance(m, kinds) for m in part.modules()) or isinstance(part, kinds):
        return
    try:
        graph = _Leaves(kinds).trace(part)
    except Exception:  # a user's forward may do anything: its parts may still be traceable
        for child in part.children():
            _search(child, kinds, found)
        return
    modules = dict(part.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if norm is not None and isinstance(norm, kinds):
            found[norm] = _before(node, norm, modules, calls, read)


def _before(
    node: torch.fx.Node, norm: nn.Module, modules: dict[str, nn.Module], calls: Counter[int], read: set[str]
) -> nn.Module | str:
    given: Any = node.args[0] if node.args else None
    if not isinstance(given, torch.fx.Node) or given.op != "call_module":
        return "its input does not come from a layer"
    before = modules[str(given.target)]
    if calls[id(norm)] > 1 or calls[id(before)] > 1:
        return "it or the layer before it is called more than once"
    if len(given.users) > 1:
        return "the output before it is used elsewhere as well"
    if any(name.rpartition(".")[0] == str(given.target) for name in read):
        return "the weight before it is read elsewhere as well"
    return before

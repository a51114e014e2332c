"""Lists the layers of a model: every normalizer once, under the name that the user's code gives it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.names import clean_name as clean_name

MODULE_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
"""Classes that keep the module they wrap in an attribute ``module``, a name that users give as well."""


def name_cleaner(model: nn.Module) -> Callable[[str], str]:
    """Return a function that takes wrappers out of the dotted names of this model's modules, parameters and buffers.

    It does what :func:`clean_name` does, and leaves out ``module`` where the model has a DistributedDataParallel, a
    DataParallel or an AveragedModel.

    >>> model = nn.Sequential(nn.DataParallel(nn.BatchNorm2d(8)))
    >>> name_cleaner(model)("0.module.weight"), clean_name("0.module.weight")
    ('0.weight', '0.module.weight')
    """
    # The class of the parent tells a wrapper's attribute from one that the user has called "module".
    wrapped = {
        f"{name}.module".removeprefix(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, MODULE_WRAPPERS)
    }
    if not wrapped:
        return clean_name

    def clean(name: str) -> str:
        parts = name.split(".")
        return clean_name(".".join(p for i, p in enumerate(parts) if ".".join(parts[: i + 1]) not in wrapped))

    return clean


def names_by_module(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every module with its names, in the model's order; a shared module has several.

    >>> layer = nn.ReLU()
    >>> names_by_module(nn.Sequential(layer, layer))[layer]
    ['0', '1']
    """
    clean = name_cleaner(model)
    names: dict[nn.Module, list[str]] = {}
    # Under each of its names, in the order of the model.
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(clean(name))
    return names


def places_by_module(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Return for every module but the model the (parent, attribute) pairs that hold it.

    >>> layer = nn.ReLU()
    >>> [attribute for _, attribute in places_by_module(nn.Sequential(layer, layer))[layer]]
    ['0', '1']
    """
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        # The public named_children() leaves out the second attribute that holds the same child.
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, attribute))
    return places


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module under each of its names; of a wrapper and what it wraps, the latter.

    >>> list(modules_by_name(nn.Sequential(nn.ReLU())))
    ['', '0']
    """
    return {name: module for module, names in names_by_module(model).items() for name in names}


def named_normalizers(model: nn.Module, *, raw_names: bool = False) -> Iterator[tuple[str, Normalizer]]:
    """Yield the normalizers of this package that a model has, each once, with its first name.

    Args:
        model: any module.
        raw_names: names as in ``model.named_modules()``, for what is to be compared with ``named_parameters()`` or
            given to ``get_submodule``.

    >>> from lightning_norm.normalizers import create
    >>> [name for name, layer in named_normalizers(nn.Sequential(nn.ReLU(), create("sn", 8)))]
    ['1']
    """
    clean = str if raw_names else name_cleaner(model)
    for name, module in model.named_modules():
        if isinstance(module, Normalizer):
            yield clean(name), module


def normalizers_of(model: nn.Module) -> list[Normalizer]:
    """Return the normalizers of this package that a model has, each once.

    >>> from lightning_norm.normalizers import create
    >>> len(normalizers_of(nn.Sequential(nn.ReLU(), create("sn", 8))))
    1
    """
    return [module for module in model.modules() if isinstance(module, Normalizer)]


def rename_for_wrappers(model: nn.Module, state_dict: Mapping[str, Any]) -> Any:
    """Return a ``state_dict`` with the model's keys, where they differ by the parts that wrappers add and no more.

    >>> import torch
    >>> model = torch.compile(nn.Linear(2, 2))
    >>> list(rename_for_wrappers(model, nn.Linear(2, 2).state_dict()))
    ['_orig_mod.weight', '_orig_mod.bias']
    """
    clean = name_cleaner(model)
    keys = {clean(key): key for key in model.state_dict()}
    renamed = {key: keys.get(clean(key), key) for key in state_dict}
    # The very same object comes back where nothing is to be renamed: it may hold gigabytes, and metadata.
    if all(old == new for old, new in renamed.items()):
        return state_dict
    result = type(state_dict)()
    for old, new in renamed.items():
        result[new] = state_dict[old]  # type: ignore[index]  # a dict or an OrderedDict
    return result


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in whatever a model returned: in mappings, sequences and dataclasses, one in the other.

    >>> [t.item() for t in tensors_in({"a": torch.tensor(1), "b": [torch.tensor(2), "text"]})]
    [1, 2]
    """
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (t for v in output.values() for t in tensors_in(v))
    elif isinstance(output, (list, tuple)):
        yield from (t for v in output for t in tensors_in(v))
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        yield from (t for field in dataclasses.fields(output) for t in tensors_in(getattr(output, field.name)))

"""One module becomes one normalizer: the same Parameters and buffers, moved and not copied."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_norm.normalizers.base import Normalizer
from lightning_norm.normalizers.registry import NormSpec, resolve

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def convert(
    module: nn.Module, name: str, norm: NormSpec, norm_args: Mapping[str, Any]
) -> tuple[Normalizer, dict[str, Any]]:
    """Build the normalizer that replaces ``module``, which is left as it is.

    Args:
        module: a torch normalization layer, or one of ours.
        name: its dotted name, for messages.
        norm: what it becomes.
        norm_args: arguments that win over those taken from ``module`` and from ``norm``.

    Returns:
        The layer, and the arguments that the user chose (not those taken over).

    Raises:
        TypeError: an argument that the normalizer does not take, or a layer that cannot be converted.
        ValueError: an argument out of range, with the layer's name.
    """
    cls, init_args = resolve(norm)
    chosen = {**init_args, **norm_args}
    known = arguments_of(cls)
    for argument in chosen:
        if argument not in known:
            near = difflib.get_close_matches(argument, known, n=1)
            guess = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"{cls.__name__} takes no argument {argument!r}.{guess} It takes: {', '.join(sorted(known))}."
            )
    inherited = {k: v for k, v in _arguments_from(module, name).items() if k in known}
    if not cls.uses_batch:  # their running statistics, if any, mean something else
        inherited = {k: v for k, v in inherited.items() if k not in ("momentum", "track_running_stats")}
    try:
        layer = cls(**{**inherited, **chosen})
        layer.adopt(module)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    _carry_over(module, layer)
    return layer, chosen


def arguments_of(cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of a class's ``__init__``, following ``**options`` to its bases."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if init is None:
            continue
        parameters = inspect.signature(init).parameters
        for name, parameter in parameters.items():
            if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(name, parameter)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return found


def unchanged_eval(module: nn.Module, layer: Normalizer) -> tuple[bool, str]:
    """Tell whether the layer evaluates to what the module did, and why."""
    came = type(module).__name__
    if getattr(module, "eps", layer.eps) != layer.eps:
        return False, f"eps {getattr(module, 'eps', None)} -> {layer.eps}"
    same = {
        "gn": isinstance(module, nn.GroupNorm) and module.num_groups == getattr(layer, "groups", None),
        "ln": isinstance(module, nn.GroupNorm) and module.num_groups == 1,
        "in": came.startswith("InstanceNorm") and not getattr(module, "track_running_stats", False),
    }
    if same.get(layer.key) or type(module) is type(layer):
        return True, f"computes what {came} did"
    if came.startswith("Instance") or not hasattr(module, "running_mean"):
        return False, f"{came} and {type(layer).__name__} use different statistics"
    if layer.keeps_eval():
        return True, f"starts as the {came} it was"
    return False, "uses each sample's own statistics" if layer.per_sample else "does not start as BatchNorm"


def _arguments_from(module: nn.Module, name: str) -> dict[str, Any]:
    features = getattr(module, "num_features", getattr(module, "num_channels", None))
    arguments: dict[str, Any] = {}
    if isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) != 1:
            raise TypeError(
                f"{name}: LayerNorm over {tuple(module.normalized_shape)} has no channel axis; only LayerNorm over "
                "one axis can "
                "be swapped. Exclude it."
            )
        features = module.normalized_shape[0]
        arguments["channel_dim"] = 1 if type(module).__name__ == "LayerNorm2d" else -1  # torchvision's permutes NCHW
    if not isinstance(features, int):
        raise TypeError(f"{name}: {type(module).__name__} does not say how many channels it has (num_features).")
    for argument in ("eps", "momentum", "track_running_stats", "channel_dim"):
        if hasattr(module, argument):
            arguments[argument] = getattr(module, argument)
    held = next((t for t in (*module.parameters(False), *module.buffers(False)) if t.is_floating_point()), None)
    arguments |= {"num_features": features, "affine": getattr(module, "weight", None) is not None}
    if held is not None:
        arguments |= {"device": held.device, "dtype": held.dtype}
    return arguments


def _carry_over(module: nn.Module, layer: Normalizer) -> None:
    layer.training = module.training
    for hooks in HOOKS:
        setattr(layer, hooks, getattr(module, hooks))
    held = list(module.parameters(False))
    if held and not any(p.requires_grad for p in held):  # a frozen layer stays frozen, its new parameters with it
        layer.requires_grad_(False)


def hand_back(layer: nn.Module, module: nn.Module) -> None:
    """Give the original module what its replacement holds now: the inverse of the move."""
    module.training = layer.training
    for held, back in ((layer._parameters, module._parameters), (layer._buffers, module._buffers)):
        for name, value in back.items():
            if value is not None and isinstance(held.get(name), torch.Tensor):
                back[name] = held[name]  # type: ignore[assignment]  # parameters to parameters, buffers to buffers

"""Parameter groups: which parameters weight decay is to leave alone, and which have a learning rate of their own."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_norm.layers.base import Normalizer
from lightning_norm.surgery.recognize import is_norm
from lightning_norm.surgery.walk import named_normalizers


def no_weight_decay(model: nn.Module) -> set[str]:
    """Return the dotted names of the normalizers' parameters that weight decay is to leave alone.

    timm's optimizers ask the model for them. A model with other such parameters adds their names::

        def no_weight_decay(self):
            return {"pos_embed"} | lightning_norm.no_weight_decay(self)

    >>> from lightning_norm import create
    >>> sorted(no_weight_decay(nn.Sequential(nn.Linear(3, 4), create("sn", 4))))
    ['1.bias', '1.mean_weight', '1.var_weight', '1.weight']
    """
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in named_normalizers(model, raw_names=True)
        for name in layer.no_weight_decay()
    }


def switch_parameters(model: nn.Module) -> set[str]:
    """Return the dotted names of what the normalizers learn beyond weight and bias.

    >>> from lightning_norm import create
    >>> sorted(switch_parameters(nn.Sequential(create("sn", 4))))
    ['0.mean_weight', '0.var_weight']
    """
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in named_normalizers(model, raw_names=True)
        for name, _ in layer.named_parameters()
        if name in layer.extra_parameters
    }


def norm_param_groups(
    model: nn.Module,
    weight_decay: float = 1e-4,
    *,
    norm_weight_decay: float = 0.0,
    bias_weight_decay: float = 0.0,
    switch_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Return all parameters of a model in groups for a torch optimizer, each parameter once.

    The groups are named "decay", "no_decay" (biases, other parameters of one dimension, and what the model's own
    ``no_weight_decay()`` names), "norm" (parameters of layers for which :func:`lightning_norm.is_norm` is true) and,
    with ``switch_lr``, "switch". An empty group is left out.

    Args:
        model: any module, swapped or not: what a later swap adds joins the group of its layer.
        weight_decay: of the group "decay".
        norm_weight_decay: of "norm" and "switch".
        bias_weight_decay: of "no_decay".
        switch_lr: learning rate of what the layers learn beyond weight and bias, such as the control parameters of
            switchable normalization; by default that of the others.

    Raises:
        ValueError: a number is negative or not a number.

    >>> import lightning_norm
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), lightning_norm.SwitchableNorm(8))
    >>> [(g["name"], len(g["params"]), g["weight_decay"]) for g in norm_param_groups(model, 0.05, switch_lr=0.01)]
    [('decay', 1, 0.05), ('no_decay', 1, 0.0), ('norm', 2, 0.0), ('switch', 2, 0.0)]
    """
    # An infinite or negative value would only show in the loss, many steps later.
    numbers = {
        "weight_decay": weight_decay,
        "norm_weight_decay": norm_weight_decay,
        "bias_weight_decay": bias_weight_decay,
        "switch_lr": 0.0 if switch_lr is None else switch_lr,
    }
    for name, value in numbers.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"norm_param_groups: {name} must be a number >= 0, got {value!r}.")
    kinds = _kinds(model, switch=switch_lr is not None)
    options: dict[str, dict[str, Any]] = {
        "decay": {"weight_decay": weight_decay},
        "no_decay": {"weight_decay": bias_weight_decay},
        "norm": {"weight_decay": norm_weight_decay},
        "switch": {"weight_decay": norm_weight_decay, "lr": switch_lr},
    }
    groups = [{"params": [p for p, k in kinds if k == kind], "name": kind, **options[kind]} for kind in options]
    return [group for group in groups if group["params"]]


def _kinds(model: nn.Module, switch: bool) -> list[tuple[nn.Parameter, str]]:
    """Return each parameter once, with the name of its group."""
    of_normalizers, switches = no_weight_decay(model), switch_parameters(model) if switch else set()
    # timm's convention: a model's method of that name returns the parameters that it wants without weight decay.
    method = getattr(model, "no_weight_decay", None)
    without_decay = set(method()) if callable(method) else set()
    # By identity: torch's layers have no list of names as ours have.
    of_other_norms = {
        id(p)
        for m in model.modules()
        if is_norm(m) and not isinstance(m, Normalizer)
        for p in m.parameters(recurse=False)
    }
    # The first that applies wins: what a normalizer learns beyond weight and bias is never left in "norm" by its name.
    kinds = []
    for name, parameter in model.named_parameters():
        if name in switches:
            kind = "switch"
        elif name in of_normalizers or id(parameter) in of_other_norms:
            kind = "norm"
        elif name in without_decay or name.rpartition(".")[2] == "bias" or _is_vector(parameter):
            kind = "no_decay"
        else:
            kind = "decay"
        kinds.append((parameter, kind))
    return kinds


def _is_vector(parameter: nn.Parameter) -> bool:
    return not is_lazy(parameter) and parameter.ndim <= 1

"""One module becomes one normalizer: the same Parameters and buffers, moved and not copied."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lightning_norm.layers.arguments import arguments_of, as_int, checked_arguments
from lightning_norm.layers.base import MomentNorm, Normalizer, has_affine
from lightning_norm.layers.behind import add_children, keep_in_evaluation, requested_mode, stays_in_evaluation
from lightning_norm.normalizers.batch_norm import BatchNorm
from lightning_norm.normalizers.group_norm import GroupNorm
from lightning_norm.surgery.options import ResolvedNorm
from lightning_norm.surgery.torch_layers import FAMILIES, LAZY_BATCH_NORMS
from lightning_norm.surgery.torch_private import TorchBatchNormBase, move_hooks
from lightning_norm.surgery.whole import Whole, measured_difference, num_channels_of, read


def convert(
    module: nn.Module, name: str, norm: ResolvedNorm, whole: Whole | None = None
) -> tuple[Normalizer, dict[str, Any]]:
    """Build the normalizer that replaces ``module``, which is left as it is.

    Weight, bias and running statistics are the very objects of ``module``, so that an optimizer goes on training them;
    what the normalizer holds in another form is computed from them. eps, momentum, ``channel_dim``, device and dtype
    are taken over, hooks and children as well. Random starting values depend on the module and the user's seed alone.

    Args:
        module: a torch normalization layer, or one of this package.
        name: its dotted name, for messages.
        norm: the class that it becomes, and arguments that win over those taken from ``module``.
        whole: what the module is beside its class; by default it is read.

    Returns:
        The layer, and the arguments that the user chose (not those taken over).

    Raises:
        TypeError: an argument that the normalizer does not take, or a layer that cannot be converted.
        ValueError: an argument out of range or text that is no number, with the layer's name.
    """
    if isinstance(module, LAZY_BATCH_NORMS):
        raise TypeError(
            f"{name!r} is a {type(module).__name__} that has not seen an input and has no channels yet. Run one "
            "forward pass through the model first, swap after it, or exclude it."
        )
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise TypeError(
            f"{name!r} is a {type(module).__name__} that has not seen an input. Run one forward pass through the model "
            "first, swap after it, or exclude it."
        )
    if computed := computed_weights(module):
        raise TypeError(f"{name!r} is a {type(module).__name__} {computed}, then swap.")
    cls, arguments = norm
    # What the user typed is checked by itself and told with the class that refuses it. What the module has and the
    # normalizer does not take is left out without a word: a swap takes over what it can.
    chosen = checked_arguments(cls, arguments, f"{name}: ")
    known = arguments_of(cls)
    if whole is None:
        measured = read(module)
        whole = Whole(None) if isinstance(measured, str) else measured
    inherited = {k: v for k, v in _arguments_from(module, name, cls, whole).items() if k in known}
    if "channels_per_group" in chosen:  # which decides, whatever the number of groups was
        inherited.pop("num_groups", None)
    _check_device(cls, name, chosen.pop("device", None), inherited.get("device"))
    try:
        layer = _built(cls, {**inherited, **chosen}, module)
        asked = [name for name, argument in (("weight", "affine"), ("bias", "bias")) if chosen.get(argument)]
        # Before take_from, which takes away what the module does not have.
        made = {parameter: getattr(layer, parameter) for parameter in asked}
        layer.take_from(module)
        for parameter, value in made.items():  # asked for, and the module has none
            if getattr(layer, parameter) is None:
                setattr(layer, parameter, value)
        _translate_variance(module, layer)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    _carry_over(module, layer, whole, name)
    return layer, layer._settled_arguments(chosen)


def _check_device(cls: type[Normalizer], name: str, chosen: Any, present: Any) -> None:
    """Refuse another device than that of the module, whose tensors are moved and not copied."""
    if chosen is None or present is None:
        return
    device = torch.device(chosen)
    if device.type != present.type or device.index not in (None, present.index):
        raise ValueError(
            f"{name}: {cls.__name__}: device={str(device)!r}, but the layer that it replaces is on {str(present)!r}. "
            "Leave device out; model.to(...) moves a swapped model as any other."
        )


def can_be_swapped(module: nn.Module) -> bool:
    """Tell whether a swap can read from a module what it needs, such as the number of its channels.

    >>> can_be_swapped(nn.BatchNorm2d(4)), can_be_swapped(nn.LazyBatchNorm2d()), can_be_swapped(nn.LayerNorm((4, 4)))
    (True, False, False)
    """
    if isinstance(module, LazyModuleMixin) or computed_weights(module):
        return False
    try:
        _arguments_from(module, "", BatchNorm, Whole(None))
    except TypeError:
        return False
    return True


def computed_weights(module: nn.Module) -> str:
    """Return what to do about a layer whose weight is computed from other parameters, "" for a plain one.

    Pruning, weight_norm, spectral_norm and parametrizations compute it before each forward: a swap would move the
    result and lose what it is made of.

    >>> computed_weights(nn.BatchNorm2d(4))
    ''
    >>> bn = torch.nn.utils.prune.l1_unstructured(nn.BatchNorm2d(4), "weight", amount=1)
    >>> computed_weights(bn).partition(":")[0]
    'whose weight is pruned'
    """
    names = ("weight", "bias")
    if hasattr(module, "parametrizations"):
        computed: Any = module.parametrizations
        name = next(iter(computed))
        return (
            f"whose {name} is parametrized: a swap or its undo would lose that. Type torch.nn.utils.parametrize."
            f"remove_parametrizations(layer, {name!r}) first"
        )
    for name in names:
        if name in module._parameters or name in module._buffers or getattr(module, name, None) is None:
            continue
        if f"{name}_orig" in module._parameters and f"{name}_mask" in module._buffers:
            return (
                f"whose {name} is pruned: a swap or its undo would lose the mask. Make it permanent: type "
                f"torch.nn.utils.prune.remove(layer, {name!r}) first"
            )
        if f"{name}_g" in module._parameters:
            return f"under weight_norm. Type torch.nn.utils.remove_weight_norm(layer, {name!r}) first"
        if f"{name}_orig" in module._parameters:
            return f"under spectral_norm. Type torch.nn.utils.remove_spectral_norm(layer, {name!r}) first"
        return f"whose {name} is no parameter but computed from others. Make it one: layer.{name} = nn.Parameter(...)"
    return ""


def _built(cls: type[Normalizer], arguments: dict[str, Any], module: nn.Module) -> Normalizer:
    """Build the layer; random starting values depend on the module alone, so that copies of it start alike."""
    # Only the generators that may be drawn from are kept: those of every GPU would be slow to copy.
    tensors = [t for t in (*module.parameters(False), *module.buffers(False)) if t is not None]
    devices = list({t.device for t in tensors if t.is_cuda})
    with torch.random.fork_rng(devices=devices):
        state = torch.get_rng_state()
        layer = cls(**arguments)
        # Most normalizers draw nothing, and need not be built twice.
        drew = not torch.equal(state, torch.get_rng_state()) or bool(devices)
        if drew and any(p.numel() for p in layer.parameters()):
            torch.manual_seed(_seed_of(module))
            layer = cls(**arguments)
    return layer


def _seed_of(module: nn.Module) -> int:
    """Return a seed from the user's seed and the values of a module's tensors, the same for a copy of it."""
    # Copies of a network, and the ranks of a run, must start alike; two layers with other values need not.
    digest = hashlib.sha256(f"{torch.initial_seed()} {type(module).__name__}".encode())
    for name, t in sorted((*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))):
        digest.update(f"{name} {tuple(t.shape)}".encode())
        # The values too, or all layers of one shape would start with the same random numbers.
        if not t.is_meta:
            digest.update(t.detach().double().cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:7], "little")


def specific_arguments(layer: nn.Module) -> dict[str, Any]:
    """Return the arguments that only the layer's class has, and the scheduled ones.

    >>> from lightning_norm import GroupNorm
    >>> specific_arguments(GroupNorm(8, num_groups=4))["num_groups"]
    4
    """
    cls = type(layer)
    # A dictionary for its order: a set would change what a report prints from run to run.
    names = dict.fromkeys((*getattr(cls, "repr_arguments", ()), *getattr(cls, "ranges", ()), "num_groups"))
    return {n: getattr(layer, n) for n in names if n in arguments_of(cls) and hasattr(layer, n)}


def preserved(module: nn.Module, layer: Normalizer, name: str, norm: ResolvedNorm, whole: Whole) -> tuple[bool, str]:
    """Tell whether the layer evaluates to what the module did, and why: measured, unless it is of torch's own class.

    Args:
        module: before the swap.
        layer: what replaces it.
        name: of the module, for messages.
        norm: the class and the arguments of the layer.
        whole: what the module is beside its class.
    """
    same, reason = preserves_eval(module, layer)
    if whole.exact:
        return same, reason
    # A class of the user's may compute anything, so that nothing is concluded from its attributes.
    distance = measured_difference(module, whole, lambda twin: convert(twin, name, norm, whole)[0])
    if isinstance(distance, str):
        return False, f"not measured: {distance}" if same else reason
    if not distance:
        return True, f"measured: computes what {type(module).__name__} did"
    return False, f"measured: outputs differ by {distance:.2g}" if same else reason


def preserves_eval(module: nn.Module, layer: Normalizer) -> tuple[bool, str]:
    """Tell whether the layer evaluates to what the module did, and why.

    By what is known of both classes and by their tensors; nothing is computed.

    >>> from lightning_norm import BatchNorm, SwitchableNorm
    >>> preserves_eval(nn.BatchNorm2d(4), SwitchableNorm(4))
    (False, "uses each sample's own statistics")
    """
    # eps is part of what every layer computes, so that a change of it is told before anything else is compared.
    came = type(module).__name__
    if getattr(module, "eps", layer.eps) != layer.eps:
        return False, f"eps {getattr(module, 'eps', None)} -> {layer.eps}"
    # Layers that normalize by each sample's statistics evaluate as the torch layer of the same kind does. All others
    # are compared with BatchNorm, which is what `preserves_eval` speaks of.
    same = {
        "gn": isinstance(module, nn.GroupNorm) and module.num_groups == getattr(layer, "num_groups", None),
        "ln": isinstance(module, nn.GroupNorm) and module.num_groups == 1,
        "in": came.startswith("InstanceNorm") and not getattr(module, "track_running_stats", False),
    }
    alike = same.get(layer.key) or type(module) is type(layer)
    if not alike:
        not_batch_norm = isinstance(module, Normalizer) and module.key != "bn"
        if not_batch_norm or came.startswith("Instance") or not hasattr(module, "running_mean"):
            return False, f"{came} and {type(layer).__name__} use different statistics"
        if not layer.preserves_eval:
            return (
                False,
                "uses each sample's own statistics" if layer.eval_uses_input_stats else "does not start as BatchNorm",
            )
    changed = _what_changed(module, layer)
    return not changed, changed or (f"computes what {came} did" if alike else f"starts as the {came} it was")


def _what_changed(module: nn.Module, layer: Normalizer) -> str:
    """Return the first thing in which two layers differ that decides what they compute; "" for none."""
    stats: tuple[str, ...] = getattr(module, "running_names", ("running_mean", "running_var"))
    tensors = ["weight", "bias", *stats]
    before, after = _what_counts(module, stats), _what_counts(layer, layer.running_names)
    if type(module) is type(layer):
        tensors += layer.extra_parameters
        before |= specific_arguments(module)
        after |= specific_arguments(layer)
    # The momentum moves the statistics in training only.
    for name, old in before.items():
        if name != "momentum" and old != after[name]:
            return f"{name} {old} -> {after[name]}"
    # A tensor that was neither moved nor translated has the value of a fresh layer.
    old_tensors = {name: getattr(module, name, None) for name in tensors}
    new = [
        name
        for name, t in old_tensors.items()
        if t is not None and getattr(layer, name, None) is not t and name not in layer.translated_tensors
    ]
    return f"{', '.join(new)} start{'s' if len(new) == 1 else ''} anew" if new else ""


def _what_counts(layer: nn.Module, stats: tuple[str, ...]) -> dict[str, Any]:
    """Return what two layers of one family must have in common to compute the same."""
    return {
        "affine": has_affine(layer, "weight") or has_affine(layer, "bias"),
        "track_running_stats": any(getattr(layer, name, None) is not None for name in stats),
        "channel_dim": getattr(layer, "channel_dim", 1),
        **{name: has_affine(layer, name) for name in ("weight", "bias")},
    }


def _arguments_from(module: nn.Module, name: str, cls: type[Normalizer], whole: Whole) -> dict[str, Any]:
    """Return the arguments by which a normalizer starts as the module that it replaces.

    Raises:
        TypeError: the module does not say how many channels it has, or has no channel axis.
    """
    features = num_channels_of(module)
    arguments: dict[str, Any] = {}
    # torch's LayerNorm normalizes the last axes. With one of them that axis is the channels, as in transformers.
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        raise TypeError(
            f"{name}: LayerNorm over {tuple(module.normalized_shape)} has no channel axis; only LayerNorm over one "
            "axis can be swapped. Exclude it."
        )
    if whole.channel_dim == -1 or isinstance(module, nn.LayerNorm):
        arguments["channel_dim"] = whole.channel_dim
    features = as_int(features)
    if not features:
        raise TypeError(f"{name}: {type(module).__name__} does not say how many channels it has (num_features).")
    names = ("eps", "momentum", "track_running_stats", "channel_dim")
    arguments |= {name: getattr(module, name) for name in names if hasattr(module, name)}
    if arguments.get("eps", 0) is None:  # RMSNorm's word for the smallest number of the input's dtype
        del arguments["eps"]
    if (whole.frozen or isinstance(module, TorchBatchNormBase)) and module.running_mean is not None:
        arguments["track_running_stats"] = True  # it evaluates on them; Lightning's finetuning clears the flag alone
    # The replacement is built where the module's first tensor lies, and in its precision.
    tensor = next((t for t in (*module.parameters(False), *module.buffers(False)) if t.is_floating_point()), None)
    affine, bias = (has_affine(module, parameter) for parameter in ("weight", "bias"))
    arguments |= {"num_features": features, "affine": affine or bias, "bias": bias}
    if axes := _axes_in_name(module, whole):
        arguments["spatial_dims"] = axes
    if tensor is not None:
        arguments |= {"device": tensor.device, "dtype": tensor.dtype}
    # Only torch's GroupNorm says in how many groups it normalizes; every other normalizer here chooses for itself.
    if isinstance(module, nn.GroupNorm) and issubclass(cls, GroupNorm):
        arguments["num_groups"] = module.num_groups
    if type(module) is cls:
        arguments |= specific_arguments(module)
        tracks = cls.train_uses_batch_stats or bool(module.track_running_stats)
    else:  # running statistics that are not those of batches mean something else
        instance = isinstance(module, FAMILIES["InstanceNorm"])
        tracks = cls.train_uses_batch_stats and not instance and getattr(module, "train_uses_batch_stats", True)
    if not tracks:
        arguments = {k: v for k, v in arguments.items() if k not in ("momentum", "track_running_stats")}
    return arguments


def _axes_in_name(module: nn.Module, whole: Whole) -> int | None:
    """Return the spatial axes of the input: a class's name alone tells, for 1d and 2d have the same attributes."""
    for kind in (type(module), whole.kind):
        if axes := re.search(r"([123])d$", getattr(kind, "__name__", "")):
            return int(axes[1])
    return None


def _translate_variance(module: nn.Module, layer: Normalizer) -> None:
    """Give the layer the variance of one that holds it in another form."""
    if layer._buffers.get("running_var") is None or not isinstance(module, Normalizer):
        return
    both = "running_var" in layer.translated_tensors  # which take_from has served
    if "running_var" in module.translated_tensors and module.track_running_stats and not both:
        layer._buffers["running_var"] = module.running().var.squeeze(0)


def _carry_over(module: nn.Module, layer: Normalizer, whole: Whole, name: str) -> None:
    """Give the layer the training flag, the hooks, the frozen state and the children of the module."""
    # A swap between eval() and train() must not change what the next forward pass does.
    layer.training = requested_mode(module)
    move_hooks(module, layer)
    parameters = list(module.parameters(False))
    # A frozen layer stays frozen, the parameters that are new in it included.
    if whole.frozen or (parameters and not any(p.requires_grad for p in parameters)):
        layer.requires_grad_(False)
    if whole.frozen or (stays_in_evaluation(module) and layer.has_running_stats):
        keep_in_evaluation(layer, True)
    if whole.behind and not isinstance(layer, MomentNorm):
        raise TypeError(
            f"{name}: {type(module).__name__} calls {', '.join(whole.behind)} behind the normalization, which "
            f"{type(layer).__name__} does not: only subclasses of MomentNorm do. Exclude the layer."
        )
    if whole.kind is not None:
        try:
            add_children(layer, dict(module._modules), whole.behind)
        except TypeError as error:
            raise TypeError(f"{name}: {error}. Exclude it.") from error
    if isinstance(module, Normalizer) and module._taken_from is not None:
        vars(layer)["_taken_from"] = module._taken_from  # by vars, for it is no child


def device_and_dtype(layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Return where a layer lies and in which precision, as far as its weights or running statistics tell."""
    weights: list[torch.Tensor] = [t for _, t in layer.named_parameters(recurse=False)]
    buffers = [(n, t) for n, t in layer.named_buffers(recurse=False)]
    weights = weights or [t for n, t in buffers if n.startswith("running")]
    tensors = [*weights, *(t for _, t in buffers)]
    return tensors[0].device if tensors else None, weights[0].dtype if weights else None


@contextlib.contextmanager
def unchanged_on_error(modules: Sequence[nn.Module]) -> Iterator[None]:
    """If the block raises, put back attributes, tensors and values of these modules as they were before it.

    Args:
        modules: of which the block may change anything; their values are copied beforehand.

    >>> bn = nn.BatchNorm2d(2)
    >>> try:
    ...     with unchanged_on_error([bn]):
    ...         _ = bn.weight.data.zero_()
    ...         raise KeyError
    ... except KeyError:
    ...     print(bn.weight.data)
    tensor([1., 1.])
    """
    before = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in modules]
    tensors = {t for _, _, parameters, buffers in before for t in (*parameters.values(), *buffers.values())}
    values = [(t, t.data, t.detach().clone()) for t in tensors if t is not None and not is_lazy(t)]
    try:
        yield
    except BaseException:
        for module, attributes, parameters, buffers in before:
            vars(module).clear()
            vars(module).update({**attributes, "_parameters": parameters, "_buffers": buffers})
        for tensor, storage, value in values:
            # A tensor may have been given another storage, as by `to`, or have been written to.
            storage.copy_(value)
            tensor.data = storage
        raise


SETTINGS = ("eps", "momentum", "track_running_stats")
"""Numbers and flags that torch's layers have too, and that code sets at run time."""


def settings_of(layer: nn.Module) -> dict[str, Any]:
    """Return a layer's ``SETTINGS`` by their names.

    Of weight, bias and the running statistics it is whether there are any: code sets them to ``None`` as well.
    """
    settings = {name: getattr(layer, name) for name in SETTINGS if hasattr(layer, name)}
    there = {name: getattr(layer, name, None) is not None for name in ("weight", "bias")}
    return {**settings, **there, "running statistics": getattr(layer, "has_running_stats", True)}


def restore_original(
    layer: Normalizer,
    module: nn.Module,
    made_with: tuple[torch.device | None, torch.dtype | None],
    settings: Mapping[str, Any],
) -> None:
    """Give the original module the weights and statistics of its replacement: the inverse of the conversion.

    Args:
        layer: the replacement.
        module: the original.
        made_with: ``device_and_dtype(layer)`` at the swap. Tensors that only the original has were out of reach of a
            ``model.to(...)`` since, and follow it here.
        settings: ``settings_of(layer)`` at the swap. What was set since is set on the original as well; what the swap
            itself chose is not.
    """
    # A momentum that both can schedule is each layer's own, as other scheduled values are.
    scheduled = module.ranges if isinstance(module, Normalizer) else ()
    now = settings_of(layer)
    for name in SETTINGS:
        if name in settings and now[name] != settings[name] and hasattr(module, name) and name not in scheduled:
            setattr(module, name, now[name])
    # The user may have called eval() or train() since, on a model that does not hold the original.
    module.training = requested_mode(layer)
    if isinstance(module, Normalizer):
        keep_in_evaluation(module, stays_in_evaluation(module), requested_mode(layer))
    layer.return_to(module)
    statistics = getattr(module, "running_names", ("running_mean", "running_var"))
    for name, tensors in {"weight": ("weight",), "bias": ("bias",), "running statistics": statistics}.items():
        for tensor in tensors if settings.get(name) and not now[name] else ():
            setattr(module, tensor, None)
    for child in layer._modules.keys() & module._modules.keys():  # the user may have put another one there
        module._modules[child] = layer._modules[child]
    device, dtype = device_and_dtype(layer)
    if (device, dtype) == made_with:
        return
    cast = dtype if dtype != made_with[1] else None
    parameters = module._parameters
    # Parameters that both have were moved and cast with the layer: `to` is to see the others alone.
    module._parameters = {n: p for n, p in parameters.items() if p is not None and layer._parameters.get(n) is not p}
    try:
        module.to(device=device, dtype=cast)
    finally:
        module._parameters = {**parameters, **module._parameters}

"""Tell the layers of a model which context each sample belongs to, when the model's forward has no place for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.layers.names import clean_name
from lightning_norm.ops import kmeans, torch_private

REMEDY = {
    "input": "Add NormContext() to the Trainer's callbacks, or call fit_contexts(model, images) once and use "
    "`with contexts(model, images=images):`.",
    "ids": "Add NormContext(context_fn=...) or NormContext(key=...) to the Trainer's callbacks, or use "
    "`with contexts(model, ids):`.",
}


class ContextState:
    """What one layer was told about the samples of the batch, and its dotted name for messages.

    ``responsibilities`` (N, K) say how much each sample belongs to each context; ``None`` where that is not known.
    Neither a Module nor a buffer: nothing of it is saved. Copies of a layer, such as an average of the weights, share
    the state of the original, so that they hear what it hears.

    Args:
        name: dotted name of the layer.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.responsibilities: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextState:
        return self

    def __reduce__(self) -> tuple[type[ContextState], tuple[str]]:
        return ContextState, (self.name,)


def context_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that take contexts by their dotted names, and tell each its name, for messages."""
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        state = getattr(module, "contexts", None)
        if isinstance(state, ContextState):
            state.name = clean_name(name)
            layers[state.name] = module
    return layers


@contextmanager
def contexts(
    model: nn.Module, ids: Tensor | None = None, *, images: Tensor | None = None, views: int = 1
) -> Iterator[None]:
    """Run ``model`` with the context of each sample known to its ContextNorm layers, outside of a Trainer.

    Args:
        model: a model with ContextNorm layers.
        ids: for layers with ``context="ids"``: contexts (N,), integers in [0, num_contexts), or the probability of
            each context (N, num_contexts), as for mixed images.
        images: for layers with ``context="input"``: the batch itself, (N, C, *); each image has the context of the
            nearest centroid. Before :func:`fit_contexts` or a training run there are none: contexts are missing then.
        views: how many times the batch that the model sees holds these samples, one after the other.

    Raises:
        ValueError, TypeError: contexts out of range or of the wrong kind, or no layer that takes them.

    >>> from lightning_norm import ContextNorm
    >>> layer = ContextNorm(8, context="ids")
    >>> with contexts(layer, torch.tensor([0, 2, 1, 0])):
    ...     y = layer(torch.randn(4, 8, 5, 5))
    """
    if (ids is None) == (images is None):
        raise ValueError("contexts(model, ids) or contexts(model, images=images): one of the two.")
    layers = context_layers(model)
    wanted = "input" if ids is None else "ids"
    if not any(layer.context == wanted for layer in layers.values()):
        present = ", ".join(sorted({f"context={layer.context!r}" for layer in layers.values()})) or "no ContextNorm"
        raise ValueError(
            f"no layer takes {'images' if ids is None else 'ids'}: the model has {present}. "
            f"Swap with norm_args={{'context': {wanted!r}}}."
        )
    # Restored at the end, so that ``with`` blocks may be nested, or stand inside of a Trainer's step.
    before = [(layer.contexts, layer.contexts.responsibilities) for layer in layers.values()]
    try:
        assign(layers, ids, images, views)
        yield
    finally:
        for state, responsibilities in before:
            state.responsibilities = responsibilities


def assign(layers: Mapping[str, Any], ids: Tensor | None = None, images: Tensor | None = None, views: int = 1) -> None:
    """Tell ``layers`` the contexts of a batch, until they are told others; layers of which nothing is known: ``None``.

    Args:
        layers: from :func:`context_layers`.
        ids: for those with ``context="ids"``: as for :func:`contexts`.
        images: for those with ``context="input"``: as for :func:`contexts`.
        views: how many times the batch that the model sees holds these samples, one after the other.

    Raises:
        ValueError, TypeError: contexts or ``views`` out of range or of the wrong kind.
    """
    if not isinstance(views, int) or views < 1:
        raise ValueError(f"views must be a positive int, got {views!r}.")
    descriptors = None if images is None else kmeans.describe(images)
    # Layers of one kind share one tensor: a network has dozens of layers, and the batch has one set of contexts.
    shared: dict[tuple[str, int, torch.device], Tensor | None] = {}
    for name, layer in layers.items():
        if layer.context == "gate":
            continue
        device = layer.prior_or_uniform().device
        kind = (layer.context, layer.num_contexts, device)
        if kind not in shared:
            known = ids
            if layer.context == "input":
                known = None if descriptors is None or not layer.is_fitted() else layer.nearest(descriptors.to(device))
            if known is not None:
                known = as_responsibilities(known, layer.num_contexts, name).to(device).repeat(views, 1)
            shared[kind] = known
        layer.contexts.responsibilities = shared[kind]


def check_contexts_of(layer: Any, n: int) -> None:
    """Check what a layer was told against the n samples that it is to normalize.

    Raises:
        RuntimeError: it was told nothing, or it runs again in a backward pass.
        ValueError: it was told of another number of samples.
    """
    responsibilities = layer.contexts.responsibilities
    told = None if responsibilities is None else torch_private.static_shape(responsibilities)[0]
    name = f"ContextNorm {layer.contexts.name!r}" if layer.contexts.name else "ContextNorm"
    who = f"{name} (context={layer.context!r})"
    if not torch.compiler.is_compiling() and torch_private.in_backward_pass():
        raise RuntimeError(
            f"{who} was run again in a backward pass, as activation checkpointing does: the contexts may have changed "
            "since, and the gradient would be wrong. Leave this layer out of the checkpointed part, or swap with "
            "norm_args={'context': 'gate'}."
        )
    if responsibilities is None and (layer.training or layer.missing == "error"):
        raise RuntimeError(f"{who} was run without contexts. {REMEDY[layer.context]}")
    if told is not None and told != n:
        raise ValueError(
            f"{who} expected contexts for {n} samples, got {told}: contexts of another batch, "
            "or several views of one (then pass views=m)."
        )


def as_responsibilities(ids: Tensor, k: int, name: str) -> Tensor:
    """Return the responsibilities of the contexts for each sample, (N, k), rows with the sum 1.

    Args:
        ids: contexts (N,), integers in [0, k), or responsibilities (N, k) themselves.
        k: the number of contexts.
        name: of the layer, for messages.

    Raises:
        TypeError: neither integers nor floating-point numbers.
        ValueError: a wrong shape, a context out of range, or rows that are no probabilities.
    """
    who = f"contexts for ContextNorm {name!r} with num_contexts={k}"
    if not isinstance(ids, Tensor) or ids.dtype == torch.bool or ids.is_complex():
        raise TypeError(
            f"{who} must be a tensor of integers (N,) or probabilities (N, {k}), got "
            f"{ids.dtype if isinstance(ids, Tensor) else type(ids).__name__}."
        )
    if not ids.dtype.is_floating_point:
        if ids.dim() != 1:
            remedy = "ids.float()" if ids.dim() == 2 and ids.shape[1] == k > 1 else "ids.flatten()"
            raise ValueError(f"{who}: integers must have the shape (N,), got {tuple(ids.shape)}. Type {remedy}.")
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
        if low < 0 or high >= k:
            raise ValueError(f"{who} must lie in [0, {k - 1}], got {low} to {high}.")
        return (ids.unsqueeze(1) == torch.arange(k, device=ids.device)).to(torch.get_default_dtype())
    if ids.dim() != 2 or ids.shape[1] != k:
        raise ValueError(f"{who} must be probabilities (N, {k}) or integers (N,), got {ids.dtype} {tuple(ids.shape)}.")
    # Probabilities may come from a network in half precision: the sums are taken in float32.
    with torch.no_grad():
        wide = ids.float()
        tolerance = max(4 * torch.finfo(ids.dtype).eps * k, 1e-4)  # each entry is rounded to the dtype of ids
        valid = not ids.numel() or bool((wide >= 0).all() & ((wide.sum(1) - 1).abs() <= tolerance).all())
    if not valid:
        raise ValueError(f"{who}: probabilities must be at least 0, and each row must sum to 1.")
    return ids.contiguous()


def fit_contexts(model: nn.Module, images: Tensor, seed: int = 0) -> None:
    """Fit the centroids of every layer with ``context="input"`` that has none; NormContext does it in a Trainer.

    Args:
        model: a model with ContextNorm layers.
        images: of the training set, (N, C, *), as the model gets them.
        seed: of the k-means start.

    Raises:
        ValueError: fewer distinct images than contexts.
    """
    set_centroids(context_layers(model), kmeans.describe(images), seed)


def set_centroids(layers: Mapping[str, Any], descriptors: Tensor, seed: int = 0) -> None:
    """Give centroids to the layers with ``context="input"`` that have none, the same to all with as many contexts.

    Args:
        layers: from :func:`context_layers`.
        descriptors: of training images, from :func:`lightning_norm.ops.kmeans.describe`.
        seed: of the k-means start.

    Raises:
        ValueError: fewer distinct images than contexts.
    """
    clusters: dict[int, tuple[Tensor, Tensor]] = {}  # number of contexts -> centroids and scale
    unfitted = []
    for layer in layers.values():
        if layer.context == "input" and layer.is_fitted():
            clusters.setdefault(layer.num_contexts, (layer.centroids, layer.descriptor_scale))
        elif layer.context == "input":
            unfitted.append(layer)
    for layer in unfitted:
        k = layer.num_contexts
        if k not in clusters:
            clusters[k] = kmeans.fit_centroids(descriptors, k, seed)
        with torch.no_grad():
            layer.centroids.copy_(clusters[k][0])
            layer.descriptor_scale.copy_(clusters[k][1])

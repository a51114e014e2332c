"""Tell the layers of a model which context each sample belongs to, when the model's forward has no place for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_norm.errors import counted
from lightning_norm.layers.arguments import check_count
from lightning_norm.layers.names import clean_name
from lightning_norm.layers.told import Told, block, tell
from lightning_norm.ops import kmeans, torch_private

REMEDY = {
    "input": "Add NormContext() to the Trainer's callbacks, or call fit_contexts(model, images) once and use "
    "`with contexts(model, images=images):`.",
    "ids": "Add NormContext(context_fn=...) or NormContext(key=...) to the Trainer's callbacks, or use "
    "`with contexts(model, ids):`.",
}


class ContextState(Told):
    """What one layer was told about the contexts of the samples."""

    @property
    def responsibilities(self) -> Tensor | None:
        """How much each sample belongs to each context, (N, K); ``None`` where that is not known."""
        return self.value

    @responsibilities.setter
    def responsibilities(self, value: Tensor | None) -> None:
        self.value = value


def context_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that take contexts by their dotted names, and tell each its name, for messages."""
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        state = getattr(module, "contexts", None)
        if isinstance(state, ContextState):
            # Told here, because a layer does not know where in a model it stands.
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
    with block():
        assign(layers, ids, images, views)
        yield


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
    views = check_count("views", views)
    # Once per batch, and not once per layer.
    descriptors = None if images is None else kmeans.describe(images)
    # Layers of one kind share one tensor: a network has dozens of layers, and the batch has one set of contexts.
    shared: dict[tuple[str, int, torch.device], Tensor | None] = {}
    news: dict[Any, Tensor | None] = {}
    for name, layer in layers.items():
        if layer.context == "gate":
            continue
        # A model may be spread over devices, and each layer reads its contexts where it is.
        device = layer.prior_or_uniform().device
        kind = (layer.context, layer.num_contexts, device)
        if kind not in shared:
            known = ids
            if layer.context == "input":
                known = None if descriptors is None or not layer.is_fitted() else layer.nearest(descriptors.to(device))
            if known is not None:
                known = as_responsibilities(known, layer.num_contexts, name).to(device).repeat(views, 1)
            shared[kind] = known
        news[layer.contexts] = shared[kind]
    tell(news)


def check_contexts_of(layer: Any, n: int) -> None:
    """Check what a layer was told against the n samples that it is to normalize.

    Raises:
        RuntimeError: it was told nothing in training.
        ValueError: it was told of another number of samples.
    """
    responsibilities = layer.contexts.responsibilities
    told = None if responsibilities is None else torch_private.static_shape(responsibilities)[0]
    if responsibilities is None and (layer.training or layer.missing == "error"):
        raise RuntimeError(f"{_who(layer)} was run without contexts. {REMEDY[layer.context]}")
    if told is not None and told != n:
        raise ValueError(
            f"{_who(layer)} expected contexts for {counted(n, 'sample')}, got {told}: contexts of another "
            "batch, or several views of one (then pass views=m)."
        )


@contextmanager
def contexts_of_forward(layer: Any, n: int) -> Iterator[None]:
    """While it is open, the layer knows again what it was told in its forward pass: it runs once more in backward.

    Autograd does that in a thread of its own on a GPU, and the ids of the task may be others by then.

    Raises:
        RuntimeError: what it was told is not known any longer.
    """
    known = layer.contexts.of_forward(n)
    if known is None:
        raise RuntimeError(
            f"{_who(layer)} was run again in a backward pass, as activation checkpointing does, and which contexts its "
            "forward pass had is not known: use_reentrant=True keeps nothing of it, or the graphs of several batches "
            "are alive. Type checkpoint(..., use_reentrant=False) and detach what you keep of a batch, leave this "
            "layer out of the checkpointed part, or swap with norm_args={'context': 'gate'}."
        )
    with block():
        layer.contexts.responsibilities = known
        yield


def _who(layer: Any) -> str:
    name = f"ContextNorm {layer.contexts.name!r}" if layer.contexts.name else "ContextNorm"
    return f"{name} (context={layer.context!r})"


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
        came = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        remedy = "ids.long()" if came == torch.bool else "torch.as_tensor(ids)"
        raise TypeError(
            f"{who} must be a tensor of integers (N,) or probabilities (N, {k}), got {came}."
            + ("" if isinstance(ids, Tensor) and ids.is_complex() else f" Type {remedy}.")
        )
    if not ids.dtype.is_floating_point:
        if ids.dim() != 1:
            remedy = "ids.float()" if ids.dim() == 2 and ids.shape[1] == k > 1 else "ids.flatten()"
            raise ValueError(f"{who}: integers must have the shape (N,), got {tuple(ids.shape)}. Type {remedy}.")
        # An index out of range would match no context, and the sample would count for none.
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
        if low < 0 or high >= k:
            raise ValueError(f"{who} must lie in [0, {k - 1}], got {low} to {high}.")
        return (ids.unsqueeze(1) == torch.arange(k, device=ids.device)).to(torch.get_default_dtype())
    if ids.dim() != 2 or ids.shape[1] != k:
        raise ValueError(f"{who} must be probabilities (N, {k}) or integers (N,), got {ids.dtype} {tuple(ids.shape)}.")
    # Probabilities may come from a network in half precision: the sums are taken in float32.
    with torch.no_grad():
        wide = ids.float()
        # Each entry is rounded to the dtype of ids, so a row of k may be off by k roundings.
        tolerance = max(4 * torch.finfo(ids.dtype).eps * k, 1e-4)
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
            # Layers with as many contexts must number them alike, also where only some were loaded from a file.
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

"""How a normalizer tells the kernels its equations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_norm.ops.recipe import Recipe, Running

if TYPE_CHECKING:
    from lightning_norm.normalizers.base import MomentNorm

EQUATIONS = {
    "algebra",
    "algebra_of",
    "standardize",
    "track",
    "running",
    "observed",
    "statistic_size",
    "_update",
    "_shift",
    "_mix",
}
"""Methods whose change makes a recipe another normalizer's."""


def recipe_of(layer: MomentNorm, statistics: tuple[str, ...], **more: Any) -> Recipe:
    """Return a recipe with the layer's eps, weight, bias and running statistics; ``more`` are further fields."""
    running = None
    if layer.track_running_stats and "bn" in statistics:
        mean, var = (layer._buffers[name] for name in layer.running_names)
        tracked, skipped = layer.num_batches_tracked, layer.skipped_updates
        assert mean is not None
        assert var is not None
        assert tracked is not None
        assert skipped is not None
        running = Running(mean, var, tracked, skipped, layer._buffers["_momentum"], not layer.training)
    return Recipe(statistics, layer.eps, layer.weight, layer.bias, running=running, **more)


def same_equations(cls: type) -> bool:
    """Tell whether no class below the one with the recipe changes what the recipe describes."""
    for base in cls.__mro__:
        if "recipe" in vars(base):
            return True
        if EQUATIONS & vars(base).keys():
            return False
    return False

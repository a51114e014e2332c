"""Group normalization, each sample's statistics over groups of channels; one group is layer normalization."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from lightning_norm.layers.base import MomentNorm, Paper
from lightning_norm.layers.fused_specs import mixture_spec
from lightning_norm.layers.inference import share_parameters
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.moments import Affine, Moments


class GroupNorm(MomentNorm):
    r"""Normalize each group of channels of each sample by its own mean and variance.

    .. math:: y = \gamma \frac{x - \mu_{ng}}{\sqrt{\sigma^2_{ng} + \epsilon}} + \beta, \qquad g = \lfloor cG/C \rfloor

    Equal to ``torch.nn.GroupNorm(groups, num_features)``. Wu and He 2018, arXiv 1803.08494.

    Args:
        num_features: channels, the C of an input (N, C, *).
        groups: G; must divide the channels.
        options: eps, affine, channel_dim, device, dtype: see :class:`MomentNorm`.

    Raises:
        ValueError: ``groups`` does not divide ``num_features``.

    >>> GroupNorm(8, groups=4)(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    key = "gn"
    paper = Paper("Wu and He", 2018, "Group Normalization", "arXiv 1803.08494")
    train_uses_batch_stats: ClassVar[bool] = False
    repr_arguments: ClassVar[tuple[str, ...]] = ("groups",)
    tested_with: ClassVar[dict[str, Any]] = {"groups": 3}

    def __init__(self, num_features: int, *, groups: int = 32, **options: Any) -> None:
        super().__init__(num_features, **stateless(type(self).__name__, options))
        self.groups = check_groups(type(self).__name__, num_features, groups)

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above."""
        group = m.over_channels(self.groups)
        return self.standardize(group.mean, group.var)

    def plain(self, dims: int | None = None) -> nn.Module | None:
        """Return torch's GroupNorm."""
        return _torch_group_norm(self, self.groups)

    def fused_spec(self, layout: Layout) -> MixtureSpec:
        """Return the same equation for the kernels."""
        return mixture_spec(self, ("ln",), num_groups=self.groups)

    def statistic_size(self, n: int, size: int) -> int:
        """Return the elements per sample and group."""
        return size * self.num_features // self.groups


class LayerNorm(MomentNorm):
    r"""Normalize each sample by the mean and variance of all its channels and positions: one group.

    .. math:: y = \gamma \frac{x - \mu_n}{\sqrt{\sigma^2_n + \epsilon}} + \beta

    Equal to ``torch.nn.GroupNorm(1, num_features)``. Ba et al. 2016, arXiv 1607.06450.

    Args:
        num_features: channels, the C of an input (N, C, *).
        options: eps, affine, channel_dim, device, dtype: see :class:`MomentNorm`.

    Differs from ``torch.nn.LayerNorm``: on tokens (N, L, C) the statistics run over L and C; per-token layer norm is
    torch's own.

    >>> LayerNorm(8)(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    key = "ln"
    paper = Paper("Ba et al.", 2016, "Layer Normalization", "arXiv 1607.06450")
    train_uses_batch_stats: ClassVar[bool] = False

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, **stateless(type(self).__name__, options))

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above."""
        layer = m.over_channels()
        return self.standardize(layer.mean, layer.var)

    def plain(self, dims: int | None = None) -> nn.Module | None:
        """Return torch's GroupNorm of one group."""
        return _torch_group_norm(self, 1)

    def fused_spec(self, layout: Layout) -> MixtureSpec:
        """Return the same equation for the kernels."""
        return mixture_spec(self, ("ln",))

    def statistic_size(self, n: int, size: int) -> int:
        """Return the elements per sample."""
        return size * self.num_features


def check_groups(who: str, num_features: int, groups: int) -> int:
    """Return ``groups``.

    Raises:
        ValueError: it does not divide the channels.
    """
    if not isinstance(groups, int) or groups < 1 or num_features % groups:
        fit = [d for d in range(1, num_features + 1) if num_features % d == 0]
        near = sorted(sorted(fit, key=lambda d: abs(d - groups) if isinstance(groups, int) else d)[:4])
        raise ValueError(
            f"{who}(groups={groups!r}) cannot split {num_features} channels: groups must divide the channels. "
            f"Divisors of {num_features} nearby: {near}."
        )
    return groups


def _torch_group_norm(layer: MomentNorm, groups: int) -> nn.Module | None:
    if layer.channel_dim != 1:
        return None
    return share_parameters(layer, nn.GroupNorm(groups, layer.num_features, eps=layer.eps, affine=layer.affine))


def stateless(who: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a class without running statistics.

    Raises:
        TypeError: they ask for some.
    """
    for name in ("track_running_stats", "momentum"):
        if name in options:
            raise TypeError(f"{who} keeps no running statistics: leave out {name}={options[name]!r}.")
    return {**options, "track_running_stats": False}

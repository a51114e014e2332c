"""Group normalization, each sample's statistics over groups of channels; one group is layer normalization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_norm.layers import on_cpu
from lightning_norm.layers.arguments import arguments_of, number_of_groups, settled_groups, stateless
from lightning_norm.layers.base import MomentNorm, Paper
from lightning_norm.layers.fused_specs import mixture_spec
from lightning_norm.layers.inference import share_parameters
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.layout import Layout
from lightning_norm.ops.moments import Affine, Moments


class GroupNorm(MomentNorm):
    r"""Normalize each group of channels of each sample by its own mean and variance.

    .. math:: y = \gamma \frac{x - \mu_{ng}}{\sqrt{\sigma^2_{ng} + \epsilon}} + \beta, \qquad g = \lfloor cG/C \rfloor

    Equal to ``torch.nn.GroupNorm(num_groups, num_features)``. Wu and He 2018, arXiv 1803.08494.

    Args:
        num_features: channels, the C of an input (N, C, *).
        num_groups: G, which must divide the channels; "auto" is the largest number up to the paper's 32 that does and
            leaves two channels or more in a group.
        channels_per_group: C / G in place of it.
        options: eps, affine, bias, channel_dim, device, dtype: see :class:`MomentNorm`.

    Raises:
        ValueError: ``num_groups`` or ``channels_per_group`` does not divide ``num_features``, or both are given.

    >>> GroupNorm(8, num_groups=4)(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    key = "gn"
    paper = Paper("Wu and He", 2018, "Group Normalization", "arXiv 1803.08494")
    train_uses_batch_stats: ClassVar[bool] = False
    _aten_on_cpu: ClassVar[bool] = True
    repr_arguments: ClassVar[tuple[str, ...]] = ("num_groups",)
    evaluation_arguments: ClassVar[tuple[str, ...]] = ("num_groups",)
    test_arguments: ClassVar[dict[str, Any]] = {"num_groups": 3}

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int | Literal["auto"] = "auto",
        channels_per_group: int | None = None,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        super().__init__(num_features, **stateless(name, options))
        # After the base class has checked the channels that the groups must divide.
        self.num_groups = number_of_groups(name, self.num_features, num_groups, channels_per_group)

    def _settled_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments with the number of groups."""
        return settled_groups(type(self), arguments, self.num_groups)

    @classmethod
    def _earlier_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments, with the 32 groups that no number has meant before "auto"."""
        return {**({"num_groups": 32} if "num_groups" in arguments_of(cls) else {}), **arguments}

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above."""
        # Nothing is tracked: each sample has its own statistics in evaluation as well.
        group = m.over_channels(self.num_groups)
        return self.standardize(group.mean, group.var)

    def _on_cpu(self, x: Tensor, layout: Layout) -> Tensor | None:
        """Return y of torch's group normalization, which is the same function."""
        return on_cpu.group_norm(self, x, layout, self.num_groups, self.weight, self.bias)

    def plain(self, dims: int | None = None) -> nn.Module | None:
        """Return torch's GroupNorm."""
        return _torch_group_norm(self, self.num_groups)

    def fused_spec(self, layout: Layout) -> MixtureSpec:
        """Return the same equation for the kernels."""
        return mixture_spec(self, ("ln",), num_groups=self.num_groups)

    def statistic_size(self, n: int, size: int) -> int:
        """Return the elements per sample and group."""
        return size * self.num_features // self.num_groups


class LayerNorm(MomentNorm):
    r"""Normalize each sample by the mean and variance of all its channels and positions: one group.

    .. math:: y = \gamma \frac{x - \mu_n}{\sqrt{\sigma^2_n + \epsilon}} + \beta

    Equal to ``torch.nn.GroupNorm(1, num_features)``. Ba et al. 2016, arXiv 1607.06450.

    Args:
        num_features: channels, the C of an input (N, C, *).
        eps, affine, bias: as torch's eps, elementwise_affine and bias, and by position likewise.
        options: channel_dim, device, dtype: see :class:`MomentNorm`.

    Raises:
        ValueError: ``num_features`` is no int, such as torch's ``normalized_shape`` of several axes.

    Differs from ``torch.nn.LayerNorm``: on tokens (N, L, C) the statistics run over L and C; per-token layer norm is
    torch's own.

    >>> LayerNorm(8)(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    key = "ln"
    paper = Paper("Ba et al.", 2016, "Layer Normalization", "arXiv 1607.06450")
    train_uses_batch_stats: ClassVar[bool] = False
    _aten_on_cpu: ClassVar[bool] = True

    def __init__(
        self, num_features: int, eps: float = 1e-5, affine: bool = True, bias: bool = True, **options: Any
    ) -> None:
        # torch's LayerNorm takes a shape, so this is the mistake that its users make.
        if isinstance(num_features, (tuple, list, torch.Size)):
            raise ValueError(
                f"LayerNorm: num_features must be a positive int, got {num_features!r}: it normalizes over the "
                f"channels and all positions. Type LayerNorm({num_features[0] if num_features else 8!r}), or use "
                "torch.nn.LayerNorm for the last axes of a shape."
            )
        super().__init__(num_features, eps=eps, affine=affine, bias=bias, **stateless(type(self).__name__, options))

    def _kind_of_evaluation(self) -> dict[str, Any]:
        """Return that of the GroupNorm with one group, which it is."""
        return {"key": "gn", "num_groups": 1}

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above."""
        # One group: over all channels and positions of a sample.
        layer = m.over_channels()
        return self.standardize(layer.mean, layer.var)

    def _on_cpu(self, x: Tensor, layout: Layout) -> Tensor | None:
        """Return y of torch's group normalization, which is the same function."""
        return on_cpu.group_norm(self, x, layout, 1, self.weight, self.bias)

    def plain(self, dims: int | None = None) -> nn.Module | None:
        """Return torch's GroupNorm of one group."""
        return _torch_group_norm(self, 1)

    def fused_spec(self, layout: Layout) -> MixtureSpec:
        """Return the same equation for the kernels."""
        return mixture_spec(self, ("ln",))

    def statistic_size(self, n: int, size: int) -> int:
        """Return the elements per sample."""
        return size * self.num_features


def _torch_group_norm(layer: MomentNorm, groups: int) -> nn.Module | None:
    # torch's GroupNorm knows channels on axis 1 alone.
    if layer.channel_dim != 1:
        return None
    return share_parameters(layer, nn.GroupNorm(groups, layer.num_features, eps=layer.eps, affine=True))

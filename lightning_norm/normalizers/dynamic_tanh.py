"""Dynamic tanh: a squashing function of each element in place of a LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_norm.layers.base import Paper
from lightning_norm.layers.elementwise import ElementwiseNorm
from lightning_norm.layers.fused_specs import elementwise_spec
from lightning_norm.ops.fused.elementwise import ElementwiseSpec
from lightning_norm.ops.layout import Layout


class DynamicTanh(ElementwiseNorm):
    r"""Squash each element, in place of a LayerNorm; no statistic of anything is taken.

    .. math:: y = \gamma \tanh(\alpha x) + \beta

    with a number alpha, ``alpha`` (1,), that starts at ``alpha_init``. Zhu et al., CVPR 2025, arXiv 2503.10622.

    When: transformers and ConvNeXt, in place of LayerNorm. When not: in place of BatchNorm, where its authors report a
    loss; a swap warns.

    Args:
        num_features: channels, the C of an input (N, C, *).
        alpha_init: where alpha starts.
        options: affine, bias, channel_dim, device, dtype: see :class:`MomentNorm`. An eps is taken over and not used.

    Raises:
        TypeError: running statistics are asked for.
        ValueError: alpha_init is no finite number.

    >>> DynamicTanh(8, channel_dim=-1)(torch.randn(4, 5, 8)).shape
    torch.Size([4, 5, 8])
    """

    key = "dyt"
    paper = Paper("Zhu et al.", 2025, "Transformers without Normalization", "arXiv 2503.10622")

    def fused_spec(self, layout: Layout) -> ElementwiseSpec:
        """Return the function as the kernels know it."""
        return elementwise_spec(self, "tanh")

    @staticmethod
    def function(u: Tensor) -> Tensor:
        """Return tanh."""
        return torch.tanh(u)

    @staticmethod
    def slope(u: Tensor, f: Tensor) -> Tensor:
        """Return 1 - tanh^2."""
        # From the value of the forward pass, which is computed again anyway.
        return 1 - f.square()

"""Dynamic erf: the error function of each element in place of a LayerNorm."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lightning_norm.layers.base import Paper
from lightning_norm.layers.elementwise import ElementwiseNorm
from lightning_norm.layers.fused_specs import elementwise_spec
from lightning_norm.ops.fused.elementwise import ElementwiseSpec
from lightning_norm.ops.layout import Layout


class DynamicErf(ElementwiseNorm):
    r"""Squash each element by the error function, in place of a LayerNorm; no statistic of anything is taken.

    .. math:: y = \gamma\, \mathrm{erf}(\alpha x + s) + \beta

    with numbers alpha and s, ``alpha`` and ``offset``, (1,) each, that start at ``alpha_init`` and 0. Chen et al. 2025,
    arXiv 2512.10938.

    When: transformers, in place of LayerNorm. When not: in place of BatchNorm; a swap warns.

    Args:
        num_features: channels, the C of an input (N, C, *).
        alpha_init: where alpha starts.
        options: affine, bias, channel_dim, device, dtype: see :class:`MomentNorm`. An eps is taken over and not used.

    Raises:
        TypeError: running statistics are asked for.
        ValueError: alpha_init is no finite number.

    >>> DynamicErf(8, channel_dim=-1)(torch.randn(4, 5, 8)).shape
    torch.Size([4, 5, 8])
    """

    key = "derf"
    paper = Paper("Chen et al.", 2025, "Stronger Normalization-Free Transformers", "arXiv 2512.10938")
    extra_parameters: ClassVar[dict[str, str]] = {"alpha": "1", "offset": "1"}
    # The authors shift x inside of the function, which dyt does not.
    shifted: ClassVar[bool] = True

    def fused_spec(self, layout: Layout) -> ElementwiseSpec:
        """Return the function as the kernels know it."""
        return elementwise_spec(self, "erf")

    @staticmethod
    def function(u: Tensor) -> Tensor:
        """Return the error function."""
        return torch.erf(u)

    @staticmethod
    def slope(u: Tensor, f: Tensor) -> Tensor:
        """Return 2 exp(-u^2) / sqrt(pi)."""
        return 2 / math.sqrt(math.pi) * torch.exp(-u.square())

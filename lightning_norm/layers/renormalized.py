"""Batch renormalization: the value that other statistics would give, with the gradient of the batch's own."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_norm.ops import torch_private


@torch_private.without_gradients
def renorm(
    batch: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    r_max: float | Tensor = math.inf,
    d_max: float | Tensor = math.inf,
) -> tuple[Tensor, Tensor]:
    r"""Return the constants r and d for which :math:`r s_B (x - \mu_B) + d = s (x - \mu)`, within their limits.

    .. math:: r = \mathrm{clip}_{[1 / r_{max}, r_{max}]}(s / s_B), \qquad
        d = \mathrm{clip}_{[-d_{max}, d_{max}]}(s (\mu_B - \mu))

    Ioffe 2017, arXiv 1702.03275, with s one over the standard deviation.

    Args:
        batch: mean and scale of the batch, (1, C).
        other: those of the statistics to agree with, such as the running ones.
        r_max: at least 1.
        d_max: at least 0.

    >>> import torch
    >>> one, two = torch.ones(1, 1), torch.full((1, 1), 2.0)
    >>> renorm((two, one), (one, two), r_max=1.5)
    (tensor([[1.5000]]), tensor([[2.]]))
    """
    # With r_max = 1 and d_max = 0, r is 1 and d 0: batch normalization is left.
    (batch_mean, batch_scale), (mean, scale) = batch, other
    r, d = scale / batch_scale, (batch_mean - mean) * scale
    if isinstance(r_max, float) and r_max == d_max == math.inf:
        return r, d
    return r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)  # type: ignore[arg-type]  # both or neither are tensors

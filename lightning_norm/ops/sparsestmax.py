"""Sparsestmax: a softmax substitute on the simplex that a radius drives to a corner."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_norm.ops import torch_private


def without_entry(weights_of: Callable[[Tensor], Tensor], z: Tensor, entry: int) -> Tensor:
    """Return the weights of logits (K,) where one entry has the weight 0, as if it were not there.

    >>> without_entry(lambda z: torch.softmax(z, 0), torch.tensor([5.0, 0.0, 0.0]), 0)
    tensor([0.0000, 0.5000, 0.5000])
    """
    rest = weights_of(torch.cat([z[:entry], z[entry + 1 :]]))
    return torch.cat([rest[:entry], rest.new_zeros(1), rest[entry:]])


def sparsemax(z: Tensor) -> Tensor:
    """Project a vector (K,) on the simplex: non-negative entries with sum 1, the nearest in Euclidean distance."""
    k = torch.arange(1, _length(z) + 1, device=z.device, dtype=z.dtype)
    ordered = torch.sort(z, descending=True).values
    excess = ordered.cumsum(0) - 1
    # As a tensor, for the size of the support would have to be read back from a GPU.
    support = (ordered * k > excess).sum()
    tau = excess.gather(0, (support - 1).unsqueeze(0)) / support
    return (z - tau).clamp_min(0)


def sparsestmax(z: Tensor, radius: Tensor | float | None) -> Tensor:
    r"""Move sparsemax(z) away from the centre of its face, to ``radius`` at least.

    With p the sparsemax and u the uniform point on its support: p itself where ``|p - u| >= radius``, otherwise ``u +
    radius (p - u) / |p - u|``, projected back on the simplex and repeated on the smaller face where that leaves it.
    Shao et al., CVPR 2019, arXiv 1903.03793.

    Args:
        z: logits (K,).
        radius: of the circle around the centre; at sqrt((K - 1) / K) and beyond, the result is a corner.

    Returns:
        (K,), non-negative with sum 1.

    Differs from the paper: equal logits have no direction and stay at u (the published code divides rounding noise by
    its norm and leaves the simplex); K - 1 fixed steps in place of a recursion that reads values back to the host.

    >>> sparsestmax(torch.tensor([0.3, 0.2, 0.1]), 1.0)
    tensor([1., 0., 0.])
    """
    p = sparsemax(z)
    if radius is None:
        return p
    # As float64 first: a number has more digits than the default dtype.
    square = (radius if isinstance(radius, Tensor) else torch.tensor(radius, dtype=torch.float64)).to(z).square()
    support = p > 0
    # The face that the point is on; its centre has equal weights.
    centre = support.to(z.dtype) / support.sum()
    # Each step loses an entry or changes nothing, so that K - 1 are enough whatever the values are.
    for _ in range(_length(z) - 1):
        # The direction in which the point lies from the centre of its face.
        away = p - centre
        norm2 = away.square().sum()
        # Below this the direction is rounding noise, and dividing by it would leave the simplex.
        known = norm2 > (64 * torch.finfo(z.dtype).eps) ** 2
        # 1 in place of 0, for the gradient of a root at 0 is infinite even where the result is not used.
        norm = torch.where(known, norm2, 1.0).sqrt()
        out = known & (norm2 < square)
        moved = centre + square.sqrt() * away / norm
        projected = sparsemax(moved)
        p = torch.where(out, projected, p)
        support = torch.where(out, projected > 0, support)
        smaller = support.to(z.dtype) / support.sum()
        # The circle is cut by the smaller face, around that face's centre, in one of this radius.
        square = (square - (smaller - centre).square().sum()).clamp_min(0)
        centre = smaller
    return p


def _length(z: Tensor) -> int:
    return torch_private.static_shape(z)[0]

"""Contexts from images: a descriptor of each image, k-means on descriptors, and the nearest centroid."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_norm.errors import counted
from lightning_norm.ops.layout import at_least_float32

BANDS = 8
"""Channels in a descriptor. Fewer are padded with zeros; of more, neighbours are averaged."""

ROUNDS = 100
"""Iterations of Lloyd's algorithm at most; it ends by itself when no image changes its cluster."""


@torch.no_grad()
def describe(images: Tensor) -> Tensor:
    """Return a descriptor of each image: mean and standard deviation of its channels, (N, C, *) -> (N, 2 * BANDS).

    Raises:
        ValueError: not a tensor with a channel axis.
    """
    if not isinstance(images, Tensor) or images.dim() < 2 or images.is_complex():
        came = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor (N, C, *), got {came}.")
    # Images of bytes are common, and their mean is no byte.
    images = images.to(at_least_float32(images.dtype))
    pixels = images.flatten(2) if images.dim() > 2 else images.unsqueeze(2)
    var, mean = torch.var_mean(pixels, dim=2, correction=0)
    parts = torch.stack([mean, var.sqrt()], dim=1)  # (N, 2, C)
    c = parts.shape[2]
    if c > BANDS:
        # Spectral images have hundreds of channels, and neighbours among them are alike.
        parts = torch.nn.functional.adaptive_avg_pool1d(parts, BANDS)
    return torch.nn.functional.pad(parts, (0, max(0, BANDS - c))).flatten(1)


@torch.no_grad()
def fit_centroids(descriptors: Tensor, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return k centroids (k, F), the largest cluster first, and the scale (F,) that makes every column count alike.

    The scale is 1 / standard deviation of a column, and 0 for a constant column.

    Args:
        descriptors: (N, F), from :func:`describe`.
        k: the number of clusters.
        seed: of the k-means start.

    Raises:
        ValueError: fewer distinct images than clusters.
    """
    # On the CPU in float64: the clusters must not depend on the device, and the descriptors are few.
    points = descriptors.detach().cpu().double()
    # One broken image would make every distance NaN.
    points = points[points.isfinite().all(1)]
    std = points.std(0, correction=0) if len(points) else points.new_zeros(points.shape[1])
    magnitude = points.abs().amax(0) if len(points) else std
    # A deviation at the rounding of float32 is no signal: the column counts as constant.
    scale = torch.where(std > 1e-6 * magnitude, 1 / std.clamp_min(torch.finfo(std.dtype).tiny), 0)
    # Equal images can form one cluster only, and k-means would go on looking for a second.
    distinct = len(torch.unique(points * scale, dim=0))
    if distinct < k or not scale.any():
        raise ValueError(
            f"cannot find {counted(k, 'context')} among {counted(len(points), 'image')} with "
            f"{counted(distinct, 'distinct descriptor')}."
        )
    centroids, cluster_of = kmeans(points * scale, k, torch.Generator().manual_seed(seed))
    # Largest first, so that another start that finds the same clusters numbers them alike.
    order = torch.bincount(cluster_of, minlength=k).argsort(descending=True, stable=True)
    centroids = torch.where(scale > 0, centroids / scale, points.mean(0))[order]
    # The layers keep them in float32 at least, and a file must give the same assignment as the run.
    return centroids.float(), scale.float()


def kmeans(points: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return centroids (k, F) and the cluster of each point (N,): Lloyd's algorithm from a k-means++ start.

    Args:
        points: (N, F) in float64.
        k: the number of clusters.
        generator: of the start.
    """
    first = torch.randint(len(points), (1,), generator=generator)
    centroids = points[first]
    # k-means++: a point becomes the next centroid with a probability in proportion to its squared distance.
    for _ in range(k - 1):
        squared_distance = torch.cdist(points, centroids).amin(1).square()
        centroids = torch.cat([centroids, points[torch.multinomial(squared_distance, 1, generator=generator)]])
    cluster_of = torch.cdist(points, centroids).argmin(1)
    for _ in range(ROUNDS):
        members = torch.nn.functional.one_hot(cluster_of, k).double()
        size = members.sum(0)
        centroids = (members.t() @ points) / size.clamp_min(1).unsqueeze(1)
        distance = torch.cdist(points, centroids)
        # An empty cluster takes the point farthest from its centroid, for k contexts were asked for.
        for empty in (size == 0).nonzero().flatten():
            farthest = distance.gather(1, cluster_of.unsqueeze(1)).argmax()
            centroids[empty] = points[farthest]
            distance[:, empty] = torch.cdist(points, centroids[empty : empty + 1]).squeeze(1)
        before, cluster_of = cluster_of, distance.argmin(1)
        if torch.equal(before, cluster_of):
            break
    return centroids, cluster_of


@torch.no_grad()
def nearest(descriptors: Tensor, centroids: Tensor, scale: Tensor) -> Tensor:
    """Return the index of the nearest centroid for each descriptor, (N,), distances being taken per ``scale``."""
    difference = (descriptors.to(centroids.dtype).unsqueeze(1) - centroids) * scale
    return difference.square().sum(2).argmin(1)

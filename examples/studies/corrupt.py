"""Corruptions of images after Hendrycks and Dietterich 2019 (CIFAR-10-C), by numpy and Pillow alone.

Kinds and strengths are those of CIFAR-10-C, the pixels are not: its generator also used other libraries. Of figures
published for CIFAR-10-C the trends alone can be compared.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

Corruption = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
"""Images (N, H, W, 3) in [0, 1], strength and random numbers, to images that need not lie in [0, 1]."""


def gaussian_noise(x: np.ndarray, std: float, random: np.random.Generator) -> np.ndarray:
    """Add normal noise."""
    return x + std * random.standard_normal(x.shape)


def shot_noise(x: np.ndarray, photons: float, random: np.random.Generator) -> np.ndarray:
    """Count photons: Poisson noise."""
    return random.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, fraction: float, random: np.random.Generator) -> np.ndarray:
    """Replace a share of the values by salt and pepper, in equal parts."""
    hit, salt = random.random(x.shape) < fraction, random.random(x.shape) < 0.5
    return np.where(hit, salt, x)


def gaussian_blur(x: np.ndarray, sigma: float, random: np.random.Generator) -> np.ndarray:
    """Blur by a Gaussian of sigma pixels."""
    return _each(x, lambda image: image.filter(ImageFilter.GaussianBlur(sigma)))


def contrast(x: np.ndarray, factor: float, random: np.random.Generator) -> np.ndarray:
    """Draw each channel of an image to its mean."""
    mean = x.mean((1, 2), keepdims=True)
    return mean + factor * (x - mean)


def brightness(x: np.ndarray, shift: float, random: np.random.Generator) -> np.ndarray:
    """Move the value V of HSV, which scales the three channels alike."""
    value = x.max(-1, keepdims=True)
    moved = np.clip(value + shift, 0, 1)
    # A black pixel has no hue, and becomes grey.
    return np.where(value > 0, x * moved / np.maximum(value, 1e-12), moved)


def jpeg(x: np.ndarray, quality: float, random: np.random.Generator) -> np.ndarray:
    """Compress."""

    def compress(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "jpeg", quality=int(quality))
        return Image.open(file)

    return _each(x, compress)


def pixelate(x: np.ndarray, factor: float, random: np.random.Generator) -> np.ndarray:
    """Reduce, and enlarge again."""
    small = (int(factor * x.shape[2]), int(factor * x.shape[1]))
    return _each(x, lambda image: image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX))


KINDS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "jpeg": (jpeg, (80, 65, 58, 50, 40)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}
"""Each corruption with its strengths of severity 1 to 5."""


def corrupted(images: Tensor, kind: str, severity: int) -> Tensor:
    """Return corrupted images, the same ones in every call.

    Args:
        images: (N, 3, H, W) in uint8.
        kind: a key of :data:`KINDS`.
        severity: 1 to 5.

    Raises:
        ValueError: an unknown kind or severity.
    """
    if kind not in KINDS or not 1 <= severity <= 5:
        raise ValueError(f"no corruption {kind!r} of severity {severity!r}: {', '.join(KINDS)}, 1 to 5.")
    function, strengths = KINDS[kind]
    x = images.permute(0, 2, 3, 1).numpy() / 255
    # The same noise in every run, and another one for each kind and severity.
    random = np.random.default_rng([list(KINDS).index(kind), severity])
    y = np.rint(255 * np.clip(function(x, strengths[severity - 1], random), 0, 1)).astype(np.uint8)
    return torch.from_numpy(y).permute(0, 3, 1, 2).contiguous()


def _each(x: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Change each image with Pillow."""
    images = np.rint(255 * x).astype(np.uint8)
    with ThreadPoolExecutor(2) as pool:
        return np.stack(list(pool.map(lambda image: np.asarray(change(Image.fromarray(image))), images))) / 255

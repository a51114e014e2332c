"""What kernels are handed as one argument: named tuples of pointers, and in device code of whatever belongs together.

Integers of the host are never in one, for Triton would compile a kernel for each that is 1 or a multiple of 16. In
device code a tuple costs nothing: it is gone once the kernel is compiled. Triton's cache does not see the order of the
fields, so whoever changes that changes a name as well.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterable
from typing import Any

Moments = namedtuple("Moments", "hi lo var")
"""The mean, hi being it in float32 and lo what rounding left, and the biased variance; see ``read_moments``."""

Sums = namedtuple("Sums", "total dot rest")
"""The sums over positions of g and of g * (x - pivot), g being dy before the activation, and for a threshold dy - g."""

Affine = namedtuple("Affine", "pivot scale offset floor")
"""y = scale * (x - pivot) + offset, and the threshold that is added behind a ReLU, where there is one."""

DxAffine = namedtuple("DxAffine", "constant slope")
"""dx = scale * g + constant + slope * (x - pivot)."""

Maps = namedtuple("Maps", "dy x residual dx dresidual")
"""What a backward pass reads and writes of the size of x."""

Layout = namedtuple("Layout", "pieces sample_stride stride piece size fold")
"""Where numbers per (sample, channel) lie in pieces, see ``Grid.moment_layout``; sums use but the first three."""


def affine_in(t: Any) -> Affine:
    """Return the parts of ``t``, (1 to 4, N, C); for those that it lacks the last one stands in."""
    return Affine(*(t[min(i, len(t) - 1)] for i in range(4)))


def sums_in(t: Any) -> Sums:
    """Return the parts of ``t``, (2 or 3, parts * N * C), likewise."""
    return Sums(t[0], t[1], t[-1])


def or_other(tensors: Iterable[Any], other: Any) -> list[Any]:
    """Return ``tensors`` with another in place of ``None``: a kernel wants a pointer, though it reads nothing there."""
    return [other if t is None else t for t in tensors]

"""What kernels are handed as one argument: named tuples of pointers, and in device code of whatever belongs together.

Integers of the host are never in one, for Triton would compile a kernel for each that is 1 or a multiple of 16. In
device code a tuple costs nothing: it is gone once the kernel is compiled. Triton's cache does not see the order of the
fields, so whoever changes that changes a name as well.
"""

from collections import namedtuple

Moments = namedtuple("Moments", "hi lo var")
"""The mean, hi being it in float32 and lo what rounding left, and the biased variance; see ``read_moments``."""

Sums = namedtuple("Sums", "total dot")
"""The sums over positions of g and of g * (x - pivot), g being dy before the activation."""

Affine = namedtuple("Affine", "pivot scale offset")
"""y = scale * (x - pivot) + offset."""

DxAffine = namedtuple("DxAffine", "constant slope")
"""dx = scale * g + constant + slope * (x - pivot)."""

Maps = namedtuple("Maps", "dy x residual dx dresidual")
"""What a backward pass reads and writes of the size of x."""

Layout = namedtuple("Layout", "pieces sample_stride stride piece size fold")
"""Where numbers per (sample, channel) lie in pieces, see ``Grid.moment_layout``; sums use but the first three."""

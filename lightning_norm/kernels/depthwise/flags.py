"""What the kernels of the depthwise convolution are compiled for, and where their tiles lie."""

from collections import namedtuple

Compiled = namedtuple("Compiled", "align last kh kw group rows block")
"""What a kernel is compiled for.

Elements that are loaded at once, whether channels are contiguous, rows and columns of the convolution's kernel, taps
that are taken at once; samples by positions of a tile, or positions by channels.
"""

Shape = namedtuple("Shape", "samples units size height width")
"""In device code: channels are units, or multiples of ``align`` where they are contiguous; size is a map's."""

Lanes = namedtuple("Lanes", "origin lane keep i j c at mask step")
"""In device code: where a tile lies.

Origin, offsets from it and their mask; row and column in the map; channels, the (N, C) index of each statistic and its
mask; elements between two neighbouring positions.
"""

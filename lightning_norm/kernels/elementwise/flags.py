"""What the kernels of functions of each element are compiled for, and where their tiles lie."""

from collections import namedtuple

Compiled = namedtuple("Compiled", "erf last align fold rows block weight bias offset")
"""What a kernel is compiled for.

Whether f is erf and not tanh, whether channels are contiguous, elements that are loaded at once, neighbouring positions
that are taken for channels; lines of a tile and what it takes of each; which parameters there are beside alpha.
"""

Learned = namedtuple("Learned", "weight bias alpha offset")
"""The parameters gamma and beta, (C,), and alpha and s, (1,)."""

Shape = namedtuple("Shape", "samples lines units piece pieces repeat")
"""In device code: x as (samples, lines, units * align), in pieces, see ``kernels.elementwise.launch.Tiles``."""

"""How the kernels that own their channels read x."""

from collections import namedtuple

Tile = namedtuple("Tile", "align flat columns n_read n_write n k c s f")
"""In which tiles a program takes its channels; what a kernel is compiled for.

Elements that are loaded at once map by map, and all maps together; whether channels are contiguous; samples of a tile
that is read, and written; samples, sets of statistics and channels that the equations take at once; positions of a map,
with what is loaded before it; positions of all maps of a program in a sample.
"""

Shape = namedtuple("Shape", "samples channels size units magic")
"""In device code: see ``Owner.numbers`` for the last three."""

"""How the cooperative kernels divide their work."""

from collections import namedtuple

Plan = namedtuple("Plan", "align rows block fold average columns flat wide act residual plain phase")
"""What a cooperative kernel is compiled for beside the equations and their tile.

As in ``passes``: elements of a load, rows and columns of a tile, positions taken for channels, whether the pivot is an
average, and whether channels are contiguous; elements of a flat tile and whether a row is longer; the activation, a
residual, and whether nobody asks for the gradients of x and of the residual. ``phase`` is the only one that runs; -1
for all of them.
"""

Forward = namedtuple("Forward", "x residual y")
"""What the forward kernel reads and writes of the size of x."""

Size = namedtuple("Size", "samples channels length units piece pieces per_group magic")
"""In device code: see ``Grid``; channels of a group, and what divides by the positions of a map."""

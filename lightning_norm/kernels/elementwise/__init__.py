"""Functions of each element alone, in place of a normalization: dyt and derf."""

"""Mixtures of statistics: bn, in, ln, gn, sn, bcn and bnet."""

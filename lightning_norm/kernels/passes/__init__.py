"""The passes over x: moments, sums, apply, combine."""

"""Triton kernels; none yet. Knows pointers, strides and blocks, and no normalizer."""

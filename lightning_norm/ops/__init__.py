"""Tensors in, tensors out: the engine. Knows autograd, layouts and ranks, and no normalizer."""

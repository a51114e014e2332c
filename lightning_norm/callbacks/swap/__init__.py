"""The callback that swaps normalizers."""

from lightning_norm.callbacks.swap.norm_swap import NormSwap as NormSwap

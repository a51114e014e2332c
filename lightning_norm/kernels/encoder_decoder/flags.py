"""Which statistics the encoder-decoders see."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass


@dataclass(frozen=True)
class EncoderDecoderFlags:
    """Which statistics the encoder-decoders see, and whether the running ones move.

    Args:
        batch: one row of statistics for all samples (afn), not one per sample (asr).
        frozen: that row holds the running statistics.
        track: 0 leaves the running statistics as they are, 1 moves them by the momentum, 2 averages all batches.
    """

    batch: bool
    frozen: bool = False
    track: int = 0


Compiled = namedtuple(
    "Compiled",
    "batch frozen track merge drop gated weight bias spans",
    defaults=(False, 0, False, False, False, False, False, 1),
)
"""What a kernel is compiled for: :class:`EncoderDecoderFlags`, and of the call.

Whether what comes from x is in pieces, E_s has a dropout, beta and gamma have gates, and there are a gamma and a beta;
into how many spans sums over channels are cut.
"""

Tile = namedtuple("Tile", "r h c n t")
"""Rows, hidden units and channels of a tile; samples where they are pooled; other numbers."""

Encoders = namedtuple("Encoders", "noise drop_prob std_weight rescale_weight")
"""The noise (2, C) and the probability of the dropout, and the weights of E_s and E_r."""

Decoders = namedtuple(
    "Decoders",
    "std_bias rescale_bias mu_weight mu_bias sigma_weight sigma_bias beta_weight beta_bias gamma_weight gamma_bias",
)
"""The biases of E_s and E_r, and weight and bias of each decoder."""

Gates = namedtuple("Gates", "mu sigma beta gamma")
"""The lambda of each decoder."""

EncoderDecoderStatistics = namedtuple("EncoderDecoderStatistics", "stats hidden outputs affine")
"""Statistics (3, R, C), hidden units (2, R, H), decoders' outputs (4, R, C), pivot, scale, offset (3, N, C)."""

AffineGradients = namedtuple(
    "AffineGradients",
    "weight bias mu_bias sigma_bias beta_bias gamma_bias gates outputs direct",
)
"""Of gamma, beta, the decoders' biases; parts of the gates'; of the outputs; of mean and deviation past them."""

EncoderGradients = namedtuple("EncoderGradients", "std_weight std_bias rescale_weight rescale_bias gates dx_affine")
"""Of both encoders and of the gates; constant and slope of dx."""

Shape = namedtuple("Shape", "samples rows channels std_units rescale_units")
"""In device code: the units are those of E_s and of E_r."""

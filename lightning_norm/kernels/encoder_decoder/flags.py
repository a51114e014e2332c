"""Which statistics the encoder-decoders see."""

from __future__ import annotations

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

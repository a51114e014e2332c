"""The conformance suite over sn and bcn with ``per_token=True``, on maps whose positions are the tokens."""

import pytest

from lightning_norm import BatchChannelNorm, SwitchableNorm
from lightning_norm.testing import checks


class OfMaps:
    """Mixin: the suite's inputs have their channels on axis 1, and those of tokens are on the last."""

    def __init__(self, num_features, *, channel_dim=1, **options):
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim must be 1 or -1, got {channel_dim!r}.")
        super().__init__(num_features, channel_dim=-1, per_token=True, **options)
        self.moved = channel_dim == 1

    def forward(self, input, activation="none", residual=None, mask=None):
        if not self.moved:
            return super().forward(input, activation, residual, mask)
        residual = None if residual is None else residual.movedim(1, -1)
        return super().forward(input.movedim(1, -1), activation, residual, mask).movedim(-1, 1)


class SwitchableTokens(OfMaps, SwitchableNorm):
    """sn."""


class BatchChannelTokens(OfMaps, BatchChannelNorm):
    """bcn."""

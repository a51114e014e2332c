"""The conformance kit: hold a normalizer of your own to what those of this package are held to."""

from lightning_norm.testing.conformance import checks as checks
from lightning_norm.testing.conformance import conform as conform
from lightning_norm.testing.ranks import run_ranks as run_ranks

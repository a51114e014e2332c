"""Lightning plugins."""

from lightning_norm.plugins.norm_sync import NormSync as NormSync

"""``lightning-norm compare``: normalizers on anyone's job, seed by seed, with intervals."""

from lightning_norm.cli.compare.command import run as run

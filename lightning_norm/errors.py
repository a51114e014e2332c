"""Warnings and errors with a type of their own, so that a user can filter or catch them. A leaf: imports nothing."""

from __future__ import annotations


class NoEffectWarning(UserWarning):
    """Something was asked for and nothing matched it."""


class CompileWarning(UserWarning):
    """Compilation does less than was asked for."""


class ParameterGrowthWarning(UserWarning):
    """A swap makes the model larger by more than a tenth."""


class MissingDependencyWarning(UserWarning):
    """An optional dependency is not installed, and what needs it is left out."""


class ConflictWarning(UserWarning):
    """Something else in the Trainer does not do with swapped layers what it does with torch's own."""


class ConflictError(RuntimeError):
    """Something else in the Trainer does not go together with a swap, or not in this order."""


class AlreadySwappedError(RuntimeError):
    """The model already holds normalizers of this package."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or is of another swap than the network it is to be loaded into."""


class OptimizerError(RuntimeError):
    """A trainable parameter of a normalizer is in no optimizer, or in several."""


class SyncError(RuntimeError):
    """Ranks did not meet where their statistics are pooled: one is gone, late beyond the timeout, or elsewhere."""


class SyncWarning(UserWarning):
    """Layers whose statistics were to be synchronized are not."""

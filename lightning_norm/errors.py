"""Warnings and errors with a type of their own, so that a user can filter or catch them.

Every room may import this file, so it imports nothing of this package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the sentence of a message that names the nearest of some names; empty where none is near.

    >>> did_you_mean("moments", ["momentum", "eps"])
    " Did you mean 'momentum'?"
    >>> did_you_mean("alpha", ["momentum", "eps"])
    ''
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class NoEffectWarning(UserWarning):
    """What the user asked for has no effect, because nothing in the model or the run matches it."""


class LeftAloneWarning(UserWarning):
    """A swap has passed over normalization layers that nobody said should stay."""


class UnsuitableNormWarning(UserWarning):
    """A swap puts a method where its authors say that it does not belong."""


class NotReachedWarning(UserWarning):
    """Layers of a swap did not run, or their parameters got no gradient, in a training step."""


class WeightDecayWarning(UserWarning):
    """Weight decay acts on parameters of normalizers, in an optimizer that spares others."""


class CompileWarning(UserWarning):
    """A compiled layer is slower than it could be, because it meets too many input shapes."""


class ParameterGrowthWarning(UserWarning):
    """A swap makes the model larger by more than a tenth."""


class BackendWarning(UserWarning):
    """The kernels cannot run here, and layers run in plain PyTorch instead."""


class KernelError(RuntimeError):
    """A Triton kernel does not compile or load, as for a shape for which the device has too little memory on chip."""

    after_others = False
    """Whether kernels of the same call may have run before, so that plain PyTorch cannot take the call over."""


class MissingDependencyWarning(UserWarning):
    """An optional dependency is not installed, and what needs it is left out."""


class OtherFileWarning(UserWarning):
    """The tensors of a file fit a layer that computes something else of them than the one that was saved."""


class ConflictWarning(UserWarning):
    """A callback or a setting of the Trainer does with swapped layers something else than with torch's own."""


class PublishedFileWarning(UserWarning):
    """A file of a paper's authors was loaded into a layer whose arguments make it compute something else."""


class ConflictError(RuntimeError):
    """A callback or a setting of the Trainer cannot be combined with a swap, or not in this order."""


class AlreadySwappedError(RuntimeError):
    """The model already holds normalizers of this package."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or comes from another swap than the network it is to be loaded into."""


class WriteError(OSError):
    """A file cannot be written. What was there before is as it was."""


class PlanError(ValueError):
    """A plan cannot be read, or a row of it is wrong."""


class OptimizerError(RuntimeError):
    """A trainable parameter of a normalizer is in no optimizer, or in more than one."""


class FusionError(RuntimeError):
    """Code of another library is about to fuse a layer into a convolution as if it were a BatchNorm.

    No AttributeError, for ``hasattr`` and ``getattr`` with a default would take it for an attribute that is missing.
    """


class QuantizationError(RuntimeError):
    """A network cannot be quantized as it is."""


class MaskError(ValueError):
    """A mask does not fit the input, holds something else than 0 and 1, or is not known, or a layer takes none."""


class SyncError(RuntimeError):
    """Ranks did not meet where they pool statistics: one has ended, is later than the timeout, or runs other layers."""


class SyncWarning(UserWarning):
    """Statistics of some layers are not synchronized over ranks, although that was asked for."""

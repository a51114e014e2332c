"""Numbers of each channel as NumPy's arrays, on the CPU: an operation on so few takes a third of the time of torch's.

Such arrays share the memory of tensors. Nobody but the caller sees what is done with them: neither autograd nor a
dispatch mode, so that they stand where :func:`lightning_norm.ops.native.takes` has said yes, or in a backward pass that
nothing records.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_norm.ops.eager import SMALL_MEAN

Array = NDArray[np.floating[Any]]

_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def quiet() -> AbstractContextManager[object]:
    """Return the context in which NumPy, as torch does, says nothing of numbers that are not finite."""
    return np.errstate(all="ignore")


def array_of(parameter: Tensor) -> Array:
    """Return the array with the memory of a tensor that may have a gradient; others have ``numpy()`` alone."""
    array: Array = parameter.detach().numpy()
    return array


def tensor_of(array: Array, dtype: torch.dtype) -> Tensor:
    """Return a copy of an array, rounded to a dtype of torch's."""
    return torch.from_numpy(array.astype(_DTYPES[dtype]))


def is_small(mean: Array, var: Array) -> bool:
    """Tell whether means are small against their standard deviations; written so that NaN is not."""
    return int(np.count_nonzero(var >= mean * mean * SMALL_MEAN**-2)) == len(mean)


def changed(*tensors: Tensor) -> None:
    """Tell autograd that tensors have other values now, written by way of their arrays."""
    if not tensors[0].is_inference():  # which counts no versions
        torch.autograd.graph.increment_version(tensors)

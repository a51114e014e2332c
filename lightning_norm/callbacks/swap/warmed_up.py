"""Kernels compiled before the first batch: what NormSwap does about `warm_up`."""

from __future__ import annotations

from typing import Any

import torch

from lightning_norm.callbacks.lightning_compat import pl
from lightning_norm.surgery.warm_up import warm_up


def warm_up_module(trainer: pl.Trainer, pl_module: pl.LightningModule, shape: bool | list[int]) -> None:
    """Compile the kernels that the module needs for a batch, in the precision of the Trainer.

    Args:
        trainer: the Trainer, whose strategy has moved the module to its device.
        pl_module: the module.
        shape: of a batch, or True for the module's ``example_input_array``.

    Raises:
        ValueError: True and no ``example_input_array``.
    """
    example: Any = torch.zeros(shape) if isinstance(shape, list) else pl_module.example_input_array
    if example is None:
        raise ValueError(
            f"NormSwap: warm_up=True needs {type(pl_module).__name__}.example_input_array, which is None. Set it to a "
            "batch, or type the shape of one: warm_up=[64, 3, 224, 224]."
        )
    precision = trainer.precision_plugin
    example = precision.convert_input(trainer.strategy.batch_to_device(example, pl_module.device))
    # A tuple holds several arguments and a dictionary named ones, as Lightning reads an example.
    args = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    with precision.forward_context():
        warm_up(pl_module, *args, progress=trainer.is_global_zero, **(example if isinstance(example, dict) else {}))

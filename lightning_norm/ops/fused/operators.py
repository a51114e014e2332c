"""The passes over x as torch operators, ``torch.ops.lightning_norm``, and how the families define theirs.

An operator is opaque to torch.compile and torch.export. It is defined whether or not Triton is installed: Triton is
imported when one runs. None has an autograd formula: autograd functions call them, those of ``ops/normalize.py`` for
an algebra in PyTorch and those of this folder for equations that the kernels know.

Schemas allow tensors and plain numbers, so the flags of a family cross them as lists: :func:`to_numbers` and
:func:`from_numbers` are the one place that knows the order, and it is that of the dataclass's fields.

``affine`` is (3, N, C): pivot, scale and offset of y = scale * (x - pivot) + offset. ``dx_affine`` is (2, N, C):
constant and slope of dx = scale * dy + constant + slope * (x - pivot).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from lightning_norm.kernels.grid import samples_and_channels
from lightning_norm.ops.sync import Ranks

Flags = TypeVar("Flags")
DOUBLE = "the Triton kernels have no second derivative: swap(..., backend='eager'), or layer.backend = 'eager'."
_library: Any = torch.library.Library("lightning_norm", "DEF")  # type: ignore[no-untyped-call]
SCHEMAS = {
    "moments": "(Tensor x, int channel_dim) -> Tensor",
    "sums": "(Tensor dy, Tensor x, Tensor affine, int channel_dim) -> Tensor",
    "apply": "(Tensor x, Tensor affine, int channel_dim, str activation, Tensor? residual) -> Tensor",
    "combine": "(Tensor dy, Tensor x, Tensor affine, Tensor? dx_affine, int channel_dim) -> Tensor",
}


def to_numbers(flags: Any) -> list[Any]:
    """Return the fields of a dataclass of booleans, integers and floats as a schema's ``int[]`` or ``float[]``.

    >>> from lightning_norm.kernels.encoder_decoder.flags import EncoderDecoderFlags
    >>> to_numbers(EncoderDecoderFlags(batch=True, track=2))
    [1, 0, 2]
    """
    values = [getattr(flags, field.name) for field in fields(flags)]
    return [value if isinstance(value, float) else int(value) for value in values]


def from_numbers(cls: type[Flags], numbers: Sequence[float]) -> Flags:
    """Return the dataclass whose :func:`to_numbers` is ``numbers``.

    >>> from lightning_norm.kernels.encoder_decoder.flags import EncoderDecoderFlags
    >>> from_numbers(EncoderDecoderFlags, [1, 0, 2])
    EncoderDecoderFlags(batch=True, frozen=False, track=2)
    """
    # A schema's list has numbers alone: what was a bool becomes one again.
    types = get_type_hints(cls)
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    return cls(**{name: types[name](number) for name, number in zip(names, numbers, strict=True)})


def over_ranks(group: str) -> Ranks | None:
    """Return what adds a tensor up over the ranks of that name; ``None`` for the empty name, this process alone."""
    return Ranks(group) if group else None


def rank_sums_shape(group: str, channels: int) -> tuple[int, ...]:
    """Return the shape of what the ranks of that name add up for so many channels; ``(0,)`` for the empty name."""
    return (1, 1 + Ranks(group).size * (1 + 2 * channels)) if group else (0,)


def _moments(x: Tensor, channel_dim: int) -> Tensor:
    from lightning_norm.kernels.passes import launch

    return launch.moments(x, channel_dim)


def _sums(dy: Tensor, x: Tensor, affine: Tensor, channel_dim: int) -> Tensor:
    from lightning_norm.kernels.passes import launch

    return launch.sums(dy, x, affine, channel_dim)


def _apply(x: Tensor, affine: Tensor, channel_dim: int, activation: str, residual: Tensor | None) -> Tensor:
    from lightning_norm.kernels.passes import launch

    return launch.apply(x, affine, channel_dim, activation, residual)


def _combine(dy: Tensor, x: Tensor, affine: Tensor, dx_affine: Tensor | None, channel_dim: int) -> Tensor:
    from lightning_norm.kernels.passes import launch

    return launch.combine(dy, x, affine, dx_affine, channel_dim)[0]


def per_sample_and_channel(x: Tensor, channel_dim: int, *lead: int) -> Tensor:
    """Return an empty (*lead, N, C) in float32: what a fake implementation returns."""
    return x.new_empty((*lead, *samples_and_channels(x, channel_dim)), dtype=torch.float32)


def fake_input_gradients(x: Tensor, affine: Tensor, residual: Tensor | None, need_dx: bool) -> tuple[Tensor, Tensor]:
    """Return what ``kernels.passes.launch.input_gradients`` returns, of the same shapes."""
    # The pass that writes the residual's gradient writes dx as well.
    dx = torch.empty_like(x) if need_dx or residual is not None else affine.new_empty(0)
    return dx, affine.new_empty(0) if residual is None else torch.empty_like(x)


def define(
    schemas: dict[str, str],
    real: dict[str, Callable[..., Any]],
    fake: dict[str, Callable[..., Any]],
    keys: tuple[str, ...] = ("CUDA", "CPU"),
) -> None:
    """Define operators, by default for CUDA and for the interpreter on the CPU."""
    for name, schema in schemas.items():
        # The tag says that torch.compile may take the operator as it is described here.
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in keys:
            _library.impl(name, real[name], key)
        torch.library.register_fake(f"lightning_norm::{name}", fake[name], lib=_library)


def refuse_second_derivatives() -> None:
    """Name the way out where a backward pass is recorded.

    Raises:
        RuntimeError: under ``create_graph=True``.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(DOUBLE)


define(
    SCHEMAS,
    {"moments": _moments, "sums": _sums, "apply": _apply, "combine": _combine},
    {
        "moments": lambda x, channel_dim: per_sample_and_channel(x, channel_dim, 3),
        "sums": lambda dy, x, affine, channel_dim: per_sample_and_channel(x, channel_dim, 2),
        "apply": lambda x, *args: torch.empty_like(x),
        "combine": lambda dy, x, *args: torch.empty_like(x),
    },
)

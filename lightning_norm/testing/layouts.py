"""Checks: every rank and memory format gives the same numbers, in the format that came."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_norm.testing.kit import C, Make, Step, built, check, defined, features, noise, refused, same_step, step

SHAPES = ((5, C), (5, C, 7), (5, C, 7, 3), (3, C, 2, 5, 3))

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}
"""Both orders of summation round a few times each: eps * sqrt(terms), with terms below 200, and margin 4."""


def formats(x: Tensor) -> dict[str, Tensor]:
    """Return views of copies of x with the same values in other strides; dense ones first."""
    # Networks make all of these: channels_last by a flag, the others by transposes and slices.
    spatial = x.dim() - 2
    views = {"contiguous": x.contiguous()}
    if spatial in (2, 3):
        last = torch.channels_last if spatial == 2 else torch.channels_last_3d
        views["channels_last"] = x.contiguous(memory_format=last)
    views["batch inside"] = x.transpose(0, 1).contiguous().transpose(0, 1)
    views["strided"] = x.repeat_interleave(2, 0)[::2]
    if spatial:
        views["sliced"] = torch.cat([x, x], -1)[..., : x.shape[-1]]
    return views


@check
def keeps_shape_dtype_and_strides(make: Make) -> None:
    """Output shape and dtype are the input's, and its memory format, in training and evaluation."""
    for training in (True, False):
        layer = built(make).train(training)
        for shape in SHAPES:
            x = features(*shape)
            if not defined(layer, x.shape[0], x[0, 0].numel()):
                with refused(ValueError, f"input {shape}, training={training}", "more than one value"):
                    layer(x)
                continue
            for name, view in formats(x).items():
                # A graph behind the input must not change what comes out.
                for recorded in (view, view.detach().requires_grad_()):
                    y = layer(recorded)
                    what = f"{name} {shape}, training={training}"
                    assert y.shape == view.shape, f"{what}: output {tuple(y.shape)}"
                    assert y.dtype == view.dtype, f"{what}: output {y.dtype}, input {view.dtype}"
                    if name not in ("contiguous", "channels_last"):
                        # Other strides are no memory format of torch's, and need not be kept.
                        continue
                    expected = view.stride()
                    assert y.stride() == expected, f"{what}: strides {y.stride()}, expected {expected}"


@check
def formats_agree(make: Make) -> None:
    """Values and every gradient do not depend on the memory format, of input or of gradient."""
    for dtype in (torch.float64, torch.float32):
        for shape in SHAPES:
            x, dy = features(*shape, dtype=dtype), noise(*shape, seed=7, dtype=dtype)
            if not defined(make(C), x.shape[0], x[0, 0].numel()):
                continue
            for training in (True, False):
                reference = step(built(make, dtype).train(training), x, dy)
                for name, view in formats(x).items():
                    # A gradient may come in another format than the input, as behind a reshape.
                    for dname, dy_view in (("contiguous", dy), (name, formats(dy)[name])):
                        got = step(built(make, dtype).train(training), view, dy_view)
                        what = f"{dtype}, input {name}, gradient {dname}, {shape}, training={training}"
                        same_step(got, reference, TOLERANCE[dtype], what)


@check
def tokens_agree(make: Make) -> None:
    """``channel_dim=-1`` on (N, ..., C) equals ``channel_dim=1`` on the transposed input."""
    for dtype in (torch.float64, torch.float32):
        for shape in SHAPES[1:]:
            x, dy = features(*shape, dtype=dtype), noise(*shape, seed=7, dtype=dtype)
            for training in (True, False):
                reference = step(built(make, dtype).train(training), x, dy)
                layer = built(make, dtype, channel_dim=-1).train(training)
                # Dense tokens, and a transposed view of a map.
                for copy in (True, False):
                    tokens = [t.movedim(1, -1).contiguous() if copy else t.movedim(1, -1) for t in (x, dy)]
                    got = step(layer, *tokens)
                    assert got.y.shape == tokens[0].shape, (
                        f"tokens {tuple(tokens[0].shape)}: output {tuple(got.y.shape)}"
                    )
                    got = Step(got.y.movedim(-1, 1), got.dx.movedim(-1, 1), got.grads)
                    same_step(got, reference, TOLERANCE[dtype], f"{dtype}, tokens of {shape}, training={training}")
                    layer = built(make, dtype, channel_dim=-1).train(training)

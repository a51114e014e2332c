"""Calls that differ from the usual one: with a mask, or in ghost batches."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_norm.errors import MaskError
from lightning_norm.layers.arguments import as_int
from lightning_norm.layers.told import Told
from lightning_norm.ops import torch_private
from lightning_norm.ops.sync import Ranks


class SpecialCalls(nn.Module):
    """Mixin of MomentNorm: what ``forward`` does where the call is not the usual one.

    A mask says which positions are padding. It comes as an argument, or from code outside of the model that tells all
    layers (:func:`lightning_norm.masks`). Ghost batches are groups of consecutive samples that are normalized one after
    the other, each by its own statistics.

    >>> from lightning_norm import BatchNorm
    >>> layer = BatchNorm(2, virtual_batch_size=4)
    >>> _ = layer(torch.randn(9, 2))  # of 4 and of 5 samples
    >>> int(layer.num_batches_tracked)
    2
    """

    _special: bool = False
    """A call may have a mask that code outside of the model tells, or goes by ghost batches."""

    train_uses_batch_stats: ClassVar[bool]
    ranges: ClassVar[dict[str, Any]]
    _behind: tuple[str, ...]
    channel_dim: int
    _mask_state: Told | None = None
    """What :func:`lightning_norm.masks` tells the layer."""

    _last_mask: Tensor | None = None
    """Which positions counted in the last call with a mask, for the monitor; calls inside of a graph are not noted."""

    _virtual_batch_size: int | None = None

    @property
    def virtual_batch_size(self) -> int | None:
        """Samples of a ghost batch; ``None`` for the whole batch.

        Raises:
            ValueError: no positive int, or a layer whose statistics are those of single samples.
        """
        return self._virtual_batch_size

    @virtual_batch_size.setter
    def virtual_batch_size(self, value: int | None) -> None:
        who = type(self).__name__
        size = as_int(value)
        if value is not None and (size is None or size < 1):
            raise ValueError(f"{who}: virtual_batch_size must be a positive int or None, got {value!r}.")
        if value is not None and not self.train_uses_batch_stats:
            raise ValueError(
                f"{who} has no statistics over samples: leave out virtual_batch_size, or choose a normalizer such as "
                "'bn'."
            )
        vars(self)["_virtual_batch_size"] = size
        self._look_for_special_calls()

    def _look_for_special_calls(self) -> None:
        # One flag, so that the forward pass of a plain layer has one condition to test.
        if self._virtual_batch_size is not None or self._mask_state is not None:
            vars(self)["_special"] = True
        else:
            vars(self).pop("_special", None)

    def _part_of_batch(self, start: int, stop: int) -> AbstractContextManager[object]:
        """Return the context in which the layer is called with these samples of the batch alone."""
        return contextlib.nullcontext()

    def _call_with_mask_or_ghost_batches(
        self, x: Tensor, activation: str, residual: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Return what ``forward`` does with a mask or in ghost batches, without the modules behind the layer."""
        # Activation checkpointing runs the layer once more in the backward pass, when the batch's mask may be gone.
        again = self.training and torch_private.in_backward_pass()
        valid = self._valid_positions(x, mask, again)
        if valid is not None and not torch.compiler.is_compiling() and not torch_private.is_transformed():
            vars(self)["_last_mask"] = valid
        y = self._by_ghost_batches(x, activation, residual, valid)
        told = mask is None and valid is not None and self._mask_state is not None
        if told and not again and not torch.compiler.is_compiling():
            assert self._mask_state is not None
            self._mask_state.remember(y)
            # Without a graph, as under use_reentrant=True, nothing remembers the mask; a second run can then be refused
            # at least.
            if y.grad_fn is None and self.training:
                vars(self._mask_state)["lost"] = self._mask_state.value
        return y

    def _valid_positions(self, x: Tensor, mask: Tensor | None, again: bool) -> Tensor | None:
        """Return which positions of x count, in a shape that broadcasts against it; ``None`` for all."""
        state, who = self._mask_state, type(self).__name__
        if mask is None and state is not None:
            mask = state.value
            if again and not torch.compiler.is_compiling():
                mask = _mask_of_first_run(state, mask, who, torch_private.static_shape(x)[0])
            if mask is None:
                vars(state).pop("lost", None)
                return None
            who = f"{who} {state.name!r}" if state.name else who
            mask = resized(mask, positions(x, self.channel_dim), who)
        if mask is None:
            return None
        layer: Any = self
        if layer.unsupported.mask:
            raise MaskError(f"{who} cannot take a mask: {layer.unsupported.mask}.")
        return valid_positions(mask, x, self.channel_dim, who)

    def _by_ghost_batches(self, x: Tensor, activation: str, residual: Tensor | None, valid: Tensor | None) -> Tensor:
        """Normalize ghost batches one after the other, each as a batch of its own; the whole batch where there is one.

        Running statistics move with each, as published.
        """
        layer: Any = self
        size = self.virtual_batch_size
        if size is None or not self.training:
            return layer._normalize(x, activation, residual, valid)  # type: ignore[no-any-return]
        bounds = ghost_batches(torch_private.static_shape(x)[0], size)
        ranks: Ranks | None = layer._ranks()
        if ranks is not None and not torch.compiler.is_compiling():
            # First of all, for a rank without ghost batches does not count them.
            layer._agree_once(ranks, x)
            # The ranks meet once for each ghost batch: one with fewer of them brings empty ones.
            bounds += [(bounds[-1][1],) * 2] * (ranks.largest(len(bounds), x.device) - len(bounds))
        if len(bounds) == 1:
            return layer._normalize(x, activation, residual, valid)  # type: ignore[no-any-return]
        parts = []
        for start, stop in bounds:
            x_part, residual_part, valid_part = (None if t is None else t[start:stop] for t in (x, residual, valid))
            with self._part_of_batch(start, stop):
                parts.append(layer._normalize(x_part, activation, residual_part, valid_part))
        return torch.cat(parts)


def hear_masks(layer: SpecialCalls) -> Told:
    """Let a layer listen to masks that code outside of the model tells, and return by what."""
    if layer._mask_state is None:
        layer._mask_state = Told()
        layer._look_for_special_calls()
    assert layer._mask_state is not None
    return layer._mask_state


def hears_masks(layer: nn.Module) -> bool:
    """Tell whether a normalizer listens to masks that code outside of the model tells."""
    return getattr(layer, "_mask_state", None) is not None


def last_mask(layer: nn.Module) -> Tensor | None:
    """Return which positions counted in a normalizer's last call with a mask, ``None`` where it had none."""
    return getattr(layer, "_last_mask", None)


def ghost_batches(n: int, size: int) -> list[tuple[int, int]]:
    """Return start and stop of each ghost batch; what is left over joins the last one, so that none is smaller.

    >>> ghost_batches(10, 4), ghost_batches(3, 4)
    ([(0, 4), (4, 10)], [(0, 3)])
    """
    count = max(1, n // size)
    return [(i * size, (i + 1) * size if i + 1 < count else n) for i in range(count)]


def _mask_of_first_run(state: Told, told: Tensor | None, who: str, n: int) -> Tensor | None:
    """Return what the forward pass was told that a backward pass runs again.

    Raises:
        MaskError: that is not known any longer.
    """
    lost = vars(state).get("lost")
    known = state.of_forward(n)
    if known is None and lost is not None and told is lost:
        known = told
    if known is None and (lost is not None or any(f.value.shape[0] == n for f in state.forwards)):
        name = f" {state.name!r}" if state.name else ""
        raise MaskError(
            f"{who}{name} was run again in a backward pass, as activation checkpointing does, and which mask its "
            "forward pass had is not known: use_reentrant=True keeps nothing of it, or the graphs of several batches "
            "are alive. Type checkpoint(..., use_reentrant=False), or hand the mask to the layer: layer(x, mask=mask)."
        )
    return known


def positions(x: Tensor, channel_dim: int) -> tuple[int, ...]:
    """Return the sizes of the axes of x beside samples and channels."""
    shape = torch_private.static_shape(x)
    return shape[2:] if channel_dim == 1 else shape[1:-1]


def valid_positions(mask: Tensor, x: Tensor, channel_dim: int, who: str) -> Tensor:
    """Return a mask as bool in a shape that broadcasts against x.

    Args:
        mask: of bool or 0 and 1, (N, *) or with an axis of size 1 for the channels, or (N,) for whole samples; or
            lengths along the last axis of positions, (N,) integers.
        x: the input.
        channel_dim: of x, 1 or -1.
        who: whom a message names.

    Raises:
        MaskError: of another kind or shape, or values that are none of these.

    >>> valid_positions(torch.tensor([3, 1]), torch.zeros(2, 8, 3), 1, "BatchNorm").int().tolist()
    [[[1, 1, 1]], [[1, 0, 0]]]
    """
    spatial, n = positions(x, channel_dim), torch_private.static_shape(x)[0]
    if not isinstance(mask, Tensor) or mask.is_complex():
        came = f"{mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise MaskError(f"{who}: a mask is a tensor of bool, or of 0 and 1, got {came}.")
    if mask.device != x.device:
        mask = mask.to(x.device)
    shape = torch_private.static_shape(mask)
    axis = 1 if channel_dim == 1 else len(shape) - 1
    # A mask that broadcasts against x has an axis of size 1 for the channels: taken off here, put back below.
    if len(shape) == len(spatial) + 2 and shape[axis] == 1:
        mask, shape = mask.squeeze(axis), (*shape[:axis], *shape[axis + 1 :])
    if is_lengths(mask) and spatial:
        valid = of_lengths(mask, spatial[-1], who).reshape(-1, *(1,) * (len(spatial) - 1), spatial[-1])
    else:
        valid = as_bool(mask, who)
        valid = valid.reshape(-1, *(1,) * len(spatial)) if len(shape) == 1 else valid
    # An axis of size 1 counts for all positions along it, as in broadcasting.
    fits = all(a in (1, b) for a, b in zip(valid.shape[1:], spatial, strict=False))
    if shape[0] != n or valid.dim() != len(spatial) + 1 or not fits:
        wanted = " or ".join([f"{(n, *spatial)}"] + [f"lengths ({n},)"] * bool(spatial))
        raise MaskError(f"{who}: a mask of x {tuple(x.shape)} has the shape {wanted}, got {shape}.")
    return valid.unsqueeze(1 if channel_dim == 1 else -1)


def is_lengths(mask: Tensor) -> bool:
    """Tell whether a mask of one axis holds lengths: integers, but not of one bit."""
    return mask.dim() == 1 and not mask.dtype.is_floating_point and mask.dtype != torch.bool


def of_lengths(lengths: Tensor, size: int, who: str) -> Tensor:
    """Return the mask (N, size) of lengths (N,).

    Raises:
        MaskError: a length that is negative or above ``size``; looked at on the CPU alone.
    """
    if _can_look(lengths) and bool(((lengths < 0) | (lengths > size)).any()):
        low, high = int(lengths.min()), int(lengths.max())
        raise MaskError(f"{who}: lengths must lie in [0, {size}], the positions of x, got {low} to {high}.")
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def as_bool(mask: Tensor, who: str) -> Tensor:
    """Return a mask of 0 and 1 as bool.

    Raises:
        MaskError: other values; looked at on the CPU alone.

    >>> as_bool(torch.tensor([1.0, 0.0]), "BatchNorm")
    tensor([ True, False])
    """
    if mask.dtype == torch.bool:
        return mask
    if _can_look(mask) and not bool(((mask == 0) | (mask == 1)).all()):
        raise MaskError(f"{who}: a mask holds 0 (padding) and 1, got other values. Type mask > 0, or mask == 0.")
    return mask != 0


def _can_look(t: Tensor) -> bool:
    # A GPU would have to be waited for, and what traces has no values.
    return t.is_cpu and not torch.compiler.is_compiling() and not torch_private.is_transformed()


def resized(mask: Tensor, spatial: tuple[int, ...], who: str) -> Tensor:
    """Return the mask of a model's input at the size of a map inside of the model.

    Of each axis that was halved k times, rounded up, as strided convolutions do, every 2^k-th entry is taken: of a
    padded signal the map has then as many positions that count as that of the signal alone. Of an axis that shrank
    otherwise, the entry at the same fraction of it.

    Args:
        mask: of bool, (N, *).
        spatial: sizes of the map's axes.
        who: whom a message names.

    Raises:
        MaskError: the mask has more axes than the map, and not as many entries.

    >>> resized(torch.tensor([[True, True, True, False, False]]), (3,), "BatchNorm")  # behind a stride of 2
    tensor([[ True,  True, False]])
    """
    sizes = torch_private.static_shape(mask)[1:]
    if sizes == spatial:
        return mask
    if not spatial:
        # Behind a pooling over all positions, a sample counts if it has any.
        return mask.flatten(1).any(1) if sizes else mask
    if len(sizes) > len(spatial):
        total = 1
        for size in sizes:
            total *= size
        if total == spatial[-1] and len(spatial) == 1:
            return mask.flatten(1)  # tokens are the positions of an image in a row
        raise MaskError(f"{who}: a mask with positions {sizes} has no place in a map with positions {spatial}.")
    # A mask with fewer axes is that of the last ones.
    first = len(spatial) - len(sizes)
    for axis, (old, new) in enumerate(zip(sizes, spatial[first:], strict=True), 1):
        if old not in (1, new):
            mask = mask.index_select(axis, _sampled_positions(old, new, mask.device))
    return mask.reshape(-1, *(1,) * first, *torch_private.static_shape(mask)[1:])


def _sampled_positions(old: int, new: int, device: torch.device) -> Tensor:
    # Halved until it has the size of the map, as a chain of strided convolutions does it.
    step, size = 1, old
    while size > new:
        size, step = (size + 1) // 2, step * 2
    if size == new:
        return torch.arange(new, device=device) * step
    return torch.arange(new, device=device) * old // new

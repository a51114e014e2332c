"""Read training batches without the training noticing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def generators_restored(loaders: Iterable[Any]) -> Iterator[None]:
    """Put back the state of every ``torch.Generator`` that the loaders and their samplers draw from."""
    owners = list(loaders)
    # A sampler may be nested in a batch sampler, and a dataset may draw random numbers too.
    for name in ("sampler", "batch_sampler", "dataset"):
        owners += [getattr(owner, name, None) for owner in owners]
    attributes = [value for owner in owners for value in getattr(owner, "__dict__", {}).values()]
    # Loader and sampler often hold the same generator.
    generators = {id(value): value for value in attributes if isinstance(value, torch.Generator)}
    states = [(generator, generator.get_state()) for generator in generators.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)

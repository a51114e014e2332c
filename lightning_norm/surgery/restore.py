"""Put back what running a model, or reading its data, has changed."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Undo = Callable[[], None]


@contextmanager
def everything_restored(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass has changed in a model, whatever happens.

    Parameters, buffers, modes, and every other attribute of its modules: numbers, tensors, lists, dictionaries. So
    queues and their pointers, momentum encoders, counters and metrics are what they were, and the very same objects.

    Args:
        model: whose modules are looked through; random numbers are for :func:`random_numbers_restored`.

    >>> model = nn.BatchNorm1d(2)
    >>> with everything_restored(model):
    ...     _ = model.train()(torch.randn(4, 2) + 9)
    >>> model.running_mean, int(model.num_batches_tracked)
    (tensor([0., 0.]), 0)
    """
    undo: list[Undo] = []
    # A container may hold itself, or be held twice: each is noted once.
    known: set[int] = set()
    for module in model.modules():
        _note_attributes(module, undo, known)
    try:
        yield
    finally:
        # In reverse, so that a container is filled again after what it holds is whole.
        for each in reversed(undo):
            each()


@contextmanager
def random_numbers_restored(*readers: Any) -> Iterator[None]:
    """Put back the state of the global generators, and of those that loaders draw from.

    Args:
        readers: loaders. Their samplers and data sets are looked through for generators of torch, numpy and Python, and
            their own attributes, such as the place that a sampler has come to, are put back as well.

    >>> with random_numbers_restored():
    ...     inside = torch.rand(1)
    >>> bool(inside == torch.rand(1))
    True
    """
    undo = [*_global_generators()]
    owners = [reader for reader in readers if reader is not None]
    # A sampler may be nested in a batch sampler, and a dataset may draw random numbers too.
    for name in ("sampler", "batch_sampler", "dataset"):
        owners += [getattr(owner, name) for owner in owners if getattr(owner, name, None) is not None]
    for owner in {id(owner): owner for owner in owners if hasattr(owner, "__dict__")}.values():
        attributes = dict(vars(owner))
        undo += [each for value in attributes.values() for each in _generator(value)]
        undo.append(partial(_put_attributes, owner, attributes))
    try:
        yield
    finally:
        for each in undo:
            each()


def is_stream(loader: Any) -> bool:
    """Tell whether reading from the loader takes samples that another reading may not get again.

    >>> is_stream([1, 2]), is_stream(iter([1, 2]))
    (False, True)
    """
    return isinstance(loader, Iterator) or isinstance(
        getattr(loader, "dataset", None), (torch.utils.data.IterableDataset, Iterator)
    )


def _note_attributes(module: nn.Module, undo: list[Undo], known: set[int]) -> None:
    """Note the attributes of a module, and what is in them."""
    attributes = dict(vars(module))
    undo.append(lambda: _put_attributes(module, attributes))
    for value in attributes.values():
        _note_content(value, undo, known)


def _put_attributes(owner: Any, attributes: dict[str, Any]) -> None:
    """Give an object the attributes that it had, and no others."""
    # Past __setattr__, which registers parameters, and in some data loaders refuses.
    now = vars(owner)
    for name in [name for name in now if name not in attributes]:
        del now[name]
    now.update(attributes)


def _note_content(value: Any, undo: list[Undo], known: set[int]) -> None:
    """Note how to put back what a tensor or a container holds; other objects are left to themselves."""
    if id(value) in known:
        return
    known.add(id(value))
    # Its value, since others may hold the very tensor; the object itself comes back with the attributes.
    if isinstance(value, Tensor):
        if not (value.is_meta or is_lazy(value)):
            saved = value.detach().clone()
            undo.append(lambda: _put_tensor(value, saved))
        return
    items: list[Any]
    if isinstance(value, dict):
        pairs, items = [*value.items()], [*value.values()]
        undo.append(lambda: _put_items(value, pairs, lambda: value.update(pairs)))
    elif isinstance(value, (list, deque)):
        items = [*value]
        undo.append(lambda: _put_items(value, items, lambda: value.extend(items)))
    elif isinstance(value, set):
        items = [*value]
        undo.append(lambda: _put_items(value, items, lambda: value.update(items)))
    elif isinstance(value, tuple):
        items = [*value]
    else:
        undo += _generator(value)
        return
    for item in items:
        # Modules are noted by themselves.
        if not isinstance(item, nn.Module):
            _note_content(item, undo, known)


def _put_items(container: Any, items: list[Any], fill: Undo) -> None:
    """Put the content of a container back if it has changed."""
    now = [*container.items()] if isinstance(container, dict) else [*container]
    # By identity: tensors cannot be compared with ==, and what has not changed is not touched.
    if [*map(_identity, now)] != [*map(_identity, items)]:
        container.clear()
        fill()


def _identity(item: Any) -> Any:
    return (id(item[0]), id(item[1])) if isinstance(item, tuple) and len(item) == 2 else id(item)


@torch.no_grad()
def _put_tensor(tensor: Tensor, saved: Tensor) -> None:
    """Put the value of a tensor back if it has changed."""
    if (tensor.shape, tensor.dtype, tensor.device) != (saved.shape, saved.dtype, saved.device):
        tensor.data = saved
    elif not torch.equal(tensor, saved):  # a copy would count as a change in place, which autograd looks for
        tensor.copy_(saved)


def _global_generators() -> Iterable[Undo]:
    """Note the states of the generators that a program shares: Python's, torch's and numpy's."""
    # Data sets and augmentations draw from any of these.
    python, cpu = random.getstate(), torch.get_rng_state()
    yield lambda: random.setstate(python)
    yield lambda: torch.set_rng_state(cpu)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        cuda = torch.cuda.get_rng_state_all()
        yield lambda: torch.cuda.set_rng_state_all(cuda)
    # Who has not imported numpy draws nothing from it.
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state = numpy.random.get_state()
        yield lambda: numpy.random.set_state(state)


def _generator(value: Any) -> Iterator[Undo]:
    """Note the state of a generator of random numbers, if the value is one."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, torch.Generator):
        torch_state = value.get_state()
        yield lambda: (value.set_state(torch_state), None)[1]
    elif isinstance(value, random.Random):
        python_state = value.getstate()
        yield lambda: value.setstate(python_state)
    elif numpy is not None and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator.state
        yield lambda: setattr(value.bit_generator, "state", bits)
    elif numpy is not None and isinstance(value, numpy.random.RandomState):
        numpy_state = value.get_state()
        yield lambda: value.set_state(numpy_state)

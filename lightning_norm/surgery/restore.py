"""Put back what running a model, or reading its data, has changed."""

from __future__ import annotations

import io
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_norm.surgery.torch_private import without_iterator

Undo = Callable[[], None]

MANY = 1000
"""Items of a container of a data set up to which each is looked into."""


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
        readers: loaders. They and whatever they read with, such as samplers, data sets and transforms at any depth, are
            looked through: generators of torch, numpy and Python are put back, and so are attributes and what lists,
            dictionaries and sets hold, such as the place that a sampler has come to. What tensors hold is not.

    >>> with random_numbers_restored():
    ...     inside = torch.rand(1)
    >>> bool(inside == torch.rand(1))
    True
    """
    undo = [*_global_generators(), *_what_readers_change(readers)]
    try:
        yield
    finally:
        for each in undo:
            each()


def _what_readers_change(readers: Iterable[Any]) -> Iterator[Undo]:
    """Note the attributes of all objects that take part in reading, their containers and generators."""
    for value, attributes in _taking_part(readers):
        if isinstance(value, (dict, list, deque, set, tuple)):
            yield from _container(value)
        elif attributes is not None:
            yield partial(_put_attributes, value, attributes)
        else:
            yield from _generator(value)


def _taking_part(readers: Iterable[Any]) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """Yield readers and what they read with, at any depth, each once with its attributes; ``None`` for other values."""
    # The objects themselves, so that no other one can get the id of one that was seen.
    seen: dict[int, Any] = {}
    first, waiting = {id(reader) for reader in readers}, [*readers]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        attributes = None
        if isinstance(value, (dict, list, deque, set, tuple)):
            # A list of samples is put back, and not every one of a million looked into.
            if len(value) <= MANY:
                waiting += value.values() if isinstance(value, dict) else value
        elif hasattr(value, "__dict__") and (id(value) in first or _takes_part(value)):
            attributes = dict(vars(value))
            waiting += attributes.values()
            # What it calls is in no attribute that vars() has.
            waiting += [value.func, value.args, value.keywords] if isinstance(value, partial) else []
        yield value, attributes


def _takes_part(value: Any) -> bool:
    """Tell whether an object is read from or called, as samplers, data sets and transforms of any class are."""
    # Loggers, files and the Trainer are none of these, and their attributes are no concern of a reading.
    return not isinstance(value, (type, Tensor, FunctionType)) and any(
        name in vars(base) for base in type(value).__mro__ for name in ("__iter__", "__getitem__", "__call__")
    )


def stream_in(loader: Any) -> Any | None:
    """Return what a loader reads with and whose place cannot be put back, an iterator or an IterableDataset, or None.

    Args:
        loader: is looked through at any depth, as by :func:`random_numbers_restored`, before anybody reads from it.

    >>> stream_in(torch.utils.data.DataLoader([1, 2])), type(stream_in([zip("ab", "cd")])).__name__
    (None, 'zip')
    """
    # The iterator of workers that persist is the training's, and a second reading makes one of its own.
    loader = without_iterator(loader)
    for value, _ in _taking_part([loader]):
        # A file has a place, to which a reading by index goes first.
        iterator = isinstance(value, Iterator) and not isinstance(value, io.IOBase)
        if iterator or isinstance(value, torch.utils.data.IterableDataset):
            return value
    return None


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
    if not isinstance(value, (dict, list, deque, set, tuple)):
        undo += _generator(value)
        return
    items = [*value.values()] if isinstance(value, dict) else [*value]
    undo += _container(value)
    for item in items:
        # Modules are noted by themselves.
        if not isinstance(item, nn.Module):
            _note_content(item, undo, known)


def _container(value: Any) -> Iterator[Undo]:
    """Note what a container holds, if it can be changed."""
    if isinstance(value, dict):
        pairs = [*value.items()]
        yield lambda: _put_items(value, pairs, lambda: value.update(pairs))
    elif isinstance(value, (list, deque)):
        items = [*value]
        yield lambda: _put_items(value, items, lambda: value.extend(items))
    elif isinstance(value, set):
        members = [*value]
        yield lambda: _put_items(value, members, lambda: value.update(members))


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

"""Launches, recorded at the first call of a kind and replayed at each later one.

At every launch Triton decides anew what the same arguments led to before: which compiled kernel runs, and how its
arguments are passed. That takes the host longer than a small kernel takes the GPU. So the first call of a kind runs the
launch code of a family without launching anything: :func:`record` compiles each ``launch(kernel, *grid)(...)`` and
writes it down, with every tensor as a slot and an offset in bytes. The :class:`Plan` that results allocates what the
launch code allocated, in fewer tensors, and launches with plain integers for pointers.

Calls are of one kind if they agree in device, shapes, strides, dtypes, flags and in the alignment of each pointer, for
Triton compiles other code for multiples of 16: :func:`key_of`. Triton's usual launch runs in place of the recorded one
under the interpreter, on backends other than CUDA, and while hooks are set, which expect tensors.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIMIT = 4096
"""Plans that are remembered: inputs that never have the same shape twice must not fill the memory."""

ALIGN = 64
"""Tensors in a workspace begin at multiples of this many numbers, 256 bytes, as those of torch's allocator do."""


class _Thread(threading.local):
    """What this thread records, if anything: backward passes run in threads of their own."""

    launches: list[_Launch] | None = None


_thread = _Thread()
_plans: dict[Hashable, Plan] = {}


class Number(int):
    """An input of a recorded call that is not a tensor, and differs from call to call."""

    slot = -1


def launch(kernel: Any, *grid: int) -> Callable[..., Any]:
    """Return what launches a kernel on a grid; while a call is recorded, what writes the launch down."""
    if _thread.launches is None:
        return kernel[grid]  # type: ignore[no-any-return]
    return functools.partial(_write_down, _thread.launches, kernel, grid)


class _Launch(NamedTuple):
    """A launch as the launch code asked for it, and the kernel that Triton compiled for it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    compiled: Any


def _write_down(launches: list[_Launch], kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    from triton.runtime.jit import JITFunction

    compiled = None
    if isinstance(kernel, JITFunction):  # and not one of the interpreter's
        plain = (int(a) if isinstance(a, Number) else a for a in args)
        compiled = kernel.warmup(*plain, grid=grid, **options)
    launches.append(_Launch(kernel, grid, args, options, compiled))


class _Pointer(NamedTuple):
    """A tensor that a kernel gets: ``offset`` bytes into the one in ``slot``, or the number there if dtype is None."""

    slot: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, tensors: Sequence[Any]) -> Tensor:
        """Return it as a tensor."""
        base = tensors[self.slot]
        start = (base.storage_offset() * base.element_size() + self.offset) // self.dtype.itemsize
        empty = torch.tensor([], dtype=self.dtype, device=base.device)
        return empty.set_(base.untyped_storage(), start, self.shape, self.stride)


class _Fresh(NamedTuple):
    """An output that is a tensor of its own: like the input in slot ``like``, or of this shape."""

    like: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass(eq=False)
class Plan:
    """The launches of one kind of call.

    Args:
        launches: in their order; every tensor in them is a :class:`_Pointer`.
        inputs: how many tensors and numbers the call gets.
        outputs: those that are tensors of their own; ``None`` for one that no kernel writes.
        sizes: of two workspaces in float32 numbers, what is kept for the backward pass and what is not.
        kept: the tensors in the first of them.
    """

    launches: list[_Launch]
    inputs: int
    outputs: list[_Fresh | None]
    sizes: tuple[int, int]
    kept: list[_Pointer]

    def __post_init__(self) -> None:
        self._replay = _replayed(self)

    def __call__(self, inputs: Sequence[Any], pointers: list[int]) -> tuple[list[Tensor | None], Tensor | None]:
        """Run the launches.

        Args:
            inputs: tensors, numbers and ``None``, as the key was made of; the first is x.
            pointers: of them, which :func:`key_of` returned; more are added.

        Returns:
            The outputs, and the workspace that is kept.
        """
        device = inputs[0].device
        outputs: list[Any] = []
        for fresh in self.outputs:
            if fresh is None:
                made = None
            elif fresh.like >= 0:
                made = torch.empty_like(inputs[fresh.like])
            else:
                made = torch.empty(fresh.shape, dtype=fresh.dtype, device=device)
            outputs.append(made)
            pointers.append(0 if made is None else made.data_ptr())
        kept, dropped = (torch.empty(n, dtype=torch.float32, device=device) if n else None for n in self.sizes)
        pointers += (0 if kept is None else kept.data_ptr(), 0 if dropped is None else dropped.data_ptr())
        if self._replay is None or _hooks_are_set():
            self._launch_as_usual([*inputs, *outputs, kept, dropped])
        else:
            self._replay(pointers, inputs[0].get_device())
        return outputs, kept

    def views(self, kept: Tensor) -> list[Tensor]:
        """Return the tensors in the workspace that is kept."""
        tensors = [*(None,) * (self.inputs + len(self.outputs)), kept]
        return [p.of(tensors) if p.slot >= 0 else kept.new_empty(p.shape, dtype=p.dtype) for p in self.kept]

    def _launch_as_usual(self, tensors: list[Any]) -> None:
        with torch.cuda.device_of(tensors[0]):
            for kernel, grid, args, options, _ in self.launches:
                kernel[grid](*(_argument(a, tensors) for a in args), **options)


def _argument(a: Any, tensors: list[Any]) -> Any:
    if isinstance(a, Number):
        return int(tensors[a.slot])
    if not isinstance(a, _Pointer):
        return a
    if a.slot < 0:  # a tensor without elements, which no kernel reads
        return torch.empty(0, dtype=a.dtype, device=tensors[0].device)
    whole = tensors[a.slot]
    return whole if a.offset == 0 and whole.shape == a.shape and whole.dtype == a.dtype else a.of(tensors)


def key_of(kind: Hashable, inputs: Sequence[Any]) -> tuple[Hashable, list[int]]:
    """Return what calls of one kind have in common, and the pointers of the inputs (0 for ``None``).

    Args:
        kind: what the launch code looks at beside its tensors.
        inputs: tensors, numbers and ``None``; the first is x, and others that have elements of x have its strides.
    """
    x = inputs[0]
    pointers, dtypes, misaligned = [], [], 0
    for t in inputs:
        if t is None:
            pointers.append(0)
            dtypes.append(None)
        elif t.__class__ is Number:
            pointers.append(t)
            dtypes.append(int)
        else:
            pointer = t.data_ptr()
            misaligned |= pointer
            pointers.append(pointer)
            dtypes.append(t.dtype)
    key = (kind, x.get_device(), x.shape, x.stride(), tuple(dtypes))
    # Nearly always all are multiples of 16.
    return (key if misaligned & 15 == 0 else (key, *(p & 15 for p in pointers))), pointers


def plan_of(
    key: Hashable, inputs: Sequence[Any], call: Callable[..., tuple[Sequence[Tensor | None], Sequence[Tensor]]]
) -> Plan:
    """Return the plan of a key; where there is none yet, record what ``call(*inputs)`` launches.

    ``call`` returns outputs and what is to be kept for the backward pass.
    """
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= LIMIT:
            _plans.clear()
        plan = _plans[key] = record(inputs, call)
    return plan


def record(inputs: Sequence[Any], call: Callable[..., tuple[Sequence[Tensor | None], Sequence[Tensor]]]) -> Plan:
    """Run the launch code of a call without launching, and return the plan of it; see :func:`plan_of`."""
    # Objects of their own, by which the launch code's arguments are told apart even where two are the same tensor.
    own = [_named(t, slot) for slot, t in enumerate(inputs)]
    launches: list[_Launch] = []
    with torch.cuda.device_of(inputs[0]), torch.no_grad():
        _thread.launches = launches
        try:
            outputs, keep = call(*own)
        finally:
            _thread.launches = None
        return _plan(own, launches, outputs, keep)


def _plan(own: list[Any], launches: list[_Launch], outputs: Sequence[Tensor | None], keep: Sequence[Tensor]) -> Plan:
    """Find out where each tensor of the launches lies."""
    passed = [a for step in launches for a in step.args if isinstance(a, Tensor)]
    used = {_storage(t) for t in passed}
    places = {id(t): (slot, 0) for slot, t in enumerate(own) if isinstance(t, Tensor)}
    storages: dict[int, tuple[int, int]] = {}  # pointer of a storage -> slot, offset of its first byte in that slot
    for slot, t in enumerate(own):
        if isinstance(t, Tensor) and _storage(t):
            offset = -t.storage_offset() * t.element_size()
            # Part of what two inputs have in common could be part of either.
            storages[_storage(t)] = (slot, offset) if _storage(t) not in storages else (-1, 0)
    fresh: list[_Fresh | None] = []
    for slot, t in enumerate(outputs, len(own)):
        fresh.append(_fresh(t, own) if t is not None and t.numel() and _storage(t) in used else None)
        if t is not None and fresh[-1] is not None:
            storages[_storage(t)] = slot, 0
    last = len(own) + len(outputs)
    sizes = _fill(storages, keep, last), _fill(storages, passed, last + 1)

    def pointer(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        slot, offset = places.get(id(t), (-1, 0))
        if slot < 0 and t.numel():
            slot, first = storages[_storage(t)]
            assert slot >= 0, "a part of a tensor that is passed twice"
            offset = first + t.storage_offset() * t.element_size()
        return _Pointer(slot, offset, t.shape, t.stride(), t.dtype)

    steps = [step._replace(args=tuple(map(pointer, step.args))) for step in launches]
    return Plan(steps, len(own), fresh, sizes, [pointer(t) for t in keep])


def _named(t: Any, slot: int) -> Any:
    if isinstance(t, Number):
        t = Number(t)
        t.slot = slot
        return t
    return None if t is None else t.detach()


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _fresh(t: Tensor, inputs: Sequence[Any]) -> _Fresh:
    x = inputs[0]
    if (t.shape, t.stride(), t.dtype) == (x.shape, x.stride(), x.dtype):
        return _Fresh(0, t.shape, t.dtype)
    assert t.is_contiguous()
    return _Fresh(-1, t.shape, t.dtype)


def _fill(storages: dict[int, tuple[int, int]], tensors: Iterable[Tensor], slot: int) -> int:
    """Give each storage that has no place yet one in a workspace, and return the float32 numbers that it needs."""
    size = 0
    for t in tensors:
        storage = t.untyped_storage()
        if storage.data_ptr() and storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = slot, 4 * size
            size += -(-storage.nbytes() // (4 * ALIGN)) * ALIGN
    return size


def _hooks_are_set() -> bool:
    from triton import knobs

    runtime = knobs.runtime
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


def _replayed(plan: Plan) -> Callable[[list[int], int], None] | None:
    """Return a function that launches the plan, given all pointers and the device; ``None`` where Triton must do it.

    The launches are written as one function, with every argument in its place: a loop over lists of arguments would
    take as long as the launches themselves.
    """
    compiled = [step.compiled for step in plan.launches]
    if any(c is None or c.metadata.target.backend != "cuda" for c in compiled):
        return None
    from triton.runtime import driver

    names: dict[str, Any] = {"driver": driver, "on": torch.cuda.device}
    lines = []
    for i, step in enumerate(plan.launches):
        run = step.compiled.run  # loads the kernel
        names |= {f"run{i}": run, f"f{i}": step.compiled.function, f"m{i}": step.compiled.packed_metadata}
        x, y, z = (*step.grid, 1, 1)[:3]
        arguments = ", ".join(_spelled(a, names) for a in _in_order(step))
        lines.append(f"    run{i}({x}, {y}, {z}, stream, f{i}, m{i}, None, None, None, {arguments})")
    code = "\n".join(["def launches(p, stream):", *lines, *([] if lines else ["    pass"])])
    exec(compile(code, "<recorded launches>", "exec"), names)  # nothing in it but numbers and names made here
    launches = names["launches"]

    def replay(pointers: list[int], device: int) -> None:
        active = driver.active
        if device < 0 or device == active.get_current_device():
            launches(pointers, active.get_current_stream(max(device, 0)))
        else:
            with torch.cuda.device(device):
                launches(pointers, active.get_current_stream(device))

    return replay


def _in_order(step: _Launch) -> list[Any]:
    """Return the arguments of a launch in the order of the kernel's parameters; constants are compiled in."""
    rest = [None if p.is_constexpr else step.options[p.name] for p in step.kernel.params[len(step.args) :]]
    return [*step.args, *rest]


def _spelled(a: Any, names: dict[str, Any]) -> str:
    if isinstance(a, Number):
        return f"p[{a.slot}]"
    if isinstance(a, _Pointer):
        return "0" if a.slot < 0 else f"p[{a.slot}] + {a.offset}" if a.offset else f"p[{a.slot}]"
    if a is None or type(a) is int:
        return repr(a)
    name = f"c{len(names)}"
    names[name] = a
    return name

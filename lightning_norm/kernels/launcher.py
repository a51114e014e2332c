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
import importlib.metadata
import operator
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_norm.errors import KernelError

LIMIT = 4096
"""Plans that are remembered: inputs that never have the same shape twice must not fill the memory."""

ALIGN = 64
"""Tensors in a workspace begin at multiples of this many numbers, 256 bytes, as those of torch's allocator do."""


# By map, over all tensors of a call.
DATA_PTR, GET_DEVICE, DTYPE = Tensor.data_ptr, Tensor.get_device, Tensor.dtype.__get__


def _installed() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


class _Thread(threading.local):
    """What this thread records, if anything: backward passes run in threads of their own."""

    launches: list[_Launch] | None = None


_thread = _Thread()
_plans: dict[Hashable, Plan] = {}
_ahead: list[Plan] | None = None
"""Plans whose kernels are compiled later, and all at once; ``None`` while each is compiled when it is recorded."""


class Number(int):
    """An input of a recorded call that is not a tensor, and differs from call to call."""

    slot = -1


def is_recording() -> bool:
    """Tell whether this thread records a call, in which nothing may be computed but by launches."""
    return _thread.launches is not None


def launch(kernel: Any, *grid: int) -> Callable[..., Any]:
    """Return what launches a kernel on a grid; while a call is recorded, what writes the launch down."""
    # One look-up tells the two: launch code reads the same whether it launches or is recorded.
    if _thread.launches is None:
        return functools.partial(_launch_now, kernel, grid)
    return functools.partial(_write_down, _thread.launches, kernel, grid)


def _launch_now(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch by Triton itself.

    Raises:
        KernelError: the kernel does not compile or load.
    """
    # The interpreter's errors are those of the kernel itself.
    with _telling_of(kernel.__name__, after_others=True) if is_compiled(kernel) else nullcontext():
        kernel[grid](*args, **options)


class _Launch(NamedTuple):
    """A launch as the launch code asked for it, and the kernel that Triton compiled for it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    compiled: Any


def _write_down(launches: list[_Launch], kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    compiled = None
    if is_compiled(kernel):
        # The compiler takes a number for what it is; that it differs from call to call is noted below.
        plain = [_each(lambda part: int(part) if isinstance(part, Number) else part, a) for a in args]
        # Compiles without launching, for pointers of this alignment.
        if _ahead is None:
            with _telling_of(kernel.__name__):
                compiled = kernel.warmup(*plain, grid=grid, **options)
        else:
            compiled = functools.partial(kernel.warmup, *(_each(_stand_in, a) for a in plain), grid=grid, **options)
    launches.append(_Launch(kernel, grid, args, options, compiled))


def is_compiled(kernel: Any) -> bool:
    """Tell a kernel that Triton compiles from one that its interpreter runs."""
    from triton.runtime.jit import JITFunction

    return isinstance(kernel, JITFunction)


@contextmanager
def _telling_of(kernel: str, after_others: bool = False) -> Iterator[None]:
    """Raise whatever Triton, ptxas, its C compiler or the driver raise as the one error that a caller can expect."""
    try:
        yield
    except Exception as error:
        # Triton's own errors quote whole files.
        first = (str(error).strip().splitlines() or [""])[0]
        told = KernelError(f"kernel {kernel} does not compile or load ({type(error).__name__}: {first})")
        told.after_others = after_others
        raise told from error


@dataclass
class _StandIn:
    """What the compiler looks at of a tensor, without its memory."""

    dtype: torch.dtype
    misaligned: int

    def data_ptr(self) -> int:
        """Return an address that is as far from a multiple of 16 as the tensor's."""
        return self.misaligned


def _each(function: Callable[[Any], Any], a: Any) -> Any:
    """Apply a function to an argument, or to every part of one that is a named tuple."""
    if isinstance(a, tuple) and not isinstance(a, _Pointer):
        return type(a)(*(_each(function, part) for part in a))
    return function(a)


def _parts(a: Any) -> Iterator[Any]:
    """Yield an argument, or every part of one that is a named tuple."""
    if isinstance(a, tuple):
        for part in a:
            yield from _parts(part)
    else:
        yield a


def _stand_in(a: Any) -> Any:
    return _StandIn(a.dtype, a.data_ptr() & 15) if isinstance(a, Tensor) else a


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
        # By bytes, for a part may have another dtype than the tensor it lies in.
        start = (base.storage_offset() * base.element_size() + self.offset) // self.dtype.itemsize
        empty = torch.tensor([], dtype=self.dtype, device=base.device)
        return empty.set_(base.untyped_storage(), start, self.shape, self.stride)


class _Output(NamedTuple):
    """An output: a tensor like x, or a part of the one tensor that all others lie in, such as gradients of parameters.

    Args:
        shape: of the output.
        stride: of the output.
        start: its first number in that tensor, -1 for a tensor like x.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    start: int


@dataclass(eq=False)
class Plan:
    """The launches of one kind of call.

    Args:
        launches: in their order; every tensor in them is a :class:`_Pointer`.
        inputs: how many tensors and numbers the call gets.
        x: where the first input lies.
        outputs: ``None`` for one that no kernel writes.
        sizes: of two workspaces in float32 numbers: kept for the backward pass, dropped.
        others: numbers of the tensor that holds the outputs that are not like x.
        saved: the tensors in the first workspace.
        replayed: the launches as one function of all pointers and the stream, where Triton need not launch them.
    """

    launches: list[_Launch]
    inputs: int
    x: _Pointer
    outputs: list[_Output | None]
    sizes: tuple[int, int]
    others: int
    saved: list[_Pointer]
    replayed: Callable[[list[int], int], None] | None = None

    def __post_init__(self) -> None:
        self.has_backward = False
        """Whether the launches of a backward pass are compiled, or none was asked for."""
        self._like_x = sum(output is not None and output.start < 0 for output in self.outputs)
        like_x = tuple(self.x.shape), self.x.stride, self.x.dtype
        flat = [((n,), (1,), torch.float32) for n in (self.others, *self.sizes) if n]
        self.made: list[tuple[Any, Any, torch.dtype]] = [*[like_x] * self._like_x, *flat]
        self._replay: Callable[[Tensor, list[int]], list[Tensor] | None] | None = self._allocate
        if any(isinstance(step.compiled, functools.partial) for step in self.launches) and _ahead is not None:
            _ahead.append(self)  # until it is compiled it launches nothing
        else:
            self._replay = _replayed(self)

    def _allocate(self, x: Tensor, pointers: Any = None) -> list[Tensor]:
        """Return what the launches write: outputs like x, all others in one tensor, and the workspaces."""
        device = x.device
        return [torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype in self.made]

    def __call__(self, inputs: Sequence[Any], pointers: list[int]) -> tuple[list[Tensor | None], Tensor | None]:
        """Run the launches.

        Args:
            inputs: tensors and then numbers, as the key was made of; the first is x.
            pointers: of them, which :func:`key_of` returned; more are added.

        Returns:
            The outputs, and the workspace that is kept.
        """
        x = inputs[0]
        made = None if self._replay is None else self._replay(x, pointers)
        if made is None:
            made = self._allocate(x)
            self._launch_as_usual([*inputs, *made])
        # In the order of ``made``: outputs like x, the tensor of all others, and the workspaces.
        workspace = made[self._like_x + bool(self.others)] if self.sizes[0] else None
        like_x, others = iter(made), made[self._like_x] if self.others else None
        outputs: list[Tensor | None] = []
        for output in self.outputs:
            if output is None:
                outputs.append(None)
            elif others is None or output.start < 0:
                outputs.append(next(like_x))
            else:  # one call for each, which takes less than cutting first and then giving shapes
                outputs.append(others.as_strided(*output))
        return outputs, workspace

    def views(self, saved: Tensor) -> list[Tensor]:
        """Return the tensors in the workspace that is kept."""
        # Numbered as in the launches, where inputs and outputs stand in front of the workspace.
        tensors = [*(None,) * (self.inputs + self._like_x + bool(self.others)), saved]
        return [p.of(tensors) if p.slot >= 0 else saved.new_empty(p.shape, dtype=p.dtype) for p in self.saved]

    def _launch_as_usual(self, tensors: list[Any]) -> None:
        # Triton launches on the current device, which need not be that of x.
        with torch.cuda.device_of(tensors[0]):
            for kernel, grid, args, options, _ in self.launches:
                kernel[grid](*(_each(lambda part: _argument(part, tensors), a) for a in args), **options)


def _argument(a: Any, tensors: list[Any]) -> Any:
    if isinstance(a, Number):
        return int(tensors[a.slot])
    if not isinstance(a, _Pointer):
        return a
    if a.slot < 0:  # a tensor without elements, which no kernel reads
        return torch.empty(0, dtype=a.dtype, device=tensors[0].device)
    whole = tensors[a.slot]
    return whole if a.offset == 0 and whole.shape == a.shape and whole.dtype == a.dtype else a.of(tensors)


def key_of(kind: Hashable, tensors: Sequence[Tensor], numbers: Sequence[Number] = ()) -> tuple[Hashable, list[int]]:
    """Return what calls of one kind have in common, and the pointers of the inputs.

    Args:
        kind: what the launch code looks at beside its tensors.
        tensors: the first is x, those like x have its strides, all others none but 1.
        numbers: behind the tensors; their values are no part of the key.

    Raises:
        RuntimeError: the tensors are on more than one device, where a kernel would read an address that is not its.
    """
    x = tensors[0]
    device = x.get_device()
    # Asked here, for a launch with integers in place of tensors asks nobody. A loop of Python's takes three times as
    # long as map with functions of torch's own.
    if len({*map(GET_DEVICE, tensors)}) > 1:
        other = next(t.device for t in tensors if t.get_device() != device)
        raise RuntimeError(
            f"all tensors of a layer must be on the device of its input, {x.device}, got one on {other}. "
            f"Type layer.to({str(x.device)!r})."
        )
    pointers = [*map(DATA_PTR, tensors)]
    key = (kind, device, x.shape, x.stride(), *map(DTYPE, tensors))
    # Nearly always all are multiples of 16.
    if functools.reduce(operator.or_, pointers) & 15:
        key = (key, *(p & 15 for p in pointers))
    pointers += numbers
    return key, pointers


def known(key: Hashable) -> Plan | None:
    """Return the plan of a key, ``None`` where there is none yet."""
    return _plans.get(key)


def plan_of(
    key: Hashable, inputs: Sequence[Any], call: Callable[..., tuple[Sequence[Tensor | None], Sequence[Tensor]]]
) -> Plan:
    """Return the plan of a key; where there is none yet, record what ``call(*inputs)`` launches.

    ``call`` returns outputs and what is to be kept for the backward pass.
    """
    # Of a call of a known kind this look-up is all that Triton's own launch would do.
    plan = _plans.get(key)
    if plan is None:
        # All at once: nobody knows which are still needed, and what Triton has compiled stays compiled.
        if len(_plans) >= LIMIT:
            _plans.clear()
        plan = _plans[key] = record(inputs, call)
    return plan


@contextmanager
def compiling_ahead(pool: Executor, wait: Callable[[], object]) -> Iterator[None]:
    """Record what the calls in this block would launch, launch nothing, and compile it by ``pool`` at the end.

    No other thread may call a layer meanwhile, but those of autograd that the block waits for.

    Args:
        pool: threads, for what is compiled cannot be sent to another process.
        wait: called once everything was handed to the pool, before the results are used.
    """
    global _ahead
    _ahead = plans = []
    try:
        yield
        _ahead = None
        _compile(plans, pool, wait)
    except BaseException:
        # Plans that are not compiled launch nothing.
        _plans.clear()
        raise
    finally:
        _ahead = None


def _compile(plans: list[Plan], pool: Executor, wait: Callable[[], object]) -> None:
    if not plans:
        return
    import triton

    # Triton before 3.5 has no such mode, and compiles one kernel after the other.
    together = getattr(triton, "AsyncCompileMode", None)
    with nullcontext() if together is None else together(pool):
        for plan in plans:
            plan.launches = [step._replace(compiled=_called(step, step.compiled)) for step in plan.launches]
        wait()
    for plan in plans:
        finished = ((step, getattr(step.compiled, "result", None)) for step in plan.launches)
        plan.launches = [
            step if result is None else step._replace(compiled=_called(step, result)) for step, result in finished
        ]
        # Loads the kernels, so that a CUDA graph may capture their first launch.
        plan._replay = _replayed(plan)


def _called(step: _Launch, compile_it: Callable[[], Any]) -> Any:
    with _telling_of(step.kernel.__name__):
        return compile_it()


def record(inputs: Sequence[Any], call: Callable[..., tuple[Sequence[Tensor | None], Sequence[Tensor]]]) -> Plan:
    """Run the launch code of a call without launching, and return the plan of it; see :func:`plan_of`."""
    # Objects of their own, by which the launch code's arguments are told apart even where two are the same tensor.
    slots = [_named(t, slot) for slot, t in enumerate(inputs)]
    launches: list[_Launch] = []
    with torch.cuda.device_of(inputs[0]), torch.no_grad():
        _thread.launches = launches
        try:
            outputs, keep = call(*slots)
        finally:
            _thread.launches = None
        return _plan(slots, launches, outputs, keep)


def _plan(slots: list[Any], launches: list[_Launch], outputs: Sequence[Tensor | None], keep: Sequence[Tensor]) -> Plan:
    """Find out where each tensor of the launches lies."""
    passed = [a for step in launches for a in _parts(step.args) if isinstance(a, Tensor)]
    # By storages: the parts of one tensor have one in common, at different offsets.
    used = {_storage(t) for t in passed}
    places = {id(t): (slot, 0) for slot, t in enumerate(slots) if isinstance(t, Tensor)}
    storages: dict[int, tuple[int, int]] = {}  # pointer of a storage -> slot, offset of its first byte in that slot
    for slot, t in enumerate(slots):
        if isinstance(t, Tensor) and _storage(t):
            offset = -t.storage_offset() * t.element_size()
            # Part of what two inputs have in common could be part of either.
            storages[_storage(t)] = (slot, offset) if _storage(t) not in storages else (-1, 0)
    # What no kernel writes is no output.
    written = [t if t is not None and t.numel() and _storage(t) in used else None for t in outputs]
    like_x = [t for t in written if t is not None and _looks_like(t, slots[0])]
    others = [t for t in written if t is not None and not _looks_like(t, slots[0])]
    slot = len(slots)
    for t in like_x:
        assert _storage(t) not in storages, "an output that is an input, or a part of another output"
        assert t.storage_offset() == 0
        storages[_storage(t)] = (slot, 0)
        slot += 1
    assert not any(_storage(t) in storages for t in others), "an output that is an input"
    # Tensors begin at multiples of 16 bytes.
    sizes = []
    for tensors, align in ((others, 4), (keep, ALIGN), (passed, ALIGN)):
        sizes.append(_fill(storages, tensors, slot, align))
        slot += sizes[-1] > 0
    made = _placed(written, others, [storages[_storage(t)][1] // 4 + t.storage_offset() for t in others])

    def pointer(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        slot, offset = places.get(id(t), (-1, 0))
        if slot < 0 and t.numel():
            slot, first = storages[_storage(t)]
            assert slot >= 0, "a part of a tensor that is passed twice"
            offset = first + t.storage_offset() * t.element_size()
        return _Pointer(slot, offset, t.shape, t.stride(), t.dtype)

    # From here on nothing holds the tensors of the recorded call, whose memory is free again.
    steps = [step._replace(args=tuple(_each(pointer, a) for a in step.args)) for step in launches]
    return Plan(steps, len(slots), pointer(slots[0]), made, (sizes[1], sizes[2]), sizes[0], [pointer(t) for t in keep])


def _named(t: Any, slot: int) -> Any:
    if isinstance(t, Number):
        t = Number(t)
        t.slot = slot
        return t
    return t.detach()


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _looks_like(t: Tensor, x: Tensor) -> bool:
    return (t.shape, t.stride(), t.dtype) == (x.shape, x.stride(), x.dtype)


def _placed(written: list[Tensor | None], others: list[Tensor], starts: list[int]) -> list[_Output | None]:
    """Return where each output lies.

    Args:
        written: the outputs.
        others: those of them that are not like x.
        starts: their places in the tensor that they lie in, in numbers.
    """
    places, end = {}, 0
    for start, t in sorted(zip(starts, others, strict=True), key=lambda place: place[0]):
        assert t.is_contiguous()
        assert t.dtype == torch.float32
        assert start >= end, "outputs that overlap"
        places[id(t)] = _Output(t.shape, t.stride(), start)
        end = start + t.numel()
    return [None if t is None else places.get(id(t), _Output(t.shape, t.stride(), -1)) for t in written]


def _fill(storages: dict[int, tuple[int, int]], tensors: Iterable[Tensor], slot: int, align: int) -> int:
    """Give each storage that has no place yet one in a tensor, and return the float32 numbers that it needs."""
    size = 0
    for t in tensors:
        storage = t.untyped_storage()
        if storage.data_ptr() and storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = slot, 4 * size
            size += -(-storage.nbytes() // (4 * align)) * align
    return size


def _replayed(plan: Plan) -> Callable[[Tensor, list[int]], list[Tensor] | None] | None:
    """Return a function that launches the plan, given x and the pointers of the inputs; ``None`` where Triton must.

    It returns what the launches write. It returns ``None``, and has launched nothing, while hooks are set in Triton, as
    its profiler does: they want tensors.

    The launches are written as one function, with every argument in its place: a loop over lists of arguments would
    take as long as the launches themselves.
    """
    compiled = [step.compiled for step in plan.launches]
    if any(c is None or c.metadata.target.backend != "cuda" for c in compiled):
        return None
    from triton import knobs
    from triton.runtime import driver

    names: dict[str, Any] = {}
    lines = []
    for i, step in enumerate(plan.launches):
        x, y, z = (*step.grid, 1, 1)[:3]
        arguments = [_spelled(a, names) for a in _in_order(step)]
        lines.append(f"    {_call(step.compiled, i, names)(f'{x}, {y}, {z}, stream, f{i}', arguments)}")
    # The pointers are one list, p; all else is written into the text.
    code = "\n".join(["def launches(p, stream):", *lines, *([] if lines else ["    pass"])])
    exec(compile(code, "<recorded launches>", "exec"), names)  # nothing in it but numbers and names made here
    launches = plan.replayed = names["launches"]

    runtime = knobs.runtime

    def run(device: int, pointers: list[int], active: Any) -> list[Tensor]:
        # Whoever asks for deterministic algorithms has fresh memory filled, which torch's public functions do.
        if torch.are_deterministic_algorithms_enabled():
            empty = functools.partial(_empty, device)
        else:
            empty = EMPTY_STRIDED[device >= 0]
        made = [empty(size, stride, dtype) for size, stride, dtype in plan.made]
        pointers += map(DATA_PTR, made)
        launches(pointers, active.get_current_stream(max(device, 0)))
        return made

    def replay(x: Tensor, pointers: list[int]) -> list[Tensor] | None:
        # Asked at every call, since a profiler may be started between two.
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            return None
        device, active = x.get_device(), driver.active
        if device < 0 or device == active.get_current_device():
            return run(device, pointers, active)
        with torch.cuda.device(device):
            return run(device, pointers, active)

    return replay


def _empty(device: int, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cpu" if device < 0 else device)


EMPTY_STRIDED: list[Callable[[Any, Any, torch.dtype], Tensor]] = [
    functools.partial(_empty, -1),
    lambda size, stride, dtype: _empty(torch.cuda.current_device(), size, stride, dtype),
]
"""What allocates a tensor of a size, strides and a dtype on the CPU, and on the current CUDA device."""


def _call(compiled: Any, i: int, names: dict[str, Any]) -> Callable[[str, list[str]], str]:
    """Return what writes the call of a kernel, from grid, stream and function and from the kernel's arguments.

    ``CompiledKernel.run`` serves any version of Triton. Where the launcher behind it is one that we know, and the
    kernel needs no scratch memory, that is called, which saves half of the time.
    """
    with _telling_of(compiled.name):
        run = compiled.run  # loads the kernel
    names |= {f"f{i}": compiled.function, f"m{i}": compiled.packed_metadata}
    raw = getattr(run, "launch", None)
    # Memory that Triton allocates for each launch, which its own way alone does.
    scratch = getattr(run, "global_scratch_size", 1) + getattr(run, "profile_scratch_size", 1)
    known = raw is not None and scratch == 0 and not getattr(run, "gsan_enabled", False)
    if known and LAUNCHER == "tuple" and hasattr(run, "arg_annotations") and hasattr(run, "kernel_signature"):
        names |= {f"r{i}": raw, f"a{i}": run.arg_annotations, f"s{i}": run.kernel_signature}
        flags = f"{int(run.launch_cooperative_grid)}, {int(run.launch_pdl)}"
        nothing = "None, None, None, None, None"  # metadata for hooks, two hooks, and scratch memory
        return lambda head, args: f"r{i}({head}, {flags}, m{i}, {nothing}, a{i}, s{i}, ({', '.join(args)},))"
    if known and LAUNCHER == "flat":
        names[f"r{i}"] = raw
        flags = f"{bool(run.launch_cooperative_grid)}, {bool(run.launch_pdl)}"
        return lambda head, args: f"r{i}({head}, {flags}, None, None, m{i}, None, None, None, {', '.join(args)})"
    names[f"r{i}"] = run
    return lambda head, args: f"r{i}({head}, m{i}, None, None, None, {', '.join(args)})"


def _launcher_of(version: str) -> str:
    """Return how the launcher of a version of Triton takes its arguments, "" where nobody has looked.

    >>> _launcher_of("3.6.0"), _launcher_of("3.8.0"), _launcher_of("4.0.0")
    ('flat', 'tuple', '')
    """
    return {"3.6": "flat", "3.8": "tuple"}.get(".".join(version.split(".")[:2]), "")


LAUNCHER = _launcher_of(_installed())


def _in_order(step: _Launch) -> list[Any]:
    """Return the arguments of a launch in the order of the kernel's parameters; constants are compiled in."""
    # Options such as num_warps are no parameters of the kernel, and were used when it was compiled.
    rest = [None if p.is_constexpr else step.options[p.name] for p in step.kernel.params[len(step.args) :]]
    return [*step.args, *rest]


def _spelled(a: Any, names: dict[str, Any]) -> str:
    if isinstance(a, Number):
        return f"p[{a.slot}]"
    if isinstance(a, _Pointer):
        return "0" if a.slot < 0 else f"p[{a.slot}] + {a.offset}" if a.offset else f"p[{a.slot}]"
    if isinstance(a, tuple):
        return f"({' '.join(_spelled(part, names) + ',' for part in a)})"
    if a is None or type(a) is int:
        return repr(a)
    # Anything else, such as a float or a dtype, is looked up by a name.
    name = f"c{len(names)}"
    names[name] = a
    return name

"""How long a call takes: on a CUDA device by events or replayed graphs, on a CPU by the wall clock."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_norm.ops import torch_private

Run = Callable[[], Any]
WARM = 3
"""Calls before anything is timed or captured."""

LEAST_MS = 1.0
"""A CUDA graph is replayed so often between two events that they are at least so far apart."""

SHORT_MS = 0.1
"""A graph shorter than that holds ``MANY`` calls, so that the time of starting it does not show."""

MANY = 16


class Timed:
    """Something to be timed again and again; ``how`` says by which clock.

    On the CPU that is the wall clock around one call. On a CUDA device it is the time between two events around so many
    replays of a captured graph that :data:`LEAST_MS` lies between them: the work of the host, which would hide the
    kernels of a short call, is not in it.

    Args:
        run: what is timed.
        device: "cpu" or "cuda".
        graph: whether to capture it; what cannot be captured is run as it is, between CUDA events.

    Attributes:
        how: "wall clock", "graph replay" or "events", the last with the reason why nothing was captured.

    >>> timed = Timed(lambda: None, "cpu")
    >>> timed.how, timed.once() >= 0
    ('wall clock', True)
    """

    def __init__(self, run: Run, device: str, graph: bool = True) -> None:
        self.run, self.device, self.how = run, device, "wall clock"
        self.loops = self.calls_per_replay = 1
        self.calls: Run = run
        # The first calls compile, allocate and choose algorithms; none of that belongs to the time of a call.
        for _ in range(WARM):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
            self.how = "events"
            if graph:
                # A replayed graph leaves out the work of the host, which would hide the kernels of a short call.
                self._capture()
            # Two events have a resolution of about half a microsecond, so short calls are timed several in a row.
            self.loops = max(1, round(LEAST_MS / max(self.once() * self.calls_per_replay, 1e-3)))

    def _capture(self) -> None:
        """Capture the call in a graph, or say in ``how`` why that cannot be."""
        try:
            self._graph(1)
            if self.once() < SHORT_MS:
                self._graph(MANY)
        except RuntimeError as error:
            # The reason stands in the report: times between events are not those of a replay.
            self.calls, self.calls_per_replay, self.how = self.run, 1, f"events ({str(error).splitlines()[0]})"

    def _graph(self, calls: int) -> None:
        """Capture so many calls in one graph, in the memory pool of all graphs."""
        # PyTorch asks for a first call on a side stream before a capture, so that lazy initialization is not captured.
        stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph, pool, before = torch.cuda.CUDAGraph(), _keeper().pool(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool):
                for _ in range(calls):
                    self.run()  # the result is given up: the next call, and the next graph, may take its memory
        except RuntimeError:
            torch.cuda.set_stream(before)  # a failed capture leaves its own
            _abandon(graph, pool)
            raise
        graph.replay()  # the first time it is sent to the device as well
        torch.cuda.synchronize()
        self.calls, self.calls_per_replay, self.how = graph.replay, calls, "graph replay"

    def once(self) -> float:
        """Return the milliseconds of one call, the mean of a few in a row where they are short."""
        if self.device == "cpu":
            start = time.perf_counter()
            self.calls()
            return (time.perf_counter() - start) * 1e3
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        # The events enclose all calls, so that no call waits for the host to record one.
        for _ in range(self.loops):
            self.calls()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / (self.loops * self.calls_per_replay)


@functools.cache
def _keeper() -> torch.cuda.CUDAGraph:
    """Return a graph that keeps the memory pool of all others: a pool that no graph uses cannot be used again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")
    return graph


_abandoned: list[Any] = []


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Begin again after a capture that failed: the allocator and the random generator still take it for running.

    A capture that succeeds, into a new pool, ends that.
    """
    _abandoned.append((graph, _keeper()))  # the allocator still refers to it
    with contextlib.suppress(RuntimeError, AttributeError):
        torch_private.end_capture(pool)
    torch.cuda.synchronize()
    _keeper.cache_clear()
    _keeper()


def interleaved(runs: dict[str, Timed], repeats: int) -> dict[str, list[float]]:
    """Time each once per round, in turn, so that a slow moment of the machine meets all of them; milliseconds.

    Args:
        runs: name -> what is timed.
        repeats: rounds.

    Returns:
        Name -> a time for each round.

    >>> {name: len(times) for name, times in interleaved({"a": Timed(lambda: None, "cpu")}, 3).items()}
    {'a': 3}
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        # One call of each per round: a slow moment of the machine then falls on all contenders alike.
        for name, run in runs.items():
            times[name].append(run.once())
    return times


def machine(threads: int) -> dict[str, Any]:
    """Return what the figures depend on: processor, GPU, threads, and versions of torch, Triton and Python.

    Args:
        threads: that PyTorch uses on the CPU.
    """
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    # Even a benchmark on the CPU says which GPU is there: the file may lie beside one of that GPU.
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"torch": torch.__version__, "triton": _triton(), "python": platform.python_version()}
    return {"cpu": cpu, "gpu": gpu, "threads": threads, **versions}


def _triton() -> str | None:
    """Return the version of Triton, ``None`` where it is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> list[str]:
    """Return the lines of Linux's description of the processor."""
    # Only Linux has this file; elsewhere platform.processor() has to do.
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []

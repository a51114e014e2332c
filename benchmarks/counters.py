"""What a call needs of the device: kernels, memory, and the speed of a copy to compare it with."""

from __future__ import annotations

import torch

from lightning_norm.bench.clock import Run, Timed, interleaved

NO_KERNELS = ("Memcpy", "Memset", "Activity Buffer", "Command Buffer", "Context Sync", "Stream Sync", "Event Sync")
"""What a profile lists on the device beside kernels."""


def copy_speed(device: str, megabytes: int, repeats: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the GB/s, read and written, of copying a tensor: the driver's copy or a kernel's, whichever is faster."""
    source = torch.ones(megabytes * 10**6 // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    runs = {"driver": lambda: target.copy_(source), "kernel": lambda: torch.neg(source, out=target)}
    times = interleaved({name: Timed(run, device) for name, run in runs.items()}, repeats)
    fastest = min(sorted(t)[len(t) // 2] for t in times.values())
    return 2 * source.numel() * dtype.itemsize / (fastest * 1e6)


def launches(run: Run, device: str) -> int | None:
    """Return how many kernels a call launches, as the profiler counts them; ``None`` where it sees none."""
    if device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    names = [e.name for e in seen.events() if e.device_type.name == "CUDA"]
    return sum(not name.startswith(NO_KERNELS) for name in names) or None


def peak_memory(run: Run, device: str) -> int | None:
    """Return the bytes that a call needs beyond what is there before; ``None`` on a CPU."""
    if device != "cuda":
        return None
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before

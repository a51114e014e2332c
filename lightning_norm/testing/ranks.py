"""Run a function on several real gloo processes, as a distributed training run would."""

from __future__ import annotations

import datetime
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 900.0) -> list[Any]:
    """Call ``fn(rank, *args)`` on ``world_size`` fresh processes that share a gloo group.

    Args:
        fn: a function of a module's top level, since it travels by pickle.
        world_size: how many processes.
        args: what it takes after the rank; travels by pickle.
        timeout: seconds after which all processes are ended.

    A script needs ``if __name__ == "__main__":`` around the call, since processes are spawned.

    Returns:
        What each rank returned, by rank.

    Raises:
        RuntimeError: a rank failed, with its traceback; or ended without a word.
        TimeoutError: the ranks did not finish in time, which a collective that not all of them call looks like.
    """
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        # By value: pickled to a process, tensors would share their memory.
        torch.save((fn, args), here / "call")
        context = _context()
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, folder, timeout), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, here, time.monotonic() + timeout, timeout)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(here / f"result{rank}", weights_only=False) for rank in range(world_size)]


def _context() -> Any:
    """Return a way to start processes that have imported torch already, where the system has one."""
    # Never forked: a forked process would inherit torch's threads in an undefined state.
    context: Any = mp.get_context("forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn")
    if hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload(["lightning_norm.testing"])
    return context


def _wait(ranks: list[Any], here: Path, until: float, timeout: float) -> None:
    while True:
        alive = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for rank, process in enumerate(ranks):
            # The first rank to fail is the cause; the others then wait in a collective for it.
            if process.exitcode:
                error = here / f"error{rank}"
                said = error.read_text() if error.exists() else f"ended with exit code {process.exitcode}"
                raise RuntimeError(f"rank {rank} of {len(ranks)} failed:\n{said}")
        if not alive:
            return
        if time.monotonic() > until:
            raise TimeoutError(
                f"ranks {alive} of {len(ranks)} still ran after {timeout} s: does each call the same collectives?"
            )
        time.sleep(0.02)


def _rank(rank: int, world_size: int, folder: str, timeout: float) -> None:
    here = Path(folder)
    # Several processes with all cores each would wait for one another.
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=(here / "meet").as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        try:
            fn, args = torch.load(here / "call", weights_only=False)
            torch.save(fn(rank, *args), here / f"result{rank}")
        finally:
            dist.destroy_process_group()
    # Also a KeyboardInterrupt or SystemExit of the function: the parent would wait for a rank that is gone.
    except BaseException:
        (here / f"error{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None

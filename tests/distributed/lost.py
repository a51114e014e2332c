"""Ranks that do not meet, each scenario with two real processes: python -m tests.distributed.lost OUT.

Writes, as JSON, what each rank of each scenario ended with. The group gets its short timeout once both ranks have met
and trained some steps, so that a busy machine may take its time over those.
"""

import datetime
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_norm import BatchNorm

TIMEOUT = 8.0
STEPS = 3


def set_timeout(seconds):
    """From here on, a collective that not every rank calls ends after so many seconds."""
    # torch 2.11 has it under the private name alone.
    change = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in dist.distributed_c10d._world.pg_map:  # the layers pool in groups of their own
        change(datetime.timedelta(seconds=seconds), group)


def step(layer):
    layer(torch.randn(4, 3, requires_grad=True)).square().sum().backward()


def exhausted(rank, layer):
    """Rank 1 has no batch left; its process goes on with something else."""
    if rank == 1:
        time.sleep(3600)  # the parent kills it when rank 0 has ended
    else:
        step(layer)


def finished(rank, layer):
    """Rank 1 has no batch left and ends."""
    if rank == 0:
        step(layer)


def killed(rank, layer):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    step(layer)


def silent(rank, layer):
    """No packet comes from rank 1 any more, and no end of the connection either."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    step(layer)


def unplugged(rank, layer):
    """The network drops every connection of rank 1."""
    if rank == 1:
        for fd in map(int, os.listdir("/proc/self/fd")):
            try:
                socket.socket(fileno=os.dup(fd)).shutdown(socket.SHUT_RDWR)
            except OSError:  # a file, or not connected
                continue
    step(layer)


def skipped(rank, layer):
    """Rank 1 leaves out the layer, as with stochastic depth by itself, and goes on with a collective of its own."""
    if rank == 1:
        dist.all_reduce(torch.ones(7))
    else:
        step(layer)


def alone(rank, layer):
    """Rank 0 evaluates while rank 1 does not."""
    if rank == 0:
        layer.eval()
        untracked = BatchNorm(3, track_running_stats=False).eval()  # takes the statistics of the batch, its own
        for _ in range(3):
            untracked(layer(torch.randn(4, 3)))
        layer.train()
        layer.sync = False
        step(layer)


SCENARIOS = (exhausted, finished, killed, silent, unplugged, skipped, alone)


def run(scenario, rank, here):
    dist.init_process_group(
        "gloo",
        init_method=(here / f"meet_{scenario.__name__}").as_uri(),
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=1800),
    )
    layer = BatchNorm(3)
    for _ in range(STEPS):
        step(layer)
    set_timeout(TIMEOUT)
    error = None
    try:
        scenario(rank, layer)
    except Exception as e:
        error = e
    ended = {"error": type(error).__name__, "text": str(error)}
    (here / f"{scenario.__name__}_{rank}.json").write_text(json.dumps(ended))


def main(here):
    torch.set_num_threads(1)
    children = {}
    for scenario in SCENARIOS:
        for rank in (0, 1):
            pid = os.fork()  # what was imported is there already
            if not pid:
                try:
                    run(scenario, rank, here)
                finally:
                    os._exit(0)
            children[scenario.__name__, rank] = pid
    for (_, rank), pid in children.items():
        if rank == 0:
            os.waitpid(pid, 0)
    for (_, rank), pid in children.items():
        if rank == 1:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

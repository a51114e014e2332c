"""Two nodes of two ranks on this machine: two torchrun agents, one rendezvous."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.inside import Uneven, batches
from tests.distributed.nodes import SHARES

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_statistics_of_the_world_and_of_the_node(tmp_path):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
    ]
    launch += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "nodes", "--local-addr", "127.0.0.1"]
    launch += ["-m", "tests.distributed.nodes", str(tmp_path / "held")]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    logs = [(tmp_path / f"agent{n}").open("w") for n in range(2)]
    agents = [subprocess.Popen(launch, cwd=ROOT, env=environment, stdout=log, stderr=log) for log in logs]
    try:
        codes = [agent.wait(200) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
        for log in logs:
            log.close()
    assert codes == [0, 0], (tmp_path / "agent0").read_text()[-3000:]
    stored = [torch.load(f"{tmp_path}/held.{rank}") for rank in range(4)]
    assert [h["number"] for h in stored] == sorted(h["number"] for h in stored)
    y = Uneven().net[0](next(iter(batches(0, 1, None)))[0]).detach()
    nodes = y.split([sum(SHARES[:2]), sum(SHARES[2:])])
    for rank, groups in enumerate(stored):
        for group, part in (("world", y), ("node", nodes[rank // 2]), (2, nodes[rank // 2])):
            for name, expected in (("mean", part.mean((0, 2, 3))), ("var", part.var((0, 2, 3)))):
                torch.testing.assert_close(groups[group][f"net.1.running_{name}"], expected, rtol=1e-10, atol=1e-10)
        for name, weight in groups["world"].items():  # DDP has made one step of all
            if "weight" in name:
                torch.testing.assert_close(weight, stored[0]["world"][name], rtol=0, atol=0)

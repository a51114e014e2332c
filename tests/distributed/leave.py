"""One of two ranks that end while gloo still has something in hand: python -m tests.distributed.leave HOW MEET RANK.

HOW: "at_once", behind collectives that both ranks take part in; "pending", rank 0 behind one that rank 1 skips.
"""

import sys

import torch
import torch.distributed as dist

from lightning_norm.ops import sync


def main(how, meet, rank):
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    sync.GRACE = {"at_once": 600.0, "pending": 0.5}[how]
    sync.active_ranks(sync=True, training=True)  # a group of a layer's own, which must end too
    assert sync.gather(rank) == [0, 1]
    if how == "pending" and rank:
        sys.stdin.read()  # until the test has seen rank 0 end
        return
    # Only tensors that Python knows need Python to be let go of.
    tensors = [torch.ones(1000) for _ in range(200)]
    for tensor in tensors:
        tensor.known = True
        dist.all_reduce(tensor, async_op=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

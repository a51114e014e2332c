"""Run a step of cooperative kernels, each program in a process of its own, all at once, and print whether it is right.

    TRITON_INTERPRET=1 python -m tests.kernels.interpreted.side_by_side sn

In one process the interpreter runs programs in turn, and the first would wait forever for the others. What they write
lies in shared memory here, and the interpreter's atomics are real ones.
"""

import os
import sys

import torch
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

from lightning_norm.kernels import grid, launcher
from lightning_norm.kernels.cooperative import launch as cooperative
from lightning_norm.testing.kit import features, noise
from tests.kernels.interpreted.test_cooperative import step

PROGRAMS = 3


def tensors_in(arguments):
    """Yield the tensors of a launch."""
    for a in arguments:
        if isinstance(a, tuple):
            yield from tensors_in(a)
        elif isinstance(a, torch.Tensor) and a.numel():
            yield a


def side_by_side(self, *arguments, grid, **options):
    """Launch a kernel as a GPU does: all programs at once, and all phases in one launch."""
    plan = options.get("PLAN")
    if plan is None:
        in_turn(self, *arguments, grid=grid, **options)
        return
    if plan.phase > 0:
        return  # ran with the first
    for t in tensors_in(arguments):
        t.share_memory_()
    children = []
    for i in range(*grid):
        children.append(os.fork())
        if not children[-1]:
            interpreter_builder.set_grid_dim = lambda *_: set_grid_dim(*grid, 1, 1)
            interpreter_builder.set_grid_idx = lambda *_, i=i: set_grid_idx(i, 0, 0)
            in_turn(self, *arguments, grid=(1,), **{**options, "PLAN": plan._replace(phase=-1)})
            os._exit(0)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    launched.append(*grid)


launched = []
in_turn = InterpretedFunction.run
set_grid_dim, set_grid_idx = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx


def main(key):
    torch.set_num_threads(1)
    x = features(4, 24, 14, 14)
    dy = noise(4, 24, 14, 14, seed=7)
    apart = step(key, {}, x, dy)
    grid.COOPERATIVE, launcher._plans, InterpretedFunction.run = True, {}, side_by_side
    cooperative.BUSY, cooperative.RESIDENT = 2 * PROGRAMS, 1
    # A second step meets the counters as the first has left them; another number of programs as well.
    for _ in range(2):
        together = step(key, {}, x, dy)
        assert all(map(torch.equal, apart, together)), "other values than those of the launches of four kernels"
        launcher._plans, cooperative.BUSY = {}, 4
    print("the same", launched)


if __name__ == "__main__":
    main(*sys.argv[1:])

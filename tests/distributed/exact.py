"""A small network with a normalizer in it, trained for some steps on shares of a batch or on the whole of it."""

import contextlib
import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lightning_norm import normalizers

C, N, STEPS = 6, 7, 3
SHARES = {2: [(4, 3), (0, 7), (6, 1)], 3: [(3, 1, 3), (0, 5, 2), (1, 1, 5)]}


class Network(nn.Module):
    """Conv, normalizer, ReLU in place, conv, normalizer; then what the case asks for.

    Cases: "plain"; "twice", one layer called twice in a step; "branch", a layer that every other step has no use for;
    "checkpoint" and "reentrant", activations computed again in the backward pass.
    """

    def __init__(self, key, case, arguments):
        super().__init__()
        torch.manual_seed(0)
        cls = normalizers()[key]
        self.first, self.second, self.branch = (cls(C, **{**cls.test_arguments, **arguments}) for _ in range(3))
        self.one, self.two = nn.Conv2d(3, C, 3), nn.Conv2d(C, C, 3, padding=1)
        self.case, self.steps = case, 0
        if case != "branch":
            self.branch = None

    def block(self, x):
        return self.second(self.two(torch.relu_(self.first(self.one(x)))))

    def forward(self, x):
        if self.case in ("checkpoint", "reentrant"):
            y = checkpoint(self.block, x, use_reentrant=self.case == "reentrant", preserve_rng_state=False)
        else:
            y = self.block(x)
        if self.case == "twice":
            y = self.second(y * 2 + 1) + self.first(y)
        if self.case == "branch":
            y = y + self.branch(y) if self.steps % 2 else y
            self.steps += 1
        return y


def data(step):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(N, 3, 6, 5, generator=g, dtype=torch.float64)
    x = x * torch.rand(N, 3, 1, 1, generator=g, dtype=torch.float64) + 3 * torch.randn(N, 3, 1, 1, generator=g).double()
    return x, torch.randn(N, C, 4, 3, generator=g, dtype=torch.float64)


def train(key, case, arguments=None, dtype=torch.float64, rank=0, world=1, compiled="", accumulate=1, **ddp):
    """Return outputs and input gradients of each step, then parameters and buffers."""
    net = Network(key, case, arguments or {}).to(dtype)
    if compiled == "layers":
        for layer in net.modules():
            if hasattr(layer, "algebra"):
                layer.compile()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    run = net
    if compiled == "network":
        torch.compiler.reset()  # the jobs before have used up the recompilations of this code
        run = torch.compile(net, backend="aot_eager", fullgraph=True)
    if world > 1:
        run = DistributedDataParallel(run, **ddp)
    got = {}
    for step in range(STEPS * accumulate):
        last = (step + 1) % accumulate == 0
        x, dy = (t.to(dtype) for t in data(step))
        if world > 1:
            shares = SHARES[world][step % 3]
            x, dy = (t.split(shares)[rank].clone() for t in (x, dy))
        x.requires_grad_()
        with contextlib.nullcontext() if last or world == 1 else run.no_sync():
            y = run(x)
            # a loss per sample that no normalizer annuls; DDP averages over ranks
            (((y * dy).sum() + y.square().sum() / 9) / N / C * world).backward()
        got[f"output {step}"] = y.detach().clone()
        got[f"input gradient {step}"] = x.grad / world
        if last:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    stored = {name: value.detach().clone() for name, value in net.state_dict().items()}
    return got, copy.deepcopy(stored)


def train_all(rank, world, jobs):
    """Run each job, a dictionary of arguments, in this rank."""
    results = []
    for number, job in enumerate(jobs):
        try:
            results.append(train(**job, rank=rank, world=world))
        except Exception as error:  # which job it was is what the reader wants to know
            raise RuntimeError(f"job {number} on rank {rank}: {job}") from error
        dist.barrier()
    return results


def joined(results):
    """Put the shares of all ranks together; return them, and what each rank holds."""
    parts = [got for got, _ in results]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, [state for _, state in results]

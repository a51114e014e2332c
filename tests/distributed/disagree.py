"""Ranks that build different models with ``swap`` alone: what the first forward pass of each says."""

import datetime

import torch
import torch.distributed as dist
from torch import nn

import lightning_norm

TIMEOUT = datetime.timedelta(seconds=8)
"""Of the process group made for a scenario: what is told by the timeout alone is told then."""


def network(width=6):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 6, 1), nn.BatchNorm2d(6))


def swapped(norm="sn", width=6, **options):
    model = network(width).train()
    lightning_norm.swap(model, norm, **options)
    return model


def x():
    return torch.randn(4, 3, 8, 8)


def step(model):
    model(x()).square().mean().backward()


def another_order(rank, model):
    y = model[0](x())
    for index in (1, 3) if rank else (3, 1):
        model[index](y)


def one_forward_more(rank, model):
    """Rank 0 looks at samples in training mode between two steps; the first step has found nothing to tell."""
    step(model)
    if rank == 0:
        with torch.no_grad():
            model(x())
    step(model)
    step(model)


SCENARIOS = {
    "agreed": lambda rank: step(swapped()),
    "normalizers": lambda rank: step(swapped(("bn", "sn")[rank])),
    "arguments": lambda rank: step(swapped(norm_args={"eps": (1e-5, 1e-3)[rank]})),
    "own arguments": lambda rank: step(swapped(norm_args={"choices": (("in", "bn"), ("in", "ln", "bn"))[rank]})),
    "channels": lambda rank: step(swapped(width=(6, 8)[rank])),
    "ghost batches": lambda rank: step(swapped(norm_args={"virtual_batch_size": (2, 4)[rank]})),
    "ghost batches on one rank": lambda rank: step(swapped(norm_args=[{"virtual_batch_size": 2}, None][rank])),
    "layers": lambda rank: step(swapped(exclude=[[], ["1"]][rank] or None)),
    "order": lambda rank: another_order(rank, swapped()),
    "affine": lambda rank: step(swapped(norm_args={"affine": rank == 0})),
    "groups": lambda rank: step(swapped(sync_group=("world", "node")[rank])),
    "sizes of groups": lambda rank: step(swapped(sync_group=(2, 1)[rank])),
    "one forward more": lambda rank: one_forward_more(rank, swapped()),
    "evaluation on one rank": lambda rank: swapped().eval()(x()) if rank == 0 else None,
    "a forward on one rank": lambda rank: swapped()(x()) if rank == 0 else None,
}


def everything(rank, names, folder):
    """Run each scenario in a process group of its own, and return what it ended with."""
    said = {}
    for name in names:
        dist.destroy_process_group()
        place = f"file://{folder}/{name.replace(' ', '_')}"
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=TIMEOUT)
        torch.manual_seed(rank)
        try:
            SCENARIOS[name](rank)
            said[name] = ""
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said

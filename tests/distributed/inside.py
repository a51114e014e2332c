"""Many Trainers in one set of processes: those of run_ranks, which have their process group already."""

import os
import warnings

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from tests.callbacks.toy import LateNet


def trainer(rank, world, **kwargs):
    """A Trainer that takes this process for rank ``rank``, as one that torchrun has started."""
    warnings.filterwarnings("ignore", module=r"lightning\.")
    os.environ.update({"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"})
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults = {"strategy": "ddp", "max_epochs": 2, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    return Trainer(accelerator="cpu", devices=world, **{**quiet, **defaults, **kwargs})


class Uneven(LateNet):
    """In float64, with a loss whose mean over ranks is the loss of the whole batch, however it is shared out."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.built = torch.nn.Sequential(torch.nn.Conv2d(6, 6, 3), torch.nn.BatchNorm2d(6))
        self.late = torch.nn.BatchNorm2d(6)
        self.double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self(x) - y).square().sum() / TOTAL * self.trainer.world_size


TOTAL = 6
STEPS = 4


def batches(rank, world, shares):
    """A loader of STEPS batches of TOTAL samples, of which each rank has its share."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS * TOTAL, 3, 8, 8, generator=generator, dtype=torch.float64) * 3 + 5
    y = torch.randn(STEPS * TOTAL, generator=generator, dtype=torch.float64)
    if world == 1:
        return DataLoader(TensorDataset(x, y), TOTAL)
    first = sum(shares[:rank])
    mine = [torch.arange(first, first + shares[rank]) + step * TOTAL for step in range(STEPS)]
    return DataLoader(TensorDataset(x, y), batch_sampler=[m.tolist() for m in mine])

"""Fit with ddp while rank 1 gets lost; prints how rank 0 ends: python -m tests.distributed.lost_trainer WHAT."""

import datetime
import os
import signal
import sys

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, IterableDataset

from lightning_norm import NormSwap
from tests.callbacks.toy import Net
from tests.distributed.lost import set_timeout

WHAT = sys.argv[-1]
TIMEOUT = 20.0
"""Seconds, from the third batch on: Lightning starts the second process before."""


class Stream(IterableDataset):
    """Without a length, so that nobody can know beforehand that rank 1 has less."""

    def __iter__(self):
        short = WHAT == "short" and os.environ.get("LOCAL_RANK") == "1"
        for _ in range(12 if short else 40):
            yield torch.randn(3, 8, 8), torch.randn(())


class Lost(Net):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            set_timeout(TIMEOUT)
        if batch_idx == 3 and self.global_rank == 1 and WHAT in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if WHAT == "kill" else signal.SIGSTOP)
        return super().training_step(batch, batch_idx)


if __name__ == "__main__":
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(timeout=datetime.timedelta(seconds=1800)),
        callbacks=[NormSwap("sn")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    error = None
    try:
        trainer.fit(Lost(), DataLoader(Stream(), 4))
    except Exception as e:
        error = e
    print(type(error).__name__, flush=True)
    for child in getattr(trainer.strategy.launcher, "procs", []):  # a stopped one hears nothing else
        child.kill()
    os._exit(0)

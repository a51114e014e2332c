"""One step on two nodes of two ranks, started by torchrun: torchrun ... -m tests.distributed.nodes OUT."""

import os
import sys
import warnings

import torch
from lightning.pytorch import Trainer

from lightning_norm import NormSwap
from tests.distributed.inside import Uneven, batches

SHARES = (2, 1, 1, 2)


def fit(group):
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        num_nodes=2,
        strategy="ddp",
        max_steps=1,
        callbacks=[NormSwap("bn", norm_args={"momentum": 1.0}, sync_group=group)],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Uneven()
    trainer.fit(model, batches(trainer.global_rank, 4, SHARES))
    return trainer.global_rank, {name: t.clone() for name, t in model.state_dict().items()}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    got = {group: fit(group) for group in ("world", "node", 2)}
    rank = got["world"][0]
    got = {group: stored for group, (_, stored) in got.items()}
    torch.save({"number": os.environ["GROUP_RANK"], **got}, f"{sys.argv[1]}.{rank}")

"""Train a swapped network on one or two processes and save what rank 0 holds.

Run it as python train.py KEY DEVICES OUT [BACKEND].

A KEY that ends in + accumulates gradients and statistics over two batches. BACKEND "triton" trains in float32.
"""

import sys

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_norm import InversePower, NormScheduler, NormSwap
from tests.callbacks.toy import LateNet


class Double(LateNet):
    """Two calls of one layer in a step, as in a siamese network, on top of LateNet."""

    def features(self, x):
        return super().features(x) + self.net[1](x.repeat(1, 2, 1, 1)).mean((2, 3), keepdim=True)


def main(key, devices, out, backend="auto"):
    seed_everything(0)
    key, more = key.removesuffix("+"), key.endswith("+")
    dtype = torch.float32 if backend == "triton" else torch.float64
    model = Double().double()
    model.built = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)).double()
    model.late = nn.BatchNorm2d(6).double()
    model.to(dtype)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        *(
            t.to(dtype)
            for t in (torch.randn(24, 3, 8, 8, generator=generator) * 3 + 5, torch.randn(24, generator=generator))
        )
    )
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=[
            NormSwap(
                key, norm_args={"num_groups": 2} if key == "gn" else None, accumulate_statistics=more, backend=backend
            ),
            *([NormScheduler({"momentum": InversePower(0.5)}, "step")] if key == "sn" else []),
        ],
        accumulate_grad_batches=1 + more,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    model.train_dataloader = lambda: DataLoader(
        data,
        batch_size=8 // devices,
        sampler=DistributedSampler(data, devices, trainer.global_rank, shuffle=False),
    )
    trainer.fit(model)
    if trainer.is_global_zero:
        torch.save(model.state_dict(), out)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])

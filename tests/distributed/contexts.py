"""Two ranks that see different images agree on the contexts: python -m tests.distributed.contexts OUT."""

import sys

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from lightning_norm import NormContext, NormSwap
from tests.callbacks.toy import LateNet
from tests.normalizers.test_contexts import images


class Reporting(LateNet):
    def on_fit_end(self):
        stored = {name: t for name, t in self.state_dict().items() if not name.startswith("net.0")}
        torch.save(stored, f"{sys.argv[1]}.{self.global_rank}")


if __name__ == "__main__":
    seed_everything(0)
    x, _ = images(48)
    y = torch.randn(48, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[NormSwap("cn"), NormContext()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Reporting(), DataLoader(TensorDataset(x, y), 12, shuffle=True))

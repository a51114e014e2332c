"""Two ranks that swap different layers: python -m tests.distributed.disagree_at_setup."""

import os

from lightning.pytorch import Trainer

from lightning_norm import NormSwap
from tests.callbacks.toy import LateNet, loader

if __name__ == "__main__":
    swap = NormSwap("sn", exclude=["late"] if os.environ.get("LOCAL_RANK", "0") == "1" else None)
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", callbacks=[swap], logger=False)
    trainer.fit(LateNet(), loader())

"""Train on two processes with a NormMonitor and count what each rank reads: python monitor.py OUT."""

import sys
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_norm import NormMonitor, NormSwap
from lightning_norm.callbacks.monitor.quantities import Quantities
from tests.callbacks.toy import Net, loader


def main(out):
    reads = []
    original = Quantities.read
    Quantities.read = lambda self, *args: reads.append(1) or original(self, *args)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[NormSwap("sn"), NormMonitor(progress_bar=True, extras=True)],
        logger=TensorBoardLogger(out),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(Net(), loader(16))
    (out / f"rank{trainer.global_rank}").write_text(str(len(reads)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Fit in processes that this one starts; look at what it has then.

python -m tests.distributed.spawned STRATEGY OUT [late], where late leaves out the swap before the processes start.
"""

import sys

import torch
from lightning.pytorch import Trainer

from lightning_norm import NormSwap
from tests.callbacks.toy import Net, loader


class Stored(Net):
    def on_train_end(self):
        if self.global_rank == 0:
            torch.save(self.state_dict(), sys.argv[2])


if __name__ == "__main__":
    model, swap = Stored(), NormSwap("sn")
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy=sys.argv[1],
        callbacks=[swap],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if sys.argv[3:] != ["late"]:
        swap.swap_before_launch(model)
    trainer.fit(model, loader(16, 4))
    learned, stored = torch.load(sys.argv[2]), model.state_dict()
    assert learned.keys() == stored.keys(), learned.keys() ^ stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in learned.items())
    assert not torch.equal(stored["net.1.mean_weight"], torch.ones(3))
    assert len(swap.report) == 1
    trainer.test(model, loader(8, 4), verbose=False)
    swap.report.undo()
    print(type(model.net[1]).__name__)

"""A training run that can be killed: python -m tests.callbacks.swap.killed FOLDER trains to step 9 and waits."""

import random
import sys
import time

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_norm import Chain, Constant, Cosine, InversePower, Linear, NormScheduler, NormSwap, Warmup
from lightning_norm.layers.base import Normalizer
from tests.callbacks.toy import LateNet, loader

EPOCHS, BATCHES, EVERY, WAIT_AT = 4, 5, 4, 9  # a checkpoint in the middle of epoch 1, the end in the same epoch


class Resumable:
    """A loader with its own order per epoch that knows where it is, as torchdata's StatefulDataLoader does."""

    def __init__(self):
        self.batches = list(loader(4 * BATCHES))
        self.epoch = self.done = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        if self.done == len(self.batches):
            self.epoch, self.done = self.epoch + 1, 0
        order = random.Random(self.epoch).sample(self.batches, len(self.batches))
        while self.done < len(order):
            self.done += 1
            yield order[self.done - 1]

    def state_dict(self):
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state):
        self.epoch, self.done = state["epoch"], state["done"]


class Late(LateNet):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class Watch(Callback):
    """Write down the values that each step trained with; wait at a step for the end."""

    def __init__(self, wait_at=None):
        self.wait_at, self.values = wait_at, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        layers = [m for m in pl_module.modules() if isinstance(m, Normalizer)]
        stored = [layer.scheduled(name).item() for layer in layers for name in ("radius", "momentum")]
        self.values[trainer.global_step] = stored
        if trainer.global_step == self.wait_at:
            print("waiting", flush=True)
            time.sleep(3600)  # the parent kills it long before


def train(folder, wait_at=None, resume_from=None):
    """Train and return what there is at the end: weights and statistics, optimizer state, values per step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, watch = Late(), Watch(wait_at)
    radius = Chain([Linear(0.0, 0.3, epochs=1.5), Cosine(0.3, 0.1, steps=7), Constant(0.2)])
    schedules = {"net.*:radius": radius, "radius": Warmup(schedule=InversePower(0.5, 0.4), epochs=0.7)}
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        callbacks=[
            NormSwap("sn", norm_args={"sparse": True}),
            NormScheduler(schedules, interval="step"),
            NormScheduler({"momentum": InversePower(0.5)}),
            ModelCheckpoint(folder, "{step}", every_n_train_steps=EVERY, save_top_k=-1),
            watch,
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, Resumable(), loader(4), ckpt_path=resume_from)
    return model.state_dict(), trainer.optimizers[0].state_dict(), watch.values


if __name__ == "__main__":
    train(sys.argv[1], WAIT_AT)

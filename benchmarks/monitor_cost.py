"""Measure what NormMonitor costs in the steps of examples/configs/digits_sn.yaml, a ResNet-18, on this machine.

    python -m benchmarks.monitor_cost [--steps 60]

In one fit, every second step is logged: each logged step is compared with the one after it, so that whatever else the
machine does falls on both. CPU time, of all threads of the process, hears less of it than wall time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_norm import NormMonitor, NormSwap
from lightning_norm.demo.job import Digits, ImageClassifier


class Clock(Callback):
    """Note the seconds of each step, the monitor's part included: it stands before the monitor."""

    clocks = {"wall": time.perf_counter, "CPU": time.process_time}

    def __init__(self) -> None:
        self.begin = dict.fromkeys(self.clocks, 0.0)
        self.seconds: dict[str, list[float]] = {name: [] for name in self.clocks}

    def on_train_batch_start(self, *_: object) -> None:
        """Start the clocks."""
        self.begin = {name: now() for name, now in self.clocks.items()}

    def on_train_batch_end(self, *_: object) -> None:
        """Stop them."""
        for name, now in self.clocks.items():
            self.seconds[name].append(now() - self.begin[name])


class Timed(NormMonitor):
    """Note the seconds of its own work in the logged steps, and at the end of an epoch and of fit."""

    spent: dict[str, list[float]]
    monitor_seconds: dict[str, list[float]]

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        """Log values and scalars, every second step."""
        begin = {name: now() for name, now in Clock.clocks.items()}
        super().on_train_batch_start(trainer, *arguments)
        if trainer.global_step % 2 == 0:
            for name, now in Clock.clocks.items():
                self.monitor_seconds[name].append(now() - begin[name])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log values and histograms."""
        begin = time.perf_counter()
        super().on_train_epoch_end(trainer, pl_module)
        self.spent["epoch"].append(time.perf_counter() - begin)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log values, the table and pictures."""
        begin = time.perf_counter()
        super().on_train_end(trainer, pl_module)
        self.spent["fit"].append(time.perf_counter() - begin)


def main() -> None:
    """Print the medians, in milliseconds and in per cent of a step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    clock, monitor = Clock(), Timed(every_n_steps=2)
    monitor.spent, monitor.monitor_seconds = {"epoch": [], "fit": []}, {name: [] for name in Clock.clocks}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=[clock, NormSwap("sn"), monitor],
            logger=TensorBoardLogger(folder),
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(ImageClassifier(), datamodule=Digits(batch_size=64))
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for name, seconds in clock.seconds.items():
        pairs = list(zip(seconds[4::2], seconds[5::2], strict=False))  # the first four warm up
        step = statistics.median(b for _, b in pairs)
        cost = statistics.median(a - b for a, b in pairs)
        print(f"{name} time, {len(pairs)} pairs of steps, median step {step * 1e3:.1f} ms")
        part = statistics.median(monitor.monitor_seconds[name][2:])
        print(f"  a logged step took longer by    {cost * 1e3:+.2f} ms  {cost / step:+.2%} of a step")
        print(f"  the monitor's own part of it    {part * 1e3:+.2f} ms  {part / step:+.2%} of a step")
        print(f"  the same, logged every 50 steps          {part / step / 50:+.3%} of a step")
    step = statistics.median(clock.seconds["wall"])
    for what, seconds in monitor.spent.items():
        value = statistics.median(seconds)
        print(f"wall time, the end of {what:<8s}{value * 1e3:+.1f} ms  {value / step:.2f} steps")


if __name__ == "__main__":
    main()

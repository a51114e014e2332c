"""Callbacks and the plugin under ``pytorch_lightning``, which has the same code and other classes."""

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import lightning_norm as ln
from tests.callbacks.toy import loader

NAMES = [lightning.pytorch, pytorch_lightning]


class Steps:
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class New(Steps, lightning.pytorch.LightningModule):
    """A process that is spawned finds it by its name."""


class Old(Steps, pytorch_lightning.LightningModule):
    """The same."""


def net(pl):
    return New() if pl is lightning.pytorch else Old()


def trainer(pl, *callbacks, **more):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", "logger": False, **quiet, **more}, callbacks=[*callbacks]
    )


@pytest.mark.parametrize("pl", NAMES)
def test_swap_schedule_and_recalibration(pl):
    model = net(pl)
    scheduler = ln.NormScheduler({"momentum": ln.Constant(0.3)})
    recalibration = ln.NormRecalibrate()
    trainer(pl, ln.NormSwap("sn"), scheduler, recalibration).fit(model, loader())
    assert type(model.net[1]) is ln.SwitchableNorm
    assert recalibration.result.batches == 2


@pytest.mark.parametrize("pl", NAMES)
def test_the_monitor_logs_all_it_has(pl, tmp_path):
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    trainer(pl, ln.NormSwap("sn"), ln.NormMonitor(every_n_steps=1), logger=logger).fit(net(pl), loader())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert all(events.Tags()[kind] for kind in ("scalars", "histograms", "images", "tensors"))


@pytest.mark.parametrize("pl", NAMES)
@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "WeightAveraging", "ModelPruning"])
def test_conflicts_are_seen(pl, name):
    kind = getattr(pl.callbacks, name)
    callback = {"Stoc": lambda: kind(0.1), "Weig": kind, "Mode": lambda: kind("l1_unstructured", amount=0.1)}[
        name[:4]
    ]()
    with pytest.raises(ln.ConflictError, match=f"{name} stands before NormSwap"):
        trainer(pl, callback, ln.NormSwap("sn")).fit(net(pl), loader())


@pytest.mark.parametrize("pl", NAMES)
def test_spawned_processes_are_refused(pl):
    runner = trainer(pl, ln.NormSwap("sn"), strategy="ddp_spawn", devices=1)
    with pytest.raises(Exception, match="swap_before_launch"):
        runner.fit(net(pl), loader())


@pytest.mark.parametrize("pl", NAMES)
@pytest.mark.parametrize("both", [False, True])
def test_the_plugin_is_taken(pl, both):
    model = net(pl)
    runner = trainer(pl, plugins=[ln.NormSync()], strategy="ddp", devices=1, sync_batchnorm=both)
    assert isinstance(runner.strategy._layer_sync, ln.NormSync)
    assert type(ln.NormSync().apply(model).net[1]) is ln.BatchNorm

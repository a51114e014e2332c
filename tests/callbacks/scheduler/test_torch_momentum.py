"""NormScheduler and the momentum of torch's own layers."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_norm import NormMonitor, NormScheduler, NormSwap, Staircase, Steps
from tests.callbacks.toy import Net, loader, trainer


class Two(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.BatchNorm2d(6, momentum=None),
            nn.InstanceNorm2d(6),  # keeps no running statistics
        )


class Trace(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append([m.momentum for m in pl_module.net[1:3]])


def test_where_nothing_is_swapped():
    trace, model = Trace(), Two()
    trainer(NormScheduler({"momentum": Staircase(0.8, 0.5, every=2, floor=0.3)}), trace, max_epochs=5).fit(
        model, loader(4)
    )
    assert trace.seen == [[0.8] * 2, [0.8] * 2, [0.4] * 2, [0.4] * 2, [0.3] * 2]
    assert model.net[3].momentum == 0.1


def test_the_statistics_follow():
    torch.manual_seed(0)
    model, twin = Two(), Two()
    twin.load_state_dict(model.state_dict())
    for layer in twin.net[1:3]:
        layer.momentum = 1.0
    trainer(NormScheduler({"momentum": 1})).fit(model, loader())
    trainer().fit(twin, loader())
    assert all(torch.equal(t, twin.state_dict()[n]) for n, t in model.state_dict().items())


def test_in_what_a_swap_has_left():
    trace, model = Trace(), Two()
    callbacks = [NormScheduler({"net.2:momentum": {0: 0.9, 1: 0.7}, "momentum": 0.5}), NormSwap("sn", include=["1"])]
    trainer(*callbacks, trace, max_epochs=2).fit(model, loader(4))
    assert type(model.net[1]).__name__ == "SwitchableNorm"
    assert trace.seen == [[0.5, 0.9], [0.5, 0.7]]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_has_the_same_values(tmp_path):
    schedules = {"momentum": {0: 0.9, 3: 0.2}}
    saved = ModelCheckpoint(tmp_path, filename="last")
    trainer(NormScheduler(schedules, "step"), saved, enable_checkpointing=True).fit(Two(), loader())
    trace = Trace()
    run = trainer(NormScheduler(schedules, "step"), trace, max_epochs=2)
    run.fit(Two(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert trace.seen == [[0.9] * 2, [0.2] * 2]
    trainer(NormScheduler(schedules, "step")).test(Two(), loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)


@pytest.mark.parametrize("swapped", [True, False])
def test_the_monitor_logs_it(tmp_path, swapped):
    logger = CSVLogger(tmp_path)
    callbacks = [
        NormScheduler({"momentum": {0: 0.9, 1: 0.7}}),
        NormMonitor(),
        *[NormSwap("sn", include=["1"])] * swapped,
    ]
    trainer(*callbacks, logger=logger, max_epochs=2).fit(Two(), loader(4))
    with open(logger.experiment.metrics_file_path, encoding="utf-8") as file:
        logged = list(csv.DictReader(file))
    assert [row["norm/BatchNorm2d/momentum/net.2"] for row in logged] == [
        "0.9",
        "0.7",
        "0.7",
    ]
    assert ("norm/BatchNorm2d/momentum/net.1" in logged[0]) != swapped
    assert ("norm/sn/momentum/net.1" in logged[0]) == swapped


def test_what_torch_has_not_is_told():
    with pytest.raises(ValueError, match=r"no layer has a value 'radius' to schedule.* They have: momentum \(2 layers"):
        trainer(NormScheduler({"radius": 0.5})).fit(Two(), loader())
    with pytest.raises(ValueError, match="momentum has no effect in InstanceNorm2d net.3 with track_running_stats=Fal"):
        trainer(NormScheduler({"net.3:momentum": 0.5})).fit(Two(), loader())
    with pytest.raises(ValueError, match="gives 2 in epoch 1, but BatchNorm2d net.1 takes momentum from 0 to 1"):
        trainer(NormScheduler({"momentum": {0: 0.5, 1: 2}}), max_epochs=2).fit(Two(), loader())


def test_a_mapping_means_steps():
    assert NormScheduler({"momentum": {0: 0.9, "10": 0.1}}).schedules == {"momentum": Steps({0: 0.9, 10: 0.1})}
    with pytest.raises(ValueError, match=r"schedules\['momentum'\]: Steps needs the value at the start"):
        NormScheduler({"momentum": {10: 0.1}})

"""NormSync by itself, and in Trainers of two ranks."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_norm import BatchNorm, NormSwap, NormSync, SwitchableNorm, SyncWarning, load_from_checkpoint
from lightning_norm.cli.norm_cli import NormCLI
from lightning_norm.surgery.manifest import manifest_of
from lightning_norm.testing.ranks import run_ranks
from tests.callbacks.toy import loader
from tests.callbacks.toy import trainer as one_process
from tests.distributed.inside import Uneven, batches, trainer

SHARES = (4, 2)


class Custom(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def network():
    shared = nn.BatchNorm2d(6)
    return nn.Sequential(
        nn.Conv2d(3, 6, 1), shared, SwitchableNorm(6), shared, nn.Flatten(), nn.BatchNorm1d(24), nn.SyncBatchNorm(24)
    )


class TestApplyAndRevert:
    def test_the_very_modules_come_back_with_what_was_learned(self):
        net, sync = network(), NormSync("node")
        before, keys = list(net), net.state_dict().keys()
        bn, sn = net[1], net[2]
        bn.register_forward_hook(lambda *_: None)
        assert sync.apply(net) is net
        assert net[2] is sn
        assert [type(net[i]) for i in (1, 3, 5, 6)] == [BatchNorm] * 4
        assert net[1] is net[3]
        assert net[1].weight is bn.weight
        assert [net[1].sync_group, sn.sync_group] == ["node", "world"]
        assert net.state_dict().keys() == keys
        assert manifest_of(net) is None
        net(torch.randn(8, 3, 2, 2)).square().sum().backward()
        moved = net[1].running_mean.clone()
        assert moved.any()
        sync.revert(net)
        assert all(now is then for now, then in zip(net, before, strict=True))
        assert torch.equal(bn.running_mean, moved)
        assert bn.num_batches_tracked == 2
        assert bn.weight.grad is not None
        sync.revert(net)  # nothing is left to do
        sync.apply(net)
        sync.apply(net)  # an earlier fit that could not revert
        assert type(net[1]) is BatchNorm
        sync.revert(net)
        assert net[1] is bn

    def test_a_subclass_is_left_alone_and_told(self):
        net = nn.Sequential(Custom(3), nn.BatchNorm2d(3))
        with pytest.warns(SyncWarning, match=r"0 \(Custom\) is not synchronized: its own forward"):
            NormSync().apply(net)
        assert [type(m) for m in net] == [Custom, BatchNorm]

    @pytest.mark.parametrize("bad", [{"sync_group": "rack"}, {"start_epoch": -1}, {"start_epoch": 1.5}])
    def test_bad_arguments(self, bad):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}.* got {next(iter(bad.values()))!r}"):
            NormSync(**bad)

    def test_epochs_need_a_trainer(self):
        with pytest.raises(TypeError, match="start_epoch=2"):
            NormSync(start_epoch=2).apply(network())

    def test_travels_to_spawned_processes(self):
        assert (
            repr(pickle.loads(pickle.dumps(copy.deepcopy(NormSync(2, 3))))) == "NormSync(sync_group=2, start_epoch=3)"
        )


def test_one_process_has_nothing_to_do(tmp_path):
    model = Uneven().float()
    one_process(NormSwap("sn"), plugins=[NormSync()], sync_batchnorm=True, tmp_path=tmp_path).fit(model, loader())
    assert type(model.late) is SwitchableNorm


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_from_yaml():
    options = ["--trainer.plugins.init_args.start_epoch", "2", "--trainer.accelerator", "cpu"]
    config = str(Path(__file__).parents[2] / "examples" / "configs" / "ddp.yaml")
    cli = NormCLI(["--config", config, *options], run=False)
    assert repr(cli.trainer.strategy._layer_sync) == "NormSync(sync_group='world', start_epoch=2)"


class Watched(Uneven):
    """Notes what synchronizes in each step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        layers = [self.net[1], self.built[1], self.late]
        self.seen.append([f"{type(m).__name__} {m.sync and not m._sync_paused}" for m in layers])
        return super().training_step(batch, batch_idx)


def fit(rank, world, folder, name, resume=None, **kwargs):
    model = Watched()
    plugin = NormSync(**kwargs)
    run = trainer(
        rank,
        world,
        plugins=[plugin],
        sync_batchnorm=True,
        callbacks=[NormSwap("sn", include=r"net\.1")],
        default_root_dir=folder,
    )
    before = (model.built[1], model.late)
    run.fit(model, batches(rank, world, SHARES), ckpt_path=resume)
    run.save_checkpoint(f"{folder}/{name}.ckpt")
    same = before == (model.built[1], model.late)
    return {"state": model.state_dict(), "seen": model.seen, "same": same, "paused": model.net[1]._sync_paused}


def jobs(rank, world, folder):
    got = {"both": fit(rank, world, folder, "both")}
    got["late"] = fit(rank, world, folder, "late", start_epoch=1)
    return got


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    return run_ranks(jobs, 2, 2, folder), folder


def test_torchs_layers_and_ours_are_those_of_one_process(ranks, tmp_path):
    expected = Uneven()
    one_process(NormSwap("sn", include=r"net\.1"), max_epochs=2, tmp_path=tmp_path).fit(expected, batches(0, 1, None))
    for got in ranks[0]:
        assert got["both"]["same"]
        assert got["both"]["seen"][0] == ["SwitchableNorm True", "BatchNorm True", "BatchNorm True"]
        for name, value in expected.state_dict().items():  # float64 over eight steps
            torch.testing.assert_close(got["both"]["state"][name], value, rtol=1e-10, atol=1e-10)


def test_synchronization_starts_in_its_epoch(ranks):
    for got in ranks[0]:
        on = [
            seen == [f"{kind} True" for kind in ("SwitchableNorm", "BatchNorm", "BatchNorm")]
            for seen in got["late"]["seen"]
        ]
        assert on == [False] * 4 + [True] * 4
        assert not got["late"]["paused"]
        assert got["late"]["same"]
        different = got["late"]["state"]["built.1.running_var"] - got["both"]["state"]["built.1.running_var"]
        assert different.abs().max() > 1e-6


def test_checkpoints_are_those_of_a_network_without_it(ranks):
    model = load_from_checkpoint(Uneven, f"{ranks[1]}/late.ckpt")
    assert [type(m).__name__ for m in (model.net[1], model.built[1], model.late)] == [
        "SwitchableNorm",
        "BatchNorm2d",
        "BatchNorm2d",
    ]
    assert model.net[1].sync
    assert isinstance(Trainer(plugins=[NormSync()], logger=False, enable_checkpointing=False), Trainer)

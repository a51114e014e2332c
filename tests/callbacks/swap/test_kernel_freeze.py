import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_norm import NoEffectWarning, NormSwap
from tests.callbacks.toy import Net, loader, trainer


class Two(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, affine=False)
        )

    def configure_optimizers(self):
        return torch.optim.SGD(
            self.parameters(), 0.1, momentum=0.9, weight_decay=0.1
        )  # both would move a zero gradient


class Kernels(Callback):
    """What each epoch ends with."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        custom = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        self.seen.append(custom)

    def moved(self, name):
        return [not torch.equal(a[name], b[name]) for a, b in zip(self.seen, self.seen[1:], strict=False)]


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_kernels_stand_still_from_the_epoch_on(strategy):
    model, kernels = Two(), Kernels()
    trainer(NormSwap("bnet", freeze_kernel_at=2), kernels, max_epochs=4, strategy=strategy).fit(model, loader())
    for name in ("net.1.kernel", "net.1.bias", "net.4.kernel"):
        assert kernels.moved(name) == [True, False, False], name
        assert model.get_parameter(name).requires_grad == (strategy == "ddp")  # DDP waits for every gradient it knows
    assert kernels.moved("net.0.weight") == [True, True, True]


def test_from_the_start():
    model = Two()
    trainer(NormSwap("bnet", freeze_kernel_at=0)).fit(model, loader())
    assert torch.equal(model.net[1].kernel.sum((1, 2, 3)), torch.ones(6))
    assert not model.net[1].kernel.requires_grad


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_is_frozen_too(tmp_path):
    """Also in the middle of an epoch, which Lightning takes up without on_train_epoch_start."""
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    first = trainer(NormSwap("bnet", freeze_kernel_at=1), saved, max_epochs=2, enable_checkpointing=True)
    first.fit(Two(), loader())
    path = tmp_path / "step=3.ckpt"  # two steps an epoch: the first of epoch 1
    stored = torch.load(path, weights_only=True)["state_dict"]["net.1.kernel"]
    model = Two()
    resumed = trainer(NormSwap("bnet", freeze_kernel_at=1), max_epochs=3)
    resumed.fit(model, loader(), ckpt_path=path)
    assert resumed.global_step == 6
    assert torch.equal(model.net[1].kernel, stored)
    assert not model.net[1].kernel.requires_grad


def test_nothing_to_freeze_is_told():
    with pytest.warns(NoEffectWarning, match="freeze_kernel_at=3 freezes nothing: the model holds no BNET layer"):
        trainer(NormSwap("sn", freeze_kernel_at=3)).fit(Two(), loader())


@pytest.mark.parametrize("bad", [-1, 1.5, "3", True])
def test_bad_epoch(bad):
    with pytest.raises(ValueError, match="freeze_kernel_at must be an epoch"):
        NormSwap("bnet", freeze_kernel_at=bad)

import copy
import pickle

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

import lightning_norm
from lightning_norm import (
    NoEffectWarning,
    NormFreeze,
    NormSwap,
    load_from_checkpoint,
)
from lightning_norm.callbacks.monitor.quantities import hyper_parameters
from tests.callbacks.toy import Net, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Two(Net):
    """One layer that a swap takes, and one that stays torch's; train() is called in the middle of the training."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.1)
        )

    def training_step(self, batch, batch_idx):
        self.eval()
        self.train()
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.1)


class Seen(Callback):
    """The state at the end of each epoch."""

    def __init__(self):
        self.states = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.states.append({n: t.clone() for n, t in pl_module.state_dict().items()})

    def moved(self, name):
        return [not torch.equal(a[name], b[name]) for a, b in zip(self.states, self.states[1:], strict=False)]


def swap_first(norm="sn", **arguments):
    return NormSwap(norm, include=["net.1"], **arguments)


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
@pytest.mark.parametrize("order", [1, -1])
def test_statistics_stand_still_from_the_epoch_on(strategy, order):
    model, seen = Two(), Seen()
    callbacks = [swap_first(), NormFreeze(at_epoch=2)][::order]
    trainer(*callbacks, seen, max_epochs=4, strategy=strategy).fit(model, loader(), loader())
    for layer in ("net.1", "net.4"):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert seen.moved(f"{layer}.{name}") == [True, False, False], (layer, name)
        assert seen.moved(f"{layer}.weight") == [True, True, True]
    # The end of the run ends it, without a trace.
    assert model.net[1].training
    assert model.net[4].training
    assert "train" not in vars(model.net[4])
    pickle.dumps(model.net)


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_what_the_layers_learn_stands_still(strategy):
    model, seen = Two(), Seen()
    callbacks = [swap_first(), NormFreeze(at_epoch=1, statistics=False, affine=True)]
    trainer(*callbacks, seen, max_epochs=3, strategy=strategy).fit(model, loader())
    for name in ("net.1.weight", "net.1.mean_weight", "net.4.bias"):
        assert seen.moved(name) == [False, False], name
    assert seen.moved("net.1.running_mean") == seen.moved("net.0.weight") == [True, True]
    assert model.net[4].weight.requires_grad


def test_the_recipe_for_detection():
    """BNET's authors: normalize by frozen statistics, train the kernel."""
    model, seen = Two(), Seen()
    model(torch.randn(4, 3, 8, 8))
    start = {n: t.clone() for n, t in model.state_dict().items()}
    trainer(NormSwap("bnet"), NormFreeze(), seen).fit(model, loader())
    assert torch.equal(seen.states[-1]["net.1.running_var"], start["net.1.running_var"])
    assert not torch.equal(model.net[1].kernel.sum((1, 2, 3)), torch.ones(6))


def test_in_training_they_normalize_as_in_evaluation():
    class Compare(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.train()
            x = batch[0]
            frozen = pl_module.net[:-1](x)
            twin = copy.deepcopy(pl_module.net).eval()
            assert torch.equal(frozen, twin(x))

    model = Two()
    model(torch.randn(4, 3, 8, 8))
    trainer(swap_first("dbn"), NormFreeze(), Compare()).fit(model, loader())


@pytest.mark.parametrize("step", [2, 3])  # two steps an epoch: its end, and its middle
def test_a_resumed_run_is_frozen_too(tmp_path, step):
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    first = trainer(swap_first(), NormFreeze(1), saved, max_epochs=2, enable_checkpointing=True)
    torch.manual_seed(0)
    first.fit(Two(), loader())
    path = tmp_path / f"step={step}.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    model = Two()
    resumed = trainer(swap_first(), NormFreeze(1), max_epochs=3)
    resumed.fit(model, loader(), ckpt_path=path)
    assert resumed.global_step == 6
    for name in ("net.1.running_mean", "net.4.running_var", "net.4.num_batches_tracked"):
        assert torch.equal(model.state_dict()[name], state[name]), name


def test_a_loaded_network_is_frozen_as_it_was_saved(tmp_path):
    model = Two()
    run = trainer(swap_first(), NormFreeze(), default_root_dir=tmp_path, enable_checkpointing=True)
    model(torch.randn(4, 3, 8, 8))
    run.fit(model, loader())
    loaded = load_from_checkpoint(Two, run.checkpoint_callback.best_model_path)
    assert not loaded.train().net[1].training
    assert "statistics=frozen" in repr(loaded.net[1])
    loaded.net[1].freeze_statistics(False)
    assert loaded.net[1].training


def test_layers_are_chosen_by_their_names():
    seen = Seen()
    trainer(swap_first(), NormFreeze(include=["net.4"]), seen, max_epochs=2).fit(_warm(), loader())
    assert (seen.moved("net.1.running_mean"), seen.moved("net.4.running_mean")) == ([True], [False])
    seen = Seen()
    trainer(swap_first(), NormFreeze(exclude=r"net\.4"), seen, max_epochs=2).fit(_warm(), loader())
    assert (seen.moved("net.1.running_mean"), seen.moved("net.4.running_mean")) == ([False], [True])


def test_a_failed_run_leaves_no_trace():
    class Fail(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("enough")

    model = _warm()
    with pytest.raises(RuntimeError, match="enough"):
        trainer(swap_first(), NormFreeze(affine=True), Fail()).fit(model, loader())
    assert "train" not in vars(model.net[4])
    assert all(m.training for m in model.net)
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_by_hand_stays_frozen():
    model = _warm()
    lightning_norm.swap(model, "sn", include=["net.1"])
    model.net[1].freeze_statistics()
    assert hyper_parameters(model) == {("sn", "frozen", "net.1"): 1.0}
    trainer(NormFreeze(at_epoch=0)).fit(model, loader())
    assert not model.net[1].training
    assert model.net[4].training


def test_a_frozen_layer_can_be_swapped_again():
    model = _warm()
    lightning_norm.swap(model, "bn")
    model.net[1].freeze_statistics()
    report = lightning_norm.swap(model, "bnet", source="bn")
    assert [m.training for m in (model.net[1], model.train().net[1], model.net[4])] == [False, False, True]
    assert model.net[1].kernel.requires_grad
    report.undo()
    assert [m.training for m in (model.net[1], model.train().net[1], model.net[4])] == [False, False, True]


def test_what_has_no_effect_is_told():
    class Plain(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6))

    with pytest.warns(NoEffectWarning, match=r"NormFreeze\(statistics\) freezes nothing: none of 1 normalization"):
        trainer(NormFreeze()).fit(Plain(), loader())
    with pytest.warns(NoEffectWarning, match=r"statistics of 2 layers \(first: net.1\) are at their start"):
        trainer(NormFreeze()).fit(Two(), loader())


@pytest.mark.filterwarnings("error::lightning_norm.ConflictWarning", "error::lightning_norm.NotReachedWarning")
def test_no_other_warning_takes_it_for_a_fault():
    trainer(swap_first(), NormFreeze(affine=True, include=["net.4"])).fit(_warm(), loader())
    trainer(swap_first(), NormFreeze(affine=True)).fit(_warm(), loader())


@pytest.mark.parametrize("bad", [-1, 1.5, "3", True, None])
def test_bad_epoch(bad):
    with pytest.raises(ValueError, match="at_epoch must be an epoch"):
        NormFreeze(bad)


def test_bad_arguments():
    with pytest.raises(ValueError, match="freezes nothing"):
        NormFreeze(statistics=False)
    with pytest.raises(ValueError, match=r"NormFreeze: include='body.*' matched none of the 2 .* nearest name"):
        trainer(NormFreeze(include=r"body\..*")).fit(Two(), loader())


def test_beside_accumulated_statistics():
    seen = Seen()
    callbacks = [swap_first(accumulate_statistics=True), NormFreeze(1)]
    trainer(*callbacks, seen, max_epochs=3, accumulate_grad_batches=2).fit(Two(), loader())
    assert seen.moved("net.1.running_mean") == seen.moved("net.4.running_mean") == [False, False]


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_in_yaml(tmp_path):
    from lightning_norm.cli.norm_cli import NormCLI

    path = tmp_path / "config.yaml"
    arguments = {"at_epoch": 5, "statistics": True, "affine": True, "include": ["net.4"]}
    callbacks = [{"class_path": "NormFreeze", "init_args": arguments}]
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "callbacks": callbacks}
    path.write_text(yaml.safe_dump({"model": {"class_path": f"{__name__}.Two"}, "norm": "sn", "trainer": quiet}))
    cli = NormCLI(["--config", str(path)], run=False, save_config_callback=None)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, NormFreeze))
    assert {name: getattr(callback, name) for name in arguments} == arguments


def _warm():
    model = Two()
    model(torch.randn(4, 3, 8, 8))
    return model

"""Groups that NormSwap makes behind an optimizer and its schedulers equal groups made by hand before them."""

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim import lr_scheduler as lrs

from lightning_norm import NormSwap, OptimizerError, no_weight_decay, swap
from lightning_norm.callbacks.swap.regroup import GROUP
from tests.callbacks.toy import Net, loader, trainer

SCALE, DECAY = 0.1, 0.3


def ratio(group):
    """1 for the groups of the network and of the norms, SCALE for the switches."""
    return SCALE if group.get("kind") == "switch" else 1.0


def lists(value):
    """The value of each group, as a list where the scheduler takes one per group."""
    return lambda groups: [value * ratio(g) for g in groups]


SCHEDULERS = {
    "none": lambda o: None,
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: 0.7**step + 0.1),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 2, 0.5),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, lists(0.2)(o.param_groups), total_steps=9),
    "CyclicLR": lambda o: lrs.CyclicLR(
        o, lists(0.02)(o.param_groups), lists(0.2)(o.param_groups), 2, cycle_momentum="momentum" in o.defaults
    ),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.3, total_iters=2), lrs.LambdaLR(o, lambda step: 0.8**step)], [3]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.5, 3), lrs.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(
        o, factor=0.5, patience=0, threshold=0.5, min_lr=lists(0.02)(o.param_groups)
    ),
}
OPTIMIZERS = {
    "SGD": lambda p: SGD(p, 0.05, momentum=0.9, weight_decay=DECAY),
    "AdamW": lambda p: AdamW(p, 0.05, weight_decay=DECAY),
    "tensor rate": lambda p: Adam(p, torch.tensor(0.05), weight_decay=DECAY, foreach=False),
}


class Trained(Net):
    """SN in the middle; groups by hand, or one group that NormSwap splits."""

    def __init__(self, optimizer, scheduler, by_hand):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
        )
        self.make, self.drive, self.by_hand, self.rates = optimizer, scheduler, by_hand, []

    def parameters_in_groups(self):
        if not self.by_hand:
            return self.parameters()
        norms = [self.net[1], self.net[4]]
        switches = [p for n in norms for p in (n.mean_weight, n.var_weight)]
        affine = [p for n in norms for p in (n.weight, n.bias)]
        rest = [p for i in (0, 3) for p in self.net[i].parameters()]
        groups = [
            {"params": rest, "lr": 0.05},
            {"params": affine, "lr": 0.05, "weight_decay": 0.0},
            {"params": switches, "lr": 0.05 * SCALE, "weight_decay": 0.0, "kind": "switch"},
        ]
        if self.make is OPTIMIZERS["tensor rate"]:  # one for each: a shared one would be reduced twice
            groups = [{**group, "lr": torch.tensor(group["lr"])} for group in groups]
        return groups

    def configure_optimizers(self):
        optimizer = self.make(self.parameters_in_groups())
        scheduler = self.drive(optimizer)
        if scheduler is None:
            return optimizer
        how = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, lrs.ReduceLROnPlateau):
            how |= {"monitor": "loss", "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": how}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        self.rates.append([float(g["lr"]) for g in self.trainer.optimizers[0].param_groups])
        return loss


def run(optimizer, scheduler, by_hand, **kwargs):
    model = Trained(OPTIMIZERS[optimizer], SCHEDULERS[scheduler], by_hand)
    if by_hand:
        swap(model, "sn")
        callbacks = []
    else:
        callbacks = [NormSwap("sn", norm_weight_decay=0.0, switch_lr_scale=SCALE)]
    runner = trainer(*callbacks, max_epochs=4)
    runner.fit(model, loader())
    return model, runner


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [("SGD", s) for s in SCHEDULERS] + [("AdamW", "LambdaLR"), ("tensor rate", "ReduceLROnPlateau")],
)
def test_equals_groups_made_by_hand(optimizer, scheduler):
    ours, runner = run(optimizer, scheduler, by_hand=False)
    theirs, _ = run(optimizer, scheduler, by_hand=True)
    groups = runner.optimizers[0].param_groups
    assert [g.get(GROUP) for g in groups] == [None, "norm", "switch"]
    assert [g["weight_decay"] for g in groups] == [DECAY, 0.0, 0.0]
    rates = [torch.tensor(m.rates, dtype=torch.float64) for m in (ours, theirs)]
    torch.testing.assert_close(*rates, rtol=1e-6 if optimizer == "tensor rate" else 1e-12, atol=0)  # float32, float64
    if scheduler != "none":
        assert len({tuple(r) for r in ours.rates}) > 1
    for name, value in ours.state_dict().items():  # the rates agree to a rounding of float64
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def groups_of(configure, model=None, **arguments):
    model = model or Net()
    model.configure_optimizers = configure.__get__(model)
    runner = trainer(NormSwap("sn", **{"norm_weight_decay": 0.0, **arguments}), max_epochs=2)
    runner.fit(model, loader())
    owned = [id(p) for g in runner.optimizers[0].param_groups for p in g["params"]]
    assert len(owned) == len(set(owned))
    assert set(owned) >= {id(p) for p in model.net[1].parameters()}
    names = {id(p): n for n, p in model.named_parameters()}
    return [(g.get(GROUP), [names[id(p)] for p in g["params"]], g) for g in runner.optimizers[0].param_groups]


AFFINE, SWITCHES = ["net.1.weight", "net.1.bias"], ["net.1.mean_weight", "net.1.var_weight"]


def test_each_argument_alone():
    def configure(self):
        return SGD(self.parameters(), 0.1, weight_decay=DECAY)

    rest, norm = groups_of(configure)
    assert (norm[0], norm[1]) == ("norm", AFFINE + SWITCHES)
    assert (rest[2]["weight_decay"], norm[2]["weight_decay"], norm[2]["lr"]) == (DECAY, 0.0, 0.1)
    rest, switch = groups_of(configure, norm_weight_decay=None, switch_lr_scale=0.5)
    assert (switch[0], switch[1]) == ("switch", SWITCHES)
    assert (rest[2]["lr"], switch[2]["lr"], switch[2]["weight_decay"]) == (0.1, 0.05, DECAY)
    assert rest[1] == ["net.0.weight", "net.0.bias", *AFFINE]
    (only,) = groups_of(configure, norm_weight_decay=None)
    assert only[0] is None


def test_a_group_that_holds_nothing_else_is_changed_in_place():
    def configure(self):
        groups = [{"params": list(self.net[0].parameters())}, {"params": list(self.net[1].parameters()), "lr": 0.4}]
        optimizer = SGD(groups, 0.1, weight_decay=DECAY)
        return [optimizer], [lrs.LambdaLR(optimizer, [lambda e: 1.0, lambda e: 0.5**e])]

    groups = groups_of(configure, switch_lr_scale=0.1)
    assert [g[0] for g in groups] == [None, "switch", "norm"]
    assert [g[2]["lr"] for g in groups] == pytest.approx([0.1, 0.4 * 0.1 * 0.25, 0.4 * 0.25])
    assert len(groups) == 3


def test_named_parameters_and_named_groups():
    def configure(self):
        named = [{"params": list(self.named_parameters()), "name": "all"}]
        return SGD(named, 0.1, weight_decay=DECAY)

    model = Net()
    groups = groups_of(configure, model, switch_lr_scale=0.1)
    assert [g[2]["param_names"] for g in groups] == [g[1] for g in groups]
    assert [g[2]["name"] for g in groups] == ["all", "all/norm", "all/switch"]


def test_the_rates_are_logged_by_their_names(tmp_path):
    model = Net()
    model.configure_optimizers = lambda: SGD([{"params": model.parameters(), "name": "all"}], 0.1)
    monitor = LearningRateMonitor()
    swap_ = NormSwap("sn", switch_lr_scale=0.1)
    trainer(swap_, monitor, logger=CSVLogger(tmp_path), tmp_path=tmp_path).fit(model, loader())
    assert monitor.lrs.keys() == {"lr-SGD/all", "lr-SGD/all/switch"}


def test_several_optimizers():
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.other = nn.BatchNorm2d(6)
            self.automatic_optimization = False

        def features(self, x):
            return self.other(self.net(x))

        def configure_optimizers(self):
            made = [SGD(self.net.parameters(), 0.1, weight_decay=1), Adam(self.other.parameters(), 0.2)]
            return made, [lrs.LambdaLR(made[1], lambda e: 0.5)]

    runner = trainer(NormSwap("sn", switch_lr_scale=0.5))
    runner.fit(Two(), loader())
    rates = [[g["lr"] for g in o.param_groups] for o in runner.optimizers]
    assert rates == [[0.1, 0.05], [0.1, 0.05]]
    assert runner.lr_scheduler_configs[0].scheduler.base_lrs == [0.2, 0.1]


def test_an_optimizer_that_lives_on_is_split_once():
    model = Net()
    optimizer = SGD(model.parameters(), 0.1)
    model.configure_optimizers = lambda: optimizer
    runner = trainer(NormSwap("sn", switch_lr_scale=0.1))
    for _ in range(2):
        runner.fit(model, loader())
        assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1 * 0.1]


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You are trying to `self.log")
@pytest.mark.parametrize("scheduler", ["LambdaLR", "OneCycleLR", "CosineAnnealingLR"])
def test_a_resumed_run_is_the_uninterrupted_one(scheduler, tmp_path):
    results = []
    for resume in (None, str(tmp_path / "whole" / "step=4.ckpt")):
        model = Trained(OPTIMIZERS["SGD"], SCHEDULERS[scheduler], by_hand=False)
        keep = ModelCheckpoint(tmp_path / ("resumed" if resume else "whole"), "{step}", save_top_k=-1)
        swap_ = NormSwap("sn", norm_weight_decay=0.0, switch_lr_scale=SCALE)
        runner = trainer(swap_, keep, max_epochs=4, enable_checkpointing=True)
        runner.fit(model, loader(), ckpt_path=resume)
        results.append((model.state_dict(), model.rates, runner.optimizers[0].state_dict()))
    whole, resumed = results
    assert resumed[1] == whole[1][4:]
    assert all(torch.equal(value, resumed[0][name]) for name, value in whole[0].items())
    strip = [{k: v for k, v in g.items() if k != "params"} for g in whole[2]["param_groups"]]
    assert strip == [{k: v for k, v in g.items() if k != "params"} for g in resumed[2]["param_groups"]]


class TestBadInput:
    def refused(self, configure, said, **arguments):
        model = Net()
        model.configure_optimizers = configure.__get__(model)
        with pytest.raises(OptimizerError, match=said):
            trainer(NormSwap("sn", **arguments)).fit(model, loader())

    def test_optimizers_that_cannot(self):
        self.refused(lambda self: torch.optim.LBFGS(self.parameters()), "LBFGS takes one group", switch_lr_scale=0.1)

        class Plain(SGD):
            def __init__(self, params):
                super().__init__(params, 0.1)
                for group in self.param_groups:
                    del group["weight_decay"]

        self.refused(lambda self: Plain(self.parameters()), "Plain has no weight decay", norm_weight_decay=0.1)

    @pytest.mark.parametrize("value", [-0.1, float("nan"), "x", float("inf")])
    def test_at_construction(self, value):
        for name in ("norm_weight_decay", "switch_lr_scale"):
            with pytest.raises(ValueError, match=f"{name} must be a number >= 0 or None"):
                NormSwap("sn", **{name: value})


def test_a_network_of_several_layers_is_complete():
    model = Trained(OPTIMIZERS["SGD"], SCHEDULERS["LambdaLR"], by_hand=False)
    trainer(NormSwap("sn", norm_weight_decay=0.0)).fit(model, loader())
    norm = model.trainer.optimizers[0].param_groups[1]["params"]
    names = {n for n, p in model.named_parameters() if any(p is q for q in norm)}
    assert names == no_weight_decay(model)

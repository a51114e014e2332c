import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from torch import nn

from lightning_norm import NoEffectWarning, NormSwap, OptimizerError, ParameterGrowthWarning, SwitchableNorm
from lightning_norm.layers.base import Normalizer
from tests.callbacks.toy import LateNet, Net, loader, trainer


def norms(model):
    return {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, (Normalizer, nn.BatchNorm2d))}


def wrappers(model):
    return {"configure_model", "configure_optimizers"} & set(model.__dict__)


class Trace(Callback):
    """Write down what the model looks like at each hook."""

    def __init__(self):
        self.seen = []

    def _see(self, hook, model):
        kinds = list(norms(model).values())
        self.seen.append((hook, kinds.count("SwitchableNorm"), len(kinds)))

    def setup(self, trainer, pl_module, stage):
        self._see("setup", pl_module)

    def on_fit_start(self, trainer, pl_module):
        self._see("on_fit_start", pl_module)
        assert not wrappers(pl_module)

    def on_train_start(self, trainer, pl_module):
        self._see("on_train_start", pl_module)


def test_swaps_layers_of_init_setup_and_configure_model_before_the_optimizer_is_built():
    model, trace, swap = LateNet(), Trace(), NormSwap("sn")
    trainer(swap, trace).fit(model, loader())
    assert trace.seen == [("setup", 1, 1), ("on_fit_start", 3, 3), ("on_train_start", 3, 3)]
    assert [layer.name for layer in swap.report.layers] == ["net.1", "built.1", "late"]
    assert not wrappers(model)


def test_new_parameters_are_trained():
    model = LateNet()
    trainer(NormSwap("sn"), max_epochs=3).fit(model, loader())
    moved = {n: (p - 1).abs().max().item() for n, p in model.named_parameters() if n.endswith("mean_weight")}
    assert len(moved) == 3
    assert min(moved.values()) > 0


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_swaps_without_fit(stage):
    model, swap = LateNet(), NormSwap("sn")
    getattr(trainer(swap), stage)(model, loader())
    assert set(norms(model).values()) == {"SwitchableNorm"}
    assert not wrappers(model)


def test_is_idempotent_over_stages_and_trainers(recwarn):
    model, swap = LateNet(), NormSwap("sn", include=r"(net|built)\..*")
    runner = trainer(swap)
    runner.fit(model, loader())
    layers = [m for m in model.modules() if isinstance(m, SwitchableNorm)]
    runner.test(model, loader())
    trainer(NormSwap("sn")).test(model, loader())  # a second Trainer takes the layer that is left
    assert [m for m in model.modules() if isinstance(m, SwitchableNorm)][:2] == layers
    trainer(NormSwap("sn")).test(model, loader())  # a third finds nothing to do and is silent
    assert len(swap.report) == 2
    assert swap.report.candidates == 3
    assert not [w for w in recwarn if issubclass(w.category, NoEffectWarning)]


def test_a_second_model_is_swapped_too():
    swap = NormSwap("sn")
    runner = trainer(swap)
    for model in (LateNet(), Net()):
        runner.test(model, loader())
        assert set(norms(model).values()) == {"SwitchableNorm"}
    assert len(swap.report) == 1


def test_two_swaps_with_different_layers():
    model = LateNet()
    first, second = NormSwap("sn", include=r"net\..*"), NormSwap("bcn", exclude=r"net\..*")
    trainer(first).test(model, loader())
    with pytest.raises(ValueError, match="exclude="):  # net.1 is no BatchNorm any more: the pattern matches nothing
        trainer(second).test(model, loader())
    model = LateNet()
    trainer(first, NormSwap("bcn")).test(model, loader())
    assert norms(model) == {"net.1": "SwitchableNorm", "built.1": "BatchChannelNorm", "late": "BatchChannelNorm"}


def test_pattern_that_matches_nothing_is_judged_after_the_late_layers():
    trainer(NormSwap("sn", include="late")).test(LateNet(), loader())
    with pytest.raises(
        ValueError, match="include='later' matched none of the 3 BatchNorm2d layers.*nearest name is 'late'"
    ):
        trainer(NormSwap("sn", include="later")).test(LateNet(), loader())


def test_nothing_to_swap_is_an_error_unless_it_may_be():
    class Bare(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(3, 6, 3)

    with pytest.raises(ValueError, match="no candidate found"):
        trainer(NormSwap("sn")).test(Bare(), loader())
    with pytest.warns(NoEffectWarning, match="no candidate found"):
        trainer(NormSwap("sn", on_empty="warn")).test(Bare(), loader())
    with pytest.raises(ValueError, match="on_empty must be"):
        NormSwap("sn", on_empty="silence")


def test_the_source_is_a_class_that_only_the_first_swap_saw():
    class Custom(nn.BatchNorm2d):
        pass

    model = Net()
    model.net[1] = Custom(6)
    for _ in range(2):
        trainer(NormSwap("sn", source="Custom")).test(model, loader())
    assert isinstance(model.net[1], SwitchableNorm)
    with pytest.raises(ValueError, match="source='Owm' is no class in the model"):
        trainer(NormSwap("sn", source="Owm")).test(Net(), loader())


class Broken(LateNet):
    def configure_model(self):
        raise ZeroDivisionError


def test_exceptions_leave_nothing_wrapped():
    model = Broken()
    with pytest.raises(ZeroDivisionError):
        trainer(NormSwap("sn")).fit(model, loader())
    assert not wrappers(model)
    pickle.dumps(model)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed")
def test_works_with_checkpoint_resume(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    runner = trainer(
        NormSwap("sn"), ModelCheckpoint(tmp_path, save_last=True), tmp_path=tmp_path, enable_checkpointing=True
    )
    model = LateNet()
    runner.fit(model, loader())
    path = str(tmp_path / "last.ckpt")
    fresh = LateNet()
    trainer(NormSwap("sn")).test(fresh, loader(), ckpt_path=path)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in model.state_dict().items())
    resumed = trainer(NormSwap("sn"), ModelCheckpoint(tmp_path / "more"), max_epochs=2, enable_checkpointing=True)
    resumed.fit(LateNet(), loader(), ckpt_path=path)
    assert resumed.global_step == 4


def test_rules_and_spec():
    model = LateNet()
    rules = {
        "net.*": {"class_path": "gn", "init_args": {"num_groups": 2}},
        "late": None,
        ".*": "lightning_norm.BatchChannelNorm",
    }
    trainer(NormSwap(rules=rules)).test(model, loader())
    assert norms(model) == {"net.1": "GroupNorm", "built.1": "BatchChannelNorm", "late": "BatchNorm2d"}


def test_plan_file(tmp_path):
    import lightning_norm

    model = Net()
    report = lightning_norm.swap(model, "sn", dry_run=True)
    path = tmp_path / "plan.yaml"
    path.write_text(report.to_yaml().replace("class_path: sn", "class_path: bcn"))
    trainer(NormSwap(plan=str(path))).test(model, loader())
    assert norms(model) == {"net.1": "BatchChannelNorm"}
    with pytest.raises(ValueError, match="cannot read the plan"):
        NormSwap(plan=str(tmp_path / "missing.yaml"))
    path.write_text("layers: []\n")
    with pytest.raises(ValueError, match=r"plan\.yaml' swaps no layer"):
        NormSwap(plan=str(path))
    with pytest.raises(ValueError, match="plan says which layers become what"):
        NormSwap("sn", plan=str(path))


class TestOptimizers:
    def fit(self, configure, swap=None):
        model = Net()
        model.configure_optimizers = configure.__get__(model)
        original = model.configure_optimizers
        runner = trainer(swap or NormSwap("sn"))
        runner.fit(model, loader())
        assert model.configure_optimizers == original
        return model, runner

    def test_optimizer_built_before_the_swap_gets_the_new_parameters(self):
        """What LightningCLI does with its ``optimizer:`` section."""
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
        model.configure_optimizers = lambda: ([optimizer], [scheduler])
        trainer(NormSwap("sn"), max_epochs=2).fit(model, loader())
        assert (model.net[1].mean_weight - 1).abs().max() > 0
        assert (model.net[1].weight - 1).abs().max() > 0
        assert len(optimizer.param_groups) == 1  # a group more would break LambdaLR
        assert sum(p is model.net[1].mean_weight for p in optimizer.param_groups[0]["params"]) == 1

    def test_new_parameters_join_the_group_of_their_layer(self):
        def configure(self):
            norm = [p for p in self.net[1].parameters() if p.numel() == 6]
            rest = list(self.net[0].parameters())
            return torch.optim.SGD([{"params": rest}, {"params": norm, "weight_decay": 0.0}], 0.1, weight_decay=0.1)

        model, runner = self.fit(configure)
        group = runner.optimizers[0].param_groups[1]
        assert sum(p is model.net[1].var_weight for p in group["params"]) == 1
        assert group["weight_decay"] == 0.0

    def test_several_optimizers(self):
        class Two(Net):
            def __init__(self):
                super().__init__()
                self.other = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
                self.automatic_optimization = False
                self.built = [
                    torch.optim.SGD(self.net.parameters(), 0.1),
                    torch.optim.Adam(self.other.parameters(), 0.1),
                ]

            def features(self, x):
                return self.other(self.net(x))

            def training_step(self, batch, batch_idx):
                loss = self.loss(batch)
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
                    optimizer.zero_grad()

            def configure_optimizers(self):
                return [{"optimizer": self.built[0]}, {"optimizer": self.built[1]}]

        model = Two()
        trainer(NormSwap("sn")).fit(model, loader())
        for layer, optimizer in zip((model.net[1], model.other[1]), model.built, strict=True):
            assert sum(p is layer.mean_weight for g in optimizer.param_groups for p in g["params"]) == 1

    def test_named_parameters_keep_their_names(self):
        model = Net()
        optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
        model.configure_optimizers = lambda: optimizer
        trainer(NormSwap("sn")).fit(model, loader())
        group = optimizer.param_groups[0]
        assert len(group["params"]) == len(group["param_names"])
        assert group["param_names"][-2:] == ["net.1.mean_weight", "net.1.var_weight"]

    def test_a_layer_without_affine_follows_its_parent(self):
        model = Net()
        model.net[1] = nn.BatchNorm2d(6, affine=False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model.configure_optimizers = lambda: optimizer
        trainer(NormSwap("sn")).fit(model, loader())
        assert (model.net[1].mean_weight - 1).abs().max() > 0

    def test_forgotten_parameters_stop_the_run_and_are_named(self):
        def configure(self):
            return torch.optim.SGD(self.net[0].parameters(), 0.1)

        with pytest.raises(
            OptimizerError, match=r"4 parameters of normalizers are in no optimizer \(first: net.1.weight"
        ):
            self.fit(configure)
        self.fit(configure, NormSwap("sn", check_optimizer=False))

    def test_frozen_parameters_are_no_concern(self):
        def configure(self):
            return torch.optim.SGD(self.net[0].parameters(), 0.1)

        model = Net()
        model.net[1].requires_grad_(False)
        model.configure_optimizers = configure.__get__(model)
        trainer(NormSwap("sn")).fit(model, loader())

    def test_a_parameter_in_two_optimizers_stops_the_run(self):
        class Twice(Net):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

            def configure_optimizers(self):
                return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.net[1].parameters(), 0.1)]

        with pytest.raises(OptimizerError, match="4 parameters of normalizers are in several optimizers"):
            trainer(NormSwap("sn")).fit(Twice(), loader())


class TestBadInput:
    def test_at_construction(self):
        with pytest.raises(ValueError, match="Did you mean 'sn'"):
            NormSwap("switchable")
        with pytest.raises(ValueError, match="NormSwap needs"):
            NormSwap()
        with pytest.raises(ValueError, match="cannot import the normalizer"):
            NormSwap(rules={".*": "no.such.Norm"})

    def test_averaging_before_the_swap(self):
        with pytest.raises(RuntimeError, match="StochasticWeightAveraging stands before NormSwap"):
            trainer(StochasticWeightAveraging(0.1), NormSwap("sn")).fit(Net(), loader())


@pytest.mark.parametrize(("model", "layers"), [(LateNet, 3), (Net, 1)])
def test_prints_what_was_swapped_once(model, layers, capsys):
    runner, net = trainer(NormSwap("sn")), model()
    runner.fit(net, loader())
    runner.test(net, loader(), verbose=False)
    text = capsys.readouterr().out
    assert text.count("NormSwap") == 1
    noun = "layer" if layers == 1 else "layers"
    assert f"NormSwap: {layers} of {layers} BatchNorm2d {noun} -> SwitchableNorm (sn, Luo et al. 2021)" in text
    assert f"parameters  +{6 * layers}" in text


def test_compile_announces_each_graph(caplog):
    swap = NormSwap("sn", compile=True)
    with caplog.at_level("INFO"):
        trainer(swap).fit(Net(), loader())
    assert any("NormSwap: compiling SwitchableNorm (4, 6, 6, 6)" in r.message for r in caplog.records)
    assert swap.report.layers[0].compiled


def test_callback_can_be_copied_and_pickled():
    swap = NormSwap("sn", norm_args={"momentum": 0.2})
    assert (
        pickle.loads(pickle.dumps(swap)).swap_arguments()
        == copy.deepcopy(swap).swap_arguments()
        == swap.swap_arguments()
    )


def test_its_own_layers_are_never_swapped_again():
    model, swap = Net(), NormSwap("sn", source=["BatchNorm", "sn"])
    runner = trainer(swap)
    runner.fit(model, loader())
    learned = model.net[1].mean_weight.detach().clone()
    runner.test(model, loader())
    assert torch.equal(model.net[1].mean_weight, learned)
    assert (len(swap.report), swap.report.candidates) == (1, 1)
    swap.report.undo()
    assert type(model.net[1]) is nn.BatchNorm2d


def test_a_second_swap_that_comes_too_late_is_told():
    with pytest.warns(
        NoEffectWarning, match="nothing left to swap to BatchChannelNorm: the model already holds 1 layer of"
    ):
        trainer(NormSwap("sn"), NormSwap("bcn")).test(Net(), loader())


def test_growth_is_told_once_with_late_layers_counted():
    model, swap = LateNet(), NormSwap("afn")
    runner = trainer(swap)
    with pytest.warns(ParameterGrowthWarning) as told:
        runner.fit(model, loader())
    runner.test(model, loader())  # a second warning would be an error
    texts = [str(w.message) for w in told if w.category is ParameterGrowthWarning]
    assert len(texts) == 1
    added = 3 * (6 * 3 + 3 + 2 * (3 * 6 + 6) + 6 + 1 + 2 * (6 + 6) + 4)
    total = sum(p.numel() for p in model.parameters())
    assert f"adds {added} parameters to the model's {total - added} (" in texts[0]

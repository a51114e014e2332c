"""NormSwap beside what else a Trainer may hold: the real pair on a tiny model, in both orders."""

import copy
import functools
import itertools
import logging
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import nn
from torch.utils.data import DataLoader

import lightning_norm
from lightning_norm import (
    ConflictError,
    ConflictWarning,
    NormMonitor,
    NormRecalibrate,
    NormScheduler,
    NormSwap,
    OptimizerError,
    SwitchableNorm,
)
from lightning_norm.layers.base import Normalizer
from tests.callbacks.toy import LateNet, Net, loader, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You're using the WeightAveraging callback with a model",  # NormSwap stands on every configure_model
    "ignore:Be aware that when using `ckpt_path`",
)
WRAPPED = {"configure_model", "configure_optimizers", "on_save_checkpoint", "on_load_checkpoint"}


class Early(Net):
    """All layers are built in __init__."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*self.net, nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))


class See(Callback):
    """Call a function at the end of every batch of training."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(self.look(trainer, pl_module))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def nothing_is_left(model, runner):
    assert not WRAPPED & set(model.__dict__)
    assert not {"load_checkpoint", "on_exception"} & set(runner.strategy.__dict__)
    assert not [m for m in model.modules() if isinstance(m, Normalizer) and m._accumulator is not None]
    pickle.dumps(model)


def told(caplog):
    return [r.message for r in caplog.records if r.message.startswith("NormSwap")]


class TestAverages:
    @pytest.mark.parametrize(
        "averaging", [WeightAveraging(), EMAWeightAveraging(decay=0.9), StochasticWeightAveraging(0.1)]
    )
    def test_in_front_of_the_swap_is_refused(self, averaging):
        model = Early()
        runner = trainer(averaging, NormSwap("sn"))
        said = f"{type(averaging).__name__} stands before NormSwap.*Put NormSwap first"
        with pytest.raises(ConflictError, match=said):
            runner.fit(model, loader())
        assert isinstance(model.net[1], nn.BatchNorm2d)
        nothing_is_left(model, runner)

    def test_ema_behind_it_averages_every_parameter_of_ours(self):
        see = See(lambda _, model: {n: p.detach().clone() for n, p in model.named_parameters()})
        model = Early()
        trainer(NormSwap("sn"), EMAWeightAveraging(decay=0.5), see, max_epochs=2).fit(model, loader())
        steps, names = see.seen, [n for n, _ in model.named_parameters()]
        assert "net.1.mean_weight" in names
        for name in names:
            mean = steps[0][name]
            for step in steps[1:]:
                mean = 0.5 * mean + 0.5 * step[name]
            torch.testing.assert_close(model.get_parameter(name).detach(), mean)

    def test_ema_with_layers_of_configure_model_says_what_was_swapped_once(self, capsys):
        class Late(LateNet):
            def setup(self, stage):
                pass

            def __init__(self):
                super().__init__()
                self.built = nn.Conv2d(6, 6, 3)

        model = Late()
        trainer(NormSwap("sn"), EMAWeightAveraging(decay=0.5)).fit(model, loader())
        assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("NormSwap")] == [
            "NormSwap: 2 of 2 BatchNorm2d layers -> SwitchableNorm (sn, Luo et al. 2021)"
        ]

    @pytest.mark.parametrize("averaging", [EMAWeightAveraging(decay=0.9), StochasticWeightAveraging(0.1)])
    def test_a_copy_from_before_a_layer_was_built_is_refused(self, averaging):
        model = LateNet()
        runner = trainer(NormSwap("sn"), averaging, NormRecalibrate())
        with pytest.raises(ConflictError, match=r"copied the network before built.0.weight was built.*__init__"):
            runner.fit(model, loader())
        nothing_is_left(model, runner)

    def test_swa_without_recalibration_is_told_and_averages_every_parameter(self):
        see = See(lambda run, model: (run.current_epoch, model.net[1].mean_weight.detach().clone()))
        model = Early()
        with pytest.warns(ConflictWarning, match=r"those of 2 layers.*Add NormRecalibrate\(\) as the last callback"):
            trainer(NormSwap("sn"), StochasticWeightAveraging(0.1, swa_epoch_start=1), see, max_epochs=3).fit(
                model, loader()
            )
        start = torch.ones(3)  # averaged at the start of each epoch
        ends = [weight for (epoch, weight), after in itertools.pairwise(see.seen) if after[0] != epoch]
        torch.testing.assert_close(model.net[1].mean_weight.detach(), torch.stack([start, *ends]).mean(0))

    @pytest.mark.parametrize(
        ("rules", "fix"),
        [
            ({".*1": "dbn", ".*": "sn"}, r"Add NormRecalibrate\(exclude=\['net.1'\]\) as the last"),
            ({".*": "dbn"}, "EMAWeightAveraging averages them with the weights"),
        ],
    )
    def test_swa_and_statistics_that_cannot_be_estimated_anew(self, rules, fix):
        with pytest.warns(ConflictWarning, match=fix):
            trainer(NormSwap(rules=rules), StochasticWeightAveraging(0.1, swa_epoch_start=1)).fit(Early(), loader())

    def test_swa_with_recalibration_is_fine(self):
        callbacks = [NormSwap("sn"), StochasticWeightAveraging(0.1, swa_epoch_start=1), NormRecalibrate()]
        trainer(*callbacks, max_epochs=2).fit(Early(), loader())


class Backbone(Net):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = self.net, nn.Conv2d(6, 2, 1)
        del self.net

    def features(self, x):
        return self.head(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), 0.1)


class Freeze(BaseFinetuning):
    """Freezes the statistics of BatchNorm layers as well, and unfreezes in epoch 1."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.1)


class TestFinetuning:
    def fit(self, *callbacks, **kwargs):
        model = Backbone()
        see = See(lambda _, m: m.backbone[1].mean_weight.detach().clone())
        runner = trainer(*callbacks, see, max_epochs=2, **kwargs)
        runner.fit(model, loader(4))
        return model, runner, see.seen

    @pytest.mark.parametrize("finetuning", [Freeze, lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1)])
    def test_behind_the_swap_layers_are_frozen_and_unfrozen_with_the_rest(self, finetuning, caplog):
        with caplog.at_level("INFO"):
            model, runner, (frozen, free) = self.fit(NormSwap("sn"), finetuning())
        assert torch.equal(frozen, torch.ones(3))
        assert not torch.equal(free, frozen)
        assert all(p.requires_grad for p in model.parameters())
        stored = [id(p) for g in runner.optimizers[0].param_groups for p in g["params"]]
        assert sorted(stored) == sorted(id(p) for p in model.parameters())
        assert "them: 1 of 1 layer; their running statistics" in told(caplog)[-1]
        assert "in front of NormSwap they train" in told(caplog)[-1]

    @pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
    def test_in_front_of_the_swap_layers_train_as_batch_norms_do(self, caplog):
        with caplog.at_level("INFO"):
            _, _, (first, _) = self.fit(BackboneFinetuning(unfreeze_backbone_at_epoch=1), NormSwap("sn"))
        assert not torch.equal(first, torch.ones(3))
        assert not [t for t in told(caplog) if "frozen" in t]

    def test_statistics_frozen_in_front_of_the_swap_are_not_lost(self):
        """Lightning clears BatchNorm's flag alone: it evaluates on its running statistics, and so does ours."""
        model = Backbone()
        model.backbone[1].running_mean.fill_(3.0)
        expected = copy.deepcopy(model).eval()
        x = torch.randn(4, 3, 8, 8)
        trainer(Freeze(), NormSwap("bn")).test(model, loader(4))
        torch.testing.assert_close(model.eval()(x), expected(x))
        model, _, (frozen, free) = self.fit(Freeze(), NormSwap("sn"))
        assert model.backbone[1].running_mean is not None
        assert torch.equal(frozen, torch.ones(3))
        assert not torch.equal(free, frozen)

    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    def test_a_resumed_run_is_the_uninterrupted_one(self, tmp_path):
        def callbacks(name):
            return NormSwap("sn"), Freeze(), ModelCheckpoint(tmp_path / name, save_top_k=-1)

        torch.manual_seed(0)
        whole, _, _ = self.fit(*callbacks("whole"), enable_checkpointing=True)
        torch.manual_seed(0)
        cut = next((tmp_path / "whole").glob("epoch=0*.ckpt"))
        model = Backbone()
        trainer(*callbacks("more"), max_epochs=2, enable_checkpointing=True).fit(model, loader(4), ckpt_path=cut)
        same(state(model), state(whole))

    def test_a_backbone_outside_the_optimizer(self):
        """The optimizer of Lightning's own example holds the head alone."""

        class HeadOnly(Backbone):
            def configure_optimizers(self):
                return torch.optim.SGD(self.head.parameters(), 0.1)

        model = HeadOnly()
        trainer(NormSwap("sn"), Freeze(), max_epochs=2).fit(model, loader(4))
        assert not torch.equal(model.backbone[1].mean_weight, torch.ones(3))
        with pytest.raises(OptimizerError, match="in no optimizer"):  # trained by nobody in epoch 0, without a word
            trainer(BackboneFinetuning(1), NormSwap("sn"), max_epochs=2).fit(HeadOnly(), loader(4))


class TestPruning:
    def pruning(self, **kwargs):
        return ModelPruning("l1_unstructured", amount=0.5, **kwargs)

    def test_in_front_of_the_swap_is_refused(self):
        model = Early()
        runner = trainer(self.pruning(), NormSwap("sn"), enable_checkpointing=False)
        with pytest.raises(ConflictError, match="ModelPruning stands before NormSwap.*would prune layers that"):
            runner.fit(model, loader())
        nothing_is_left(model, runner)

    @pytest.mark.parametrize("lottery", [False, True])
    def test_behind_it_the_layers_are_pruned(self, lottery, tmp_path):
        model = Early()
        pruning = self.pruning(use_lottery_ticket_hypothesis=lottery, parameter_names=["weight"], verbose=1)
        saver = ModelCheckpoint(tmp_path, filename="last")
        runner = trainer(NormSwap("sn"), pruning, saver, enable_checkpointing=True)
        runner.fit(model, loader())
        weights = [p for n, p in model.named_parameters() if n.endswith(".weight")]
        assert sum(p.numel() for p in weights) == 162 + 6 + 324 + 6
        zeros = sum(int((p == 0).sum()) for p in weights)
        assert zeros == sum(p.numel() for p in weights) // 2
        loaded = lightning_norm.load_from_checkpoint(Early, tmp_path / "last.ckpt")
        same(state(loaded), state(model))

    def test_the_layers_of_ours_alone(self):
        class Ours(ModelPruning):
            def filter_parameters_to_prune(self, parameters_to_prune=()):
                return [(m, n) for m, n in parameters_to_prune if isinstance(m, Normalizer) and n == "bias"]

        model = Early()
        see = See(lambda _, m: sorted(n for n, _ in m.net[1].named_parameters()))
        pruning = Ours("random_unstructured", amount=0.5, make_pruning_permanent=False)
        trainer(NormSwap("sn"), pruning, see, max_epochs=2).fit(model, loader())
        assert see.seen[-1] == ["bias_orig", "mean_weight", "var_weight", "weight"]
        assert int((torch.cat([m.bias for m in model.modules() if isinstance(m, Normalizer)]) == 0).sum()) == 9


class Tunable(Early):
    def __init__(self):
        super().__init__()
        self.lr, self.batch_size, self.calls, self.fail_at = 0.05, 2, 0, None

    def training_step(self, batch, batch_idx):
        self.calls += 1
        if self.calls == self.fail_at:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return DataLoader(loader(16).dataset, batch_size=self.batch_size)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


FINDERS = {
    "lr": lambda: LearningRateFinder(num_training_steps=4, early_stop_threshold=None),
    "batch": lambda: BatchSizeFinder(steps_per_trial=2, max_trials=1),
}


@pytest.mark.filterwarnings("ignore:The number of training batches")
class TestFinders:
    @pytest.mark.parametrize("finder", FINDERS)
    @pytest.mark.parametrize("first", [True, False])
    def test_leave_the_layers_as_they_were(self, finder, first, tmp_path):
        class Before(Callback):
            def on_train_start(self, trainer, pl_module):
                self.state, self.calls = state(pl_module), pl_module.calls
                self.momenta = len(trainer.optimizers[0].state)

        model, before, swap = Tunable(), Before(), NormSwap("sn")
        tuner = FINDERS[finder]()
        callbacks = [swap, tuner] if first else [tuner, swap]
        torch.manual_seed(0)
        start = state(model)
        runner = trainer(*callbacks, before, tmp_path=tmp_path, enable_checkpointing=True)
        runner.fit(model)
        assert before.calls >= 2  # it did train
        assert before.momenta == 0
        for name, value in start.items():
            assert torch.equal(value, before.state[name]), name
        assert torch.equal(before.state["net.1.mean_weight"], torch.ones(3))
        assert not torch.equal(model.net[1].mean_weight, torch.ones(3))

    @pytest.mark.parametrize("finder", FINDERS)
    def test_an_exception_while_they_train_leaves_nothing_wrapped(self, finder, tmp_path):
        """They put other callbacks in the Trainer, so that on_exception does not reach ours."""
        model = Tunable()
        model.fail_at = 3
        scheduler = NormScheduler({"momentum": 0.2})
        runner = trainer(NormSwap("sn"), scheduler, FINDERS[finder](), tmp_path=tmp_path, enable_checkpointing=True)
        with pytest.raises(ZeroDivisionError):
            runner.fit(model)
        nothing_is_left(model, runner)

    @pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
    def test_an_exception_while_they_train_leaves_nothing_of_the_monitor(self, hook, tmp_path):
        """Lightning puts them first: in ``on_train_start`` the monitor has wrapped, and not yet cleared."""

        class Finder(LearningRateFinder):
            def on_fit_start(self, *args):
                self.run_in("on_fit_start", *args)

            def on_train_start(self, *args):
                self.run_in("on_train_start", *args)

            def run_in(self, now, *args):
                if now == hook:
                    self.lr_find(*args)

        model = Tunable()
        model.fail_at = 3
        runner = trainer(
            NormSwap("sn"), NormMonitor(), Finder(), tmp_path=tmp_path, enable_checkpointing=True,
            logger=TensorBoardLogger(tmp_path),
        )  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            runner.fit(model)
        nothing_is_left(model, runner)
        assert "on_fit_start" not in model.__dict__


class TestConfigureCallbacks:
    class Custom(Early):
        callbacks = ()

        def configure_callbacks(self):
            return [make() for make in self.callbacks]

    def test_a_swap_of_the_module(self, capsys):
        model = self.Custom()
        model.callbacks = [functools.partial(NormSwap, "sn")]
        runner = trainer()
        runner.fit(model, loader())
        runner.test(model, loader())  # another NormSwap, on a model that is swapped
        assert isinstance(model.net[1], SwitchableNorm)
        assert not torch.equal(model.net[1].mean_weight, torch.ones(3))
        assert capsys.readouterr().out.count("2 of 2") == 1
        nothing_is_left(model, runner)

    def test_it_replaces_that_of_the_trainer_and_lightning_says_so(self, caplog):
        model = self.Custom()
        model.callbacks = [lambda: NormSwap("sn")]
        logging.getLogger("lightning.pytorch").propagate = True
        with caplog.at_level("INFO"):
            trainer(NormSwap("bcn")).fit(model, loader())
        assert isinstance(model.net[1], SwitchableNorm)
        assert any("will override existing callbacks passed to Trainer: NormSwap" in r.message for r in caplog.records)

    def test_averaging_in_the_trainer_stands_in_front_of_it(self):
        model = self.Custom()
        model.callbacks = [lambda: NormSwap("sn")]
        with pytest.raises(ConflictError, match="configure_callbacks stand behind the Trainer's: give both to one"):
            trainer(EMAWeightAveraging(decay=0.9)).fit(model, loader())
        model.callbacks.append(lambda: EMAWeightAveraging(decay=0.9))
        trainer().fit(model, loader())


class TestSeveralSwaps:
    def test_each_takes_its_layers_and_both_are_trained(self):
        model = Early()
        swaps = [NormSwap("sn", include=["net.1"]), NormSwap("bcn", include=["net.4"], norm_weight_decay=0.1)]
        runner = trainer(*swaps)
        runner.fit(model, loader())
        assert not torch.equal(model.net[1].mean_weight, torch.ones(3))
        assert not torch.equal(model.net[4].iota, torch.ones(6))
        assert [len(g["params"]) for g in runner.optimizers[0].param_groups] == [4, 7]
        nothing_is_left(model, runner)

    def test_two_choices_of_parameter_groups(self):
        swaps = [NormSwap("sn", include=["net.1"], norm_weight_decay=0), NormSwap("bcn", norm_weight_decay=0.1)]
        with pytest.raises(ConflictError, match=r"two NormSwap callbacks set norm_weight_decay \(0 and 0.1\)"):
            trainer(*swaps).fit(Early(), loader())


class TestSyncBatchNorm:
    @pytest.fixture(autouse=True)
    def _separate_process_group(self):
        yield
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def fit(self, swap):
        model = Early()
        runner = trainer(swap, strategy="ddp", devices=1, sync_batchnorm=True)
        runner.fit(model, DataLoader(loader().dataset, batch_size=4, sampler=range(8)))
        return model

    def test_our_layers_stay_what_they_are(self):
        model = self.fit(NormSwap("sn"))
        assert all(type(m) is SwitchableNorm and m.sync for m in (model.net[1], model.net[4]))
        assert not torch.equal(model.net[1].mean_weight, torch.ones(3))
        assert model.net[1].num_batches_tracked == 2

    def test_layers_of_torch_are_converted_beside_them(self):
        class Custom(lightning_norm.BatchNorm):
            key = ""

        model = Early()
        lightning_norm.swap(model, Custom, include=["net.1"])
        TorchSyncBatchNorm().apply(model)
        assert [type(model.net[i]) for i in (1, 4)] == [Custom, nn.SyncBatchNorm]

    def test_statistics_kept_on_each_rank_contradict_it(self):
        with pytest.warns(ConflictWarning, match=r"NormSwap\(sync=False\) keeps.*Type NormSwap\(sync=True\), or leave"):
            self.fit(NormSwap("sn", sync=False))


class TestPrecision:
    @pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed", "64-true"])
    @pytest.mark.parametrize("key", ["sn", "dbn"])
    def test_statistics_stay_wide_and_right(self, precision, key, tmp_path):
        """0.4 % is half a unit in the last place of bfloat16: what rounding the input alone may do to a mean of it."""

        class First(LateNet):
            def __init__(self):
                super().__init__()
                self.first = nn.BatchNorm2d(3, momentum=None)

            def forward(self, x):
                return super().forward(self.first(x))

        model = First()
        norm_args = {"alpha": 1.0} if key == "dbn" else None
        runner = trainer(NormSwap(key, norm_args=norm_args), precision=precision, tmp_path=tmp_path)
        runner.fit(model, loader(4))
        wide = torch.float64 if precision == "64-true" else torch.float32
        half = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, wide)
        layers = [m for m in model.modules() if isinstance(m, Normalizer)]
        assert len(layers) == 4
        for layer in layers:
            assert layer.weight.dtype == half
            assert all(layer._buffers[name].dtype == wide for name in layer.running_names)
        x = loader(4).dataset.tensors[0].double()
        torch.testing.assert_close(
            model.first.running_mean.double(), x.mean((0, 2, 3)), atol=4e-3 * float(x.abs().mean()), rtol=0
        )
        spread = x.var((0, 2, 3), correction=int(key == "sn"))
        torch.testing.assert_close(model.first.running().var[0].double(), spread, rtol=2 * 4e-3, atol=0)
        runner.test(model, loader(4))
        runner.save_checkpoint(tmp_path / "half.ckpt")
        fresh = First()
        if precision == "64-true":  # Lightning loads before it widens the module
            fresh.setup("test"), fresh.configure_model(), fresh.double()
        trainer(NormSwap(key, norm_args=norm_args), precision=precision).test(
            fresh, loader(4), ckpt_path=str(tmp_path / "half.ckpt")
        )
        same(state(fresh), state(model))

    def test_layers_of_configure_model_under_half_precision(self):
        """There the default dtype is bfloat16, and BatchNorm keeps its statistics in it."""

        class Late(LateNet):
            def configure_model(self):
                if self.late is None:
                    self.late = nn.BatchNorm2d(6, affine=False)

        model = Late()
        trainer(NormSwap("sn"), precision="bf16-true").fit(model, loader())
        assert model.late.running_var.dtype == torch.float32


class TestCompiledModule:
    def test_a_compiled_module_is_swapped_and_trained(self, tmp_path):
        model = LateNet()
        compiled = torch.compile(model, backend="eager")
        runner = trainer(NormSwap("sn"), max_epochs=2)
        runner.fit(compiled, loader())
        eager = LateNet()
        assert [n for n, m in model.named_modules() if isinstance(m, SwitchableNorm)] == ["net.1", "built.1", "late"]
        assert not torch.equal(model.late.mean_weight, torch.ones(3))
        assert not WRAPPED & set(model.__dict__)
        runner.test(compiled, loader())
        runner.save_checkpoint(tmp_path / "compiled.ckpt")
        trainer(NormSwap("sn")).test(eager, loader(), ckpt_path=str(tmp_path / "compiled.ckpt"))
        same(state(eager), state(model))


def at(hook):
    """Return a callback that fails at a hook."""

    def fail(self, *args, **kwargs):
        raise ZeroDivisionError

    return type("Failing", (Callback,), {hook: fail})()


HOOKS = ["setup", "on_fit_start", "on_sanity_check_start", "on_train_start", "on_train_epoch_start",
         "on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_train_epoch_end",
         "on_save_checkpoint", "on_train_end", "on_fit_end", "teardown"]  # fmt: skip


class TestExceptions:
    @pytest.mark.parametrize("hook", HOOKS)
    @pytest.mark.parametrize("first", [True, False])
    def test_nothing_is_left_and_the_model_goes_on(self, hook, first, tmp_path):
        model, swap = LateNet(), NormSwap("sn")
        custom = model.on_save_checkpoint = lambda checkpoint: None
        callbacks = [at(hook), swap] if first else [swap, at(hook)]
        saver = ModelCheckpoint(tmp_path)
        runner = trainer(
            *callbacks, NormScheduler({"momentum": 0.2}), saver, enable_checkpointing=True, num_sanity_val_steps=1
        )
        with pytest.raises(ZeroDivisionError):
            runner.fit(model, loader(), loader())
        assert model.__dict__.pop("on_save_checkpoint") is custom
        nothing_is_left(model, runner)
        assert model.configure_optimizers.__func__ is Net.configure_optimizers
        assert model.configure_model.__func__ is LateNet.configure_model
        trainer(NormSwap("sn")).fit(model, loader())
        assert all(type(m) is not nn.BatchNorm2d for m in model.modules())

    @pytest.mark.parametrize("method", ["configure_model", "configure_optimizers", "setup"])
    def test_in_the_modules_own_methods(self, method):
        def fail(*args, **kwargs):
            raise ZeroDivisionError

        model = type("Broken", (LateNet,), {method: fail})()
        runner = trainer(NormSwap("sn"))
        with pytest.raises(ZeroDivisionError):
            runner.fit(model, loader())
        assert not WRAPPED & set(model.__dict__)

    @pytest.mark.parametrize("stage", ["validate", "test", "predict"])
    def test_in_other_stages(self, stage):
        model = LateNet()
        runner = trainer(
            NormSwap("sn"), NormScheduler({"momentum": 0.2}), at(f"on_{stage.replace('date', 'dation')}_start")
        )
        with pytest.raises(ZeroDivisionError):
            getattr(runner, stage)(model, loader())
        nothing_is_left(model, runner)

    def test_interrupted_by_the_keyboard(self):
        def interrupt(self, trainer, pl_module, outputs, batch, batch_idx):
            raise KeyboardInterrupt

        stop = type("Stop", (Callback,), {"on_train_batch_end": interrupt})()
        model = LateNet()
        runner = trainer(NormSwap("sn"), stop)
        with pytest.raises(SystemExit):
            runner.fit(model, loader())
        nothing_is_left(model, runner)


def test_a_weights_only_file_as_ckpt_path(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    model, fresh = Early(), Early()
    trainer(NormSwap("sn"), saver, enable_checkpointing=True).fit(model, loader())
    trainer(NormSwap("sn")).test(fresh, loader(), ckpt_path=str(tmp_path / "weights.ckpt"))
    same(state(fresh), state(model))
    with pytest.raises(KeyError, match="contains only the model"):  # Lightning's own answer to a resume
        trainer(NormSwap("sn")).fit(fresh, loader(), ckpt_path=str(tmp_path / "weights.ckpt"))

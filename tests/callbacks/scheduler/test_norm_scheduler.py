import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from torch import nn
from torch.utils.data import DataLoader

from lightning_norm import (
    Chain,
    Constant,
    Exponential,
    InversePower,
    Linear,
    NormScheduler,
    NormSwap,
    Schedule,
    Steps,
    fold,
    swap,
)
from lightning_norm.layers.base import Normalizer
from lightning_norm.ops import compiled
from tests.callbacks.toy import LateNet, Net, loader, trainer

SPARSE = {"sparse": True}
NAMES = ["net.1", "built.1", "late"]


def swap_sn(**arguments):
    return NormSwap("sn", norm_args=SPARSE, **arguments)


def values(model, name="radius"):
    return {n: getattr(m, name) for n, m in model.named_modules() if isinstance(m, Normalizer)}


class Trace(Callback):
    """Write down the values, as the layers' tensors hold them, at each hook."""

    def __init__(self, name="radius"):
        self.name, self.seen = name, []

    def _see(self, hook, trainer, model):
        stored = [m.scheduled(self.name).item() for m in model.modules() if isinstance(m, Normalizer)]
        assert stored == list(values(model, self.name).values())
        self.seen.append(
            (hook, trainer.current_epoch, trainer.global_step, stored[-1] if len(set(stored)) == 1 else stored)
        )

    def at(self, hook):
        return [value for h, _, _, value in self.seen if h == hook]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._see("train", trainer, pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *args, **kwargs):
        self._see("sanity" if trainer.sanity_checking else "validation", trainer, pl_module)

    def on_test_batch_end(self, trainer, pl_module, *args, **kwargs):
        self._see("test", trainer, pl_module)

    def on_predict_batch_end(self, trainer, pl_module, *args, **kwargs):
        self._see("predict", trainer, pl_module)


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_layers_of_a_swap_are_found_whatever_the_order(scheduler_first):
    """Two batches an epoch; layers of __init__, setup and configure_model."""
    model, trace = LateNet(), Trace()
    pair = [NormScheduler({"radius": Linear(0.1, 0.4, epochs=3)}), swap_sn()]
    runner = trainer(*pair[:: 1 if scheduler_first else -1], trace, max_epochs=5)
    runner.fit(model, loader(), loader(4))
    expected = [0.1, 0.2, 0.3, 0.4, 0.4]
    assert trace.at("train") == pytest.approx([v for v in expected for _ in range(2)])
    assert trace.at("validation") == pytest.approx(expected)
    assert values(model) == dict.fromkeys(NAMES, 0.4)
    assert not {"configure_model", "configure_optimizers", "on_load_checkpoint"} & set(model.__dict__)


def test_by_step_a_step_is_an_optimizer_step():
    trace = Trace()
    scheduler = NormScheduler({"radius": InversePower(0.5)}, interval="step")
    runner = trainer(swap_sn(), scheduler, trace, max_epochs=2, accumulate_grad_batches=2)
    runner.fit(Net(), loader(20), loader(4))
    steps = [0, 0, 1, 1, 2]  # five batches an epoch: the last window is a short one
    assert trace.at("train") == [(s + 1) ** -0.5 for s in steps + [s + 3 for s in steps]]
    assert trace.at("validation") == [3**-0.5, 6**-0.5]  # as in the last training step


def test_by_step_epochs_advance_by_fractions():
    trace = Trace()
    scheduler = NormScheduler({"radius": Linear(0.0, 1.0, epochs=2)}, interval="step")
    trainer(swap_sn(), scheduler, trace, max_epochs=3, accumulate_grad_batches=2).fit(Net(), loader(20))
    steps = [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 6, 6, 6]
    assert trace.at("train") == pytest.approx([s / 6 for s in steps])


def test_patterns_and_the_first_match_wins():
    model = LateNet()
    schedules = {r"(?:net|late)(?:\..*)?:radius": 0.3, "radius": Constant(0.6), "late:momentum": 0.5}
    trainer(swap_sn(), NormScheduler(schedules)).fit(model, loader())
    assert values(model) == {"net.1": 0.3, "built.1": 0.6, "late": 0.3}
    assert values(model, "momentum") == {"net.1": 0.1, "built.1": 0.1, "late": 0.5}


def test_a_shared_layer_goes_by_any_of_its_names():
    model = Net()
    model.again = model.net[1]
    trainer(swap_sn(), NormScheduler({"again:radius": 0.3})).fit(model, loader())
    assert model.net[1].radius == 0.3


def test_the_value_changes_what_is_learned():
    weights = []
    for schedule in (0.0, Steps({0: 0.0, 1: 0.5})):
        torch.manual_seed(0)
        model = Net()
        swap(model, "sn", norm_args=SPARSE)
        nn.init.normal_(model.net[1].mean_weight)
        trainer(NormScheduler({"radius": schedule}), max_epochs=2).fit(model, loader())
        weights.append(model.net[0].weight)
    assert not torch.equal(*weights)


class TestEvaluation:
    def test_sanity_check_has_the_first_value(self):
        trace = Trace()
        scheduler = NormScheduler({"radius": Linear(0.2, 1.0, steps=8)}, interval="step")
        runner = trainer(scheduler, swap_sn(), trace, num_sanity_val_steps=1, max_epochs=2)
        runner.fit(LateNet(), loader(), loader(4))
        assert trace.at("sanity") == [0.2]
        assert trace.at("validation") == pytest.approx([0.3, 0.5])

    @pytest.mark.parametrize("stage", ["validate", "test", "predict"])
    def test_without_training_the_first_value(self, stage):
        model, trace = LateNet(), Trace()
        getattr(trainer(NormScheduler({"radius": Linear(0.2, 1.0, epochs=8)}), swap_sn(), trace), stage)(
            model, loader(4)
        )
        assert values(model) == dict.fromkeys(NAMES, 0.2)
        assert {value for *_, value in trace.seen} == {0.2}

    @pytest.mark.parametrize("net", [Net, LateNet])
    def test_what_was_folded_has_nothing_to_schedule(self, net):
        model, schedules = net(), {"net.*:momentum": Constant(0.5)}
        trainer(NormSwap("bn"), NormScheduler(schedules)).fit(model, loader(4))
        fold(model.eval())
        assert isinstance(model.net[1], nn.Identity)
        for stage in ("validate", "test", "predict"):
            getattr(trainer(NormScheduler(schedules)), stage)(model, loader(4))

    @pytest.mark.parametrize("interval", ["epoch", "step"])
    def test_after_training_the_last_value_also_in_another_trainer(self, interval):
        model, last = LateNet(), {"epoch": 0.4, "step": 0.2}[interval]
        length = {"epoch": {"epochs": 5}, "step": {"steps": 25}}[interval]
        callbacks = [swap_sn(), NormScheduler({"radius": Linear(0.0, 1.0, **length)}, interval)]
        runner = trainer(*callbacks, max_epochs=3)
        runner.fit(model, loader())
        for tester in (runner, trainer(*copy.deepcopy(callbacks))):
            tester.test(model, loader(4))
            assert values(model) == dict.fromkeys(NAMES, last)

    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Found keys that are not in")
    @pytest.mark.parametrize("weights_only", [False, True])
    @pytest.mark.parametrize("interval", ["epoch", "step"])
    def test_with_a_checkpoint_its_own_value(self, interval, weights_only, tmp_path):
        """A checkpoint of the end of each epoch, of the middle, and of after the training."""
        schedule = Linear(0.0, 1.0, epochs=5) if interval == "epoch" else Linear(0.0, 1.0, steps=10)
        callbacks = [swap_sn(), NormScheduler({"radius": schedule}, interval)]
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=weights_only)
        trace = Trace()
        runner = trainer(*callbacks, keep, trace, max_epochs=2, enable_checkpointing=True)
        runner.fit(LateNet(), loader(), loader(4))
        runner.save_checkpoint(tmp_path / "end.ckpt", weights_only=weights_only)
        expected = {f"step={step}.ckpt": value for *_, step, value in trace.seen}
        expected["end.ckpt"] = trace.at("train")[-1]
        assert len(expected) == 5
        assert len(set(expected.values())) == (2 if interval == "epoch" else 4)
        for name, value in expected.items():
            for tester in (runner, trainer(*copy.deepcopy(callbacks))):
                model = LateNet()
                tester.test(model, loader(4), ckpt_path=str(tmp_path / name))
                assert values(model) == dict.fromkeys(NAMES, value)

    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
    def test_fractions_of_an_epoch_need_the_steps_of_an_epoch(self, tmp_path):
        callbacks = [swap_sn(), NormScheduler({"radius": Linear(0.0, 1.0, epochs=4)}, "step")]
        runner = trainer(*callbacks, max_epochs=2)
        runner.fit(Net(), loader())
        for name, weights_only in (("all.ckpt", False), ("weights.ckpt", True)):
            runner.save_checkpoint(tmp_path / name, weights_only=weights_only)
        assert torch.load(tmp_path / "all.ckpt", weights_only=True)["callbacks"] == {
            "NormScheduler{'interval': 'step', 'schedules': ['radius']}": {"steps_per_epoch": 2}
        }
        model = Net()
        trainer(*copy.deepcopy(callbacks[:1]), NormScheduler(callbacks[1].schedules, "step")).test(
            model, loader(4), ckpt_path=str(tmp_path / "all.ckpt")
        )
        assert values(model) == {"net.1": 3 / 8}
        with pytest.raises(ValueError, match="does not tell how many steps an epoch had"):
            trainer(swap_sn(), NormScheduler(callbacks[1].schedules, "step")).test(
                Net(), loader(4), ckpt_path=str(tmp_path / "weights.ckpt")
            )


class Tunable(LateNet):
    def __init__(self):
        super().__init__()
        self.lr, self.batch_size, self.radii = 0.1, 2, []

    def training_step(self, batch, batch_idx):
        self.radii.append([m.scheduled("radius").item() for m in self.modules() if isinstance(m, Normalizer)])
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return DataLoader(loader(16).dataset, batch_size=self.batch_size)

    val_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
def test_finders_train_with_the_first_value_and_change_nothing(finder, interval, tmp_path):
    model, trace = Tunable(), Trace()
    tuner = (
        LearningRateFinder(num_training_steps=5, early_stop_threshold=None)
        if finder is LearningRateFinder
        else BatchSizeFinder(steps_per_trial=2, max_trials=1)
    )
    scheduler = NormScheduler({"radius": Linear(0.1, 0.9, epochs=2)}, interval)
    runner = trainer(scheduler, swap_sn(), trace, tuner, max_epochs=2, tmp_path=tmp_path, enable_checkpointing=True)
    runner.fit(model)
    batches = 16 // model.batch_size
    tried = len(model.radii) - 2 * batches
    assert tried > 1
    assert model.radii[:tried] == [[0.1] * 3] * tried
    steps = range(2 * batches)
    expected = [0.1 + 0.4 * (s // batches if interval == "epoch" else s / batches) for s in steps]
    assert trace.at("train") == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model")
def test_averaged_buffers_do_not_reach_the_scheduled_values():
    trace = Trace()  # it compares each layer's tensor with its value
    model = Net()
    scheduler = NormScheduler({"radius": Linear(0.0, 1.0, steps=20)}, "step")
    runner = trainer(scheduler, swap_sn(), EMAWeightAveraging(decay=0.9), trace, max_epochs=3)
    runner.fit(model, loader(), loader(4))
    assert trace.at("validation") == pytest.approx([1 / 20, 3 / 20, 5 / 20])
    runner.test(model, loader(4))
    assert trace.at("test") == [5 / 20]
    assert model.net[1].scheduled("radius").item() == 5 / 20


class TestCompiled:
    def test_no_graph_is_added_when_values_change(self, monkeypatch):
        monkeypatch.setattr(compiled, "_graphs", {})
        monkeypatch.setattr(compiled, "_shapes", type(compiled._shapes)())
        real = torch.compile  # traced as always, the graph run as it is
        monkeypatch.setattr(torch, "compile", lambda f, **kw: real(f, backend="eager", **kw))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        counts = []

        class Count(Trace):
            def on_train_batch_end(self, *args):
                super().on_train_batch_end(*args)
                counts.append((compiled.graphs(), torch._dynamo.utils.counters["stats"]["unique_graphs"]))

        trace = Count()
        schedules = {"radius": Linear(0.0, 1.0, steps=9), "momentum": Exponential(0.5, 0.9)}
        model = Net()
        runner = trainer(swap_sn(compile=True), NormScheduler(schedules, "step"), trace, max_epochs=6)
        runner.fit(model, loader())
        assert len(set(trace.at("train"))) == 10
        assert all(m.compiled for m in model.modules() if isinstance(m, Normalizer))
        assert counts == [counts[0]] * 12
        assert counts[0][0] == counts[0][1] == 1
        assert not torch._dynamo.utils.counters["graph_break"]

    def test_a_compiled_model_is_not_compiled_again(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = Net()
        swap(model, "sn", norm_args=SPARSE)
        trace = Trace()
        scheduler = NormScheduler({"radius": Linear(0.0, 1.0, steps=9)}, "step")
        runner = trainer(scheduler, trace, max_epochs=5)
        runner.fit(torch.compile(model, backend="eager"), loader())
        assert len(set(trace.at("train"))) == 10
        once = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = Net()
        swap(model, "sn", norm_args=SPARSE)
        trainer(max_epochs=5).fit(torch.compile(model, backend="eager"), loader())
        assert once == torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


class Unsized(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(loader(8).dataset)


class TestBadInput:
    def refused(self, message, schedules, interval="epoch", model=None, data=None, callbacks=None, **kwargs):
        trace = Trace()
        callbacks = [swap_sn()] if callbacks is None else callbacks
        model = model or LateNet()
        with pytest.raises(ValueError, match=message):
            trainer(*callbacks, NormScheduler(schedules, interval), trace, **kwargs).fit(
                model, loader() if data is None else data
            )
        assert not trace.at("train")
        assert not {"configure_model", "configure_optimizers", "on_load_checkpoint"} & set(model.__dict__)

    def test_an_unknown_name(self):
        said = r"schedules\['radios'\]: no layer has a value 'radios' to schedule. Did you mean 'radius'\? They have: "
        self.refused(said + r"momentum \(3 layers\), radius \(3 layers\)", {"radios": 0.1})
        self.refused(r"none of the 1 layer that 'late' matches has a value 'alpha'", {"late:alpha": 0.1})

    def test_an_unknown_layer(self):
        said = r"'lat' matched none of the 3 layers. The nearest name is 'late': the regular expression must match"
        self.refused(said, {"lat:radius": 0.1})

    def test_a_key_behind_one_that_takes_all(self):
        said = r"schedules\['late:radius'\] is never used: schedules\['radius'\] comes first"
        self.refused(said, {"radius": 0.1, "late:radius": 0.2})

    def test_a_value_without_effect(self):
        self.refused(
            "radius has no effect in SwitchableNorm net.1 with sparse=False",
            {"radius": 0.1},
            callbacks=[NormSwap("sn")],
        )
        self.refused(
            "momentum has no effect in SwitchableNorm net.1 with track_running_stats=False",
            {"momentum": 0.1},
            callbacks=[NormSwap("sn", norm_args={"choices": ["in", "ln"]})],
        )

    def test_a_model_without_our_layers(self):
        self.refused(
            r"no layer has a value 'radius' to schedule.* momentum \(3 layers\). radius is a value of sn. Swap first",
            {"radius": 0.1},
            callbacks=[],
        )
        model = Net()
        model.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6))
        said = "no layer of this package and no BatchNorm, so nothing to schedule. Swap first"
        self.refused(said, {"momentum": 0.1}, model=model, callbacks=[])

    def test_two_schedulers_for_one_value(self):
        callbacks = [swap_sn(), NormScheduler({"late:radius": 0.3})]
        self.refused("two NormSchedulers schedule radius of late", {"radius": 0.2}, callbacks=callbacks)

    @pytest.mark.parametrize(
        ("schedule", "interval", "said", "kwargs"),
        [
            (1.5, "epoch", "gives 1.5 in epoch 0, but SwitchableNorm net.1 takes radius from 0 to 1", {}),
            (Linear(0.5, 1.5, epochs=10), "epoch", "epochs=10, .* gives 1.4 in epoch 9", {"max_epochs": 10}),
            (Steps({0: 0.5, 7: -1}), "step", "gives -1 in step 7", {"max_steps": 9, "max_epochs": -1}),
            (Exponential(0.1, 2.0), "step", "gives 1.6 in step 4", {"max_steps": 5}),
            (Exponential(0.1, 2.0), "step", "gives 3.2 in step 5", {"max_epochs": 3}),
            (Exponential(0.1, 2.0), "step", "gives 1.6 in step 4", {"max_epochs": 5, "accumulate_grad_batches": 2}),
            (Exponential(0.1, 2.0), "epoch", "gives 1.6 in epoch 4", {"max_steps": 9, "max_epochs": -1}),
            (Exponential(0.1, 1.01), "epoch", "gives inf in the long run", {"max_epochs": -1}),
            (Chain([Linear(0, 2, steps=4), Constant(0.5)]), "step", "gives 1.5 in step 3", {"max_epochs": 10}),
        ],
    )
    def test_a_value_out_of_range_at_any_time_of_the_run(self, schedule, interval, said, kwargs):
        self.refused(said, {"radius": schedule}, interval, **{"max_epochs": 3, **kwargs})

    def test_what_the_run_never_reaches_is_no_concern(self):
        trainer(swap_sn(), NormScheduler({"radius": Steps({0: 0.5, 3: 2})}), max_epochs=3).fit(Net(), loader())

    def test_a_schedule_of_ones_own_that_lies(self):
        class Late(Schedule):
            def __call__(self, time, epoch=1.0):
                return 2.0 if time == 1 else 0.5

            def turns(self, last, epoch=1.0):
                return [0]

        with pytest.raises(ValueError, match="gives 2 in epoch 1"):
            trainer(swap_sn(), NormScheduler({"radius": Late()}), max_epochs=3).fit(Net(), loader())

    @pytest.mark.filterwarnings("ignore:Your `IterableDataset`")
    def test_fractions_of_an_epoch_without_a_known_length(self):
        class ByHand(Net):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

        wanted = {"radius": Linear(0.0, 1.0, epochs=2)}
        said = "how many steps an epoch has is not known"
        self.refused(said, wanted, "step", data=DataLoader(Unsized(), batch_size=4))
        self.refused(said, wanted, "step", reload_dataloaders_every_n_epochs=1)
        self.refused(said, wanted, "step", model=ByHand())
        accumulation = GradientAccumulationScheduler({0: 2, 1: 1})
        self.refused(said, wanted, "step", callbacks=[swap_sn(), accumulation])
        trace = Trace()
        callbacks = [swap_sn(), accumulation, NormScheduler({"radius": Linear(0, 1, steps=4)}, "step"), trace]
        trainer(*callbacks, max_epochs=2).fit(Net(), loader())
        assert trace.at("train") == [0, 0, 0.25, 0.5]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (({},), "NormScheduler needs schedules"),
            (([("radius", 0.1)],), "schedules must be a mapping such as {'alpha': 0.1}, got"),
            (({1: 0.1},), r"schedules\[1\]: expected 'alpha' or 'layer1"),
            (({"radius": "x"},), r"schedules\['radius'\] must be a number or a schedule"),
            (({"net.*:": 0.1},), "the value's name coming last"),
            (({":radius": 0.1},), "the value's name coming last"),
            (({"(:radius": 0.1},), "is not a regular expression"),
            (({"radius": 0.1}, "batch"), "interval must be 'epoch' or 'step', got 'batch'"),
            (({"radius": Linear(0, 1, steps=5)},), "has a duration in steps: type interval='step'"),
        ],
    )
    def test_at_construction(self, arguments, said):
        with pytest.raises((ValueError, TypeError), match=said):
            NormScheduler(*arguments)


def test_can_be_copied_and_pickled():
    scheduler = NormScheduler({"radius": Linear(0.0, 1.0, epochs=3), "momentum": 0.1})
    for again in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert again.schedules == scheduler.schedules


class Broken(Net):
    def configure_optimizers(self):
        raise ZeroDivisionError


def test_an_exception_leaves_nothing_wrapped():
    model = Broken()
    for order in (1, -1):
        with pytest.raises(ZeroDivisionError):
            trainer(*[swap_sn(), NormScheduler({"radius": 0.1})][::order]).fit(model, loader())
        assert not {"configure_model", "configure_optimizers"} & set(model.__dict__)
    pickle.dumps(model)

"""accumulate_statistics: the running statistics after a window are those after one batch of all its samples."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, GradientAccumulationScheduler, LearningRateFinder
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_norm
from lightning_norm import NoEffectWarning, NormContext, NormRecalibrate, NormSwap, create
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.running_stats import close_window, open_window
from lightning_norm.testing.ranks import run_ranks
from tests.callbacks.toy import Net, loader, trainer

CHANNELS = 3


def data(n, seed=0):
    """Images of unequal means, so that the spread between batches matters."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, CHANNELS, 4, 4, generator=generator, dtype=torch.float64)
    return x + torch.arange(n, dtype=torch.float64).reshape(-1, 1, 1, 1) / 3 + 5


class First(Net):
    """A normalizer as the first layer: what it sees does not depend on what is learned."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.first = nn.BatchNorm2d(CHANNELS, momentum=momentum)
        self.net = nn.Sequential(nn.Conv2d(CHANNELS, 6, 3), nn.BatchNorm2d(6))
        self.double()

    def forward(self, x):
        return super().forward(self.first(x))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)  # rbn's statistics follow what it learns


def batches(n, batch_size, seed=0):
    return DataLoader(TensorDataset(data(n, seed), torch.zeros(n).double()), batch_size=batch_size)


def fit(swap, loader, *callbacks, model=None, ckpt_path=None, **kwargs):
    model = First() if model is None else model
    runner = trainer(swap, *callbacks, **kwargs)
    runner.fit(model, loader, ckpt_path=ckpt_path)
    return model, runner


def statistics(model):
    return {name: model.first._buffers[name] for name in (*model.first.running_names, "num_batches_tracked")}


def agree(model, expected):
    for name, value in statistics(expected).items():
        torch.testing.assert_close(statistics(model)[name], value, rtol=1e-12, atol=1e-12, msg=name)


ON = {"accumulate_statistics": True}
LAYERS = {
    "bn": {},
    "sn": {"correction": 1},
    "in": {"track_running_stats": True},
    "bcn": {},
    "bnet": {},
    "afn": {"dropout": 0.0},
    "rbn": {},
    "ubn": {},
    "dbn": {},
}


class TestEqualsOneBigBatch:
    @pytest.mark.filterwarnings("ignore::lightning_norm.ParameterGrowthWarning")
    @pytest.mark.parametrize("key", LAYERS)
    def test_every_normalizer(self, key):
        arguments = {"norm_args": LAYERS[key], "include": ["first"]}
        torch.manual_seed(0)
        one, _ = fit(NormSwap(key, **arguments), batches(24, 12))
        torch.manual_seed(0)
        many, runner = fit(NormSwap(key, **arguments, **ON), batches(24, 4), accumulate_grad_batches=3)
        assert runner.global_step == 2
        agree(many, one)
        assert many.first.num_batches_tracked == 2
        torch.manual_seed(0)
        without, _ = fit(NormSwap(key, **arguments), batches(24, 4), accumulate_grad_batches=3)
        assert without.first.num_batches_tracked == 6
        second = one.first.running_names[1]
        assert (statistics(without)[second] - statistics(one)[second]).abs().max() > 0.01

    def test_the_average_of_all_batches(self):
        one, _ = fit(NormSwap("bn"), batches(24, 12), model=First(momentum=None))
        many, _ = fit(NormSwap("bn", **ON), batches(24, 4), model=First(momentum=None), accumulate_grad_batches=3)
        agree(many, one)

    def test_the_last_incomplete_window_and_a_smaller_last_batch(self):
        """22 samples in batches of 4: windows of 12 and of 4 + 4 + 2."""
        one, _ = fit(NormSwap("bn"), batches(22, 12))
        many, runner = fit(NormSwap("bn", **ON), batches(22, 4), accumulate_grad_batches=3)
        assert runner.global_step == 2
        agree(many, one)

    def test_with_a_schedule_of_windows(self):
        """Epoch 0: each batch, epoch 1: two, epoch 2: all six in windows of four and two."""
        scheduler = GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
        many, runner = fit(NormSwap("bn", **ON), batches(24, 4), scheduler, max_epochs=3)
        assert runner.global_step == 6 + 3 + 2
        layer = create("bn", CHANNELS, dtype=torch.float64)
        x = data(24)
        for sizes in ([4] * 6, [8] * 3, [16, 8]):
            for part in x.split(sizes):
                layer(part)
        assert torch.allclose(many.first.running_var, layer.running_var, rtol=1e-12)
        assert many.first.num_batches_tracked == layer.num_batches_tracked == 11

    def test_several_calls_in_a_step_and_manual_optimization(self):
        class Manual(First):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch, batch_idx):
                self.first(batch[0] + 1)
                self.manual_backward(self.loss(batch))
                if batch_idx % 2:
                    self.optimizers().step()
                    self.optimizers().zero_grad()

        many, _ = fit(NormSwap("bn", **ON), batches(16, 4), model=Manual())
        layer = create("bn", CHANNELS, dtype=torch.float64)
        for part in data(16).split(8):
            layer(torch.cat([part, part + 1]))
        torch.testing.assert_close(many.first.running_var, layer.running_var, rtol=1e-12, atol=0)
        assert many.first.num_batches_tracked == 2

    def test_contexts(self):
        def ids(x):
            return (x[:, 0, 0, 0] > 7).long()

        swap = {"norm_args": {"context": "ids", "num_contexts": 2}, "include": ["first"]}
        context = {"context_fn": lambda batch: ids(batch[0])}
        one, _ = fit(NormSwap("cn", **swap), batches(24, 12), NormContext(**context))
        many, _ = fit(NormSwap("cn", **swap, **ON), batches(24, 4), NormContext(**context), accumulate_grad_batches=3)
        agree(many, one)
        torch.testing.assert_close(many.first.prior, one.first.prior, rtol=1e-12, atol=0)

    def test_condensed_batches_stay_out(self):
        layer = create("ubn", CHANNELS, threshold=0.5, min_updates=0, dtype=torch.float64)
        alone = copy.deepcopy(layer)
        spread, alike = torch.randn(4, CHANNELS, 4, 4).double(), data(1).expand(4, -1, -1, -1)
        open_window(layer)
        for x in (spread, alike):
            layer(x)
        close_window(layer)
        alone(spread)
        torch.testing.assert_close(layer.running_var, alone.running_var, rtol=1e-12, atol=0)
        assert (layer.num_batches_tracked, layer.skipped) == (1, 1)

    def test_over_ranks(self):
        for key, *results in zip(("bn", "in"), *run_ranks(windows, 2), strict=True):
            layer = create(key, CHANNELS, dtype=torch.float64, **LAYERS[key])
            layer(data(12))
            for stored in results:
                torch.testing.assert_close(stored, [layer.running_mean, layer.running_var], rtol=1e-12, atol=1e-12)

    def test_compiled_layers(self, monkeypatch):
        from lightning_norm.ops import compiled

        monkeypatch.setattr(compiled, "_graphs", {})
        real = torch.compile  # traced as always, the graph run as it is
        monkeypatch.setattr(torch, "compile", lambda f, **kw: real(f, backend="eager", **kw))
        torch._dynamo.reset()
        x = data(12)
        one, many = (create("sn", CHANNELS, dtype=torch.float64) for _ in range(2))
        many.compile()
        many(x[:4])  # a graph without a window is there already
        many.reset_running_stats()
        open_window(many)
        for part in x.split(4):
            many(part)
        close_window(many)
        one(x)
        torch.testing.assert_close(many.running_var, one.running_var, rtol=1e-12, atol=0)
        assert many.num_batches_tracked == 1


def windows(rank):
    got = []
    for key in ("bn", "in"):
        layer = create(key, CHANNELS, dtype=torch.float64, **LAYERS[key])
        open_window(layer)
        for x in data(12).split([3, 1, 2, 3, 1, 2])[rank::2]:  # uneven in every batch
            layer(x)
        close_window(layer)
        got.append([layer.running_mean, layer.running_var])
    return got


class TestNan:
    def test_a_batch_with_a_nan_is_left_out_and_counted_once(self):
        layer, alone = (create("bn", CHANNELS, dtype=torch.float64) for _ in range(2))
        x = data(8)
        open_window(layer)
        layer(x[:4])
        layer(torch.full_like(x[:4], float("nan")))
        close_window(layer)
        alone(x[:4])
        torch.testing.assert_close(layer.running_mean, alone.running_mean, rtol=1e-12, atol=0)
        assert (layer.num_batches_tracked, layer.skipped_updates) == (1, 1)

    @pytest.mark.parametrize("key", ["bn", "cn"])
    def test_an_empty_window_moves_and_counts_nothing(self, key):
        layer = create(key, CHANNELS, **({"context": "gate"} if key == "cn" else {}))
        before = copy.deepcopy(layer.state_dict())
        open_window(layer)
        close_window(layer)
        assert all(torch.equal(v, layer.state_dict()[k]) for k, v in before.items())
        assert layer.skipped_updates == 0


class Save(Callback):
    """Write a checkpoint after some batch."""

    def __init__(self, path, batch):
        self.path, self.batch, self.inputs = path, batch, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.inputs.append(batch[0])
        if batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


class TestCheckpoint:
    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    def test_resumed_inside_a_window_its_statistics_are_those_of_the_whole_window(self, tmp_path):
        path = str(tmp_path / "mid.ckpt")
        save = Save(path, batch=3)  # the second window has one batch of three
        fit(NormSwap("bn", **ON), batches(24, 4), save, accumulate_grad_batches=3)
        stored = torch.load(path, weights_only=True)["callbacks"]["NormSwap{'norm': 'bn'}"]["window"]
        assert sorted(stored) == ["first", "net.1"]
        assert [t.tolist() for t in stored["first"][:1]] == [[[4 * 16.0]]]
        seen = Save(path, batch=None)
        many, runner = fit(
            NormSwap("bn", **ON), None, seen, model=Resuming(batches(24, 4)), ckpt_path=path, accumulate_grad_batches=3
        )
        assert runner.global_step == 2
        layer = create("bn", CHANNELS, dtype=torch.float64)
        layer(torch.cat(save.inputs[:3]))
        layer(torch.cat([save.inputs[3], *seen.inputs]))
        torch.testing.assert_close(many.first.running_var, layer.running_var, rtol=1e-12, atol=0)
        torch.testing.assert_close(many.first.running_mean, layer.running_mean, rtol=1e-12, atol=0)

    def test_between_windows_the_file_holds_nothing_of_it(self, tmp_path):
        path = str(tmp_path / "step.ckpt")
        fit(NormSwap("bn", **ON), batches(24, 4), Save(path, batch=2), accumulate_grad_batches=3)
        assert torch.load(path)["callbacks"]["NormSwap{'norm': 'bn'}"] == {"window": {}}

    def test_without_it_the_rest_of_a_window_is_dropped_with_a_word(self, tmp_path, caplog):
        path = str(tmp_path / "mid.ckpt")
        fit(NormSwap("bn", **ON), batches(24, 4), Save(path, batch=3), accumulate_grad_batches=3)
        with caplog.at_level("INFO"):
            fit(NormSwap("bn"), None, model=Resuming(batches(24, 4)), ckpt_path=path, accumulate_grad_batches=3)
        assert "what was gathered is dropped" in caplog.text


class Resuming(First):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return self.batches


class TestInTheTrainer:
    def test_nothing_is_left_on_the_layers(self):
        model, _ = fit(NormSwap("bn", **ON), batches(24, 4), accumulate_grad_batches=3)
        assert all(m._accumulator is None for m in model.modules() if isinstance(m, Normalizer))

        class Broken(First):
            def training_step(self, batch, batch_idx):
                if batch_idx == 1:
                    assert self.first._accumulator.count.any()
                    raise ZeroDivisionError
                return super().training_step(batch, batch_idx)

        model = Broken()
        with pytest.raises(ZeroDivisionError):
            fit(NormSwap("bn", **ON), batches(24, 4), model=model, accumulate_grad_batches=3)
        assert all(m._accumulator is None for m in model.modules() if isinstance(m, Normalizer))

    def test_validation_inside_a_window_leaves_it_alone(self):
        one, _ = fit(NormSwap("bn"), batches(24, 12))
        model = First()
        runner = trainer(
            NormSwap("bn", **ON),
            NormRecalibrate(2, when="on_request"),
            accumulate_grad_batches=3,
            val_check_interval=2,
        )
        runner.fit(model, batches(24, 4), batches(8, 4, seed=1))
        agree(model, one)

    @pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model")
    def test_averages_hold_the_statistics_of_each_step(self):
        averaged, _ = fit(
            NormSwap("bn", **ON), batches(24, 4), EMAWeightAveraging(decay=0.5), accumulate_grad_batches=3
        )
        one, _ = fit(NormSwap("bn"), batches(24, 12), EMAWeightAveraging(decay=0.5))
        agree(averaged, one)

    @pytest.mark.filterwarnings("ignore:The number of training batches")
    def test_the_trials_of_a_finder_leave_them_alone(self, tmp_path):
        one, _ = fit(NormSwap("bn", include=["first"]), batches(24, 12), max_epochs=2)
        model = Resuming(batches(24, 4))
        model.lr, finder = 0.0, LearningRateFinder(num_training_steps=4, early_stop_threshold=None)
        options = {"max_epochs": 2, "enable_checkpointing": True, "tmp_path": tmp_path, "accumulate_grad_batches": 3}
        fit(NormSwap("bn", include=["first"], **ON), None, finder, model=model, **options)
        assert len(finder.optimal_lr.results["loss"]) >= 4
        agree(model, one)

    def test_two_swaps(self):
        swaps = [NormSwap("sn", include=["first"], **ON), NormSwap("bn", **ON)]
        one, _ = fit(NormSwap("sn", include=["first"]), batches(24, 12))
        many, _ = fit(swaps[0], batches(24, 4), swaps[1], accumulate_grad_batches=3)
        agree(many, one)


class TestRefused:
    def test_in_a_trainer_nothing_is_left_behind(self):
        model = First()
        with pytest.raises(ValueError, match=r"net.1 is ContextNorm: missing='posterior' follows.*=False"):
            fit(NormSwap("cn", {"missing": "posterior", "context": "gate"}, **ON), batches(24, 4), model=model)
        assert all(m._accumulator is None for m in model.modules() if isinstance(m, Normalizer))

    def test_posteriors_of_contexts(self):
        layer = create("cn", CHANNELS, missing="posterior")
        with pytest.raises(ValueError, match="missing='posterior' follows the spread of each batch"):
            open_window(layer)

    def test_layers_without_running_statistics(self):
        with pytest.raises(ValueError, match="InstanceNorm: it keeps no running statistics"):
            open_window(create("in", CHANNELS))
        with pytest.warns(NoEffectWarning, match="accumulate_statistics=True does nothing: no layer keeps"):
            fit(NormSwap("in", **ON), batches(24, 4))


def test_recalibration_inside_a_window_does_not_see_it():
    layer = lightning_norm.create("bn", CHANNELS, dtype=torch.float64)
    open_window(layer)
    layer(data(4))
    stored = [t.clone() for t in layer._accumulator.tensors()]
    lightning_norm.recalibrate(nn.Sequential(layer), [data(8)])
    assert all(torch.equal(a, b) for a, b in zip(stored, layer._accumulator.tensors(), strict=True))
    torch.testing.assert_close(layer.running_mean, data(8).mean((0, 2, 3)), rtol=1e-12, atol=0)


def test_the_module_can_be_copied_inside_a_window():
    seen = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(copy.deepcopy(pl_module).first._accumulator.count.item())

    fit(NormSwap("bn", **ON), loader_of_doubles(), Copy(), accumulate_grad_batches=2)
    assert seen == [256.0, 0.0]


def loader_of_doubles():
    x, y = loader(8).dataset.tensors
    return DataLoader(TensorDataset(x.double(), y.double()), batch_size=4)

"""NormRecalibrate in a real Trainer: after SWA and EMA, before validation, on request; nothing else notices."""

import copy
import itertools

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torchmetrics import MeanMetric

from lightning_norm import MomentNorm, NormRecalibrate, NormSwap, load_from_checkpoint, recalibrate
from lightning_norm.layers.declared import Unsupported
from tests.callbacks.toy import LateNet, Net, loader, trainer


def expected(model):
    """The statistics that the weights, as they are, have on the training data."""
    twin = copy.deepcopy(model)
    recalibrate(twin, loader())
    return twin.state_dict()


def same(a, b):
    for name, value in b.items():
        torch.testing.assert_close(a[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


class Dropping(Net):
    def __init__(self):
        super().__init__()
        self.net.append(nn.Dropout(0.5))
        self.net.append(nn.BatchNorm2d(6))


@pytest.mark.parametrize("swap", [NormSwap("sn"), None])
def test_after_the_fit(swap, capsys):
    model, callback = Dropping(), NormRecalibrate()
    trainer(*[swap] if swap else [], callback, max_epochs=2).fit(model, loader())
    said = "NormRecalibrate: running statistics of 2 layers re-estimated on 2 batches"
    assert said in capsys.readouterr().out.splitlines()
    assert callback.result.layers == ["net.1", "net.4"]
    same(model.state_dict(), expected(model))
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("key", ["sn", "bn"])
def test_after_swa(key):
    class Averaged(Callback):
        def on_train_end(self, trainer, pl_module):
            self.weights = copy.deepcopy(pl_module.net[0].state_dict())

    model, after = Dropping(), Averaged()
    swa = StochasticWeightAveraging(0.05, swa_epoch_start=1)
    trainer(NormSwap(key), swa, after, NormRecalibrate(), max_epochs=2).fit(model, loader())
    for name, value in after.weights.items():
        assert torch.equal(model.net[0].state_dict()[name], value)
    same(model.state_dict(), expected(model))


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback", "ignore:Checkpoint directory")
def test_before_validation_with_ema_the_checkpoint_holds_the_new_statistics(tmp_path):
    model = Net()
    callbacks = [NormSwap("sn"), EMAWeightAveraging(decay=0.5), NormRecalibrate(when="before_validation")]
    saver = ModelCheckpoint(tmp_path, filename="ema", monitor="val_loss")
    runner = trainer(*callbacks, saver, enable_checkpointing=True, max_epochs=2)
    runner.fit(model, loader(), loader())
    averaged = load_from_checkpoint(Net, saver.best_model_path)
    same(averaged.state_dict(), expected(averaged))


def test_before_validation_without_averaging():
    class See(Callback):
        seen = []

        def on_validation_epoch_end(self, trainer, pl_module):
            assert not any(m.training for m in pl_module.modules())
            self.seen.append((pl_module.state_dict()["net.1.running_mean"].clone(), expected(pl_module)))

    model, see = Net(), See()
    trainer(NormSwap("bn"), NormRecalibrate(when="before_validation"), see, max_epochs=2, num_sanity_val_steps=1).fit(
        model, loader(), loader()
    )
    assert len(see.seen) == 3  # the sanity check is left alone
    assert not torch.allclose(see.seen[0][0], see.seen[0][1]["net.1.running_mean"])
    for mean, state in see.seen[1:]:
        torch.testing.assert_close(mean, state["net.1.running_mean"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("when", ["before_validation", "on_request"])
def test_the_training_does_not_notice(when):
    """Order of the data, dropout and the loader's own generator are what they are without the callback."""

    def fit(*callbacks):
        torch.manual_seed(5)
        model = Dropping()
        generator = torch.Generator().manual_seed(1)
        data = DataLoader(loader(12).dataset, 4, shuffle=True, generator=generator)
        trainer(*callbacks, max_epochs=2, val_check_interval=1).fit(model, data, loader())
        return dict(model.named_parameters())

    class Request(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            calibrate = next(c for c in trainer.callbacks if isinstance(c, NormRecalibrate))
            calibrate.run(trainer, pl_module)

    alone = fit()
    for name, value in fit(NormRecalibrate(when=when), *[Request()] if when == "on_request" else []).items():
        assert torch.equal(value, alone[name]), name


def test_workers_that_persist_are_left_alone():
    class Twice(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.callbacks[0].run(trainer, pl_module)

    data = DataLoader(loader(12).dataset, 4, num_workers=1, persistent_workers=True)
    runner = trainer(NormRecalibrate(when="on_request"), Twice())
    runner.fit(Net(), data)
    assert runner.global_step == 3
    assert runner.callbacks[0].result.batches == 3


def test_layers_of_a_dict_batch():
    class Named(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    rows = [{"x": x, "y": y} for x, y in loader().dataset]
    model = Named()
    trainer(NormRecalibrate(inputs="x")).fit(model, DataLoader(rows, 4))
    same(model.state_dict(), expected(model))


def test_late_layers_and_mixed_precision():
    model = LateNet()
    trainer(NormSwap("sn"), NormRecalibrate(), precision="bf16-mixed").fit(model, loader())
    assert int(model.late.num_batches_tracked) == 2
    assert model.late.running_mean.dtype == torch.float32


def test_refused():
    class OwnState(MomentNorm):
        unsupported = Unsupported(recalibration="its statistics are a state of the training")

        def algebra(self, m):
            b = self.track(m.over_batch())
            return self.standardize(b.mean, b.var)

    class Swaps(Net):
        def __init__(self):
            super().__init__()
            self.net[1] = OwnState(6)

    runner = trainer(NormRecalibrate())
    with pytest.raises(ValueError, match="net.1 is OwnState: its statistics are a state of the training"):
        runner.fit(Swaps(), loader())
    assert runner.global_step == 0, "told after the training"
    with pytest.raises(RuntimeError, match="StochasticWeightAveraging stands behind NormRecalibrate"):
        trainer(NormRecalibrate(), StochasticWeightAveraging(0.1)).fit(Net(), loader())
    with pytest.raises(ValueError, match="one training loader, the Trainer has several"):
        trainer(NormRecalibrate(inputs=None)).fit(Pair(), {"a": loader(), "b": loader()})
    with pytest.raises(ValueError, match="num_batches must be a positive int"):
        NormRecalibrate(0)
    with pytest.raises(ValueError, match="cannot import forward='nowhere.function'"):
        NormRecalibrate(forward="nowhere.function")
    with pytest.raises(ValueError, match="when must be one of"):
        NormRecalibrate(when="sometimes")


class Metered(Net):
    """No forward, logging and a metric in training_step."""

    forward = LightningModule.forward

    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch):
        loss = (self.net(batch[0]).mean((1, 2, 3)) - batch[1]).square().mean()
        self.mean(loss)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss


@pytest.mark.parametrize("when", ["fit_end", "before_validation"])
def test_a_module_without_forward_runs_its_training_step_and_logs_nothing(when):
    class Validated(Metered):
        def validation_step(self, batch, batch_idx):
            pass

    def fit(*callbacks):
        torch.manual_seed(0)
        model = Validated()
        runner = trainer(NormSwap("bn"), *callbacks)
        runner.fit(model, loader(), loader())
        return model, runner.callback_metrics["loss"], model.mean.compute()

    model, loss, mean = fit(NormRecalibrate(when=when))
    _, expected_loss, expected_mean = fit()
    assert torch.equal(loss, expected_loss)
    assert torch.equal(mean, expected_mean)
    assert "log" not in vars(model)
    model.mean.reset()  # it holds a graph of the training, which cannot be copied
    twin = copy.deepcopy(model)
    recalibrate(twin, loader(), forward=lambda batch: twin.net(batch[0]))
    if when == "fit_end":
        same(model.state_dict(), twin.state_dict())

    class Manual(Validated):
        automatic_optimization = False

    with pytest.raises(ValueError, match="Manual has no forward, and its training_step optimizes by itself"):
        trainer(NormRecalibrate()).fit(Manual(), loader())


class Pair(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)


def test_other_stages_have_no_training_data():
    trainer(NormSwap("sn"), NormRecalibrate(when="before_validation")).validate(Net(), loader())


class Stream(IterableDataset):
    """Samples that come once; how many were taken is counted."""

    taken = 0

    def __iter__(self):
        for x, y in loader().dataset:
            Stream.taken += 1
            yield x, y


class TwoInputs(Net):
    def forward(self, x, y):
        return super().forward(x + 0 * y.mean())

    def training_step(self, batch, batch_idx):
        return (self(*batch) - batch[1]).square().mean()


class Mapping(Net):
    """Its forward takes one argument as any other, which only a call shows to be a dictionary."""

    def forward(self, batch):
        return super().forward(batch["x"])

    def training_step(self, batch, batch_idx):
        return self({"x": batch[0]}).square().mean()


class Manual(Net):
    automatic_optimization = False
    forward = LightningModule.forward

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        self.manual_backward(self.net(batch[0]).square().mean())
        self.optimizers().step()


REFUSED = {
    "several loaders": (Pair, lambda: {"a": loader(), "b": loader()}, {}, "Trainer has several.*loader="),
    "a list of loaders": (Pair, lambda: [loader(), loader()], {}, "Trainer has several"),
    "manual optimization": (Manual, loader, {}, "optimizes by itself.*forward="),
    "forward with two arguments": (TwoInputs, loader, {}, "cannot run TwoInputs on a training batch.*'y'.*forward="),
    "forward with a dictionary": (Mapping, loader, {}, "cannot run Mapping on a training batch with inputs='first'"),
    "a part that is not there": (Net, loader, {"inputs": "image"}, "cannot run Net .* with inputs='image'"),
    "a function that fails": (
        Net,
        loader,
        {"forward": lambda module, batch: module.nothing},
        "cannot run Net .*forward",
    ),
    "a stream": (Net, lambda: DataLoader(Stream(), 4), {}, r"samples of a stream \(Stream\).*loader="),
    "an iterator": (Net, lambda: iter(loader()), {}, "samples of a stream"),
    "a stream in a loader of another class": (Net, lambda: Prefetches(DataLoader(Stream(), 4)), {}, "of a stream"),
    "an iterator in a loader of another class": (Net, lambda: Prefetches(iter(loader())), {}, "of a stream"),
    "a data set that reads on": (Net, lambda: DataLoader(Subset(ReadsOn(), range(8)), 4), {}, "of a stream"),
    "a loader that is none": (Net, loader, {"loader": 3}, "loader must be an iterable of batches"),
    "its own loader without a batch": (Net, loader, {"loader": []}, "the loader gave no batch"),
    "its own loader with batches of another form": (
        Net,
        loader,
        {"loader": [{"x": torch.zeros(2, 3, 4, 4)}]},
        r"cannot run Net on a batch of its loader with inputs='first'(?s:.*)inputs=",
    ),
    "several loaders of its own": (Net, loader, {"loader": [loader(), loader()]}, "cannot run Net on a batch of its"),
    "samples and no batches": (Net, loader, {"loader": torch.zeros(4, 3, 4, 4)}, "cannot run Net on a batch of its"),
}


class Prefetches:
    """A loader of a library's own, around another one."""

    def __init__(self, inner):
        self.inner = inner

    def __iter__(self):
        return iter(self.inner)

    def __len__(self):
        return 2


class ReadsOn(Dataset):
    """Goes on in a file of records, whatever index it is asked for."""

    def __init__(self):
        self.records = itertools.cycle(loader().dataset)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return next(self.records)


@pytest.mark.filterwarnings("ignore:Found .* module")
@pytest.mark.parametrize("case", REFUSED)
def test_a_job_that_it_cannot_serve_is_refused_before_the_first_step(case):
    net, data, arguments, message = REFUSED[case]
    runner, Stream.taken = trainer(NormSwap("bn"), NormRecalibrate(**arguments), limit_train_batches=2), 0
    with pytest.raises(ValueError, match=message):
        runner.fit(net(), data())
    assert runner.global_step == 0
    assert Stream.taken == 0


def test_an_iterator_is_no_loader_of_its_own():
    """The second reading, before the second validation, would find nothing in it."""
    with pytest.raises(ValueError, match=r"loader is an iterator .*, which can be read once.*loader=lambda: "):
        NormRecalibrate(loader=(batch for batch in loader()))


def test_loaders_that_only_look_like_streams(tmp_path):
    (tmp_path / "data").write_bytes(b"12345678")

    class Reads(Dataset):
        """From a file that is open, at the place of the sample."""

        def __init__(self):
            self.file = file

        def __len__(self):
            return 8

        def __getitem__(self, index):
            self.file.seek(index)
            return torch.randn(3, 8, 8) + float(self.file.read(1)), torch.zeros(())

    callback = NormRecalibrate(when="before_validation")
    with (tmp_path / "data").open("rb") as file:
        trainer(callback, max_epochs=2).fit(Net(), DataLoader(Reads(), 4, shuffle=True), loader())
    assert callback.result.batches == 2


def test_a_loader_of_its_own_is_read_again_each_time_and_leaves_no_trace():
    generator = torch.Generator().manual_seed(3)
    own = DataLoader(loader().dataset, 4, shuffle=True, generator=generator)
    state, numbers = generator.get_state(), []

    class Draw(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            numbers.append(torch.get_rng_state().sum())

    def fit(*callbacks):
        torch.manual_seed(0)
        trainer(*callbacks, Draw(), max_epochs=2).fit(Net(), loader(), loader())

    fit()
    fit(NormRecalibrate(when="before_validation", loader=own))
    assert torch.equal(generator.get_state(), state)
    assert numbers[: len(numbers) // 2] == numbers[len(numbers) // 2 :]


def features_of(module, batch):
    return module.features(batch[0])


@pytest.mark.parametrize("net", [TwoInputs, Mapping, Manual])
def test_a_function_and_a_loader_of_ones_own(net):
    model = net()
    path = f"{__name__}.features_of"
    trainer(NormSwap("bn"), NormRecalibrate(forward=path, loader=loader)).fit(model, DataLoader(Stream(), 4))
    twin = copy.deepcopy(model)
    recalibrate(twin, loader(), forward=lambda batch: twin.features(batch[0]))
    same(model.state_dict(), twin.state_dict())


def test_no_batch_beyond_those_of_the_training_is_read():
    callback = NormRecalibrate()
    trainer(callback, limit_train_batches=1).fit(Net(), loader())
    assert callback.result.batches == 1


def test_the_hooks_on_transfers_are_called_as_in_training():
    class Doubled(Net):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch[0], batch[1]

    model = Doubled()
    trainer(NormRecalibrate()).fit(model, loader())
    twin = copy.deepcopy(model)
    recalibrate(twin, [2 * x for x, _ in loader()])
    same(model.state_dict(), twin.state_dict())

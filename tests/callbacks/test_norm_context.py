"""NormContext: contexts of each batch in every stage, from a function, a key or the images."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_norm import NoEffectWarning, NormContext, NormSwap
from tests.callbacks.toy import LateNet, Net, loader, trainer
from tests.normalizers.test_contexts import images


def swap_ids():
    return NormSwap("cn", norm_args={"context": "ids"})


def by_sign(batch):
    return (batch[0].mean((1, 2, 3)) > 0).long()


def none_in_evaluation(batch):
    return by_sign(batch) if len(batch[0]) == 4 else None


def soft_by_sign(batch):
    first = by_sign(batch).float().unsqueeze(1) * 0.8
    return torch.cat([first, 0.8 - first, torch.full_like(first, 0.2)], 1)


def out_of_range(batch):
    return torch.full((len(batch[0]),), 3)


class Seeing(LateNet):
    """Keeps what its layers were told, per stage."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        g = self.net[1].contexts.responsibilities
        self.seen.append((self.trainer.state.stage.value, None if g is None else g.argmax(1).tolist()))
        return super().forward(x)


def test_a_function_gives_them_in_every_stage_and_they_end_with_the_batch():
    model = Seeing()
    runner = trainer(swap_ids(), NormContext("tests.callbacks.test_norm_context.by_sign"), num_sanity_val_steps=1)
    runner.fit(model, loader(), loader())
    runner.validate(model, loader(), verbose=False)
    runner.test(model, loader(), verbose=False)
    runner.predict(model, loader())
    expected = [by_sign(batch).tolist() for batch in loader()]
    stages = ["sanity_check"] + ["train"] * 2 + ["validate"] * 4 + ["test"] * 2 + ["predict"] * 2
    assert [stage for stage, _ in model.seen] == stages
    assert [ids for _, ids in model.seen] == [expected[0]] + expected * 5
    assert model.net[1].contexts.responsibilities is model.late.contexts.responsibilities is None
    assert model.net[1].num_batches_tracked == 2


def test_probabilities():
    model = Net()
    trainer(swap_ids(), NormContext(soft_by_sign)).fit(model, loader())
    assert model.net[1].prior.argmin() == 2


class WithDomain(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"image": x, "y": y, "domain": torch.tensor(index % 3)}


class DictNet(Net):
    def loss(self, batch):
        return super().loss((batch["image"], batch["y"]))


def test_a_key_of_the_batch():
    data = WithDomain(*loader().dataset.tensors)
    model, heard = DictNet(), []
    hook = lambda layer, _: heard.append(layer.contexts.responsibilities.argmax(1).tolist())  # noqa: E731
    model.net[1].register_forward_pre_hook(hook)
    trainer(swap_ids(), NormContext(key="domain")).fit(model, DataLoader(data, batch_size=4))
    assert heard == [[0, 1, 2, 0], [1, 2, 0, 1]]
    with pytest.raises(RuntimeError, match=r"key='city' found no contexts .* keys \['domain', 'image', 'y'\]"):
        trainer(swap_ids(), NormContext(key="city")).fit(DictNet(), DataLoader(data, batch_size=4))


class TwoViews(Net):
    def training_step(self, batch, _):
        x, y = batch
        return (self(torch.cat([x, x.flip(3)])) - y.repeat(2)).square().mean()


def test_two_views_of_a_batch():
    trainer(swap_ids(), NormContext(by_sign, views=2)).fit(TwoViews(), loader())
    with pytest.raises(ValueError, match=r"'net.1' .* expected contexts for 8 samples, got 4"):
        trainer(swap_ids(), NormContext(by_sign)).fit(TwoViews(), loader())


def test_missing_in_evaluation_is_the_layers_business():
    model = Net()
    context = NormContext(none_in_evaluation)
    trainer(swap_ids(), context).fit(model, loader(), loader(batch_size=2))
    strict = NormSwap("cn", norm_args={"context": "ids", "missing": "error"})
    with pytest.raises(RuntimeError, match=r"'net.1' \(context='ids'\) was run without contexts"):
        trainer(strict, NormContext(none_in_evaluation)).fit(Net(), loader(), loader(batch_size=2))


class TestToldAtOnce:
    @pytest.mark.parametrize(
        ("context", "says"),
        [("input", r"1 ContextNorm layers \(first: net.1\) .* Add NormContext\(\)"), ("ids", r"NormContext\(key=")],
    )
    def test_without_the_callback(self, context, says):
        model = Seeing()
        with pytest.raises(RuntimeError, match=says.replace("1 Con", "3 Con")):
            trainer(NormSwap("cn", norm_args={"context": context}), num_sanity_val_steps=1).fit(
                model, loader(), loader()
            )
        assert model.seen == []

    def test_the_gate_needs_none(self):
        trainer(NormSwap("cn", norm_args={"context": "gate"})).fit(LateNet(), loader())

    def test_the_callback_does_not_know_where(self):
        with pytest.raises(RuntimeError, match=r"does not know where the contexts of 'net.1'"):
            trainer(swap_ids(), NormContext()).fit(Net(), loader())
        with pytest.raises(RuntimeError, match=r"the model's have 'input': swap with norm_args=\{'context': 'ids'\}"):
            trainer(NormSwap("cn"), NormContext(by_sign)).fit(Net(), loader())

    def test_no_layer(self):
        with pytest.warns(NoEffectWarning, match="NormContext has no effect"):
            trainer(NormContext()).fit(Net(), loader())

    def test_arguments(self):
        with pytest.raises(ValueError, match="exclude each other"):
            NormContext(by_sign, key=1)
        with pytest.raises(ValueError, match="cannot import context_fn='tests.callbacks.nothing.f'"):
            NormContext("tests.callbacks.nothing.f")
        with pytest.raises(ValueError, match="no function but module"):
            NormContext("tests.callbacks.toy")
        with pytest.raises(ValueError, match="fit_batches must be a positive int, got 0"):
            NormContext(fit_batches=0)

    def test_a_context_out_of_range_and_the_way_out(self):
        model = Net()
        with pytest.raises(ValueError, match=r"'net.1' with num_contexts=3 must lie in \[0, 2\], got 3 to 3"):
            trainer(swap_ids(), NormContext(out_of_range)).fit(model, loader())
        assert model.net[1].contexts.responsibilities is None


class Augmenting(LateNet):
    """Draws random numbers in a hook that the fit of the contexts goes through as well."""

    def on_after_batch_transfer(self, batch, _):
        x, y = batch
        return x + 0.1 * torch.randn_like(x), y


class Noisy(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn_like(x), y


def kinds(shuffle=True, n=48, workers=0, **options):
    x, _ = images(n)
    data = Noisy(x, torch.randn(n, generator=torch.Generator().manual_seed(1)))
    return DataLoader(data, 12, shuffle=shuffle, num_workers=workers, persistent_workers=workers > 0, **options)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


class TestInput:
    def fit(self, context, data):
        torch.manual_seed(0)
        model = Augmenting()
        trainer(NormSwap("cn"), context, max_epochs=2).fit(model, data)
        return model

    def test_finds_them_before_the_first_step(self):
        heard = []
        context = NormContext()
        torch.manual_seed(0)
        model = LateNet()
        model.net[1].register_forward_pre_hook(lambda layer, _: heard.append(layer.contexts.responsibilities.argmax(1)))
        trainer(NormSwap("cn"), context).fit(model, kinds(shuffle=False))
        expected = torch.arange(12) % 3
        for ids in heard:
            assert [len(set(ids[expected == k].tolist())) for k in range(3)] == [1, 1, 1]
        assert torch.equal(model.net[1].centroids, model.late.centroids)
        assert model.net[1].is_fitted()

    @pytest.mark.parametrize("drawn", ["globally", "by a generator", "in a worker"])
    def test_no_random_number_of_the_training_changes(self, drawn):
        """With the centroids known beforehand or looked for: the same training, bit by bit."""
        data = {
            "globally": kinds,
            "by a generator": lambda: kinds(generator=torch.Generator().manual_seed(5)),
            "in a worker": lambda: kinds(workers=1),
        }[drawn]
        first = self.fit(NormContext(), data())
        known = NormContext()
        known._fit = lambda trainer, module: [
            getattr(layer, name).copy_(getattr(first.net[1], name))
            for layer in known._layers.values()
            for name in ("centroids", "descriptor_scale")
        ]
        second = self.fit(known, data())
        assert second.net[1].is_fitted()
        assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))

    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
    def test_a_resumed_run_keeps_them(self, tmp_path):
        saving = ModelCheckpoint(tmp_path, save_last=True)
        torch.manual_seed(0)
        model = LateNet()
        trainer(NormSwap("cn"), NormContext(), saving, enable_checkpointing=True).fit(model, kinds())
        other = LateNet()
        context = NormContext()
        context._fit = lambda *_: pytest.fail("fitted again")
        runner = trainer(NormSwap("cn"), context, max_epochs=2)
        runner.fit(other, kinds(), ckpt_path=saving.last_model_path)
        assert torch.equal(other.net[1].centroids, model.net[1].centroids)
        assert runner.global_step == 8

    def test_the_sanity_check_comes_before_and_has_none(self):
        model = Seeing()
        trainer(NormSwap("cn"), NormContext(), num_sanity_val_steps=1).fit(model, kinds(), kinds())
        assert model.seen[0] == ("sanity_check", None)
        assert all(ids is not None for _, ids in model.seen[1:])

    def test_fit_batches(self):
        seen = []
        model = Net()
        model.on_after_batch_transfer = lambda batch, _: seen.append(len(batch[0])) or batch
        trainer(NormSwap("cn"), NormContext(fit_batches=2), max_epochs=0).fit(model, kinds())
        assert seen == []
        trainer(NormSwap("cn"), NormContext(fit_batches=2)).fit(model, kinds())
        assert len(seen) == 2 + 4

    def test_too_few_images(self):
        with pytest.raises(RuntimeError, match="cannot find 3 contexts among 2 images with 2 distinct"):
            trainer(NormSwap("cn"), NormContext()).fit(Net(), kinds(n=2))

    def test_data_that_can_be_read_only_once(self):
        with pytest.raises(RuntimeError, match="would take samples of a stream"):
            trainer(NormSwap("cn"), NormContext(), limit_train_batches=2).fit(Net(), iter(kinds()))

    def test_a_stream(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(kinds().dataset)

        model, runner = Net(), trainer(NormSwap("cn"), NormContext())
        with pytest.raises(RuntimeError, match=r"samples of a stream \(Stream\).*NormContext\(loader="):
            runner.fit(model, DataLoader(Stream(), 12))
        assert runner.global_step == 0
        model = Net()
        trainer(NormSwap("cn"), NormContext(loader=kinds)).fit(model, DataLoader(Stream(), 12))
        assert model.net[1].is_fitted()

    @pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
    def test_averaged_weights(self):
        """The average was copied before the fit; it follows."""
        average = EMAWeightAveraging(decay=0.5)
        torch.manual_seed(0)
        model = Net()
        runner = trainer(NormSwap("cn"), NormContext(), average)
        runner.fit(model, kinds(), kinds())
        layer = average._average_model.module.net[1]
        torch.testing.assert_close(layer.centroids, model.net[1].centroids)
        with torch.no_grad():
            assert copy.deepcopy(model).eval().net(images()[0]).isfinite().all()

"""fuse_activation: the ReLU or SiLU behind a normalizer goes with it, and none is lost or applied twice."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_norm
from benchmarks.decoders import ConditionalUnet1d, VaeDecoder
from lightning_norm import NormSwap, NotReachedWarning, normalizers, swap
from lightning_norm.layers.behind import TakenActivation
from lightning_norm.surgery.manifest import manifest_of, rebuild
from tests.callbacks.toy import Net, loader, trainer

C = 6


def images(n=4, seed=0):
    return torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


def sequence(activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), activation(), nn.Conv2d(C, 2, 1))


def results(model, x):
    """Output, gradients, and what the model holds afterwards."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.state_dict().values()]


def equal(one, other, **tolerance):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 1e-5, "atol": 1e-6} | tolerance))


@pytest.mark.filterwarnings("ignore::lightning_norm.ParameterGrowthWarning")
@pytest.mark.parametrize("key", [k for k in normalizers() if k != "cn"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_every_normalizer_computes_what_the_two_did(key, activation):
    with_it, without = sequence(activation), sequence(activation)
    arguments = dict(normalizers()[key].test_arguments)
    for model, fuse in ((with_it, True), (without, False)):
        swap(model, key, norm_args=arguments, fuse_activation=fuse)
    assert isinstance(with_it[2], TakenActivation)
    assert with_it.state_dict().keys() == without.state_dict().keys()
    for mode in (True, False):
        torch.manual_seed(1)
        one = results(with_it.train(mode), images())
        torch.manual_seed(1)
        equal(one, results(without.train(mode), images()))


class Block(nn.Module):
    """Layers that no nn.Sequential holds; ``how`` says what else happens between them."""

    def __init__(self, how="alone"):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.act = nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.ReLU(inplace=how == "in place")
        self.second, self.drop, self.how = nn.BatchNorm2d(C), nn.Dropout(0.5), how

    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.how == "added first":
            y += 1
        if self.how == "dropped first":
            y = self.drop(y)
        z = self.act(y)
        if self.how == "used elsewhere" or self.how == "in place":
            z = z + y
        if self.how == "shared":
            z = self.act(self.second(z))
        return (z, y) if self.how == "returned" else z


class TestByRunning:
    @pytest.mark.parametrize("how", ["alone", "in place"])
    def test_found(self, how):
        block, plain = Block(how), Block(how)
        report = swap(block, "bn", fuse_activation=True, example=images())
        swap(plain, "bn")
        assert {row.name: row.activation for row in report.layers} == {"bn": "act", "second": ""}
        assert "computed by the layer before it: 1 (first: act)" in report.summary()
        if how == "alone":
            equal(results(block, images()), results(plain, images()))
        else:
            equal([block(images())], [plain(images())])

    @pytest.mark.parametrize(
        ("how", "why"),
        [
            ("shared", "it is called behind a swapped layer and elsewhere"),
            ("used elsewhere", "the output of the layer before it is used elsewhere as well"),
            ("returned", "the output of the layer before it is used elsewhere as well"),
            ("added first", "the output of the layer before it is used elsewhere as well"),
            ("dropped first", "it is called behind a swapped layer and elsewhere"),
        ],
    )
    def test_left_with_a_word(self, how, why):
        block = Block(how)
        report = swap(block, "bn", fuse_activation=True, example=images())
        assert type(block.act) is nn.ReLU
        assert report.activations_left == [("act", "ReLU", why)]
        assert "activation  left: 1 ReLU (act)" in report.summary()

    def test_nothing_of_the_run_stays(self):
        block = Block().eval()
        before = copy.deepcopy(block.state_dict())
        torch.manual_seed(3)
        state = torch.get_rng_state()
        report = swap(block, "bn", fuse_activation=True, example=(images(),), dry_run=True)
        assert report.layers[0].activation == "act"
        assert type(block.bn) is nn.BatchNorm2d
        assert type(block.act) is nn.ReLU
        assert torch.equal(state, torch.get_rng_state())
        assert not block.training
        assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())

    def test_what_the_example_does_not_reach(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two, self.three = Block(), Block(), sequence()

            def forward(self, x):
                return self.one(x)

        model = Two()
        report = swap(model, "bn", fuse_activation=True, example={"x": images()})
        assert {r.name: r.activation for r in report.layers if r.activation} == {
            "one.bn": "one.act",
            "three.1": "three.2",
        }
        assert report.activations_left == [("two.act", "ReLU", "the example does not reach it")]

    def test_without_an_example_it_is_said_what_is_not_known(self):
        report = swap(Block(), "bn", fuse_activation=True)
        assert report.activations_left == [("act", "ReLU", "no nn.Sequential shows what it follows: pass example")]

    def test_one_activation_in_two_places_of_a_sequence_is_left_with_that_word(self):
        shared = nn.ReLU()
        model = nn.Sequential(nn.BatchNorm2d(4), shared, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), shared)
        report = swap(model, "bn", fuse_activation=True)
        assert report.activations_left == [("1", "ReLU", "it has 2 places in the model: pass example")]

    def test_an_example_on_which_the_model_fails(self):
        block = Block()
        with pytest.raises(ValueError, match="Block fails on the example in training: RuntimeError: .*Pass an example"):
            swap(block, "bn", fuse_activation=True, example=torch.zeros(1, 7, 5, 5))
        assert type(block.bn) is nn.BatchNorm2d
        assert not block.bn._forward_hooks


class TestUndoAndFiles:
    def test_undo(self):
        model = sequence()
        before, modules = results(copy.deepcopy(model), images()), list(model)
        report = swap(model, "bn", fuse_activation=True)
        report.undo()
        assert all(a is b for a, b in zip(model, modules, strict=True))
        equal(results(model, images()), before, rtol=0, atol=0)
        report = swap(model, "bn", fuse_activation=True)
        model[2] = nn.ReLU()
        with pytest.raises(RuntimeError, match="cannot undo: 2 holds ReLU and no longer"):
            report.undo()

    def test_swapped_twice_and_back(self):
        model = sequence()
        first = swap(model, "bn", fuse_activation=True)
        one = model(images())
        second = swap(model, "bcn", source="bn")
        assert model[1]._taken_from is model[2]
        assert model[1].origin["activation"] == "2"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(images())
        second.undo()
        torch.testing.assert_close(model(images()), one)
        first.undo()
        assert type(model[2]) is nn.ReLU

    def test_manifest_metadata_and_plan(self, tmp_path):
        model = sequence()
        report = swap(model, "sn", fuse_activation=True)
        for manifest in (json.loads(json.dumps(manifest_of(model))), None):
            again = sequence()
            if manifest is None:
                from lightning_norm.surgery.manifest import rebuild_from

                rebuild_from(again, {"state_dict": model.state_dict()})
            else:
                rebuild(again, manifest)
            assert isinstance(again[2], TakenActivation)
            again.load_state_dict(model.state_dict())
            torch.testing.assert_close(again.eval()(images()), model.eval()(images()))
        (tmp_path / "plan.yaml").write_text(report.to_yaml())
        assert NormSwap(plan=str(tmp_path / "plan.yaml")).options.fuse_activation == {"1": "2"}
        # a checkpoint of the network with its activations in place fits, and the other way round
        plain = sequence()
        swap(plain, "sn")
        plain.load_state_dict(model.state_dict())

    def test_to_plain_and_fold_give_it_back(self):
        for deploy in (lightning_norm.to_plain, lightning_norm.fold):
            model = sequence()
            swap(model, "bn", fuse_activation=True)
            model(images())
            expected = model.eval()(images())
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                deploy(model, images())
                torch.testing.assert_close(model(images()), expected)
            assert type(model[2]) is nn.ReLU
            assert "1.norm.weight" not in model.state_dict()

    def test_names_that_are_not_there(self):
        with pytest.raises(ValueError, match="'3' is Conv2d in this model, and not a ReLU or SiLU for '1'"):
            swap(sequence(), "bn", fuse_activation={"1": "3"})
        with pytest.raises(ValueError, match="fuse_activation names the layer '9'"):
            swap(sequence(), "bn", fuse_activation={"9": "2"})
        with pytest.raises(TypeError, match="fuse_activation must be true, false or a mapping"):
            swap(sequence(), "bn", fuse_activation="yes")


class TestCalledElsewhere:
    def test_the_activation_by_itself_is_applied_and_told(self):
        model = sequence(nn.SiLU)
        swap(model, "bn", fuse_activation=True)
        x = torch.randn(2, C, 3, 3)
        with pytest.warns(NotReachedWarning, match="2 was called with a tensor that does not come from 1"):
            y = model[2](x)
        torch.testing.assert_close(y, nn.functional.silu(x))

    def test_an_output_that_goes_elsewhere_is_told(self):
        model = sequence()
        swap(model, "bn", fuse_activation=True)
        model[1](torch.randn(2, C, 3, 3))
        with pytest.warns(NotReachedWarning, match="an output of 1 did not come to 2, and has its activation in it"):
            model(images())

    def test_every_way_to_run_it_is_quiet(self):
        model, plain = sequence(nn.SiLU), sequence(nn.SiLU)
        swap(model, "bn", fuse_activation=True)
        swap(plain, "bn")
        ways = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.fx.symbolic_trace(copy.deepcopy(model)),
            torch.compile(copy.deepcopy(model), backend="eager"),
        ]
        expected = plain(images())
        with warnings.catch_warnings():
            warnings.simplefilter("error", NotReachedWarning)  # torch 2.11 has warnings of its own when it compiles
            for way in ways:
                for _ in range(2):
                    y = way(images())
                torch.testing.assert_close(y, expected)
            for reentrant in (True, False):
                x = images().requires_grad_()
                checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
                plain.zero_grad()
                model(images())
            two = [model[1](model[0](images(seed=s))) for s in (1, 2)]  # as in a siamese network
            [model[2](y) for y in two]


class TestGroupNormAndSilu:
    """Networks built as those of diffusers and diffusion-policy are."""

    def swapped(self, build, x):
        torch.manual_seed(0)
        model = build()
        plain = copy.deepcopy(model)
        return model, plain, swap(model, "gn", source="GroupNorm", fuse_activation=True, example=x)

    def test_a_decoder_whose_blocks_share_their_activations(self):
        x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
        model, plain, report = self.swapped(VaeDecoder, x)
        assert {r.name: r.activation for r in report.layers if r.activation} == {"conv_norm_out": "conv_act"}
        assert [name for name, _, _ in report.activations_left] == ["blocks.0.nonlinearity", "blocks.1.nonlinearity"]
        assert "activation  left: 2 SiLU (first: blocks.0.nonlinearity): it is called behind" in report.summary()
        # In float64, for these gradients cancel: large channels-last maps of gn are computed otherwise than torch's.
        x = x.double()
        equal(results(model.double(), x), results(plain.double(), x), rtol=1e-9, atol=1e-9)

    def test_a_unet_of_blocks_in_a_row(self):
        x = torch.randn(2, 3, 16)
        model, plain, report = self.swapped(ConditionalUnet1d, x)
        assert all(r.activation for r in report.layers)
        assert len(report.layers) == 7
        assert report.activations_left == []  # those of the conditions follow no norm
        equal(results(model, x), results(plain, x), rtol=1e-4, atol=1e-4)


def test_in_a_trainer(tmp_path):
    class Example(Net):
        def __init__(self):
            super().__init__()
            self.example_input_array = torch.randn(2, 3, 8, 8)
            self.bn, self.act = nn.BatchNorm2d(6), nn.SiLU()

        def features(self, x):
            return self.act(self.bn(self.net(x)))

    model = Example()
    callback = NormSwap("bn", fuse_activation=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotReachedWarning)
        run = trainer(callback, tmp_path=tmp_path)
        run.fit(model, loader())
        run.fit(model, loader())
    assert isinstance(model.act, TakenActivation)
    assert isinstance(model.net[2], TakenActivation)
    path = str(tmp_path / "last.ckpt")
    run.save_checkpoint(path)
    again = lightning_norm.load_from_checkpoint(Example, path)
    assert isinstance(again.act, TakenActivation)
    assert NormSwap(plan=path).options.fuse_activation == {"net.1": "net.2", "bn": "act"}
    callback.report.undo()
    assert type(model.act) is nn.SiLU

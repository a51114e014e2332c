"""to_plain and fold: the outputs stay, in float64 to the last digits, and the report says what happened."""

import copy
import dataclasses

import pytest
import torch
import torchvision
from torch import nn

import lightning_norm
from lightning_norm import Affine, MomentNorm, create, fold, swap, to_plain
from lightning_norm.testing.kit import features, noise


class RunningStd(MomentNorm):
    """Evaluates with eps outside the root: affine, and no BatchNorm of the same tensors."""

    eval_uses_input_stats = False

    def algebra(self, m):
        b = self.track(m.over_batch())
        return Affine(b.mean, self.weight / (b.var.sqrt() + 0.1), self.bias)


def trained(model, *shape, dtype=torch.float64):
    """Move statistics and parameters away from their start."""
    model.to(dtype).train()
    for seed in (1, 2):
        model(features(*shape, seed=seed, dtype=dtype))
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if not name.endswith("iota"):
                p.add_(0.1 * noise(*p.shape, seed=i, dtype=dtype))
    return model.eval()


def network(norm, **arguments):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 1))
    swap(model, norm, norm_args=arguments)
    return trained(model, 4, 3, 8, 8)


X = features(2, 3, 8, 8, seed=9, dtype=torch.float64)
PLAIN = [
    ("bn", {}, "BatchNorm2d"),
    ("bn", {"affine": False}, "BatchNorm2d"),
    ("bcn", {}, "BatchNorm2d"),
    ("sn", {"choices": ("bn",)}, "BatchNorm2d"),
    (RunningStd, {}, "BatchNorm2d"),
    ("in", {}, "InstanceNorm2d"),
    ("in", {"track_running_stats": True}, "BatchNorm2d"),
    ("gn", {"num_groups": 3}, "GroupNorm"),
    ("ln", {}, "GroupNorm"),
]


class TestToPlain:
    @pytest.mark.parametrize(("norm", "arguments", "kind"), PLAIN, ids=str)
    def test_outputs_stay(self, norm, arguments, kind):
        model = network(norm, **arguments)
        with torch.no_grad():
            expected = model(X)
        report = to_plain(model, X)
        assert (len(report), type(model[1]).__name__) == (1, kind)
        assert type(model[1]).__module__.startswith("torch.nn")
        torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)
        assert report.moved < 1e-12
        assert report.largest == expected.abs().max()

    def test_the_state_dict_is_the_original_networks(self):
        model = network("bn")
        weight, mean = model[1].weight, model[1].running_mean
        to_plain(model)
        assert model[1].weight is weight
        assert model[1].running_mean is mean
        original = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)).double()
        original.load_state_dict(model.state_dict())
        assert torch.equal(original.eval()(X), model(X))

    @pytest.mark.parametrize(
        ("norm", "arguments", "why"),
        [
            ("sn", {}, "looks at the sample in evaluation"),
            ("bn", {"track_running_stats": False}, "has no running statistics"),
            ("bcn", {"constraint": "sigmoid"}, "looks at the sample"),
        ],
        ids=str,
    )
    def test_what_stays_says_why(self, norm, arguments, why):
        model = network(norm, **arguments)
        report = to_plain(model, X)
        assert (len(report), report.moved) == (0, 0.0)
        assert why in str(report)
        assert report.names("stays") == ["1"]
        assert isinstance(model[1], MomentNorm)

    @pytest.mark.parametrize("norm", ["bn", "bcn", "dbn", "brn", "bnet"])
    def test_no_bias_is_invented(self, norm):
        model = nn.Sequential(nn.BatchNorm2d(6))
        model[0].bias = None
        swap(model, norm)
        model.eval()
        x = features(2, 6, 8, 8, seed=9, dtype=torch.float32)
        expected = model(x)
        to_plain(model, x)
        assert model[0].bias is None
        torch.testing.assert_close(model(x), expected)

    def test_bcn_away_from_iota_1_stays(self):
        model = network("bcn")
        with torch.no_grad():
            model[1].iota[2] = 0.9
        assert len(to_plain(model)) == 0

    def test_sparse_sn_that_has_chosen(self):
        model = network("sn", sparse=True, radius=1.0)
        with torch.no_grad():
            model[1].mean_weight.copy_(torch.tensor([0.0, 0.0, 5.0]))
            model[1].var_weight.copy_(torch.tensor([0.0, 0.0, 5.0]))
        assert to_plain(model, X).moved < 1e-12
        assert type(model[1]) is nn.BatchNorm2d

    @pytest.mark.parametrize(
        ("shape", "kind"), [((4, 6), "BatchNorm1d"), ((4, 6, 5), "BatchNorm1d"), ((4, 6, 2, 3, 4), "BatchNorm3d")]
    )
    def test_layers_without_a_swap_learn_their_dimensions_from_the_example(self, shape, kind):
        model = trained(nn.Sequential(create("bn", 6)), *shape)
        assert "pass example_input" in str(to_plain(model))
        x = features(*shape, dtype=torch.float64)
        report = to_plain(model, x)
        assert type(model[0]).__name__ == kind
        assert report.moved < 1e-12

    def test_tokens_stay(self):
        model = nn.Sequential(create("bn", 6, channel_dim=-1))
        assert "channels from axis 1" in str(to_plain(model, torch.randn(2, 4, 6)))

    def test_shared_layers_hooks_and_the_model_itself(self):
        norm, seen = create("gn", 6, num_groups=2), []
        norm.register_forward_hook(lambda *_: seen.append(1))
        model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
        to_plain(model)
        assert model["a"] is model["b"][0]
        model["a"](torch.randn(2, 6, 3))
        assert seen == [1]
        assert "is the model itself" in str(to_plain(create("bn", 6)))

    def test_half_precision(self):
        model = network("bn").to(torch.bfloat16)
        report = to_plain(model, X.bfloat16())
        assert model[1].running_mean.dtype == torch.float32
        assert report.moved <= 2**-7 * report.largest

    def test_what_timm_calls(self):
        model = network("bcn")
        expected = model(X)
        for name, child in model.named_children():
            if hasattr(child, "fuse"):
                setattr(model, name, child.fuse())
        assert type(model[1]) is nn.BatchNorm2d
        torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)
        layer = create("sn", 6)
        assert layer.fuse() is layer


class TestFold:
    @pytest.mark.parametrize(("norm", "arguments", "kind"), [p for p in PLAIN if p[2] == "BatchNorm2d"], ids=str)
    def test_outputs_stay(self, norm, arguments, kind):
        model = network(norm, **arguments)
        expected = model(X).detach()
        report = fold(model, X)
        assert report.names("folded") == ["1"]
        assert type(model[1]) is nn.Identity
        torch.testing.assert_close(model(X).detach(), expected, rtol=1e-12, atol=1e-12)
        assert report.moved < 1e-12
        assert "into 0 (Conv2d)" in str(report)

    @pytest.mark.parametrize(
        ("layer", "shape", "norm"),
        [
            (nn.Linear(5, 6), (4, 5), nn.BatchNorm1d(6)),
            (nn.Linear(5, 6, bias=False), (4, 5), nn.BatchNorm1d(6, affine=False)),
            (nn.Conv1d(4, 6, 3, groups=2, padding=1, bias=False), (4, 4, 9), nn.BatchNorm1d(6)),
            (nn.Conv3d(2, 6, 2), (3, 2, 4, 4, 4), nn.BatchNorm3d(6)),
            (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), (3, 4, 4, 4), nn.BatchNorm2d(6)),
            (nn.ConvTranspose1d(4, 6, 2, bias=False), (3, 4, 4), nn.BatchNorm1d(6)),
        ],
        ids=lambda v: type(v).__name__,
    )
    @pytest.mark.parametrize("ours", [False, True])
    def test_every_kind_of_layer(self, layer, shape, norm, ours):
        model = nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm))
        if ours:
            swap(model, "bn")
        trained(model, *shape)
        x = features(*shape, seed=9, dtype=torch.float64)
        report = fold(model, x)
        assert report.names("folded") == ["1"]
        assert report.moved < 1e-12 < report.largest

    def test_tokens_into_a_linear_layer(self):
        model = trained(nn.Sequential(nn.Linear(5, 6), create("bn", 6, channel_dim=-1)), 4, 7, 5)
        report = fold(model, features(2, 7, 5, dtype=torch.float64))
        assert report.names("folded") == ["1"]
        assert report.moved < 1e-12

    @pytest.mark.parametrize("key", ["bn", "bcn"])
    def test_a_resnet(self, key):
        model = torchvision.models.resnet18(num_classes=5)
        swap(model, key)
        with torch.no_grad():
            for m in model.modules():
                if isinstance(m, MomentNorm):
                    m.running_mean.uniform_(-0.1, 0.1)
                    m.running_var.uniform_(0.5, 2)
        report = fold(model, torch.randn(2, 3, 32, 32))
        assert len(report.names("folded")) == 20
        assert report.moved < 1e-5 * report.largest  # float32
        assert not [m for m in model.modules() if isinstance(m, (MomentNorm, nn.BatchNorm2d))]

    def test_a_lightning_module_whose_own_forward_cannot_be_traced(self):
        from tests.callbacks.toy import LateNet

        class Untraceable(LateNet):
            def forward(self, x):
                return super().forward(x) if x.sum() > -1e9 else None

        model = Untraceable()
        model.setup("fit")
        model.configure_model()
        swap(model, "bn")
        trained(model, 4, 3, 8, 8)
        report = fold(model, X)
        assert report.names("folded") == ["net.1", "built.1"]
        assert "late" in report.names("plain")
        assert "torch.fx cannot trace" in str(report)
        assert report.moved < 1e-12

    def check_stays(self, model, x, why):
        swap(model, "bn")
        trained(model, *x.shape)
        expected = model(x).detach()
        report = fold(model, x)
        assert why in str(report)
        assert report.names("folded") == []
        torch.testing.assert_close(model(x).detach(), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("affine", [True, False])
    def test_of_bnet_the_depthwise_convolution_stays(self, affine):
        model = network("bnet", affine=affine)
        kernel = model[1].kernel
        report = fold(model, X)
        assert report.names("folded") == ["1"]
        assert "into 0 (Conv2d); the convolution behind it stays" in str(report)
        assert type(model[1]) is nn.Conv2d
        assert model[1].weight is kernel
        assert (model[1].bias is not None) == affine
        assert report.moved < 1e-12

    def test_what_is_used_elsewhere_stays(self):
        class Branch(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

            def forward(self, x):
                y = self.conv(x)
                return y + self.norm(y)

        class Twice(Branch):
            def forward(self, x):
                return self.norm(self.conv(x)) + self.conv(x * 2)

        class Reads(Branch):
            def forward(self, x):
                return self.norm(self.conv(x)) * self.conv.weight.sum()

        class Sum(Branch):
            def forward(self, x):
                return self.norm(self.conv(x) * 2)

        self.check_stays(Branch(), X, "used elsewhere as well")
        self.check_stays(Twice(), X, "called more than once")
        self.check_stays(Reads(), X, "read elsewhere as well")
        self.check_stays(Sum(), X, "does not come from a layer")
        self.check_stays(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), X, "follows ReLU")

    def test_tied_hooked_and_parametrized_weights_stay(self):
        tied = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
        tied[2].weight = tied[0].weight
        self.check_stays(tied, X, "belongs to another layer")
        hooked = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        hooked[0].register_forward_hook(lambda *_: None)
        self.check_stays(hooked, X, "a hook is on it")
        normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
        self.check_stays(normed, X, "parametrized")

    def test_another_axis_than_the_linear_layers_outputs(self):
        x = features(4, 6, 6, dtype=torch.float64)
        self.check_stays(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), x, "pass example_input")
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
        assert "pass example_input" in str(fold(model))

    def test_what_depends_on_the_sample_stays(self):
        model = network("sn")
        report = fold(model, X)
        assert (report.names("stays"), len(report)) == (["1"], 0)
        assert "outputs moved by 0" in str(report)

    def test_the_folded_network_is_exported(self):
        model = network("bcn").float()
        fold(model)
        program = torch.export.export(model, (X.float(),))
        assert not [n for n in program.graph.nodes if "batch_norm" in str(n.target)]
        torch.testing.assert_close(program.module()(X.float()), model(X.float()))


def test_from_a_checkpoint_back_to_the_original_class(tmp_path):
    from tests.callbacks.toy import Net, loader, trainer

    model = Net()
    runner = trainer(lightning_norm.NormSwap("gn", norm_args={"num_groups": 2}, exclude=None))
    runner.fit(model, loader())
    runner.save_checkpoint(tmp_path / "x.ckpt")
    again = lightning_norm.load_from_checkpoint(Net, tmp_path / "x.ckpt")
    assert to_plain(again, torch.randn(2, 3, 8, 8)).moved < 1e-6
    assert type(again.net[1]) is nn.GroupNorm


class TestFrozen:
    @pytest.mark.parametrize("norm", ["bn", "bcn", "dbn"])
    def test_torch_cannot_freeze_and_a_warning_says_so(self, norm):
        model = network(norm)
        model[1].freeze_statistics()
        with pytest.warns(lightning_norm.NoEffectWarning, match="train\\(\\) would let them move"):
            report = to_plain(model, X)
        assert "frozen no longer" in str(report)

    @pytest.mark.parametrize("norm", ["bn", "bcn", "dbn"])
    def test_a_frozen_class_comes_back_and_stays_frozen(self, norm):
        kind = torchvision.ops.FrozenBatchNorm2d
        model = nn.Sequential(nn.Conv2d(3, 6, 3), kind(6), nn.ReLU()).double()
        model[1].running_mean.fill_(0.3)
        keys, expected = model.state_dict().keys(), model(X)
        assert len(swap(model, norm, source="FrozenBatchNorm2d"))
        assert len(to_plain(model, X)) == 1
        assert type(model[1]) is kind
        assert model.state_dict().keys() == keys
        assert not list(model[1].parameters())
        torch.testing.assert_close(model.train()(X), expected)
        assert torch.equal(model[1].running_mean, torch.full((6,), 0.3, dtype=torch.float64))

    def test_trained_weights_do_not_go_into_buffers(self):
        model = nn.Sequential(torchvision.ops.FrozenBatchNorm2d(6))
        swap(model, "bn", source="FrozenBatchNorm2d")
        model[0].requires_grad_(True)
        with pytest.warns(lightning_norm.NoEffectWarning, match="frozen"):
            to_plain(model)
        assert model[0].weight.requires_grad

    @pytest.mark.parametrize("norm", ["bn", "dbn"])
    @pytest.mark.parametrize("affine", [True, False])
    def test_what_did_not_train_does_not_begin_to(self, norm, affine):
        model = nn.Sequential(nn.BatchNorm2d(6, affine=affine))
        swap(model, norm)
        model.requires_grad_(False)
        to_plain(model)
        assert isinstance(model[0], nn.BatchNorm2d)
        assert not any(p.requires_grad for p in model.parameters())


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


class Wrapped(nn.Module):
    def __init__(self, net, wrap):
        super().__init__()
        self.net, self.wrap = net, wrap

    def forward(self, x):
        return self.wrap(self.net(x))


@pytest.mark.parametrize("deploy", [to_plain, fold, lightning_norm.harden])
def test_outputs_of_any_kind_are_measured_or_said_not_to_be(deploy):
    model = Wrapped(network("bcn"), lambda y: {"out": [Output(y)]})
    assert deploy(copy.deepcopy(model), X).largest > 0
    model.wrap = lambda y: str(y)
    report = deploy(model, X)
    assert report.moved is None
    assert "not measured" in str(report)

import copy
import functools
import re
import warnings

import pytest
import torch
import torchvision
from torch import nn

import lightning_norm
from lightning_norm import AlreadySwappedError, LeftAloneWarning, NoEffectWarning, SwitchableNorm, swap
from lightning_norm.layers.base import Normalizer

ARCHITECTURES = [
    "resnet18",
    "resnext50_32x4d",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "vgg11_bn",
    "googlenet",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "regnet_y_400mf",
]
NORM_ARGS = {"gn": {"num_groups": 1}}
EVERY = [(arch, "bcn") for arch in ARCHITECTURES[1:]] + [("resnet18", key) for key in lightning_norm.normalizers()]


def network(arch="resnet18", **kwargs):
    if arch == "googlenet":
        kwargs |= {"aux_logits": False, "init_weights": False}
    return torchvision.models.get_model(arch, weights=None, num_classes=4, **kwargs)


def small():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
    )


def warmed(model):
    """Running statistics away from their start, so that preserving them means something."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
            nn.init.uniform_(module.weight, 0.8, 1.2, generator=generator)
            nn.init.uniform_(module.bias, -0.2, 0.2, generator=generator)
    return model


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


@pytest.mark.filterwarnings("ignore::lightning_norm.ParameterGrowthWarning")
@pytest.mark.parametrize(("arch", "key"), EVERY)
def test_swaps_trains_and_undoes_bit_identically(arch, key):
    torch.manual_seed(0)
    model = warmed(network(arch)).eval()
    x = torch.randn(2, 3, 64, 64)
    before = model(x).detach()
    state = copy.deepcopy(model.state_dict())
    count = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    report = swap(model, key, norm_args=NORM_ARGS.get(key))
    assert len(report) == count > 0
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    after = model(x).detach()
    relative = ((after - before).norm() / before.norm()).item()
    if all(layer.preserves_eval for layer in report.layers):
        assert relative < 1e-3  # the bound; float32 rounding through ~50 layers gives about 1e-5
    else:
        # "differs" is no empty warning either.
        assert relative > 1e-3, f"evaluation is what it was: {key} must declare preserves_eval"
    report.undo()
    assert same_state(state, model.state_dict())
    assert torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore::lightning_norm.ParameterGrowthWarning")
@pytest.mark.parametrize(
    "arch", [arch for arch in ARCHITECTURES if arch not in ("resnet18", "densenet121", "vgg11_bn")]
)
def test_afn_with_closed_gates_keeps_the_evaluation(arch):
    torch.manual_seed(0)
    model = warmed(network(arch)).eval()
    x = torch.randn(2, 3, 64, 64)
    before = model(x).detach()
    report = swap(model, "afn", norm_args={"gate_init": float("-inf"), "rescale_init": 0.0})
    assert all(layer.preserves_eval for layer in report.layers)
    after = model(x).detach()
    assert not torch.equal(after, before)  # another formula ran
    assert (after - before).norm() < 1e-3 * before.norm()


@pytest.mark.parametrize("arch", ["resnet18", "densenet121"])
def test_trains_after_the_swap(arch):
    torch.manual_seed(0)
    model = network(arch)
    swap(model, "sn")
    x = torch.randn(4, 3, 64, 64)
    loss = nn.functional.cross_entropy(model(x), torch.arange(4))
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing
    assert any(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n.endswith("mean_weight"))


def test_parameters_and_buffers_are_moved_not_copied():
    model = small()
    model[1].weight.requires_grad_(False)
    model[4].eval()
    old = model[1]
    swap(model, "sn")
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert getattr(model[1], name) is getattr(old, name)
    assert not model[1].weight.requires_grad
    assert model[1].mean_weight.requires_grad  # bias is still trained: the layer is not frozen
    assert model[1].training
    assert not model[4].training


def test_a_frozen_layer_stays_frozen():
    model = small().requires_grad_(False)
    swap(model, "sn")
    assert not any(p.requires_grad for p in model.parameters())


def test_dtype_and_eps_and_momentum_are_taken_over():
    model = nn.Sequential(nn.BatchNorm1d(6, eps=1e-3, momentum=None, dtype=torch.float64))
    swap(model, "sn")
    assert model[0].mean_weight.dtype == torch.float64
    assert (model[0].eps, model[0].momentum) == (1e-3, None)


@pytest.mark.parametrize("key", ["sn", "dbn"])
def test_statistics_of_a_narrow_network_are_widened_and_go_back_narrow(key):
    model = small().bfloat16()
    model(torch.randn(4, 3, 9, 9).bfloat16())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = lightning_norm.swap(model, key)
    for layer in (m for m in model.modules() if isinstance(m, Normalizer)):
        assert all(layer._buffers[name].dtype == torch.float32 for name in layer.running_names)
    report.undo()
    assert same_state(model.state_dict(), before)
    model(torch.randn(4, 3, 9, 9).bfloat16())


def test_layers_without_affine_or_statistics():
    model = nn.Sequential(nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6, track_running_stats=False))
    report = swap(model, "bn")
    assert model[0].weight is None
    assert model[1].running_mean is None
    assert all(layer.preserves_eval for layer in report.layers)
    x = torch.randn(3, 6, 4, 4)
    plain = nn.Sequential(nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6, track_running_stats=False)).eval()
    torch.testing.assert_close(model.eval()(x), plain(x))


def test_shared_modules_stay_shared():
    shared = nn.BatchNorm2d(6)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared})
    model["again"] = model["a"]
    report = swap(model, "sn")
    assert len(report) == 1
    assert model["a"][0] is model["b"] is model["again"][0]
    assert set(report.layers[0].also) == {"b", "again.0"}
    assert isinstance(model["b"], SwitchableNorm)
    report.undo()
    assert model["a"][0] is model["b"] is shared


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(6))
    model[1].weight = model[0].weight
    swap(model, "sn")
    assert model[0].weight is model[1].weight


def test_forward_hooks_move_and_their_handles_still_work():
    model = small()
    calls = []
    handle = model[1].register_forward_hook(lambda *_: calls.append("post"))
    model[1].register_forward_pre_hook(lambda *_: calls.append("pre"))
    swap(model, "sn")
    x = torch.randn(2, 3, 8, 8)
    model(x)
    assert calls == ["pre", "post"]
    handle.remove()
    model(x)
    assert calls == ["pre", "post", "pre"]


def test_undo_after_training_keeps_what_was_learned():
    model = small()
    report = swap(model, "sn")
    with torch.no_grad():
        model[1].weight.mul_(2)
    model(torch.randn(4, 3, 8, 8))
    stats = model[1].running_mean.clone()
    model.double()
    report.undo()
    assert type(model[1]) is nn.BatchNorm2d
    assert torch.equal(model[1].weight, torch.full((6,), 2.0, dtype=torch.float64))
    assert torch.equal(model[1].running_mean, stats.double())
    with pytest.raises(RuntimeError, match="nothing to undo"):
        report.undo()


@pytest.mark.parametrize("key", lightning_norm.normalizers())
def test_a_batch_norm_that_a_momentum_of_0_keeps_still(key):
    """Its statistics stay what they are in the replacement, or the swap says that they move."""
    bn = nn.BatchNorm2d(6, momentum=0.0)
    bn.running_mean.uniform_(), bn.running_var.uniform_(1, 2), bn.num_batches_tracked.fill_(3)
    model = nn.Sequential(bn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        swap(model, key, norm_args=lightning_norm.normalizers()[key].test_arguments)
    told = any("momentum=0, which keeps running statistics as they are" in str(w.message) for w in caught)
    before = {name: t.clone() for name, t in model.named_buffers() if "running" in name}
    model(torch.randn(4, 6, 5, 5) + 3)
    moved = [name for name, t in before.items() if not torch.equal(t, model.get_buffer(name))]
    assert told == bool(moved)
    if told:
        model[0].freeze_statistics()
        before = {name: model.get_buffer(name).clone() for name in before}
        model(torch.randn(4, 6, 5, 5) + 3)
        assert all(torch.equal(t, model.get_buffer(name)) for name, t in before.items())


def test_include_exclude_and_rules():
    model = network()
    report = swap(model, "sn", include=r"layer1\..*", exclude=["bn2"])
    assert [layer.name for layer in report.layers] == ["layer1.0.bn1", "layer1.1.bn1"]
    model = network()
    rules = {
        r"layer1\..*": None,
        r"layer2\.0\.bn1": {"class_path": "gn", "init_args": {"num_groups": 4}},
        r"layer[23].*": "bcn",
    }
    swap(model, rules=rules)
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, (Normalizer, nn.BatchNorm2d))}
    assert kinds["layer1.0.bn1"] == kinds["layer4.0.bn1"] == kinds["bn1"] == "BatchNorm2d"
    assert kinds["layer2.0.bn1"] == "GroupNorm"  # the first rule that matches wins
    assert kinds["layer2.0.bn2"] == kinds["layer3.1.bn1"] == "BatchChannelNorm"


def test_list_entries_are_exact_names_or_suffixes():
    report = swap(network(), "sn", include=["bn1"])
    assert [layer.name for layer in report.layers][:2] == ["bn1", "layer1.0.bn1"]
    assert all(layer.name.split(".")[-1] == "bn1" for layer in report.layers)


def test_other_sources_on_request():
    model = nn.Sequential(nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True), nn.BatchNorm2d(6), nn.LayerNorm(5))
    with pytest.warns(LeftAloneWarning, match=r"leaves 3 .* 1 LayerNorm \(3\): source='LayerNorm' includes it\. sourc"):
        assert len(swap(copy.deepcopy(model), "sn")) == 1
    assert len(swap(copy.deepcopy(model), "sn", source=["GroupNorm", "InstanceNorm"])) == 2
    x = torch.randn(3, 6, 4, 5)
    want = model.eval()(x)
    report = swap(model, rules={"0": {"class_path": "gn", "init_args": {"num_groups": 2}}, "1": "in"}, source="all")
    assert all(layer.preserves_eval for layer in report.layers)
    torch.testing.assert_close(model(x), want)


def test_layer_norm_becomes_a_token_layer():
    model = nn.Sequential(nn.LayerNorm(6))
    swap(model, "bn", source="LayerNorm")
    assert model[0].channel_dim == -1
    assert model(torch.randn(2, 5, 6)).shape == (2, 5, 6)


def test_layer_norm2d_of_torchvision_keeps_its_channel_axis():
    model = torchvision.models.convnext_tiny(num_classes=2)
    report = swap(model, "ln", source=["LayerNorm2d"], norm_args={})
    assert len(report) > 0
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 2)


def test_a_normalizer_can_be_swapped_again():
    model = small()
    swap(model, "sn")
    report = swap(model, "bcn", source="sn")
    assert len(report) == 2
    assert report.layers[0].dropped == ["mean_weight", "var_weight"]


def test_compiled_model_sees_the_swap():
    model = torch.compile(small().eval(), backend="eager")
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    report = swap(model, "in", include=["1", "4"])
    assert [layer.name for layer in report.layers] == ["1", "4"]  # no "_orig_mod." in names
    assert not torch.allclose(model(x), before, atol=1e-3)


def test_dry_run_changes_nothing():
    model = small()
    modules = list(model.modules())
    report = swap(model, "sn", dry_run=True)
    assert len(report) == 2
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    with pytest.raises(RuntimeError, match="dry run"):
        report.undo()


def test_a_failed_swap_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(7))
    modules = list(model.modules())
    with pytest.raises(ValueError, match=re.escape("1: GroupNorm(num_groups=3) cannot split 7 channels")):
        swap(model, "gn", norm_args={"num_groups": 3})
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


def test_report_as_table_dict_and_yaml():
    import yaml

    report = swap(network(), "sn", include=["bn1"])
    text = str(report)
    assert "layer1.0.bn1" in text
    assert "SwitchableNorm (sn, Luo et al. 2021)" in text
    data = yaml.safe_load(report.to_yaml())
    # In the file, every layer that stays has a row as well.
    stay = [row for row in data["layers"] if row["norm"] is None]
    data["layers"] = [row for row in data["layers"] if row["norm"]]
    assert data == report.to_dict()
    assert len(stay) == report.candidates - len(report)
    assert data["layers"][0]["norm"] == {"class_path": "sn", "init_args": {}}
    assert report.parameters_added == 6 * len(report)
    assert not report.layers[0].preserves_eval


def test_loads_with_weights_only_and_pickles():
    import io
    import pickle

    model = small()
    report = swap(model, "sn")
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(2, 3, 8, 8)
    model.eval()
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert len(report) == 2


class TestBadInput:
    def test_unknown_key_names_the_nearest(self):
        with pytest.raises(
            ValueError, match=r"no normalizer called 'switchabel'\. Did you mean 'sn' \(SwitchableNorm\)"
        ):
            swap(small(), "switchabel")

    def test_pattern_that_matches_nothing(self):
        with pytest.raises(
            ValueError, match=r"include='backbone.bn.\*' matched none of the 20 BatchNorm2d layers.*nearest"
        ):
            swap(network(), "sn", include="backbone.bn.*")
        with pytest.raises(ValueError, match=r"exclude='nope' matched none"):
            swap(network(), "sn", exclude=["bn1", "nope"])
        with pytest.raises(ValueError, match=r"rules='nope' matched none"):
            swap(network(), rules={"nope": "sn", "bn1": "sn"})

    def test_pattern_that_is_no_regular_expression(self):
        with pytest.raises(ValueError, match="not a regular expression"):
            swap(small(), "sn", include="(")

    def test_nothing_to_swap_warns_or_raises(self):
        with pytest.warns(NoEffectWarning, match="no candidate found"):
            report = swap(nn.Sequential(nn.Conv2d(3, 3, 1)), "sn")
        assert len(report) == 0
        with pytest.raises(ValueError, match="no candidate found"):
            swap(nn.Sequential(nn.Conv2d(3, 3, 1)), "sn", on_empty="error")

    @pytest.mark.parametrize(
        ("model", "source", "said"),
        [
            (small, "LayerNorm", r"source='LayerNorm', and the model has none.*is BatchNorm2d \(2 of them\)"),
            (small, ["GroupNorm", "LayerNorm"], r"source=\['GroupNorm', 'LayerNorm'\].*source='BatchNorm2d'"),
            (lambda: nn.Sequential(nn.LayerNorm(6)), None, "BatchNorm layers are looked for.*source='LayerNorm'"),
            (lambda: nn.Sequential(nn.Conv2d(3, 3, 1)), "LayerNorm", "no layer with 'Norm' in its class name"),
        ],
    )
    def test_no_candidate_names_what_was_asked_for_and_what_is_there(self, model, source, said):
        with pytest.warns(NoEffectWarning, match=said):
            assert not len(swap(model(), "sn", source=source))

    @pytest.mark.parametrize("source", ["BatchNorm4d", "BatchNrm2d", ["BatchNorm", "BatchNorm4d"]])
    def test_a_class_name_that_nothing_has(self, source):
        model = small()
        with pytest.raises(
            ValueError, match=r"'BatchN\w+' is no class in the model or in torch.nn.*BatchNorm2d \(2 of"
        ):
            swap(model, "sn", source=source)
        assert not any(isinstance(m, SwitchableNorm) for m in model.modules())

    def test_swap_twice(self):
        model = small()
        swap(model, "sn")
        with pytest.raises(AlreadySwappedError, match=r"already holds 2 layers .*SwitchableNorm.*source='sn'"):
            swap(model, "sn")

    def test_lazy_layer_gets_an_answer(self):
        with pytest.raises(TypeError, match="'0' is a LazyBatchNorm2d that has not seen an input"):
            swap(nn.Sequential(nn.LazyBatchNorm2d()), "sn")

    def test_initialized_lazy_layer_is_swapped(self):
        model = nn.Sequential(nn.LazyBatchNorm2d())
        model(torch.randn(2, 3, 4, 4))
        assert len(swap(model, "sn")) == 1

    def test_subclass_is_left_alone_and_said_so(self):
        class BatchNormAct(nn.BatchNorm2d):
            def forward(self, x):
                return super().forward(x).relu()

        model = nn.Sequential(BatchNormAct(3), nn.BatchNorm2d(3))
        with pytest.warns(LeftAloneWarning, match=r"leaves 1 .*: 1 BatchNormAct \(0\): its own forward"):
            report = swap(model, "sn")
        assert len(report) == 1
        assert "1 BatchNormAct (0): its own forward, outputs differ by" in report.summary()
        with pytest.warns(NoEffectWarning, match="its own forward"):
            assert not len(swap(nn.Sequential(BatchNormAct(3)), "sn", source="BatchNormAct"))

    def test_forms_that_are_none(self):
        for rules in (["bn1"], "bn1"):
            with pytest.raises(TypeError, match=r"rules must be a mapping such as \{'layer1.\*': 'sn'\}, got"):
                swap(small(), rules=rules)
        with pytest.raises(TypeError, match=r"norm_args must be a mapping such as \{'momentum': 0.2\}, got \['eps'\]"):
            swap(small(), "sn", norm_args=["eps"])
        with pytest.raises(TypeError, match=r"expects a torch.nn.Module, got str. Type swap\(model, 'sn'\)"):
            swap("x", "sn")

    def test_unknown_argument_source_and_backend(self):
        with pytest.raises(TypeError, match="SwitchableNorm takes no argument 'choicse'. Did you mean 'choices'"):
            swap(small(), "sn", norm_args={"choicse": ["in"]})
        with pytest.raises(ValueError, match="source='batchnorm' is unknown"):
            swap(small(), "sn", source="batchnorm")
        with pytest.raises(ValueError, match="backend must be one of"):
            swap(small(), "sn", backend="cuda")
        with pytest.raises(ValueError, match="backend='triton': no CUDA device. Type backend='auto'"):
            swap(small(), "sn", backend="triton")
        with pytest.raises(ValueError, match="swap needs norm"):
            swap(small())

    def test_value_out_of_range_names_the_layer(self):
        with pytest.raises(ValueError, match=r"1: SwitchableNorm: momentum must lie in \[0, 1\], got 1.5"):
            swap(small(), "sn", norm_args={"momentum": 1.5})
        with pytest.raises(ValueError, match="1: SwitchableNorm: eps must be"):
            swap(small(), "sn", norm_args={"eps": -1.0})

    def test_the_model_itself_is_the_layer(self):
        with pytest.raises(ValueError, match="lightning_norm.create"):
            swap(nn.BatchNorm2d(3), "sn")

    def test_not_a_normalizer(self):
        with pytest.raises(TypeError, match="is not a normalizer"):
            swap(small(), "torch.nn.BatchNorm2d")
        with pytest.raises(TypeError, match="class_path"):
            swap(small(), {"class": "sn"})
        with pytest.raises(TypeError, match="got a layer, GroupNorm.* Type GroupNorm, and what it takes as norm_args"):
            swap(small(), lightning_norm.create("gn", 3))

    def test_multi_axis_layer_norm(self):
        with pytest.raises(TypeError, match="no channel axis"):
            swap(nn.Sequential(nn.LayerNorm((6, 4, 4))), "ln", source="LayerNorm")

    def test_norm_args_without_norm(self):
        with pytest.raises(ValueError, match=r"norm_args=.*momentum.* without norm.*init_args"):
            swap(small(), rules={"1": "sn"}, norm_args={"momentum": 0.2})

    def test_unknown_sync_group(self):
        model = small()
        with pytest.raises(ValueError, match="sync_group must be 'world', 'node' or a positive number .*, got 'nodes'"):
            swap(model, "sn", sync_group="nodes")
        assert type(model[1]) is nn.BatchNorm2d

    def test_lazy_layer_matters_only_when_it_would_be_swapped(self):
        model = nn.Sequential(nn.BatchNorm2d(6), nn.LazyBatchNorm2d())
        for arguments in ({"include": ["0"]}, {"exclude": ["1"]}, {"rules": {"1": None}}):
            assert [layer.name for layer in swap(model, "sn", **arguments, dry_run=True).layers] == ["0"]
        with pytest.raises(TypeError, match="'1' is a LazyBatchNorm2d that has not seen an input"):
            swap(model, "sn")

    def test_numbers_that_yaml_read_as_text(self):
        model = small()
        report = swap(model, {"class_path": "sn", "init_args": {"eps": "1e-3", "momentum": "2e-1"}})
        assert (model[1].eps, model[1].momentum) == (1e-3, 0.2)
        assert report.layers[0].norm["init_args"] == {"eps": 1e-3, "momentum": 0.2}
        with pytest.raises(ValueError, match=r"^1: SwitchableNorm: eps must be a number, got the text '1e-3x'"):
            swap(small(), "sn", norm_args={"eps": "1e-3x"})

    def test_missed_pattern_names_every_kind_of_candidate(self):
        model = nn.Sequential(nn.BatchNorm2d(6), nn.LayerNorm(6), nn.BatchNorm2d(6))
        with pytest.raises(ValueError, match="none of the 3 BatchNorm2d and LayerNorm layers"):
            swap(model, "sn", include="nope", source=["BatchNorm", "LayerNorm"])
        with pytest.raises(ValueError, match="none of the 4 BatchNorm2d, LayerNorm and GroupNorm layers"):
            swap(model.append(nn.GroupNorm(2, 6)), "sn", include="nope", source="all")


class TestPreserved:
    @pytest.mark.parametrize("key", ["bn", "bcn"])
    @pytest.mark.parametrize("argument", ["track_running_stats", "affine"])
    def test_not_without_the_statistics_or_the_weights(self, key, argument):
        model = warmed(small()).eval()
        x = torch.randn(2, 3, 8, 8)
        before = model(x)
        report = swap(model, key, norm_args={argument: False})
        assert not torch.allclose(model(x), before, atol=1e-3)
        assert {(row.preserves_eval, row.reason) for row in report.layers} == {(False, f"{argument} True -> False")}

    def test_not_when_what_was_learned_stays_behind(self):
        model = small()
        swap(model, "sn")
        row = swap(model, "sn", source="sn").layers[0]
        assert (row.preserves_eval, row.reason) == (False, "mean_weight, var_weight start anew")

    def test_not_with_other_arguments_of_the_same_class(self):
        model = nn.Sequential(lightning_norm.create("gn", 6, num_groups=3), lightning_norm.create("bn", 6))
        rows = swap(model, rules={"0": {"class_path": "gn", "init_args": {"num_groups": 2}}}, source="gn", dry_run=True)
        assert (rows.layers[0].preserves_eval, rows.layers[0].reason) == (False, "num_groups 3 -> 2")
        assert swap(model, rules={"0": "gn", "1": "bn"}, source=["gn", "bn"]).layers[0].preserves_eval
        rows = swap(model, "bn", source="bn", norm_args={"channel_dim": -1}, dry_run=True)
        assert (rows.layers[0].preserves_eval, rows.layers[0].reason) == (False, "channel_dim 1 -> -1")

    @pytest.mark.parametrize("key", ["gn", "sn", "in"])
    def test_not_from_another_normalizer_of_ours(self, key):
        model = nn.Sequential(lightning_norm.create(key, 6, **NORM_ARGS.get(key, {})))
        assert not swap(model, "bn", source=key).layers[0].preserves_eval

    def test_from_our_batch_norm(self):
        model = small()
        swap(model, "bn")
        assert all(row.preserves_eval for row in swap(model, "bcn", source="bn").layers)


class TestUndoAfterACast:
    @pytest.mark.parametrize("key", ["gn", "bn", "in"])
    @pytest.mark.parametrize("cast", [nn.Module.double, nn.Module.bfloat16, lambda m: m.to("meta")])
    def test_gives_what_the_cast_gives_without_a_swap(self, key, cast):
        model, plain = small(), small()
        report = swap(model, key, norm_args=NORM_ARGS.get(key))
        cast(model)
        report.undo()
        want = {k: (v.dtype, v.device) for k, v in cast(plain).state_dict().items()}
        assert {k: (v.dtype, v.device) for k, v in model.state_dict().items()} == want

    def test_reaches_weights_that_the_normalizer_had_no_place_for(self):
        model = small()
        report = swap(model, "sn", norm_args={"affine": False})
        model.double()
        report.undo()
        assert model(torch.randn(2, 3, 8, 8).double()).dtype == model[1].weight.dtype == torch.float64

    def test_leaves_a_mixed_layer_as_it_was_without_a_cast(self):
        model = small()
        model[1].weight.data = model[1].weight.data.bfloat16()
        stats = model[1].running_mean
        swap(model, "gn", norm_args={"num_groups": 1}).undo()
        assert model[1].running_mean is stats
        assert stats.dtype == torch.float32

    def test_keeps_the_scheduled_values_and_the_statistics_of_ours(self):
        model = small()
        swap(model, "sn")
        report = swap(model, "gn", source="sn", norm_args={"num_groups": 1})
        model.bfloat16()
        report.undo()
        assert model[1].scheduled("momentum").dtype == torch.float64
        assert model[1].running_var.dtype == torch.float32
        assert model[1].weight.dtype == model[1].mean_weight.dtype == torch.bfloat16


class TestArguments:
    def test_norm_args_belong_to_norm_and_not_to_a_rule_of_the_same_name(self):
        model = small()
        swap(model, "sn", rules={"1": "sn"}, norm_args={"momentum": 0.3})
        assert (model[1].momentum, model[4].momentum) == (0.1, 0.3)

    @pytest.mark.parametrize("instance", [nn.InstanceNorm2d(6, momentum=0.7), lightning_norm.create("in", 6)])
    def test_instance_norm_does_not_turn_running_statistics_off(self, instance):
        model = nn.Sequential(instance)
        swap(model, "bn", source=["InstanceNorm", "in"])
        assert (model[0].track_running_stats, model[0].momentum) == (True, 0.1)
        assert model[0].affine == (getattr(instance, "weight", None) is not None)

    def test_group_norm_hands_on_its_groups(self):
        model = nn.Sequential(nn.GroupNorm(2, 6), nn.GroupNorm(2, 6))
        rules = {"0": "gn", "1": {"class_path": "gn", "init_args": {"num_groups": 3}}}
        report = swap(model, rules=rules, source="GroupNorm")
        assert [m.num_groups for m in model] == [2, 3]
        assert [row.preserves_eval for row in report.layers] == [True, False]

    def test_the_same_class_hands_on_its_own_arguments(self):
        arguments = {"choices": ("ln", "bn", "gn"), "num_groups": 3, "correction": 1, "sparse": True, "radius": 0.4}
        model = nn.Sequential(
            lightning_norm.create("sn", 6, momentum=0.3, **arguments),
            lightning_norm.create("gn", 6, num_groups=3),
            lightning_norm.create("in", 6, track_running_stats=True, momentum=0.2),
        )
        swap(model, rules={"0": "sn", "1": "gn", "2": "in"}, source=["sn", "gn", "in"])
        assert {name: getattr(model[0], name) for name in arguments} == arguments
        assert (model[0].momentum, model[1].num_groups, model[2].track_running_stats) == (0.3, 3, True)
        swap(model, "sn", source="sn", norm_args={"radius": 0.6, "num_groups": 2})
        assert (model[0].radius, model[0].num_groups, model[0].sparse) == (0.6, 2, True)


class TestPlan:
    def plan(self, tmp_path, text):
        path = tmp_path / "plan.yaml"
        path.write_text(text)
        return str(path)

    @pytest.mark.parametrize("source", ["sn", "LayerNorm2d", "BatchNorm"])
    def test_applies_to_the_kinds_it_was_made_for(self, tmp_path, source):
        model = nn.Sequential(nn.BatchNorm2d(6), torchvision.models.convnext.LayerNorm2d(6), nn.BatchNorm2d(6))
        swap(model, "sn", include=["2"])
        report = swap(model, "bcn", source=source, dry_run=True)
        callback = lightning_norm.NormSwap(plan=self.plan(tmp_path, report.to_yaml()))
        applied = swap(model, **callback.swap_arguments())
        assert [(row.name, row.target) for row in applied.layers] == [(report.layers[0].name, "BatchChannelNorm")]

    @pytest.mark.parametrize("layers", ["[]", "[{name: '1', source: BatchNorm2d, norm: null}]"])
    def test_an_empty_plan_is_refused(self, tmp_path, layers):
        with pytest.raises(ValueError, match=r"plan\.yaml' swaps no layer"):
            lightning_norm.NormSwap(plan=self.plan(tmp_path, f"layers: {layers}\n"))


@pytest.mark.parametrize("use", [lambda m: m(torch.ones(2, 3, 8, 8)), lambda m: m.parameters(), lambda m: m.fc])
def test_a_report_in_place_of_the_model_says_so(use):
    """As somebody writes who comes from torch's convert_sync_batchnorm."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    for function in (functools.partial(swap, norm="sn"), lightning_norm.harden):
        model = function(network)
        with pytest.raises((TypeError, AttributeError), match=r"Type `report = \.\.\.` in place of `model"):
            use(model)
        assert copy.copy(model).table() == model.table()  # what copies and prints it still can


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"exclude": ".*"}, "exclude names it"),
        ({"include": []}, "include does not name it"),
        ({"filter": lambda name, module: False}, "not chosen by filter"),
        ({"rules": {".*": None}}, "rules: '.*' leaves it alone"),
        ({"skip_frozen": True}, "skip_frozen=True: nothing around it requires a gradient"),
    ],
)
def test_a_swap_that_leaves_every_candidate_says_what_leaves_them(options, why):
    model = nn.Sequential(nn.BatchNorm2d(4)).requires_grad_("skip_frozen" not in options)
    with pytest.raises(ValueError, match="1 candidate, none chosen") as told:
        swap(model, "sn", on_empty="error", **options)
    assert f"0 is a BatchNorm2d: {why}." in str(told.value)
    assert "the model has none" not in str(told.value)

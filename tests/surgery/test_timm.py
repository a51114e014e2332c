"""Whole families of timm: every layer is swapped with its activation and dropout, and nothing is left in silence."""

import copy
import warnings

import pytest
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from timm.layers.norm_act import BatchNormAct2d, GroupNormAct, SyncBatchNormAct, convert_sync_batchnorm
from torch import nn

import lightning_norm
from lightning_norm import LeftAloneWarning, is_norm, norm_types, normalizers, swap
from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.behind import fuse_behind
from lightning_norm.surgery.manifest import manifest_of, rebuild
from tests.callbacks.toy import Net, loader, trainer

FAMILIES = {
    "efficientnet_lite0": {},
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "resnetv2_50": {"layers": (1, 1, 1, 1)},
    "regnetx_002": {},
    "rexnet_100": {"width_mult": 0.5},
    "ghostnet_050": {},
    "repvit_m0_9": {},
    "levit_128s": {"img_size": 64},
    "mnasnet_small": {},
    "lcnet_035": {},
    "tinynet_e": {},
    "repghostnet_050": {},
    "test_byobnet": {},
    "test_resnet": {},
    "resnet18": {},
    "mobilevitv2_050": {},
}
LEFT = {"mobilevitv2_050": "GroupNorm1"}
"""Families with layers of other kinds as well."""


def build(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **FAMILIES[name]).eval()
    for key, t in (*model.named_parameters(), *model.named_buffers()):
        if t.dim() == 1 and t.is_floating_point():  # of norms and biases: nothing is at its start
            t.data.copy_(torch.rand_like(t) + 0.5 if "var" in key or "weight" in key else torch.randn_like(t) / 10)
    return model


def swapped(model, norm, name, **arguments):
    if name not in LEFT:
        return swap(model, norm, **arguments)
    with pytest.warns(LeftAloneWarning, match=LEFT[name]) as caught:
        report = swap(model, norm, **arguments)
    assert len([w for w in caught if w.category is LeftAloneWarning]) == 1
    return report


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name):
    model, x = build(name), torch.randn(4, 3, 64, 64)
    layers = {n: m for n, m in model.named_modules() if is_norm(m)}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.double()
    want = model(x.double())
    report = swapped(model, "bn", name)
    assert all(row.preserves_eval for row in report.layers)
    torch.testing.assert_close(model(x.double()), want, rtol=1e-6, atol=1e-8)
    assert model.state_dict().keys() == state.keys()
    left = {n for n, _, _ in (*report.skipped, *report.others)}
    assert {row.name for row in report.layers} | left == layers.keys()
    report.undo()
    model.float()

    report = swapped(model, "sn", name)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    loss = model.train()(x).square().mean()
    loss.backward()
    for row in report.layers:
        for n, p in model.get_submodule(row.name).named_parameters():
            assert p.grad is not None, f"{row.name}.{n}"
    optimizer.step()
    report.undo()
    assert {n for n, m in model.named_modules() if m in set(layers.values())} == layers.keys()


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "levit_128s"])
def test_undo_is_bit_identical(name):
    model = build(name)
    state, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    x = torch.randn(2, 3, 64, 64)
    want = model(x)
    swap(model, "dbn").undo()
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), want)


def layer(act_layer=nn.SiLU, drop_layer=None, **arguments):
    torch.manual_seed(0)
    module = BatchNormAct2d(6, act_layer=act_layer, drop_layer=drop_layer, **arguments)
    for name in ("weight", "bias", "running_mean"):
        nn.init.normal_(getattr(module, name))
    return nn.Sequential(nn.Conv2d(3, 6, 3), module)


@pytest.mark.parametrize("key", normalizers())
@pytest.mark.parametrize("act", [nn.ReLU, nn.Hardswish, nn.PReLU])
def test_every_normalizer_with_an_activation(key, act, tmp_path):
    model = layer(act, lambda: nn.Dropout2d(0.5)).eval()
    arguments = {k: v for k, v in normalizers()[key].test_arguments.items() if k != "num_features"}
    before, x = model[1], torch.randn(8, 3, 9, 9)
    state = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lightning_norm.ParameterGrowthWarning)
        swap(model, key, norm_args=arguments)
    new = model[1]
    assert (new.act, new.drop, new.num_features, new.eps) == (before.act, before.drop, 6, before.eps)
    bare = copy.deepcopy(new)
    bare._behind = ()
    for training in (True, False):
        if training and getattr(new, "context", "") == "ids":
            continue
        model.train(training)
        bare.train(training)
        torch.manual_seed(1)
        want = before.act(bare.drop(bare(model[0](x))))
        torch.manual_seed(1)
        torch.testing.assert_close(model(x), want)
    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x))
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), model(x))
    manifest = manifest_of(model)
    rebuilt = layer(act, lambda: nn.Dropout2d(0.5)).eval()
    rebuild(rebuilt, manifest)
    rebuilt.load_state_dict(model.state_dict())
    torch.testing.assert_close(rebuilt(x), model(x))
    plain = copy.deepcopy(model)
    lightning_norm.to_plain(plain, x)
    torch.testing.assert_close(plain(x), model(x))
    if type(plain[1]) is BatchNormAct2d:
        assert plain.state_dict().keys() == state.keys()
    folded = copy.deepcopy(model)
    lightning_norm.fold(folded, x)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    swap(model, "bn", source=key)
    assert model[1].act is before.act
    assert model[1]._behind == ("drop", "act")


def test_undo_puts_a_new_activation_back():
    model = layer()
    report = swap(model, "sn")
    model[1].act = nn.GELU()
    report.undo()
    assert isinstance(model[1], BatchNormAct2d)
    assert isinstance(model[1].act, nn.GELU)


@pytest.mark.parametrize(("act", "left"), [(nn.ReLU, 0), (nn.SiLU, 0), (nn.GELU, 1)])
def test_relu_and_silu_are_fused(act, left):
    model = layer(act)
    swap(model, "sn")
    activation, rest = fuse_behind(model[1], "none")
    assert len(rest) == left
    assert activation == {nn.ReLU: "relu", nn.SiLU: "silu"}.get(act, "none")
    # A hook is to see the activation's call, and another activation comes before the layer's.
    assert len(fuse_behind(model[1], "relu")[1]) >= 1
    seen = []
    model[1].act.register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(2, 3, 8, 8))
    assert seen == [1]


def test_compiled():
    model = layer()
    swap(model, "sn", compile=True)
    x = torch.randn(4, 3, 8, 8)
    plain = copy.deepcopy(model)
    plain[1].compiled = False
    torch.testing.assert_close(model(x), plain(x))


def test_synchronized_batch_norm_of_timm():
    model = convert_sync_batchnorm(layer(drop_layer=nn.Dropout)).eval()
    assert type(model[1]) is SyncBatchNormAct
    x = torch.randn(2, 3, 8, 8)
    want = model(x)
    report = swap(model, "bn")
    assert (len(report), model[1]._behind) == (1, ("drop", "act"))
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("key", ["bn", "sn", "bnet", "dbn"])
def test_frozen_layers_on_request(key):
    model = nn.Sequential(layer(), nn.BatchNorm2d(6))
    model[0] = freeze_batch_norm_2d(model[0])
    model[1] = freeze_batch_norm_2d(model[1])
    state, x = copy.deepcopy(model.state_dict()), torch.randn(4, 3, 8, 8)
    model[1].running_var.fill_(2)
    state = copy.deepcopy(model.state_dict())
    assert all(isinstance(m, norm_types()) and is_norm(m) for m in (model[0][1], model[1]))
    want = model(x)
    with pytest.warns(lightning_norm.NoEffectWarning, match="FrozenBatchNorm"):
        assert not len(swap(model, key))
    report = swap(model, key, source=["FrozenBatchNormAct2d", "FrozenBatchNorm2d"])
    assert len(report) == 2
    layers = [m for m in model.modules() if isinstance(m, Normalizer)]
    model.train()
    if key != "sn":
        assert all(row.preserves_eval for row in report.layers)
        torch.testing.assert_close(model(x), want)
    before = copy.deepcopy(model.state_dict())
    model(x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for m in layers for p in m.parameters(recurse=False))
    report.undo()
    assert all(m.training for m in model.modules())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_other_families_on_request():
    model = nn.Sequential(GroupNormAct(6, 3, act_layer=nn.SiLU), timm.layers.LayerNorm2d(6), timm.layers.LayerNorm(5))
    x = torch.randn(2, 6, 4, 5)
    want = model(x)
    report = swap(model, rules={"0": {"class_path": "gn", "init_args": {"num_groups": 3}}}, source="GroupNorm")
    assert report.layers[0].preserves_eval
    torch.testing.assert_close(model(x), want)
    report = swap(model, "in", source="LayerNorm")
    assert [m.channel_dim for m in model[1:]] == [1, -1]
    assert not any(row.preserves_eval for row in report.layers)


def test_on_the_meta_device_the_known_classes_are_trusted():
    with torch.device("meta"):
        model = timm.create_model("mobilenetv3_small_050")
    report = swap(model, "sn")
    assert len(report) == report.candidates == 34
    assert model.bn1._behind == ("drop", "act")


def test_export():
    model, x = layer(nn.Hardswish, nn.Dropout).eval(), torch.randn(2, 3, 8, 8)
    swap(model, "bn")
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("act", [nn.SiLU, nn.Hardswish])
def test_compiled_by_the_user_without_a_break(act):
    model, x = layer(act).eval(), torch.randn(2, 3, 8, 8)
    swap(model, "bn")
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


class Job(Net):
    def __init__(self):
        super().__init__()
        self.net = layer(nn.Hardswish, nn.Dropout)


def test_a_checkpoint_of_a_run_rebuilds_it(tmp_path):
    job = Job()
    run = trainer(lightning_norm.NormSwap("sn"), tmp_path=tmp_path)
    run.fit(job, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again, x = lightning_norm.load_from_checkpoint(Job, tmp_path / "a.ckpt"), torch.randn(2, 3, 8, 8)
    assert again.net[1]._behind == ("drop", "act")
    assert torch.equal(again.eval()(x), job.eval()(x))

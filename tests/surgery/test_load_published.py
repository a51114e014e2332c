"""Files of the papers' authors are loaded, and the network then computes what their equations say."""

import contextlib
import copy
import math
import pickle
import re
import warnings
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn

import lightning_norm
from lightning_norm import contexts, create, load_published, normalizers, swap
from lightning_norm.errors import CheckpointError, PublishedFileWarning
from tests import published
from tests.published import F64, LAYERS, trained

KEYS = {name: name.split()[0] for name in LAYERS} | {name: "sn" for name in LAYERS if name.startswith("sparse")}
SHAPES = {"sn 3d": (5, 3, 4, 2), "sn 1d": ()}
TORCH = {0: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
PRIORS = [0.2, 0.5, 0.3]


def norm_for(name):
    return {"class_path": "cn", "init_args": {"priors": PRIORS}} if KEYS[name] == "cn" else KEYS[name]


def saved(tmp_path, state, name="published.pth"):
    path = tmp_path / name
    torch.save(state, path)
    return path


def inputs(c, name="sn", n=6, seed=3):
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, c, *SHAPES.get(name, (4, 3))[-3:], generator=g, dtype=F64) + 1


def with_ids(layers, model, x):
    ids = torch.arange(len(x)) % 3
    for layer in layers:
        layer.ids = ids.tolist()
    cn = any(isinstance(m, normalizers()["cn"]) for m in model.modules())
    return contexts(model, ids) if cn else contextlib.nullcontext()


@pytest.mark.parametrize("c", [1, 6, 20])
@pytest.mark.parametrize("name", LAYERS)
def test_evaluation_is_the_authors(name, c, tmp_path):
    if name == "sn 1d" and c == 1:
        pytest.skip("one value has no variance, in the authors' code either")
    theirs = trained(nn.Sequential(LAYERS[name](c)), seed=c)
    path = saved(tmp_path, {"state_dict": theirs.state_dict(), "epoch": 3})
    axes = len(SHAPES.get(name, (4, 3))) if name not in SHAPES else len(SHAPES[name]) and 3
    ours = nn.Sequential(TORCH[axes](c)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = load_published(ours, path, norm_for(name))
    assert len(report) == 1
    assert type(ours[0]).key == KEYS[name]
    x = inputs(c, name)
    with with_ids([theirs[0]], ours, x), torch.no_grad():
        y, wanted = ours.eval()(x), theirs(x)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    assert wanted.std() > 0.01


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("bnet", "bnet 5x5", "sparse sn, decided")])
def test_each_argument_that_is_set_counts(name, tmp_path):
    """With the class's own default in its place evaluation is another function, and a warning tells it."""
    theirs = trained(nn.Sequential(LAYERS[name](6)))
    path = saved(tmp_path, theirs.state_dict())
    defaults = {"correction": 0, "eps_outside": False}
    defaults = {"rbn": {"gate_init": "unit"}, "cn": {"prior_scale": False}}.get(KEYS[name], defaults)
    axes = 3 if name == "sn 3d" else 0 if name == "sn 1d" else 2
    x = inputs(6, name)
    spec = norm_for(name)
    spec = {"class_path": spec} if isinstance(spec, str) else spec
    counted = 0
    for argument in defaults:
        ours = nn.Sequential(TORCH[axes](6)).double()
        load_published(ours, path, spec)
        if getattr(ours[0], argument, defaults[argument]) == defaults[argument]:
            continue
        counted += 1
        other = nn.Sequential(TORCH[axes](6)).double()
        changed = {**spec, "init_args": {**spec.get("init_args", {}), argument: defaults[argument]}}
        with pytest.warns(PublishedFileWarning, match=f"was trained with .*{argument}"):
            load_published(other, path, changed)
        ids = torch.arange(len(x)) % 3
        cn = KEYS[name] == "cn"
        with torch.no_grad():
            pair = []
            for model in (ours.eval(), other.eval()):
                with contexts(model, ids) if cn else contextlib.nullcontext():
                    pair.append(model(x))
        assert (pair[0] - pair[1]).abs().max() > 1e-8, argument
    assert counted


def resnet(norm, block="basic"):
    kind = {"basic": torchvision.models.resnet.BasicBlock, "bottleneck": torchvision.models.resnet.Bottleneck}[block]
    return torchvision.models.ResNet(kind, [1, 1, 1, 1], num_classes=5, norm_layer=norm)


def renamed(state, *pairs):
    names = {name: name for name in state}
    for pattern, replacement in pairs:
        names = {old: re.sub(pattern, replacement, new) for old, new in names.items()}
    return OrderedDict((names[name], t) for name, t in state.items())


NETWORKS = {
    "sn": (published.SN, [(r"\bbn(\d)", r"sn\1")]),
    "sn in DataParallel": (published.SN, [(r"\bbn(\d)", r"sn\1"), (r"^", "module.")]),
    "rbn": (published.RBN, []),
    "bcn": (published.BCN, []),
}


@pytest.mark.parametrize("entry", ["state_dict", "model", None])
@pytest.mark.parametrize("case", NETWORKS)
def test_a_whole_network(case, entry, tmp_path):
    norm, names = NETWORKS[case]
    theirs = trained(resnet(norm))
    state = renamed(theirs.state_dict(), *names)
    path = saved(tmp_path, {entry: state, "best_prec1": torch.tensor(0.5)} if entry else state)
    ours = resnet(nn.BatchNorm2d).double()
    report = load_published(ours, path, case.split()[0])
    assert len(report) == 12
    x = inputs(3, n=2)[..., :1].repeat(1, 1, 16, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs(x), rtol=1e-8, atol=1e-8)
    report.undo()
    assert not any(isinstance(m, lightning_norm.Normalizer) for m in ours.modules())


@pytest.mark.parametrize("older", [False, True])
def test_bnet_at_the_end_of_each_block(older, tmp_path):
    """``bnet3`` of the ImageNet files, or ``bn3`` with ``bnconv3`` beside it; all other layers are BatchNorms."""
    theirs = resnet(nn.BatchNorm2d, "bottleneck")
    for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        stage[0].bn3 = published.BNET(stage[0].bn3.num_features, 5)
    trained(theirs)
    names = [(r"\bbn3\.bnconv\.", "bnconv3.")] if older else [(r"\bbn3\b", "bnet3")]
    state = renamed(theirs.state_dict(), *names)
    assert any(name.startswith("layer1.0.bnconv3.weight" if older else "layer1.0.bnet3.bnconv") for name in state)
    ours = resnet(nn.BatchNorm2d, "bottleneck").double()
    report = load_published(ours, saved(tmp_path, state), "bnet")
    assert [row.name for row in report.layers] == [f"layer{i}.0.bn3" for i in range(1, 5)]
    assert type(ours.bn1) is nn.BatchNorm2d
    x = inputs(3, n=2)[..., :1].repeat(1, 1, 16, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs(x), rtol=1e-8, atol=1e-8)


def test_a_network_with_the_authors_names_keeps_them(tmp_path):
    theirs = trained(nn.Sequential(OrderedDict(sn1=published.SN(6))))
    ours = nn.Sequential(OrderedDict(sn1=nn.BatchNorm2d(6))).double()
    load_published(ours, saved(tmp_path, theirs.state_dict()), "sn")
    assert ours.sn1.correction == 1


def test_decided_weights_no_longer_train(tmp_path):
    theirs = trained(nn.Sequential(published.SparseSN(6, 0.9, (1, 0))))
    ours = nn.Sequential(nn.BatchNorm2d(6)).double()
    load_published(ours, saved(tmp_path, theirs.state_dict()), "sn")
    assert not ours[0].mean_weight.requires_grad
    assert ours[0].var_weight.requires_grad
    assert ours[0].radius == pytest.approx(0.9)


def test_the_stem_of_the_sparse_resnets_is_told(tmp_path):
    state = renamed(trained(resnet(published.SparseSN)).state_dict(), (r"\bbn(\d)", r"sn\1"))
    model = resnet(nn.BatchNorm2d)
    with pytest.warns(PublishedFileWarning, match=re.escape("torch.nn.MaxPool2d(3, 2, ceil_mode=True)")):
        load_published(model, saved(tmp_path, state), "sn")
    model = resnet(nn.BatchNorm2d)
    model.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
    load_published(model, saved(tmp_path, state), "sn")


def test_afn_with_running_statistics_is_typed(tmp_path):
    theirs = trained(nn.Sequential(published.AFN(6)))
    ours = nn.Sequential(nn.BatchNorm2d(6)).double()
    norm = {"class_path": "afn", "init_args": {"track_running_stats": True}}
    with pytest.warns(PublishedFileWarning, match="track_running_stats"):
        load_published(ours, saved(tmp_path, theirs.state_dict()), norm)
    x = inputs(6)
    ours.eval()
    torch.testing.assert_close(ours(x)[:2], ours(x[:2]))  # a sample no longer depends on its batch mates


def test_the_file_is_read_without_running_code(tmp_path):
    class Malicious:
        def __reduce__(self):
            return eval, ("print('ran')",)

    path = tmp_path / "bad.pth"
    with path.open("wb") as file:
        pickle.dump({"sn1.weight": Malicious()}, file, protocol=2)
    with pytest.raises(CheckpointError, match="would run code"):
        load_published(nn.Sequential(nn.BatchNorm2d(6)), path, "sn")


def one(name, c=6, seed=0):
    return trained(nn.Sequential(LAYERS[name](c)), seed).state_dict()


def without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


BAD = {
    "another method": (lambda: one("rbn"), "sn", r"no layer as the authors' code of 'sn'.*type norm='rbn'"),
    "asr or afn": (lambda: one("asr"), "bcn", r"type norm='a\w\w' or 'a\w\w'"),
    "a plain network": (lambda: nn.Sequential(nn.BatchNorm2d(6)).state_dict(), "sn", "no layer as the authors"),
    "of this package": (lambda: nn.Sequential(create("sn", 6)).state_dict(), "sn", "no layer as the authors"),
    "no priors": (lambda: one("cn"), "cn", r"'priors': \[0.333333, 0.333333, 0.333333\]"),
    "another place": (lambda: renamed(one("sn"), ("^0", "a.b")), "sn", "'a.b'.*no layer of that name.*rename="),
    "other channels": (lambda: one("sn", 8), "sn", "8 channels at '0'.*BatchNorm2d of 6"),
    "no norm there": (lambda: renamed(one("sn"), ("^0", "1")), "sn", "'1' of 'sn'.*has a ReLU there"),
    "the layer by itself": (lambda: trained(published.SN(6)).state_dict(), "sn", "one layer by itself"),
    "no tensor": (lambda: {**one("sn"), "0.weight": [1.0]}, "sn", "list and no tensor|no checkpoint"),
    "an entry more": (lambda: {**one("bcn"), "0.extra": torch.ones(1)}, "bcn", "holds extra, which"),
    "an entry of the network more": (lambda: {**one("rbn"), "fc.weight": torch.ones(1)}, "rbn", "Unexpected key.*fc"),
    "fixed, and not one-hot": (
        *(lambda: {**one("sparse sn"), "0.var_fixed": torch.tensor([1])}, "sn"),
        "var_fixed is set, and var_weight is not one-hot",
    ),
    "an even kernel": (lambda: {**one("bnet"), "0.bnconv.weight": torch.ones(6, 1, 4, 4)}, "bnet", "with an odd k"),
    "scaled twice": (lambda: {**one("bnet"), "0.weight": torch.ones(6)}, "bnet", "holds weight, which"),
    "four statistics": (lambda: {**one("sn"), "0.mean_weight": torch.ones(4)}, "sn", r"\(4,\), expected \(3,\)"),
}


BAD |= {
    f"{entry} of {value}": (
        lambda entry=entry, value=value: {**one("sn"), f"0.{entry}": torch.full((1, 6, 1), value)},
        "sn",
        f"layer '0'.*{entry} holds {said}",
    )
    for entry, value, said in (
        ("running_var", math.nan, "NaN or infinity"),
        ("running_var", math.inf, "NaN or infinity"),
        ("running_var", -0.1, "values below 0"),
        ("running_mean", math.nan, "NaN or infinity"),
    )
}
INSIDE = [("model_ema",), ("checkpoint", "model"), ("model", "state_dict"), ("a", "b", "c"), ("state_dict", "net")]


@pytest.mark.parametrize("keys", INSIDE, ids=".".join)
def test_weights_that_lie_deeper_are_told_with_what_to_type(keys, tmp_path):
    content = one("sn")
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    path, entries = saved(tmp_path, content), "".join(f"[{key!r}]" for key in keys)
    with pytest.raises(CheckpointError, match=re.escape(f"torch.load({str(path)!r}){entries}, 'weights.pth')")):
        load_published(nn.Sequential(nn.BatchNorm2d(6)), path, "sn")
    torch.save(eval(f"torch.load(path){entries}"), tmp_path / "weights.pth")  # as typed
    assert len(load_published(nn.Sequential(nn.BatchNorm2d(6)), tmp_path / "weights.pth", "sn")) == 1


@pytest.mark.parametrize("case", BAD)
def test_foreign_and_damaged_files_are_refused(case, tmp_path):
    state, norm, said = BAD[case]
    model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=said) as error:
        load_published(model, saved(tmp_path, state()), norm)
    assert "published.pth" in str(error.value)
    assert type(model[0]) is nn.BatchNorm2d
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", LAYERS)
def test_every_entry_is_needed(name, tmp_path):
    """Without any one of them, and with any one of another shape, the file is refused and nothing is changed."""
    state = one(name, 20)
    unused = ("Batchh.gamma", "Batchh.beta", "layeer.gamma", "layeer.beta", "num_batches_tracked")
    axes = 3 if name == "sn 3d" else 0 if name == "sn 1d" else 2
    for entry in state:
        if entry.endswith(unused):
            continue
        for damaged in (without(state, entry), {**state, entry: torch.ones(20, 7)}):
            model = nn.Sequential(TORCH[axes](20))
            with pytest.raises(CheckpointError):
                load_published(model, saved(tmp_path, damaged), norm_for(name))
            assert type(model[0]) is TORCH[axes], entry


def test_truncated(tmp_path):
    path = saved(tmp_path, one("sn"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="breaks off|cannot read"):
        load_published(nn.Sequential(nn.BatchNorm2d(6)), path, "sn")
    with pytest.raises(FileNotFoundError):
        load_published(nn.Sequential(nn.BatchNorm2d(6)), tmp_path / "nothing.pth", "sn")


def test_a_network_inside_and_outside_of_another_is_told(tmp_path):
    path = saved(tmp_path, one("sn"))
    outer = nn.Module()
    outer.net = nn.Sequential(nn.BatchNorm2d(6))
    with pytest.raises(CheckpointError, match=re.escape("type load_published(model.net, ...)")):
        load_published(outer, path, "sn")
    load_published(outer.net, path, "sn")
    longer = saved(tmp_path, renamed(one("sn"), ("^", "encoder.")))
    with pytest.raises(CheckpointError, match=re.escape("rename={'^encoder")):
        load_published(nn.Sequential(nn.BatchNorm2d(6)), longer, "sn")
    model = nn.Sequential(nn.BatchNorm2d(6))
    load_published(model, longer, "sn", rename={r"^encoder\.": ""})
    assert model[0].key == "sn"


def test_a_network_that_is_swapped_already(tmp_path):
    model = nn.Sequential(nn.BatchNorm2d(6)).double()
    swap(model, "sn")
    theirs = trained(nn.Sequential(published.SN(6)))
    load_published(model, saved(tmp_path, theirs.state_dict()), "sn")
    x = inputs(6)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_arguments_are_checked_as_in_a_swap(tmp_path):
    path = saved(tmp_path, one("sn"))
    model = nn.Sequential(nn.BatchNorm2d(6))
    with pytest.raises(TypeError, match="momentun"):
        load_published(model, path, {"class_path": "sn", "init_args": {"momentun": 0.2}})
    with pytest.raises(ValueError, match="Did you mean"):
        load_published(model, path, "snn")
    with pytest.raises(TypeError, match="Module"):
        load_published(path, model, "sn")
    assert type(model[0]) is nn.BatchNorm2d


def test_a_checkpoint_of_what_was_loaded_says_what_was_swapped(tmp_path):
    from lightning_norm.surgery.manifest import load_weights, rebuild_from

    theirs = trained(nn.Sequential(published.AFN(20)))
    ours = nn.Sequential(nn.BatchNorm2d(20)).double()
    load_published(ours, saved(tmp_path, theirs.state_dict()), "afn")
    again = nn.Sequential(nn.BatchNorm2d(20)).double()
    checkpoint = {"state_dict": ours.state_dict()}
    rebuild_from(again, checkpoint)
    load_weights(again, checkpoint, "ours.ckpt")
    x = inputs(20)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_a_detector_file_in_its_backbone(tmp_path):
    theirs = resnet(nn.BatchNorm2d, "bottleneck")
    theirs.layer4[0].bn3 = published.BNET(theirs.layer4[0].bn3.num_features)
    state = renamed(trained(theirs).state_dict(), (r"\bbn3\.bnconv\.", "bnconv3."), ("^", "backbone."))
    path = saved(tmp_path, {"state_dict": {**state, "neck.weight": torch.ones(3)}})
    ours = resnet(nn.BatchNorm2d, "bottleneck").double()
    with pytest.raises(CheckpointError, match=r"Unexpected key.*neck.weight.*Type strict=False"):
        load_published(ours, path, "bnet", rename={r"^backbone\.": ""})
    load_published(ours, path, "bnet", rename={r"^backbone\.": ""}, strict=False)
    x = inputs(3, n=2)[..., :1].repeat(1, 1, 16, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["sn", "bcn"])
def test_what_does_not_load_otherwise_points_here(name):
    from lightning_norm.surgery.manifest import load_weights

    model = nn.Sequential(OrderedDict(bn1=nn.BatchNorm2d(6)))
    swap(model, name)
    for place in ("sn1", "bn1"):
        state = renamed(one(name), ("^0", place))
        if (name, place) != ("sn", "bn1"):  # which loads, with a warning
            with pytest.raises(CheckpointError, match=re.escape(f"load_published(model, path, {name!r})")) as error:
                load_weights(model, {"state_dict": state}, "theirs.pth")
            assert str(error.value).count("lightning-norm convert") == 1

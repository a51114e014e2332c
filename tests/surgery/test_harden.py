"""harden: what has decided becomes the plain normalizer it chose; what has not stays, and the report says why."""

import copy

import pytest
import torch
from torch import nn

from lightning_norm import Choice, MomentNorm, Normalizer, create, fold, harden, normalizers, swap
from lightning_norm.errors import NoEffectWarning
from lightning_norm.testing.kit import features, noise

F64 = torch.float64
X = features(4, 6, 5, 3, seed=9, dtype=F64)


def network(*layers, n=6):
    model = nn.Sequential()
    for _ in layers:
        model.append(nn.Conv2d(n, n, 3, padding=1))
        model.append(nn.BatchNorm2d(n))
    for i, (norm, arguments) in enumerate(layers):
        swap(model, norm, norm_args=arguments, include=[str(2 * i + 1)])
    model.double().train()
    for seed in (1, 2):
        model(features(4, n, 5, 3, seed=seed, dtype=F64))
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if not name.endswith(("iota", "mean_weight", "var_weight")):
                p.add_(0.1 * noise(*p.shape, seed=i, dtype=F64))
    return model


def decide(layer, choice, by=40.0, var=None):
    """By 40 the softmax is exactly one-hot in float64."""
    with torch.no_grad():
        for weight, chosen in ((layer.mean_weight, choice), (layer.var_weight, var or choice)):
            weight.zero_()[layer.choices.index(chosen)] = by


SN = [
    ("bn", {}, "BatchNorm"),
    ("in", {}, "InstanceNorm"),
    ("ln", {}, "LayerNorm"),
    ("gn", {"choices": ["in", "gn", "bn"], "num_groups": 3}, "GroupNorm"),
    ("bn", {"sparse": True}, "BatchNorm"),
    ("bn", {"correction": 1}, "BatchNorm"),
]


@pytest.mark.parametrize(("chosen", "arguments", "target"), SN, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_sn_becomes_what_it_chose(chosen, arguments, target, training):
    model = network(("sn", arguments))
    decide(model[1], chosen)
    sn, weight = model[1], model[1].weight
    before = copy.deepcopy(model).eval()(X)
    model.train(training)
    report = harden(model, X, threshold=1.0)
    assert (type(model[1]).__name__, len(report), report.names(chosen)) == (target, 1, ["1"])
    assert model[1].weight is weight
    assert model.training == model[1].training == training
    assert report.moved < 1e-12
    assert report.layers[0].moved < 1e-12
    torch.testing.assert_close(model.eval()(X), before, rtol=1e-12, atol=1e-12)
    assert target in str(report)
    folded = fold(copy.deepcopy(model), X)
    assert folded.names("folded") == (["1"] if chosen == "bn" else [])
    report.undo()
    assert model[1] is sn
    assert torch.equal(model.eval()(X), before)


@pytest.mark.parametrize(("iota", "norm", "target"), [(1.0, "bn", "BatchNorm"), (0.0, "ln", "LayerNorm")])
@pytest.mark.parametrize("constraint", [None, "clamp"])
def test_bcn_becomes_what_it_chose(iota, norm, target, constraint):
    model = network(("bcn", {"constraint": constraint}))
    model[1].iota.data.fill_(iota)
    before = copy.deepcopy(model).eval()(X)
    report = harden(model, X, threshold=1.0)
    assert type(model[1]).__name__ == target
    assert report.names(norm) == ["1"]
    torch.testing.assert_close(model.eval()(X), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("iota", "threshold", "norm"),
    [
        ([0.95] * 6, 0.9, "bn"),
        ([1.05] * 6, 0.9, "bn"),  # beyond 1 it is as far from batch normalization as below
        ([1.2] * 6, 0.9, ""),
        ([-0.05] * 6, 0.9, "ln"),
        ([0.95] * 6, 0.96, ""),
        ([1.0] * 5 + [0.0], 0.9, ""),
        ([float("nan")] * 6, 0.9, ""),
    ],
)
def test_bcn_decides_in_every_channel(iota, threshold, norm):
    layer = create("bcn", 6)
    layer.iota.data.copy_(torch.tensor(iota))
    assert layer.choice(threshold).norm == norm


def test_undecided_layers_stay_and_are_named():
    model = network(("sn", {}), ("sn", {}), ("sn", {}), ("bcn", {}))
    decide(model[1], "bn", by=4.0)  # 0.965
    decide(model[5], "bn", var="ln")
    model[7].iota.data[0] = 0.5
    report = harden(model, X)
    assert report.names("bn") == ["1"]
    assert list(report.undecided) == ["3", "5", "7"]
    assert "mean: in 0.333" in report.undecided["3"]
    assert "no plain normalizer" in report.undecided["5"]
    assert "bn in 5, ln in 0" in report.undecided["7"]
    assert [type(model[i]).key for i in (1, 3, 5, 7)] == ["bn", "sn", "sn", "bcn"]
    assert "1 bn, 3 undecided" in str(report)
    assert report.to_dict()["layers"][0]["norm"] == "bn"


def test_what_moves_is_measured():
    model = network(("sn", {}))
    decide(model[1], "bn", by=4.0)
    before = copy.deepcopy(model).eval()
    report = harden(model, X)
    with torch.no_grad():
        expected = (model.eval()(X) - before(X)).abs().max()
    assert report.moved == pytest.approx(float(expected))
    assert 0 < report.moved <= report.largest
    assert harden(network(("sn", {})), threshold=0.9).moved is None


def test_the_model_is_left_as_it_was_but_for_the_layers():
    model = network(("sn", {}), ("sn", {}))
    decide(model[1], "bn")
    model[3].eval()
    model[0].register_buffer("calls", torch.zeros(()))
    model[0].register_forward_hook(lambda m, a, y: m.calls.add_(1) and None)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    harden(model, X)
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items() if name in after)
    assert {*before} - {*after} == {"1.mean_weight", "1.var_weight"}
    assert torch.equal(torch.get_rng_state(), random)
    assert [model[i].training for i in (1, 3)] == [True, False]


def test_settings_of_a_layer_are_its_own():
    model = network(("sn", {}), ("sn", {}))
    for i in (1, 3):
        decide(model[i], "bn")
    model[1].sync, model[1].backend, model[1].sync_group = False, "eager", 2
    harden(model)
    assert (model[1].sync, model[1].backend, model[1].sync_group) == (False, "eager", 2)
    assert (model[3].sync, model[3].backend) == (True, "auto")


def test_one_element_has_no_instance_statistics():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), create("sn", 6)).double()
    decide(model[1], "in")
    report = harden(model, X)
    assert "one element" in report.undecided["1"]
    model(X)


def test_a_shared_layer_stays_shared():
    layer = create("sn", 6)
    decide(layer, "bn")
    model = nn.Sequential(layer, nn.ReLU(), layer).double()
    assert len(harden(model, X)) == 1
    assert model[0] is model[2]
    assert type(model[0]).key == "bn"


def test_checkpoints_say_both_steps():
    from lightning_norm.surgery.manifest import load_weights, manifest_of, rebuild_from

    model = network(("sn", {}), ("sn", {}))
    decide(model[1], "ln")
    harden(model)
    row, other = manifest_of(model)["layers"]
    assert (row["norm"]["class_path"], [n["class_path"] for n in row["before"]]) == ("ln", ["sn"])
    assert other["norm"]["class_path"] == "sn"
    again = nn.Sequential(
        *(copy.deepcopy(m) if isinstance(m, nn.Conv2d) else nn.BatchNorm2d(6) for m in model)
    ).double()
    checkpoint = {"state_dict": model.state_dict()}
    rebuild_from(again, checkpoint)
    load_weights(again, checkpoint, "net.ckpt")
    torch.testing.assert_close(again.eval()(X), model.eval()(X), rtol=0, atol=0)


@pytest.mark.parametrize("threshold", [0.5, 1.01, -1, float("nan"), True])
def test_thresholds_out_of_range(threshold):
    with pytest.raises(ValueError, match="threshold must lie in"):
        harden(network(("sn", {})), threshold=threshold)


def test_nothing_to_choose():
    with pytest.warns(NoEffectWarning, match="sn and bcn"):
        report = harden(network(("rbn", {})), X)
    assert (len(report), report.moved) == (0, 0)
    with pytest.raises(RuntimeError, match="nothing to undo"):
        report.undo()


@pytest.mark.parametrize("key", sorted(normalizers()))
def test_every_normalizer_is_asked(key):
    layer = create(key, 6, **({"num_groups": 2} if key == "gn" else {}))
    choice = layer.choice(0.9)
    assert (choice is not None) == (key in ("sn", "bcn"))


def test_a_class_of_ones_own(monkeypatch):
    monkeypatch.setattr(Normalizer, "registry", dict(Normalizer.registry))

    class Half(MomentNorm):
        eval_uses_input_stats = False

        def algebra(self, m):
            batch = self.track(m.over_batch())
            return self.standardize(batch.mean, batch.var)

        def choice(self, threshold):
            return Choice("bn", 1.0)

    model = network((Half, {}))
    before = copy.deepcopy(model).eval()(X)
    report = harden(model, X)
    assert report.names("bn") == ["1"]
    torch.testing.assert_close(model.eval()(X), before)


def test_activations_behind_stay():
    timm = pytest.importorskip("timm")
    model = nn.Sequential(nn.Conv2d(6, 6, 1), timm.layers.BatchNormAct2d(6)).double()
    swap(model, "sn")
    decide(model[1], "bn")
    before = copy.deepcopy(model).eval()(X)
    harden(model, X)
    torch.testing.assert_close(model.eval()(X), before)
    assert model[1].key == "bn"
    assert (model(X) >= 0).all()

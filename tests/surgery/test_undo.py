"""Undo, all or nothing: values, buffers, schedules and order, from any normalizer of this package to any other."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lightning_norm
from lightning_norm import normalizers, swap
from lightning_norm.layers.scheduled import set_scheduled, was_scheduled

KEYS = sorted(normalizers())
ARGUMENTS = {"cn": {"context": "gate"}, "gn": {"num_groups": 2}}


def everything(model):
    """What an undo must give back: classes, names in order, values of tensors, scheduled values and what set them."""
    rows = []
    for name, m in model.named_modules():
        tensors = (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False))
        scheduled = [(n, getattr(m, n), was_scheduled(m, n)) for n in getattr(m, "ranges", ())]
        rows.append((name, type(m), m.training, [(n, t.dtype, t.tolist()) for n, t in tensors], scheduled))
    return rows


def model_of(key):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6))
    swap(model, key, norm_args=ARGUMENTS.get(key))
    with torch.no_grad():  # values that are not those a new layer starts with
        for layer in model[1:]:
            for p in layer.parameters():
                p.add_(0.1 * torch.randn_like(p))
    for _ in range(2):
        model(torch.randn(4, 3, 8, 8))
    move_scheduled(model, 0.3)
    return model


def move_scheduled(model, value):
    for layer in model[1:]:
        for name in set(layer.ranges) - set(layer.without_effect()):
            if (layer.key, name) != ("dbn", "momentum"):  # it refuses one
                set_scheduled(layer, name, max(value, value + layer.ranges[name].low))  # of brn, from 1 on


@pytest.mark.filterwarnings("ignore::lightning_norm.errors.ParameterGrowthWarning")
@pytest.mark.parametrize("source", KEYS)
def test_ours_to_ours_and_back_is_as_if_nothing_had_been(source):
    for target in KEYS:
        model = model_of(source)
        layers, before = list(model), everything(model)
        report = swap(model, target, source=source, norm_args=ARGUMENTS.get(target))
        move_scheduled(model, 0.77)
        report.undo()
        assert list(model) == layers
        assert everything(model) == before, target


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.filterwarnings("ignore::lightning_norm.errors.ParameterGrowthWarning")
def test_on_the_meta_device(key):
    for meta in ([2], [1, 2]):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6))
        report = swap(model, key, norm_args=ARGUMENTS.get(key))
        for i in meta:
            model[i].to("meta")
        report.undo()
        assert [type(m) for m in model] == [nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm2d]
        assert [{t.device.type for t in m.state_dict().values()} == {"meta"} for m in model] == [
            i in meta for i in range(3)
        ]


class Breaks(lightning_norm.BatchChannelNorm):
    """A user's normalizer whose way back fails, after it has written."""

    key = ""

    def return_to(self, source):
        super().return_to(source)
        source.weight.data.fill_(7)
        source.running_mean.fill_(7)
        source.extra = 7
        raise OSError("no way back")


def test_one_layer_that_fails_leaves_all_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6))
    originals = list(model)
    report = swap(model, rules={"1": "bcn", "2": Breaks})
    model.double()
    model(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    layers, before = list(model), everything(model)
    state = [copy.deepcopy(m.state_dict()) for m in originals[1:]]
    with pytest.raises(OSError, match="no way back"):
        report.undo()
    assert list(model) == layers
    assert everything(model) == before
    assert [m.state_dict().keys() for m in originals[1:]] == [s.keys() for s in state]
    for module, was in zip(originals[1:], state, strict=True):
        assert all(torch.equal(t, was[n]) for n, t in module.state_dict().items())
        assert not hasattr(module, "extra")
    del Breaks.return_to  # it can be repaired, and undone then
    report.undo()
    assert list(model) == originals


@pytest.mark.parametrize("how", ["prune", "parametrize", "weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weights_that_are_computed_are_named_with_the_way_out(how):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    original, report = model[1], swap(model, "sn")
    tools = nn.utils
    make, way_back = {
        "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.5), prune.remove),
        "parametrize": (
            lambda m: tools.parametrize.register_parametrization(m, "weight", nn.Softplus()),
            tools.parametrize.remove_parametrizations,
        ),
        "weight_norm": (tools.weight_norm, tools.remove_weight_norm),
    }[how]
    make(model[1])
    weight = model[1].weight.detach().clone()
    with pytest.raises(RuntimeError, match=rf"cannot undo: 1 is a .*SwitchableNorm .*[Tt]ype .*{way_back.__name__}\("):
        report.undo()
    way_back(model[1], "weight")
    report.undo()
    assert model[1] is original
    torch.testing.assert_close(original.weight.detach(), weight)


@pytest.mark.parametrize("key", ["sn", "bn", "rbn", "dbn"])
def test_what_was_set_since_the_swap_goes_back(key):
    """Not what the swap itself chose: its momentum of 0.3 is the replacement's, and the original has its own."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    report = lightning_norm.swap(model, key, norm_args={} if key == "dbn" else {"momentum": 0.3})
    model[0].eps = 1e-3
    if key != "dbn":  # which has no momentum
        model[0].momentum = 0.0
    report.undo()
    assert (model[0].eps, model[1].eps) == (1e-3, 1e-5)
    assert (model[0].momentum, model[1].momentum) == (0.1 if key == "dbn" else 0.0, 0.1)


@pytest.mark.parametrize("key", ["bn", "sn", "dbn"])
@pytest.mark.parametrize("tensor", ["weight", "bias", "running"])
def test_a_tensor_that_was_taken_away_stays_away(key, tensor):
    """As torch's layer evaluates without it: setting it to None is a setting like eps."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    nn.init.uniform_(model[1].weight)
    nn.init.uniform_(model[1].bias)
    model(x := torch.randn(4, 3, 8, 8))
    plain = copy.deepcopy(model)
    report = swap(model, key)
    for layer in (plain[1], model[1]):
        for name in [n for n in (*layer._parameters, *layer._buffers) if n.startswith(tensor)]:
            setattr(layer, name, None)
    report.undo()
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.filterwarnings("ignore::lightning_norm.errors.ParameterGrowthWarning")
def test_a_network_that_is_on_the_meta_device(key):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).to("meta")
    report = swap(model, key, norm_args=ARGUMENTS.get(key))
    assert type(model[1]) is normalizers()[key]
    report.undo()
    assert type(model[1]) is nn.BatchNorm2d

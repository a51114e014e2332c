"""What torch's own layers do every day, in a model that was swapped."""

import copy
import functools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn.utils import parametrize

import lightning_norm as ln
from lightning_norm import NoEffectWarning, normalizers, swap
from lightning_norm.layers.arguments import arguments_of

pytestmark = pytest.mark.filterwarnings("ignore::lightning_norm.ParameterGrowthWarning")
KEYS = [key for key, cls in normalizers().items() if cls.__module__.startswith("lightning_norm.")]


class Exp(nn.Module):
    def forward(self, w):
        return w.exp()


def arguments(key):
    return normalizers()[key].test_arguments


@pytest.mark.parametrize("key", KEYS)
def test_copies_of_a_network_start_alike_and_draw_no_random_numbers(key):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    twins = nn.ModuleList([net, copy.deepcopy(net)])
    apart = copy.deepcopy(net)
    state = torch.get_rng_state()
    swap(twins, key, norm_args=arguments(key))
    swap(apart, key, norm_args=arguments(key))
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(4, 3, 7, 7)
    first, second, third = (one.eval()(x) for one in (*twins, apart))
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@pytest.mark.parametrize("key", KEYS)
def test_weights_that_are_computed_are_refused_with_the_remedy(key):
    pruned, parametrized, normed = (nn.Sequential(nn.Identity(), nn.BatchNorm2d(6)) for _ in range(3))
    nn.utils.prune.l1_unstructured(pruned[1], "weight", 0.5)
    with pytest.warns(NoEffectWarning, match=r"prune.remove\(layer, 'weight'\)"):
        swap(pruned, key, norm_args=arguments(key))
    nn.utils.prune.remove(pruned[1], "weight")
    assert len(swap(pruned, key, norm_args=arguments(key))) == 1
    parametrize.register_parametrization(parametrized[1], "weight", Exp())
    with pytest.warns(NoEffectWarning, match=r"remove_parametrizations\(layer, 'weight'\)"):
        swap(parametrized, key, norm_args=arguments(key))
    parametrize.remove_parametrizations(parametrized[1], "weight")
    assert len(swap(parametrized, key, norm_args=arguments(key))) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(normed[1], "weight", dim=None)
    with pytest.warns(NoEffectWarning, match=r"remove_weight_norm\(layer, 'weight'\)"):
        swap(normed, key, norm_args=arguments(key))


@pytest.mark.parametrize("key", KEYS)
def test_update_bn_says_what_to_call(key):
    model = nn.Sequential(nn.Sequential(ln.create(key, 6, **arguments(key))))
    with pytest.warns(NoEffectWarning, match=r"lightning_norm.recalibrate\(model, loader\)"):
        torch.optim.swa_utils.update_bn([torch.randn(4, 6, 3, 3)], model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(model.modules())


class Wrapped(nn.Sequential):
    """Its methods are its own, or stand behind a wrapper of another name."""

    def modules(self):
        def all_of_them():
            yield from nn.Module.modules(self)

        return all_of_them()

    def load_state_dict(self, *args, **kwargs):
        return super().load_state_dict(*args, **kwargs)


def test_update_bn_of_a_model_with_modules_of_its_own():
    with pytest.warns(NoEffectWarning, match="recalibrate"):
        torch.optim.swa_utils.update_bn([torch.randn(4, 6, 3, 3)], Wrapped(ln.BatchNorm(6)))


@pytest.mark.parametrize("strict", [True, False])
def test_a_file_in_part_where_a_library_has_wrapped_load_state_dict(strict, monkeypatch):
    original = nn.Module.load_state_dict

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(nn.Module, "load_state_dict", wrapper)
    for key in KEYS:
        layer = Wrapped(ln.create(key, 6, **arguments(key)))
        part = {"0.bias": torch.ones_like(layer[0].bias)}
        if strict:
            with pytest.raises(RuntimeError, match="Missing key"):
                layer.load_state_dict(part)
        else:
            layer.load_state_dict(part, strict=False)
            assert layer[0].bias.eq(1).all()


def test_channels_of_any_whole_type_are_swapped():
    model = nn.Sequential(nn.Identity(), nn.BatchNorm2d(np.int64(6)))
    swap(model, "sn")
    assert type(model[1].num_features) is int


HINTED = {
    "LayerNorm of two axes": lambda: nn.LayerNorm((6, 5)),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(2),
    "a class of the user's": lambda: type("MyNorm", (nn.Module,), {})(),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(6),
    "GroupNorm": lambda: nn.GroupNorm(2, 6),
    "LayerNorm": lambda: nn.LayerNorm(6),
    "lazy": nn.LazyInstanceNorm2d,
}


@pytest.mark.parametrize("name", HINTED)
def test_a_hint_leads_to_a_swap(name):
    def model():
        return nn.Sequential(nn.Identity(), HINTED[name]())

    with pytest.warns(NoEffectWarning) as caught:
        swap(model(), "sn")
    _, got, rest = str(caught[0].message).partition("pass source='")
    assert not got or len(swap(model(), "sn", source=rest.partition("'")[0])) == 1


@pytest.mark.parametrize("key", KEYS)
def test_no_advice_to_evaluate_what_evaluates(key):
    try:
        layer = ln.create(key, 6, **{**arguments(key), "track_running_stats": False}).eval()
    except TypeError:
        return  # it keeps none
    if layer.statistic_size(1, 1) < 2:
        with pytest.raises(ValueError, match="more than one value per statistic") as error:
            layer(torch.randn(1, 6, 1, 1))
        assert "eval()" not in str(error.value)


@pytest.mark.parametrize("key", sorted(normalizers()))
def test_true_and_false_are_no_numbers(key):
    cls = normalizers()[key]
    for name in cls.ranges.keys() & arguments_of(cls).keys():
        for value in (True, False, np.bool_(True), torch.tensor(True)):
            with pytest.raises((ValueError, TypeError), match=f"{name} must|leave out {name}"):
                ln.create(key, 6, **{**cls.test_arguments, name: value})

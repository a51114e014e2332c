import pytest
import torch
from torch import nn

import lightning_norm
from lightning_norm import no_weight_decay, norm_param_groups, swap


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.left = nn.BatchNorm2d(6)
        self.tokens = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.ones(6))
        self.embed = nn.Parameter(torch.ones(2, 6))
        self.head = nn.Linear(6, 2)
        self.tied = self.head

    def no_weight_decay(self):
        return {"embed"} | no_weight_decay(self)


def named(model, groups):
    names = {id(p): n for n, p in model.named_parameters()}
    assert sum(len(g["params"]) for g in groups) == len(names)
    return {g["name"]: {names[id(p)] for p in g["params"]} for g in groups}


NORM = {"norm.weight", "norm.bias", "left.weight", "left.bias", "tokens.weight", "tokens.bias"}
SWITCH = {"norm.mean_weight", "norm.var_weight"}
NO_DECAY = {"stem.bias", "head.bias", "scale", "embed"}


def test_groups():
    model = Model()
    swap(model, "sn", include="norm")
    groups = norm_param_groups(model, 0.05)
    assert named(model, groups) == {
        "decay": {"stem.weight", "head.weight"},
        "no_decay": NO_DECAY,
        "norm": NORM | SWITCH,
    }
    assert [g["weight_decay"] for g in groups] == [0.05, 0.0, 0.0]
    groups = norm_param_groups(model, 0.05, norm_weight_decay=0.1, bias_weight_decay=0.2, switch_lr=0.3)
    assert named(model, groups)["switch"] == SWITCH
    assert named(model, groups)["norm"] == NORM
    assert [(g["weight_decay"], g.get("lr")) for g in groups] == [(0.05, None), (0.2, None), (0.1, None), (0.1, 0.3)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 1.0, 1.0, 0.3]


def test_frozen_and_lazy_parameters_have_their_place():
    model = nn.Sequential(nn.LazyLinear(4), nn.Conv2d(3, 6, 3).requires_grad_(False))
    assert {k: len(v) for k, v in named(model, norm_param_groups(model)).items()} == {"decay": 2, "no_decay": 2}


def test_what_a_later_swap_adds_joins_the_norms():
    from tests.callbacks.toy import Net, loader, trainer

    model = Net()
    optimizer = torch.optim.SGD(norm_param_groups(model, 0.05), 0.1)
    model.configure_optimizers = lambda: optimizer
    trainer(lightning_norm.NormSwap("sn")).fit(model, loader())
    groups = named(model, optimizer.param_groups)
    assert groups["norm"] == {"net.1.weight", "net.1.bias", "net.1.mean_weight", "net.1.var_weight"}


def test_names_for_timm():
    """timm takes the names of a model's ``no_weight_decay()`` out of weight decay, as they are in named_parameters."""
    model = Model()
    swap(model, "sn", include="norm")
    assert model.norm.no_weight_decay() == {"weight", "bias", "mean_weight", "var_weight"}
    assert model.no_weight_decay() == {"embed", *(f"norm.{n}" for n in model.norm.no_weight_decay())}
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    assert no_weight_decay(model.norm) == model.norm.no_weight_decay()


class Kernel(lightning_norm.BatchNorm):
    """A parameter that is to decay, beside weight and bias."""

    extra_parameters = {"mix": "C"}

    def __init__(self, num_features, **options):
        super().__init__(num_features, **options)
        self.mix = nn.Parameter(torch.zeros(num_features, 1, 3))

    def no_weight_decay(self):
        return super().no_weight_decay() - {"mix"}


def test_a_layer_has_the_last_word():
    model = nn.Sequential(Kernel(4))
    assert named(model, norm_param_groups(model)) == {"decay": {"0.mix"}, "norm": {"0.weight", "0.bias"}}


@pytest.mark.parametrize("name", ["weight_decay", "norm_weight_decay", "bias_weight_decay", "switch_lr"])
def test_bad_numbers(name):
    for value in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"norm_param_groups: {name} must be a number >= 0, got"):
            norm_param_groups(Model(), **{name: value})

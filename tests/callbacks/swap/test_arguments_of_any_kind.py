"""Arguments of any library's types: the layer, checkpoint, plan and YAML hold the same plain values."""

import collections
import decimal
import enum
import fractions
import re
import types

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import lightning_norm
from lightning_norm import NormContext, NormFreeze, NormMonitor, NormRecalibrate, NormScheduler, NormSwap, create, swap
from lightning_norm.layers.arguments import plain_value
from tests.callbacks.toy import Net, loader, trainer


class Word(enum.Enum):
    IN, BN = "in", "bn"


class Text(str, enum.Enum):
    IN, BN = "in", "bn"


class Number(enum.IntEnum):
    ONE = 1


class List(collections.abc.Sequence):
    """A sequence that is no list, as Hydra's."""

    def __init__(self, items):
        self.items = items

    def __getitem__(self, i):
        return self.items[i]

    def __len__(self):
        return len(self.items)


class Dict(collections.abc.Mapping):
    """A mapping that is no dict, as Hydra's."""

    def __init__(self, items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


CASES = {
    "np.float64": ("eps", np.float64(1e-3), 1e-3),
    "np.float32": ("momentum", np.float32(0.25), 0.25),
    "np.float16": ("momentum", np.float16(0.25), 0.25),
    "np.int64": ("correction", np.int64(1), 1),
    "np.bool": ("sparse", np.bool_(True), True),
    "np.str": ("choices", [np.str_("in"), np.str_("bn")], ["in", "bn"]),
    "0-dim array": ("eps", np.array(1e-3), 1e-3),
    "array": ("choices", np.array(["in", "bn"]), ["in", "bn"]),
    "0-dim tensor": ("momentum", torch.tensor(0.25), 0.25),
    "0-dim parameter": ("momentum", nn.Parameter(torch.tensor(0.25)), 0.25),
    "0-dim bool tensor": ("sparse", torch.tensor(True), True),
    "0-dim int tensor": ("correction", torch.tensor(1), 1),
    "fraction": ("momentum", fractions.Fraction(1, 4), 0.25),
    "decimal": ("eps", decimal.Decimal("0.001"), 1e-3),
    "enum": ("choices", [Word.IN, Word.BN], ["in", "bn"]),
    "text enum": ("choices", (Text.IN, Text.BN), ["in", "bn"]),
    "int enum": ("correction", Number.ONE, 1),
    "sequence": ("choices", List(["in", "bn"]), ["in", "bn"]),
    "UserList": ("choices", collections.UserList(["in", "bn"]), ["in", "bn"]),
    "deque": ("choices", collections.deque(["in", "bn"]), ["in", "bn"]),
    "dict keys": ("choices", {"in": 0, "bn": 1}.keys(), ["in", "bn"]),
}


def plain(value):
    return list(value) if isinstance(value, tuple) else value


def the_same_everywhere(net, path, name, expected, run):
    layer = net.net[1]
    args = layer.origin["norm"]["init_args"]
    assert plain(getattr(layer, name)) == expected
    assert type(plain(getattr(layer, name))) is type(expected)
    assert args == {name: expected}
    assert type(args[name]) is type(expected)
    run.save_checkpoint(path / "a.ckpt")
    torch.load(path / "a.ckpt", weights_only=True)
    again = lightning_norm.load_from_checkpoint(Net, path / "a.ckpt")
    assert again.net[1].extra_repr() == layer.extra_repr()


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_plan_and_yaml_give_the_layer_back(case, tmp_path):
    name, value, expected = CASES[case]
    for norm, norm_args in (
        ("sn", {name: value}),
        ({"class_path": "sn", "init_args": types.MappingProxyType({name: value})}, None),
        (Dict({"class_path": "sn", "init_args": Dict({name: value})}), None),
        ("sn", Dict({name: value})),
    ):
        net = Net()
        run = trainer(callback := NormSwap(norm, norm_args), max_steps=1)
        run.fit(net, loader())
        the_same_everywhere(net, tmp_path, name, expected, run)
    assert yaml.safe_load(yaml.safe_dump(callback.report.to_dict())) == callback.report.to_dict()
    (tmp_path / "plan.yaml").write_text(callback.report.to_yaml())
    for plan in (tmp_path / "plan.yaml", str(tmp_path / "a.ckpt")):
        net = Net()
        run = trainer(NormSwap(plan=plan), max_steps=1)
        run.fit(net, loader())
        the_same_everywhere(net, tmp_path, name, expected, run)
    assert plain(getattr(create("sn", 6, **{name: value}), name)) == expected


@pytest.mark.parametrize("kind", [set, frozenset])
def test_a_set_has_the_same_order_in_every_process(kind):
    """In each process a text has another hash, and a set of texts another order."""
    words = [f"{i:02d}" for i in range(30)]
    assert plain_value(kind(words)) == words
    assert plain_value(dict.fromkeys(reversed(words)).keys()) == words[::-1]  # which have an order


def test_a_generator_is_gone_through_once():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6))
    swap(net, "sn", norm_args={"choices": (c for c in ("in", "bn"))}, include=(name for name in ["1", "2"]))
    assert [layer.choices for layer in net[1:]] == [("in", "bn")] * 2


def test_the_key_of_the_callbacks_state_is_that_of_plain_types():
    plain_ = NormSwap("sn", {"eps": 0.5}, include=["1"])
    other = NormSwap("sn", Dict({"eps": np.float64(0.5)}), include=List(["1"]))
    assert plain_.state_key == other.state_key


def test_a_dtype_comes_back_from_a_plan(tmp_path):
    report = swap(nn.Sequential(nn.Identity(), nn.BatchNorm2d(6)), "sn", norm_args={"dtype": torch.float64})
    (tmp_path / "plan.yaml").write_text(report.to_yaml())
    net = Net()
    NormSwap(plan=tmp_path / "plan.yaml")  # reads it
    rules = {"net.1": report.layers[0].norm}
    swap(net, rules=rules)
    assert net.net[1].mean_weight.dtype == torch.float64


@pytest.mark.parametrize("name", ["num_features", "num_channels", "normalized_shape"])
def test_channels_are_those_of_the_layer(name):
    with pytest.raises(TypeError, match=rf"SwitchableNorm: {name}=6 is that of each layer that is replaced. Leave it"):
        NormSwap("sn", norm_args={name: 6})
    with pytest.raises(TypeError, match="Leave it out"):
        swap(nn.Sequential(nn.BatchNorm2d(6)), rules={".*": {"class_path": "sn", "init_args": {name: 6}}})


def test_another_device_is_refused_and_the_same_is_taken():
    net = nn.Sequential(nn.BatchNorm2d(6))
    with pytest.raises(ValueError, match="device='meta', but the layer that it replaces is on 'cpu'. Leave device out"):
        swap(net, "sn", norm_args={"device": "meta"})
    assert type(net[0]) is nn.BatchNorm2d
    swap(net, "sn", norm_args={"device": torch.device("cpu")})
    assert type(net[0]) is lightning_norm.SwitchableNorm


def test_omegaconf(tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create(
        {"norm": {"class_path": "sn", "init_args": {"choices": ["in", "bn"], "eps": "${value}"}}, "value": 0.5}
    )
    for norm, norm_args in ((config.norm, None), ("sn", config.norm.init_args)):
        net = Net()
        run = trainer(NormSwap(norm, norm_args, include=omegaconf.ListConfig(["1"])), max_steps=1)
        run.fit(net, loader())
        assert net.net[1].origin["norm"]["init_args"] == {"choices": ["in", "bn"], "eps": 0.5}
        run.save_checkpoint(tmp_path / "a.ckpt")
        torch.load(tmp_path / "a.ckpt", weights_only=True)
    net = nn.Sequential(nn.BatchNorm2d(6))
    swap(net, rules=omegaconf.OmegaConf.create({"0": {"class_path": "sn", "init_args": {"momentum": 0.5}}}))
    assert net[0].momentum == 0.5


def test_the_arguments_of_every_callback_become_plain():
    freeze = NormFreeze(np.int64(2), include=List(["1"]), exclude=(name for name in ["2"]))
    assert (freeze.at_epoch, freeze.include, freeze.exclude) == (2, ["1"], ["2"])
    recalibrate = NormRecalibrate(torch.tensor(3), exclude=np.array(["1"]))
    assert (recalibrate.num_batches, recalibrate.exclude) == (3, ["1"])
    context, monitor = NormContext(views=np.int8(2), fit_batches=torch.tensor(5)), NormMonitor(np.int64(7))
    plain_ = [context.views, context.fit_batches, monitor.every_n_steps]
    assert (plain_, {type(n) for n in plain_}) == ([2, 5, 7], {int})
    half = Dict({"a": torch.tensor(0.5), "b": decimal.Decimal("0.5"), "c": Dict({np.int64(0): np.float32(0.5)})})
    assert [schedule(3) for schedule in NormScheduler(half).schedules.values()] == [0.5] * 3


WRONG = [
    (lambda v: swap(nn.Sequential(nn.BatchNorm2d(6)), "sn", include=v), (re.compile("0"), 0, [0], b"0", [None])),
    (lambda v: NormSwap("sn", exclude=v), (re.compile("0"), 0, {"0": 1})),
    (lambda v: NormFreeze(include=v), (re.compile("0"), 0)),
    (lambda v: NormRecalibrate(exclude=v), (0,)),
    (lambda v: lightning_norm.recalibrate(nn.Sequential(nn.BatchNorm2d(6)), [], exclude=v), (0,)),
    *[
        (lambda v, name=name: NormSwap("sn", **{name: v}), ("false", "no", None, [True]))
        for name in ("compile", "skip_frozen", "check_optimizer", "accumulate_statistics")
    ],
    (lambda v: swap(nn.Sequential(nn.BatchNorm2d(6)), "sn", dry_run=v), ("false",)),
    (lambda v: NormFreeze(statistics=v), ("false",)),
    (lambda v: NormFreeze(affine=v), ("false",)),
    *[(lambda v, name=name: NormMonitor(**{name: v}), ("false",)) for name in ("pictures", "page", "print_table")],
    (lambda v: NormMonitor(every_n_steps=v), ("50", 2.5, True)),
    (lambda v: NormRecalibrate(num_batches=v), ("50", 2.5)),
    (lambda v: NormContext(views=v), ("2",)),
]


@pytest.mark.parametrize(("call", "value"), [(call, value) for call, values in WRONG for value in values])
def test_an_argument_of_another_kind_says_what_was_expected_and_what_came(call, value):
    """A text is true for Python, and what is compared with a number or gone through would be an error of Python's."""
    words = r"must be (True or False|a positive int|a regular expression or a list of names, as text)"
    with pytest.raises((TypeError, ValueError), match=words) as told:
        call(value)
    came = value[0] if isinstance(value, list) and value != [True] else value
    assert f"got {came!r}" in str(told.value)


def test_a_class_of_numbers_is_no_number():
    with pytest.raises(TypeError, match="torch.dtype"):
        create("sn", 6, dtype=np.float32)

"""Choosing layers by a function, by what is frozen, and by their places in blocks and in the model."""

import copy
import warnings

import pytest
import torch
import torchvision
import yaml
from torch import nn

from lightning_norm import LeftAloneWarning, NoEffectWarning, NormSwap, load_from_checkpoint, swap
from lightning_norm.layers.base import Normalizer
from tests.callbacks.toy import Net, loader, trainer


def swapped(model):
    return [name for name, m in model.named_modules() if isinstance(m, Normalizer)]


def wide(name, module):
    return module.num_features >= 256 and "downsample" not in name


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)) for _ in range(3))

    def forward(self, x):
        return self.c(self.b(self.a(x)))


class Blocks(Net):
    """A stem and two blocks with three layers each."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), Branch(), Branch())


STEM = ["net.1"]
IN_BLOCKS = [[f"net.{i}.{part}.1" for part in "abc"] for i in (2, 3)]
ALL = STEM + IN_BLOCKS[0] + IN_BLOCKS[1]


def test_a_function_of_name_and_module():
    model = torchvision.models.resnet18()
    report = swap(model, "sn", filter=wide)
    expected = [f"layer{i}.{j}.bn{k}" for i in (3, 4) for j in (0, 1) for k in (1, 2)]
    assert swapped(model) == expected
    assert [row.name for row in report.layers] == expected


def test_a_shared_layer_is_asked_for_under_each_name():
    layer = nn.BatchNorm2d(4)
    model, asked = nn.Sequential(layer, layer), []
    swap(model, "sn", filter=lambda name, module: asked.append((name, module)) or name == "1")
    assert asked == [("0", layer), ("1", layer)]
    assert model[0] is model[1] is not layer


def test_rules_win_over_it_and_other_choices_go_with_it():
    model = Blocks()
    swap(model, "sn", rules={r"net\.1": "in"}, exclude=r".*\.c\..*", filter=lambda name, _: name.startswith("net.2"))
    assert swapped(model) == [*STEM, *IN_BLOCKS[0][:2]]
    assert type(model.net[1]).__name__ == "InstanceNorm"


def test_a_function_that_chooses_nothing_or_returns_nothing():
    with pytest.warns(NoEffectWarning, match="7 candidates, none chosen"):
        swap(Blocks(), "sn", filter=lambda *_: False)
    with pytest.raises(TypeError, match=r"filter must return True or False, got None for 'net.1'"):
        swap(Blocks(), "sn", filter=lambda *_: None)
    with pytest.raises(TypeError, match="filter must be a function of a layer's name and the layer, got 'net"):
        swap(Blocks(), "sn", filter="net.*")
    swap(Blocks(), "sn", filter=lambda *_: torch.tensor(True))


def test_frozen_parts_are_left():
    model = nn.ModuleDict({"student": Blocks().net, "teacher": Blocks().net.requires_grad_(False)})
    model["teacher"].add_module("plain", nn.BatchNorm2d(6, affine=False))
    model["student"][1].requires_grad_(False)
    model["student"].add_module("plain", nn.BatchNorm2d(6, affine=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeftAloneWarning)
        report = swap(model, "sn", skip_frozen=True, rules={"teacher.1": "bn"})
    assert swapped(model) == [f"student.{name[4:]}" for name in ALL[1:]] + ["student.plain"]
    assert "9 BatchNorm2d (first: student.1): skip_frozen=True: nothing around it requires a gradient" in str(report)
    assert len(report.to_dict()["skipped"]) == 9
    report.undo()
    assert len(swap(model, "sn")) == 16


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"in_block": 0}, [IN_BLOCKS[0][0], IN_BLOCKS[1][0]]),
        ({"in_block": -1}, [IN_BLOCKS[0][2], IN_BLOCKS[1][2]]),
        ({"in_block": [0, -1]}, [IN_BLOCKS[0][0], IN_BLOCKS[0][2], IN_BLOCKS[1][0], IN_BLOCKS[1][2]]),
        ({"in_block": -1, "exclude": r".*\.c\.1"}, [IN_BLOCKS[0][1], IN_BLOCKS[1][1]]),
        ({"every": 2}, ALL[::2]),
        ({"every": 3, "exclude": r"net\.1"}, ALL[1::3]),
        ({"every": 2, "in_block": 0}, [IN_BLOCKS[0][0]]),
        ({"every": 100}, STEM),
    ],
)
def test_by_position(options, expected):
    model = Blocks()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeftAloneWarning)
        swap(model, "sn", **options)
    assert swapped(model) == expected


def test_blocks_of_real_networks():
    def chosen(model, **options):
        return [row.name for row in swap(model, "sn", dry_run=True, **options).layers]

    resnet = torchvision.models.resnet50()
    last = chosen(resnet, in_block=-1, exclude=r".*downsample\.1")
    assert last == chosen(resnet, include="last_of_block")
    mobilenet = torchvision.models.mobilenet_v2()
    # The first block has no expansion; features.0 and features.18 are no blocks.
    assert chosen(mobilenet, in_block=0) == [f"features.{i}.conv.0.1" for i in range(1, 18)]
    densenet = torchvision.models.densenet121()
    assert len(chosen(densenet, in_block=1)) == 58


def test_no_such_position_is_told():
    with pytest.raises(ValueError, match=r"in_block=3 matched none of the 7 layers: a block is the nearest module"):
        swap(Blocks(), "sn", in_block=3)
    with pytest.raises(ValueError, match="in_block=0 matched none of the 1 layer"):
        swap(Net(), "sn", in_block=0)
    for bad in (0, -1, 1.5, "2", True):
        with pytest.raises(ValueError, match="every must be an int > 0"):
            swap(Blocks(), "sn", every=bad)
    for bad in ([], "first", 1.5, [0, "1"]):
        with pytest.raises(ValueError, match="in_block must be an int or a list of ints"):
            swap(Blocks(), "sn", in_block=bad)


@pytest.mark.parametrize(
    "options", [{"every": 2}, {"in_block": -1}, {"every": 2, "filter": lambda n, m: not hasattr(m, "key")}]
)
def test_a_second_run_chooses_the_same(options):
    model = Blocks()
    callback = NormSwap("sn", **options)
    trainer(callback).fit(model, loader())
    first = swapped(model)
    trainer(callback).test(model, loader(), verbose=False)
    trainer(NormSwap("sn", **options)).test(model, loader(), verbose=False)
    assert swapped(model) == first
    assert 0 < len(first) < len(ALL)


def test_two_swaps_of_one_trainer_share_the_blocks():
    model = Blocks()
    trainer(NormSwap("sn", in_block=0), NormSwap("bcn", in_block=[1, 2])).fit(model, loader())
    assert [type(model.get_submodule(n)).__name__ for n in IN_BLOCKS[1]] == [
        "SwitchableNorm",
        *["BatchChannelNorm"] * 2,
    ]
    assert type(model.net[1]) is nn.BatchNorm2d


def test_a_checkpoint_and_a_plan_hold_what_was_chosen(tmp_path):
    run = trainer(
        NormSwap("sn", filter=lambda n, m: n != "net.1", every=2), tmp_path=tmp_path, enable_checkpointing=True
    )
    model = Blocks()
    run.fit(model, loader())
    path = run.checkpoint_callback.best_model_path
    assert swapped(load_from_checkpoint(Blocks, path)) == swapped(model) == ALL[1::2]
    again = Blocks()
    trainer(NormSwap(plan=path)).test(again, loader(), verbose=False)
    assert swapped(again) == ALL[1::2]
    plan = tmp_path / "plan.yaml"
    plan.write_text(swap(Blocks(), "sn", in_block=1).to_yaml())
    trainer(NormSwap(plan=str(plan))).test(third := Blocks(), loader(), verbose=False)
    assert swapped(third) == [IN_BLOCKS[0][1], IN_BLOCKS[1][1]]
    for name, value in (("every", 2), ("skip_frozen", True), ("filter", wide), ("in_block", 0)):
        with pytest.raises(ValueError, match=f"plan says which layers .* leave out .*{name}"):
            NormSwap(plan=str(plan), **{name: value})


def test_the_state_of_a_resumed_run_is_found_by_name():
    keys = {NormSwap("sn", filter=f).state_key for f in (wide, copy.copy(wide), lambda n, m: True)}
    assert len(keys) == 2
    assert not any("0x" in key for key in keys)
    assert NormSwap("sn").state_key == "NormSwap{'norm': 'sn'}"


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_in_yaml(tmp_path):
    from lightning_norm.cli.norm_cli import NormCLI

    path = tmp_path / "config.yaml"
    section = {"norm": "sn", "filter": f"{__name__}.wide", "skip_frozen": True, "in_block": [0, -1], "every": 2}
    model = {"class_path": f"{__name__}.Blocks"}
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    path.write_text(yaml.safe_dump({"model": model, "norm": section, "trainer": quiet}))
    cli = NormCLI(["--config", str(path)], run=False, save_config_callback=None)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, NormSwap))
    assert callback.options.filter is wide
    assert (callback.options.skip_frozen, callback.options.in_block, callback.options.every) == (True, [0, -1], 2)

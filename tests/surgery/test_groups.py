"""Groups without arithmetic: a number for each layer, in the report, in checkpoints and in plans."""

import collections
import copy

import pytest
import torch
import torchvision
from torch import nn

from lightning_norm import GroupNorm, NormSwap, create, load_from_checkpoint, swap
from lightning_norm.errors import CheckpointError
from lightning_norm.surgery.manifest import difference, manifest_in, manifest_of, rebuild
from tests.callbacks.toy import Net, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def network(*channels):
    return nn.Sequential(*(nn.BatchNorm2d(c) for c in channels))


class Wide(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.Conv2d(24, 32, 3), nn.BatchNorm2d(32))


@pytest.mark.parametrize(
    ("norm", "norm_args"),
    [("gn", {}), ("gn", {"num_groups": "auto"}), ("sn", {"choices": ["in", "gn", "bn"]})],
)
def test_mobilenet_just_works(norm, norm_args):
    model = torchvision.models.mobilenet_v2()
    report = swap(model, norm, norm_args=norm_args)
    assert len(report) == 52
    groups = {row.num_features: row.num_groups for row in report.layers}
    assert groups == {
        **{16: 8, 24: 12, 32: 16, 64: 32, 96: 32, 144: 24, 160: 32},
        **{192: 32, 320: 32, 384: 32, 576: 32, 960: 32, 1280: 32},
    }
    assert all(model.get_submodule(row.name).num_groups == row.num_groups for row in report.layers)
    text = str(report)
    assert "(24 groups)" in text
    counts = collections.Counter(groups[row.num_features] for row in report.layers)
    told = ", ".join(f"{n} in {counts[n]}" for n in (32, 24, 16, 12, 8))
    assert f"  groups      {told} layer\n" in text  # of the last kind there is one


@pytest.mark.parametrize("norm", [{"norm": "gn"}, {"norm": "sn", "norm_args": {"choices": ["gn", "bn"]}}])
def test_a_size_of_groups(norm):
    model = network(8, 24)
    arguments = {**norm.get("norm_args", {}), "channels_per_group": 4}
    report = swap(model, norm["norm"], norm_args=arguments)
    assert [m.num_groups for m in model] == [row.num_groups for row in report.layers] == [2, 6]
    assert "channels_per_group" not in report.layers[0].norm["init_args"]
    with pytest.raises(
        ValueError, match=r"0: \w+\(channels_per_group=5\) cannot split 8 channels.* nearby: \[1, 2, 4, 8"
    ):
        swap(network(8), norm["norm"], norm_args={**arguments, "channels_per_group": 5})
    with pytest.raises(ValueError, match="num_groups=2 and channels_per_group=4 say the same"):
        swap(network(8), norm["norm"], norm_args={**arguments, "num_groups": 2})


def test_one_layer():
    x = torch.randn(3, 24, 4, 4)
    torch.testing.assert_close(create("gn", 24)(x), nn.functional.group_norm(x, 12))
    torch.testing.assert_close(create("gn", 24, channels_per_group=8)(x), nn.functional.group_norm(x, 3))
    for bad in (0, -1, 1.5, "8", True):
        with pytest.raises(ValueError, match="channels_per_group"):
            create("gn", 24, channels_per_group=bad)
    for bad, said in ((0, "fits any number"), ("all", "say"), (1.5, "say")):
        with pytest.raises(ValueError, match=f"num_groups='auto',? {said}"):
            create("gn", 24, num_groups=bad)
    layer = copy.deepcopy(create("sn", 24, choices=("gn", "bn")))
    assert layer.num_groups == 12


def test_without_gn_the_number_means_nothing():
    model = network(7)
    report = swap(model, "sn", norm_args={"num_groups": 5})
    assert report.layers[0].num_groups is None
    assert "groups" not in swap(network(7), "sn").summary()


def test_what_comes_as_groups_keeps_them_unless_a_size_is_asked_for():
    model = nn.Sequential(nn.GroupNorm(3, 12), nn.GroupNorm(3, 12))
    sized = {"class_path": "gn", "init_args": {"channels_per_group": 2}}
    swap(model, rules={"0": "gn", "1": sized}, source="GroupNorm")
    assert [m.num_groups for m in model] == [3, 6]
    swap(model, rules={"0": sized}, source="gn")
    assert [m.num_groups for m in model] == [6, 6]


def test_checkpoints_and_plans_hold_the_number_of_each_layer(tmp_path):
    run = trainer(NormSwap("gn", norm_args={"channels_per_group": 8}), tmp_path=tmp_path, enable_checkpointing=True)
    run.fit(Wide(), loader())
    path = run.checkpoint_callback.best_model_path
    loaded = load_from_checkpoint(Wide, path)
    assert [loaded.net[i].num_groups for i in (1, 3)] == [3, 4]
    trainer(NormSwap("gn", norm_args={"channels_per_group": 8})).test(Wide(), loader(), ckpt_path=path, verbose=False)
    with pytest.raises(CheckpointError, match=r"net.1 \(gn\) has num_groups=3 in the file and 12 here"):
        trainer(NormSwap("gn")).test(Wide(), loader(), ckpt_path=path, verbose=False)
    plan = tmp_path / "plan.yaml"
    plan.write_text(swap(Wide(), "gn").to_yaml())
    trainer(NormSwap(plan=str(plan))).test(planned := Wide(), loader(), verbose=False)
    assert [planned.net[i].num_groups for i in (1, 3)] == [12, 16]


class Four(GroupNorm):
    """A class of the user's own, whose number of groups is no argument."""

    def __init__(self, num_features, *, eps=1e-5):
        super().__init__(num_features, num_groups=4, eps=eps)


def test_a_class_that_chooses_by_itself():
    model = network(8)
    report = swap(model, Four, norm_args={"eps": 0.1})
    assert report.layers[0].norm["init_args"] == {"eps": 0.1}
    rebuild(again := network(8), manifest_in({"lightning_norm": manifest_of(model)}))
    assert (again[0].num_groups, again[0].eps) == (4, 0.1)


def test_files_of_earlier_versions_mean_32_groups():
    model = network(32, 64)
    choices = {"choices": ["gn", "bn"]}
    swap(
        model,
        rules={
            "0": {"class_path": "gn", "init_args": {"num_groups": 32}},
            "1": {"class_path": "sn", "init_args": choices},
        },
    )
    manifest = manifest_of(model)
    for row in manifest["layers"]:
        del row["norm"]["init_args"]["num_groups"]
    manifest = manifest_in({"lightning_norm": manifest})
    assert difference(manifest, manifest_of(model)) is None
    fresh = network(32, 64)
    rebuild(fresh, manifest)
    assert [m.num_groups for m in fresh] == [32, 32]
    assert [m.num_groups for m in model] == [32, 32]


def test_the_report_says_how_many_samples_the_statistics_are_of():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    text = swap(model, "bn", norm_args={"virtual_batch_size": 16}, dry_run=True).summary()
    assert "  statistics  of 16 samples at a time in 2 layers\n" in text
    assert "at a time" not in swap(model, "bn", dry_run=True).summary()

"""One list of a model's normalizers, under the names that the user's code gives them, whatever wraps them."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lightning_norm import SwitchableNorm, swap
from lightning_norm.surgery.walk import (
    clean_name,
    modules_by_name,
    name_cleaner,
    named_normalizers,
    names_by_module,
    normalizers_of,
)


@pytest.fixture(autouse=True, scope="module")
def _one_process(tmp_path_factory):
    """DDP and FSDP wrap only where there is a process group."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {
    "torch.compile": torch.compile,
    "activation checkpointing": checkpoint_wrapper,
    "FSDP": lambda module: FullyShardedDataParallel(
        module, sharding_strategy=ShardingStrategy.NO_SHARD, use_orig_params=True, device_id=torch.device("cpu")
    ),
    "DDP": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "DDP of torch.compile": lambda module: DistributedDataParallel(torch.compile(module)),
    "torch.compile of activation checkpointing": lambda module: torch.compile(checkpoint_wrapper(module)),
}


def layer():
    return SwitchableNorm(4)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_no_wrapper_is_part_of_a_name(wrapper):
    wrap = WRAPPERS[wrapper]
    inside = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 1), layer()))
    whole = wrap(inside)
    assert [name for name, _ in named_normalizers(whole)] == ["1.1"]
    part = nn.ModuleDict({"net": whole, "head": layer()})
    assert [name for name, _ in named_normalizers(part)] == ["net.1.1", "head"]
    assert isinstance(modules_by_name(part)["net.1.1"], SwitchableNorm)
    raw = [name for name, _ in named_normalizers(part, raw_names=True)]
    assert raw[0] != "net.1.1"
    assert isinstance(part.get_submodule(raw[0]), SwitchableNorm)
    clean = name_cleaner(part)
    assert clean(f"{raw[0]}.weight") == "net.1.1.weight"


def test_a_wrapped_layer_has_its_own_name_and_not_its_wrappers():
    layers = nn.ModuleList([torch.compile(layer()), checkpoint_wrapper(layer()), nn.DataParallel(layer())])
    assert [name for name, _ in named_normalizers(layers)] == ["0", "1", "2"]
    assert [type(modules_by_name(layers)[name]) for name in ("0", "1", "2")] == [SwitchableNorm] * 3


def test_an_attribute_called_module_stays():
    model = nn.ModuleDict({"module": nn.ModuleDict({"module": layer()}), "net": nn.DataParallel(layer())})
    assert [name for name, _ in named_normalizers(model)] == ["module.module", "net"]
    assert clean_name("module.module.weight") == "module.module.weight"


def test_a_word_that_only_contains_a_wrappers_is_none():
    assert clean_name("my_orig_mod.weight") == "my_orig_mod.weight"
    assert clean_name("_orig_mod") == ""


def test_a_shared_layer_is_listed_once_and_has_all_its_names():
    shared = layer()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": layer()})
    assert normalizers_of(model) == [shared, model["c"]]
    assert [name for name, _ in named_normalizers(model)] == ["a", "c"]
    assert names_by_module(model)[shared] == ["a", "b.0"]
    assert modules_by_name(model)["b.0"] is shared


def test_patterns_of_a_swap_are_the_names_of_the_users_code():
    model = DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 4, 1), torch.compile(nn.BatchNorm2d(4))))
    assert [row.name for row in swap(model, "sn", include=["1"]).layers] == ["1"]
    assert isinstance(model.module[1]._orig_mod, SwitchableNorm)

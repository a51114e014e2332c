"""The private names of torch that surgery uses are there and mean what surgery takes them to mean."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_norm.surgery.torch_private import (
    HOOK_ATTRIBUTES,
    MODULE_ATTRIBUTES,
    STATE_DICT_METADATA,
    TorchBatchNormBase,
    TorchConvBase,
    TorchDispatchMode,
    TorchInstanceNormBase,
    TorchRunningNormBase,
    has_hooks,
    move_hooks,
    tree_leaves,
    without_iterator,
)


def test_the_base_classes():
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d)
    instance_norms = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    assert all(issubclass(cls, TorchBatchNormBase) for cls in batch_norms)
    assert all(issubclass(cls, TorchRunningNormBase) for cls in (*batch_norms, *instance_norms))
    assert not any(issubclass(cls, TorchBatchNormBase) for cls in (*instance_norms, nn.GroupNorm, nn.LayerNorm))
    assert all(issubclass(cls, TorchInstanceNormBase) for cls in instance_norms)
    assert not any(issubclass(cls, TorchInstanceNormBase) for cls in (*batch_norms, nn.GroupNorm))
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.LazyConv2d)
    assert all(issubclass(cls, TorchConvBase) for cls in convolutions)


def test_a_dispatch_mode_sees_operators():
    seen = []

    class See(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with See():
        x.add(1)
    assert seen == ["aten.add.Tensor"]


def test_the_leaves_of_a_nested_output():
    assert tree_leaves({"a": [1, (2, None)], "b": 3}) == [1, 2, None, 3]


def test_the_attributes_of_a_module():
    module, shared = nn.BatchNorm2d(3, affine=False), nn.ReLU()
    assert {name for name in MODULE_ATTRIBUTES if hasattr(module, name)} == set(MODULE_ATTRIBUTES)
    assert module._parameters == {"weight": None, "bias": None}
    assert list(module._buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    assert list(nn.Sequential(shared, shared)._modules.items()) == [("0", shared), ("1", shared)]


def test_the_metadata_of_a_state_dict():
    class Layer(nn.Module):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination._metadata[prefix[:-1]]["mine"] = 3

    metadata = getattr(nn.Sequential(nn.ReLU(), Layer()).state_dict(), STATE_DICT_METADATA)
    assert metadata["1"]["mine"] == 3


def test_the_dictionaries_are_all_that_calling_a_module_reads():
    """A kind of hook that a later torch adds has an attribute of its own, which is to join the list."""
    others = {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}
    attributes = {name for name in vars(nn.ReLU()) if "hook" in name}
    assert attributes == {*HOOK_ATTRIBUTES, *others}


REGISTER = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "forward, keywords": lambda m, f: m.register_forward_hook(f, with_kwargs=True),
    "forward, always": lambda m, f: m.register_forward_hook(f, always_call=True),
    "before forward": lambda m, f: m.register_forward_pre_hook(f),
    "before forward, keywords": lambda m, f: m.register_forward_pre_hook(f, with_kwargs=True),
    "backward": lambda m, f: m.register_full_backward_hook(f),
    "before backward": lambda m, f: m.register_full_backward_pre_hook(f),
}


@pytest.mark.parametrize("kind", REGISTER)
def test_a_moved_hook_is_called_as_before_and_its_handle_still_removes_it(kind):
    first, second, calls = nn.Linear(2, 2), nn.Linear(2, 2), []

    def hook(module, *args):
        calls.append((module, len(args)))

    def run(module):
        module(torch.randn(3, 2, requires_grad=True)).sum().backward()

    assert not has_hooks(first)
    handle = REGISTER[kind](first, hook)
    assert has_hooks(first)
    run(first)
    move_hooks(first, second)
    run(second)
    ((_, number),) = calls[:1]
    assert calls == [(first, number), (second, number)]
    handle.remove()
    run(second)
    assert len(calls) == 2


def test_a_copy_of_a_loader_has_workers_of_its_own():
    data = DataLoader(TensorDataset(torch.arange(4)), num_workers=1, persistent_workers=True)
    first = iter(data)
    next(first)
    twin = without_iterator(data)
    assert data._iterator is first  # the loader does keep it there
    assert iter(twin) is not first
    assert [int(x) for (x,) in first] == [1, 2, 3]
    plain = [1, 2]
    assert without_iterator(plain) is plain

"""``load_state_dict`` of another normalizer's checkpoint: exact, or refused with what came and what to type."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_norm import create, normalizers
from lightning_norm.layers.state import marks

KEYS = [key for key, cls in normalizers().items() if cls.__module__.startswith("lightning_norm.")]
MORE = {"cn(ids)": {"context": "ids"}, "cn(ids, no statistics)": {"context": "ids", "track_running_stats": False}}


def layer(name):
    key = name.partition("(")[0]
    made = create(key, 6, **MORE.get(name, normalizers()[key].test_arguments))
    for tensor in made.state_dict().values():
        tensor.add_(torch.rand(tensor.shape) if tensor.is_floating_point() else 1)
    return made


def shapes(name):
    return {n: v.shape for n, v in layer(name).state_dict().items()}


ALIKE = {key: {other for other in KEYS if shapes(other) == shapes(key)} for key in KEYS}
"""Whose checkpoints have the same names and shapes, and cannot be told apart."""
EXACT = {(file, key) for file in ALIKE["bn"] for key in KEYS}
EXACT |= {(file, key) for file in ALIKE["in"] for key in ("asr", "frn", "dyt", "derf")}
"""Weight, bias and, where both keep them, running statistics move; what the file lacks keeps its starting value."""


def test_a_checkpoint_with_tensors_of_its_own_can_be_told_from_every_other():
    for key, alike in ALIKE.items():
        # Both keep the mean and deviation of a blend; the manifest of a swap tells them apart.
        assert alike in ({key}, {"brn", "dbn"}) or not marks(normalizers()[key])
    assert ALIKE["in"] == {"in", "ln", "gn"}


PAIRS = [
    (file, target)
    for file, target in itertools.product([*KEYS, *MORE], KEYS)
    if file.partition("(")[0] != target and file not in ALIKE[target]
]


@pytest.mark.parametrize(("file", "target"), PAIRS)
def test_loads_exactly_or_names_layer_and_normalizer(file, target):
    source, network = layer(file), nn.Sequential(layer(target))
    state = {f"0.{name}": value for name, value in source.state_dict().items()}
    if (file, target) in EXACT:
        network.load_state_dict(state)
        now = network[0]._as_batch_norm() | {
            n: v for n, v in network[0].state_dict().items() if n not in network[0].translated_tensors
        }
        for name, value in source.state_dict().items():
            if name in now:
                torch.testing.assert_close(now[name].to(value), value, msg=name)
        return
    with pytest.raises(RuntimeError) as error:
        network.load_state_dict(state)
    message, key = str(error.value), file.partition("(")[0]
    assert f"0 is {type(network[0]).__name__}" in message
    assert type(source).__name__ in message.partition("the file holds")[2]
    assert f"'{key}'" in message or len(ALIKE[key]) > 1 or "Swap the model to that normalizer" in message


def test_only_what_was_trained_loads_where_not_strict():
    """Without buffers, as LightningModules with strict_loading=False save it."""
    source, target = layer("ubn"), layer("ubn")
    trained = dict(source.named_parameters())
    del trained["affine_weight"]
    missing, _ = target.load_state_dict(trained, strict=False)
    assert {"running_mean", "affine_weight"} <= set(missing)
    assert torch.equal(target.center_weight, source.center_weight)
    assert layer("bn").load_state_dict(layer("ln").state_dict(), strict=False).missing_keys == [
        "running_mean",
        "running_var",
    ]


@pytest.mark.parametrize("key", KEYS)
def test_buffers_keep_their_places(key):
    """An average of models pairs them by their places: moved, and with values set that were None or become it."""
    layer = create(key, 6, **normalizers()[key].test_arguments)
    for name, range_ in layer.ranges.items():
        if key == "dbn" and name.endswith("momentum"):  # it has none, and says at construction whether it averages
            continue
        for value in (range_.high if math.isfinite(range_.high) else 3.0, *([None] if range_.optional else [])):
            model = nn.Sequential(layer, nn.BatchNorm2d(6))
            average = AveragedModel(model, use_buffers=True).double()
            setattr(layer, name, value)
            model[1].running_mean.fill_(7)
            average.update_parameters(model)
            for mean, now in zip(average.module.buffers(), model.buffers(), strict=True):
                assert torch.equal(mean, now.to(mean.dtype))
            assert [n for n, _ in average.module[1].named_buffers()] == [n for n, _ in model[1].named_buffers()]
            assert list(average.module[0]._buffers) == list(layer._buffers)

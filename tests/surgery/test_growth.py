"""A swap that makes a model larger by more than a tenth says so, and what to do."""

import warnings

import pytest
import torch
from torch import nn

from lightning_norm import MomentNorm, ParameterGrowthWarning, swap


def network(channels=8, wide=8):
    """Two normalized layers; ``wide`` sets how much the rest weighs."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels),
        nn.Conv2d(channels, wide, 3),
    )  # fmt: skip


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dry_run", [False, True])
def test_afn_in_a_small_network(dry_run):
    model = network()
    before = count(model)
    with pytest.warns(ParameterGrowthWarning) as told:
        report = swap(model, "afn", dry_run=dry_run)
    assert len(told) == 1
    text = str(told[0].message)
    added = 2 * (8 * 4 + 4 + 2 * (4 * 8 + 8) + 8 + 1 + 2 * (8 + 8) + 4)
    assert report.parameters_added == added
    if not dry_run:
        assert count(model) == before + added
    assert f"adds {added} parameters to the model's {before:,} (+{added / before:.0%})".replace(",", " ") in text
    assert "std_ratio" in text
    assert "include or exclude" in text
    assert told[0].filename == __file__


def test_a_tenth_is_the_limit():
    model = network(wide=2000)
    assert count(model) > 10 * 322
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap(model, "afn")
        swap(nn.Sequential(nn.BatchNorm2d(6)), "sn")  # half as many again, and no news


def test_fewer_with_what_the_message_says():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3))
    with pytest.warns(ParameterGrowthWarning, match="adds 7 208 parameters"):
        swap(model, "afn", dry_run=True)
    swap(model, "afn", norm_args={"std_ratio": 16})


class Square(MomentNorm):
    """C x C parameters of its own, and no hint."""

    def __init__(self, num_features, **options):
        super().__init__(num_features, **options)
        self.table = nn.Parameter(torch.zeros(num_features, num_features))

    def algebra(self, m):
        batch = self.track(m.over_batch())
        return self.standardize(batch.mean + batch.mean @ self.table.to(batch.mean.dtype), batch.var)


def test_many_parameters_are_told_of_any_class():
    with pytest.warns(ParameterGrowthWarning, match=r"adds 160 000 parameters .* with them\. Swap fewer layers"):
        swap(nn.Sequential(nn.Conv2d(3, 400, 3), nn.BatchNorm2d(400)), Square)
    swap(nn.Sequential(nn.Conv2d(3, 40, 1), nn.BatchNorm2d(40)), Square)

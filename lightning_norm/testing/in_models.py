"""Checks: what the rest of the package does with a layer that stands in a model."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from typing import Any

import torch
from torch import nn

from lightning_norm.surgery.norm_statistics import norm_statistics
from lightning_norm.surgery.report import SwapReport
from lightning_norm.surgery.swap import swap
from lightning_norm.testing.kit import C, Make, built, check, features, refused, same, seeded


@check
def groups_fit(make: Make) -> None:
    """A class with ``num_groups`` finds a number that divides any channels, and takes ``channels_per_group``."""
    takes = inspect.signature(type(make(C))).parameters
    named = {"num_groups", "channels_per_group"} <= takes.keys()
    if not named or not isinstance(make(C).num_groups, int):  # sn without "gn" among its choices has no groups
        return
    for channels, wanted in ((C, {}), (7, {}), (24, {"channels_per_group": 8})):
        layer = make(channels, **{"num_groups": "auto", **wanted})
        expected = channels // wanted["channels_per_group"] if wanted else None
        number = getattr(layer, "num_groups", 0)
        assert number, "no groups"
        assert channels % number == 0, f"{number} groups of {channels} channels"
        assert expected in (None, number), f"{number} groups, not {expected}"
    with refused(ValueError, "channels_per_group=5 of 6", type(make(C)).__name__, "5", "6"):
        make(C, num_groups="auto", channels_per_group=5)


@check
def statistics_are_listed(make: Make) -> None:
    """:func:`lightning_norm.norm_statistics` takes out and puts back what evaluation reads, and averages it."""
    model = nn.Sequential(built(make, torch.float64))
    x = features(5, C, 7, 3, dtype=torch.float64)
    listed, everything = norm_statistics(model), norm_statistics(model, personal=True)
    assert set(everything) == set(model.state_dict()), "personal=True lists something else than the state_dict"
    seeded(model, x)
    before, y = listed.take(), seeded(model.eval(), x)
    seeded(model.train(), 3 * x + 1)
    listed.put(before)
    same(seeded(model.eval(), x), y, 0.0, "evaluation after the statistics were put back")
    for name, value in listed.average([before, before], counts=[1, 3]).items():
        same(value.double(), before[name].double(), 1e-12, f"average of two clients that agree, {name}")
    left = listed.others(model.state_dict())
    assert set(left) == set(dict(model.named_parameters())), f"what is no statistic: {sorted(left)}"


@check
def chosen_and_with_its_activation(make: Make) -> None:
    """A swap takes the layer that a function chooses, leaves a frozen one, and hands over the ReLU behind it."""
    network = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU(), nn.BatchNorm2d(C)).double()
    network[3].requires_grad_(False)
    x = features(4, 3, 6, 5, dtype=torch.float64)
    fused, plain = copy.deepcopy(network), copy.deepcopy(network)
    report = _swapped(make, fused, True)
    assert [row.name for row in report.layers] == ["1"], f"swapped {[row.name for row in report.layers]}"
    assert report.layers[0].activation == "2", "the ReLU behind the layer was left"
    _swapped(make, plain, False)
    for training in (True, False):
        expected, got = (seeded(m.train(training), x) for m in (plain, fused))
        same(got, expected, 1e-10, f"with its activation, {training=}")
    report.undo()
    assert [type(m) for m in fused] == [type(m) for m in network], "undo() leaves other modules"


def _swapped(make: Make, model: nn.Module, fuse: bool) -> SwapReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return swap(
            model,
            type(make(C)),
            norm_args=_arguments(make),
            filter=lambda name, _: name in ("1", "3"),
            skip_frozen=True,
            fuse_activation=fuse,
        )


def _arguments(make: Any) -> dict[str, Any]:
    """Return the arguments that a factory of ``functools.partial`` adds."""
    if not isinstance(make, functools.partial):
        return {}
    return {**_arguments(make.args[0] if make.args else make.func), **make.keywords}

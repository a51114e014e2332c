"""Layers on the kernels whose batch lies on two ranks, against one process with the whole batch in float64."""

import copy

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

import lightning_norm
from lightning_norm.testing.kit import C, Step, features, noise, same, same_step, statistics, step
from lightning_norm.testing.ranks import run_ranks
from tests.kernels.interpreted.test_layers import count_launches, rounded_once
from tests.kernels.interpreted.test_recorded import pair

SPLITS = ((3, 2), (5, 0), (1, 4))
CASES = [  # and launches, forward and backward
    ("bn", {}, 12),
    ("bn", {"momentum": None, "affine": False}, 12),
    ("sn", {}, 12),
    ("sn", {"choices": ("bn", "gn"), "num_groups": 2, "correction": 1}, 12),
    ("bcn", {}, 12),
    ("bnet", {}, 13),
    ("rbn", {}, 13),
    ("rbn", {"rectify": ["center"], "momentum": None, "affine": False}, 13),
    ("ubn", {}, 13),
    ("dbn", {}, 13),
    ("dbn", {"average": "var", "power": None, "alpha": 0.3}, 13),
    ("dbn", {"stat_grad": "none"}, 10),  # which hands nothing back
    ("dbn", {"track_running_stats": False}, 12),
    ("dbn", {"stat_grad": "renorm", "eval_momentum": 0.1, "init": "zero_one", "alpha": 0.9}, 13),
    ("brn", {"init": "zero_one", "r_max": 1.1}, 13),
    ("dbn", {"train_stats": "batch", "average": "var", "init": "zero_one"}, 13),
]


def layers_of(key, arguments):
    """One layer on the kernels per split, moved from its start, and its twin in float64."""
    layer, exact = pair(key, arguments, C)
    return [copy.deepcopy(layer) for _ in SPLITS], exact


def steps(rank, cases, x, dy):
    results_of_rank = []
    for layers in cases:
        for layer, split in zip(layers, SPLITS, strict=True):
            part, grad = (torch.split(t, list(split))[rank] for t in (x, dy))
            with pytest.MonkeyPatch.context() as patch:
                launched = count_launches(patch)
                patch.setattr(InterpreterBuilder, "create_fma", rounded_once)
                results_of_rank.append((step(layer, part, grad), statistics(layer), launched))
    return results_of_rank


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_two_ranks_equal_one_process(offset):
    x, dy = features(5, C, 3, 2) + offset, noise(5, C, 3, 2, seed=7)
    made = [layers_of(key, arguments) for key, arguments, _ in CASES]
    results = run_ranks(steps, 2, [layers for layers, _ in made], x, dy)
    results = [iter(results_of_rank) for results_of_rank in results]
    for (key, arguments, number), (_, exact) in zip(CASES, made, strict=True):
        for split in SPLITS:
            whole = copy.deepcopy(exact)
            expected, running = step(whole, x.double(), dy.double()), statistics(whole)
            (a, first, launched), (b, second, _) = (next(results_of_rank) for results_of_rank in results)
            joined = Step(torch.cat([a.y, b.y]), torch.cat([a.dx, b.dx]), {k: a.grads[k] + b.grads[k] for k in a.grads})
            what = f"{key} {arguments}, batch split {split}"
            far = joined.grads.pop("center_weight", None)
            if far is not None:  # a part of each rank's is as large as its mean, and annuls the other's
                same(far, expected.grads["center_weight"], 1e-6 * max(1.0, offset), what)
            same_step(joined, Step(expected.y, expected.dx, {k: expected.grads[k] for k in joined.grads}), 1e-5, what)
            for name, value in running.items():
                same(first[name], value, 1e-6, f"{what}: {name} on rank 0")
                same(second[name], first[name], 0.0, f"{what}: {name} of rank 1 against rank 0")
            assert len(launched) == number, f"{what}: {launched}"


def after_nan(rank, layers, x):
    for layer in layers:
        layer.backend = "triton"
        layer(x.chunk(2)[rank])
    before = [statistics(layer) for layer in layers]
    bad = x.clone()
    bad[0, 2, 1, 1] = float("nan")  # on the first rank alone
    for layer in layers:
        layer(bad.chunk(2)[rank])
    return list(zip(before, map(statistics, layers), strict=True))


def test_a_nan_on_one_rank_moves_the_running_statistics_of_none():
    layers = [lightning_norm.create(key, C) for key in ("bn", "sn", "rbn", "dbn")]
    for results_of_rank in run_ranks(after_nan, 2, layers, features(6, C, 3, 2)):
        for before, after in results_of_rank:
            assert after.pop("skipped_updates") == before.pop("skipped_updates") + 1
            assert all(torch.equal(after[name], value) for name, value in before.items())


def frozen_input(rank, layer, x):
    """The first layer of a network: x takes no gradient, so only the way forward meets."""
    layer.backend = "triton"
    with pytest.MonkeyPatch.context() as patch:
        launched = count_launches(patch)
        y = layer(x.chunk(2)[rank])
        torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    return launched


def test_the_ranks_meet_on_the_way_back_only_where_the_input_takes_a_gradient():
    for launched in run_ranks(frozen_input, 2, lightning_norm.create("sn", C), features(6, C, 3, 2)):
        assert "unpack" in launched
        assert "pack_gradient" not in launched


def compiled(rank, layer, x, dy):
    plain = copy.deepcopy(layer)
    part, grad = x.chunk(2)[rank], dy.chunk(2)[rank]
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [step(run, part, grad), step(plain, part, grad)]
    return [(r.y, r.dx, *r.grads.values()) for r in results], [statistics(layer), statistics(plain)]


def test_compiled():
    layer = lightning_norm.create("sn", C)
    layer.backend = "triton"
    for results, first in run_ranks(compiled, 2, layer, features(6, C, 3, 2), noise(6, C, 3, 2, seed=7)):
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])

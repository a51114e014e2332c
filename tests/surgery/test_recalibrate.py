"""recalibrate: running statistics of several batches are those of one big batch, in float64, and nothing else moves."""

import copy
import random
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import lightning_norm
from lightning_norm import MomentNorm, create, recalibrate
from lightning_norm.layers.declared import Unsupported
from lightning_norm.testing.kit import features
from lightning_norm.testing.ranks import run_ranks

KEYS = ["bn", "sn", "bcn", "torch"]


def batches(*sizes, dtype=torch.float64, offset=0.0):
    return [features(n, 3, 6, 6, seed=i, dtype=dtype) * (1 + i) + i + offset for i, n in enumerate(sizes)]


def network(key, **arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    if key != "torch":
        lightning_norm.swap(model, key, norm_args=arguments)
    return model


@pytest.mark.parametrize("key", KEYS)
def test_equals_one_big_batch(key):
    """The paper formula on the whole tensor: mean and unbiased variance over all samples and positions."""
    model, data = network(key), batches(4, 1, 7)
    report = recalibrate(model, data)
    whole = torch.cat(data)
    torch.testing.assert_close(model[0].running_mean, whole.mean((0, 2, 3)), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(model[0].running_var, whole.var((0, 2, 3)), rtol=1e-13, atol=1e-13)
    assert (report.layers, report.batches, report.skipped) == (["0", "3"], 3, 0)
    assert int(model[0].num_batches_tracked) == 3


@pytest.mark.parametrize("key", KEYS)
def test_later_layers_see_what_the_earlier_make_of_each_batch_without_dropout(key):
    model, data = network(key), batches(4, 5)
    twin = copy.deepcopy(model).eval()
    first = twin[0].train()
    seen = torch.cat([twin[2](first(x)).detach() for x in data])
    recalibrate(model, data)
    torch.testing.assert_close(model[3].running_mean, seen.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[3].running_var, seen.var((0, 2, 3)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("key", ["bn", "torch"])
def test_float32_at_a_large_mean(key):
    """At mean/std = 1e4 the pooled variance keeps what float32 inputs have: E[x^2] - E[x]^2 would lose it."""
    data = batches(4, 6, dtype=torch.float32, offset=1e4)
    model = network(key).float()
    recalibrate(model[:1], data)
    whole = torch.cat(data).double()
    torch.testing.assert_close(model[0].running_var.double(), whole.var((0, 2, 3)), rtol=2e-6, atol=0)
    torch.testing.assert_close(model[0].running_mean.double(), whole.mean((0, 2, 3)), rtol=1e-7, atol=0)


def test_instance_norm_averages_over_samples():
    model = nn.Sequential(create("in", 3, track_running_stats=True).double())
    data = batches(4, 1, 7)
    recalibrate(model, data)
    whole = torch.cat(data)
    torch.testing.assert_close(model[0].running_mean, whole.mean((2, 3)).mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(model[0].running_var, whole.var((2, 3)).mean(0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_else_moves(key, fails):
    model = network(key).train()
    model[3].eval()  # frozen by its owner
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    data = batches(4, 5)
    if fails:
        with pytest.raises(ValueError, match="axis 1 of input"):
            recalibrate(model, [*data, torch.randn(2, 5, 6, 6)], forward=model)
    else:
        recalibrate(model, data)
    assert [m.training for m in model.modules()] == modes
    for name, value in model.state_dict().items():
        moves = name.split(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")
        assert torch.equal(value, before[name]) == (fails or not moves), name
    for layer in (model[0], model[3]):
        assert layer.momentum == 0.1
        assert not layer._forward_pre_hooks
        if key != "torch":
            assert (layer.sync, layer.compiled, layer._accumulator) == (True, False, None)
    x = data[0]
    model.train()(x)  # trains as before
    assert not torch.equal(model[0].running_mean, before["0.running_mean"])


def test_counts_the_batches_that_it_takes():
    model, data = network("sn"), batches(4, 5, 6)
    assert recalibrate(model, iter(data), 2).batches == 2
    torch.testing.assert_close(model[0].running_mean, torch.cat(data[:2]).mean((0, 2, 3)))
    assert recalibrate(model, ([x, None] for x in data), 99, progress=True).batches == 3


def test_bad_batches_are_left_out_and_counted():
    model, data = network("sn"), batches(4, 5, 6)
    data[1][0, 0, 0, 0] = float("nan")
    report = recalibrate(model, data)
    assert (report.batches, report.skipped) == (2, 1)
    torch.testing.assert_close(model[0].running_mean, torch.cat([data[0], data[2]]).mean((0, 2, 3)))
    assert "1 left out for a NaN" in str(report)
    remaining = model[0].running_mean.clone()
    with pytest.raises(ValueError, match="every batch has a NaN"):
        recalibrate(model, [data[1]])
    assert torch.equal(model[0].running_mean, remaining)


def test_layers_that_no_batch_reaches_keep_theirs():
    model = network("bn")
    model.add_module("aside", create("bn", 2))
    report = recalibrate(model, batches(4), forward=model[:4])
    assert report.unused == ["aside"]
    assert torch.equal(model.aside.running_mean, torch.zeros(2))
    assert "no batch reached aside" in str(report)


def test_exclude_and_layers_that_refuse():
    class OwnState(MomentNorm):
        unsupported = Unsupported(recalibration="its statistics are a state of the training")

        def algebra(self, m):
            b = self.track(m.over_batch())
            return self.standardize(b.mean, b.var)

    model = network("bn")
    lightning_norm.swap(model, OwnState, source="bn", include=["3"])
    with pytest.raises(ValueError, match=r"3 is OwnState: its statistics are a state.*exclude=\['3'\]"):
        recalibrate(model, batches(4))
    before = model[3].running_mean.clone()
    assert recalibrate(model, batches(4), exclude=["3"]).layers == ["0"]
    assert torch.equal(model[3].running_mean, before)
    assert recalibrate(model, batches(4), exclude=r"[3x]").layers == ["0"]


def test_bad_input():
    model = network("bn")
    with pytest.raises(ValueError, match="num_batches must be a positive int, got 0"):
        recalibrate(model, batches(4), 0)
    with pytest.raises(ValueError, match="the loader gave no batch"):
        recalibrate(model, [])
    for bare in (nn.Linear(3, 3), create("gn", 6, num_groups=2), nn.BatchNorm1d(3, track_running_stats=False)):
        with pytest.raises(ValueError, match="no layer with running statistics"):
            recalibrate(nn.Sequential(bare), batches(4))


def test_compiled_layers_and_momentum_none():
    model = nn.Sequential(create("bn", 3, momentum=None).double())
    model[0].compile()
    data = batches(4, 5)
    recalibrate(model, data)
    assert model[0].compiled
    assert model[0].momentum is None
    torch.testing.assert_close(model[0].running_mean, torch.cat(data).mean((0, 2, 3)))


CASES = {"sn": 1, "torch": 3, "in": 2, "bn": 0}  # batches of the first rank; the second takes the others


def _on_rank(rank, data):
    results = {}
    for key, first in CASES.items():
        model = network(key, **({"track_running_stats": True} if key == "in" else {}))
        report = recalibrate(model, data[first:] if rank else data[:first])
        results[key] = (model.state_dict(), report.batches)
    return results


def test_two_uneven_ranks_agree_with_one_process_on_all_batches():
    """One of them has none at all, once."""
    data = batches(4, 2, 7, 3, 5)
    one, two = run_ranks(_on_rank, 2, data)
    for key in CASES:
        whole = network(key, **({"track_running_stats": True} if key == "in" else {}))
        recalibrate(whole, data)
        assert one[key][1] == two[key][1] == 5
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(one[key][0][name], value, rtol=1e-12, atol=1e-12, msg=f"{key} {name}")
            assert torch.equal(one[key][0][name], two[key][0][name]), f"{key} {name}"


class Contrast(nn.Module):
    """A momentum encoder, a queue and its pointer, and what else a forward pass may write to."""

    def __init__(self, key):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5))
        lightning_norm.swap(self, key)
        self.momentum = copy.deepcopy(self.encoder)
        self.register_buffer("queue", torch.zeros(6, 8))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.register_buffer("replaced", torch.zeros(3))
        self.steps, self.bank, self.seen, self.last, self.plain = 0, [], {}, None, torch.zeros(2)
        self.draw = random.Random(3)
        self.never = nn.BatchNorm2d(6)

    def forward(self, x):
        with torch.no_grad():
            for slow, fast in zip(self.momentum.parameters(), self.encoder.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
                slow.data.add_(1.0)
        y = self.encoder(x).mean((2, 3))
        self.queue[:, : len(x)] = y.detach().T
        self.pointer += len(x)
        self.replaced = self.replaced + 1
        self.steps += 1
        self.bank.append(y)
        self.seen[self.steps] = y
        self.last = y
        self.plain += 1
        self.extra = torch.rand(2), random.random(), np.random.rand(), self.draw.random()
        return y


def content(model):
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    attributes = {n: v for n, v in vars(model).items() if not n.startswith("_")}
    attributes["draw"] = attributes["draw"].getstate()
    return {n: v.clone() for n, v in values.items()}, copy.deepcopy(attributes), {n: id(v) for n, v in values.items()}


def generators():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("key", ["bn", "sn", "bcn"])
def test_nothing_that_the_forward_pass_writes_to_is_left_changed(key, fails):
    model = Contrast(key)
    data = DataLoader(TensorDataset(torch.randn(12, 3, 8, 8)), 4, shuffle=True, generator=torch.Generator())
    before, numbers, drawn = content(model), generators(), data.generator.get_state()

    def forward(batch):
        model(batch[0])
        if fails:
            raise ArithmeticError

    with pytest.raises(ArithmeticError) if fails else nullcontext():
        recalibrate(model, data, forward=forward, exclude=["momentum.*", "never"])
    tensors, attributes, identities = content(model)
    changed = {name for name in tensors if not torch.equal(tensors[name], before[0][name])}
    layer = model.encoder[1]
    mine = {f"encoder.1.{name}" for name in (*layer.running_names, "num_batches_tracked")}
    assert changed <= (set() if fails else mine)
    assert str(attributes) == str(before[1])
    assert identities == before[2]
    assert generators() == numbers
    assert torch.equal(data.generator.get_state(), drawn)


def test_generators_and_places_of_samplers_are_put_back():
    class Walk(Sampler):
        """Goes on where it stopped, and draws from numpy and Python."""

        def __init__(self):
            self.place, self.numpy, self.python = 0, np.random.default_rng(0), random.Random(0)

        def __iter__(self):
            for _ in range(8):
                self.place += 1
                yield int(self.numpy.integers(8)) * 0 + self.python.randrange(8)

    model, walk = network("bn"), Walk()
    data = DataLoader(torch.randn(8, 3, 6, 6, dtype=torch.float64), 4, sampler=walk)
    state = str(walk.numpy.bit_generator.state), walk.python.getstate()
    recalibrate(model, data)
    assert walk.place == 0
    assert (str(walk.numpy.bit_generator.state), walk.python.getstate()) == state


class Noisy(Dataset):
    """Draws for each sample, counts it, and lets a transform draw as well."""

    def __init__(self):
        self.rng, self.python, self.count = np.random.default_rng(1), random.Random(2), {"read": 0}
        self.augment = Jitter()

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.count["read"] += 1
        x = index + self.rng.normal() + self.python.random() + self.count["read"]
        return self.augment(torch.full((3, 6, 6), x, dtype=torch.float64))


class Jitter:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(4)

    def __call__(self, x):
        return x + torch.rand((), generator=self.generator)


class Pops(Sampler):
    def __init__(self):
        self.queue = [*range(12)] * 9

    def __iter__(self):
        return (self.queue.pop() for _ in range(8))


def batched(sampler):
    return DataLoader(Noisy(), batch_sampler=BatchSampler(sampler, 4, False))


def mixed(batch, rng):
    return torch.stack(batch) * rng.random()


LOADERS = {
    "a sampler in a batch sampler": lambda: batched(RandomSampler(range(12), generator=torch.Generator())),
    "weights in a batch sampler": lambda: batched(WeightedRandomSampler([1.0] * 12, 12, generator=torch.Generator())),
    "a list that a sampler empties": lambda: DataLoader(Noisy(), 4, sampler=Pops()),
    "a part of a part of a data set": lambda: DataLoader(Subset(Subset(Noisy(), range(10)), range(8)), 4),
    "data sets in a row": lambda: DataLoader(ConcatDataset([Noisy(), Noisy()]), 4),
    "an argument of the function that collates": lambda: DataLoader(
        Noisy(), 4, collate_fn=partial(mixed, rng=np.random.default_rng(3))
    ),
    "workers that persist": lambda: DataLoader(
        torch.arange(48.0).reshape(12, 4), 4, shuffle=True, num_workers=1, persistent_workers=True
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_training_reads_on_as_if_nobody_had_read_in_between(kind):
    def read(between):
        torch.manual_seed(0)
        loader = LOADERS[kind]()
        reading = iter(loader)
        batches = [next(reading)]
        between(loader)
        return torch.cat([*batches, *reading, *loader])

    model = nn.BatchNorm1d(4).double() if "workers" in kind else network("bn")
    forward = (lambda batch: model(batch.double())) if "workers" in kind else None
    untouched = read(lambda loader: None)
    assert torch.equal(read(lambda loader: recalibrate(model, loader, 2, forward=forward)), untouched)
    assert not torch.equal(read(lambda loader: list(loader)), untouched)  # a reading does leave traces

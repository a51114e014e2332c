"""sync="running": each rank normalizes by itself, and all running statistics are pooled in one collective per step."""

import copy
import json
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_norm import NormSwap, SyncError, SyncWarning, create, normalizers, pool_statistics, recalibrate, swap
from lightning_norm.layers.running_stats import close_window, open_window
from lightning_norm.surgery.manifest import manifest_of, rebuild
from lightning_norm.testing.ranks import run_ranks
from tests.distributed.inside import Uneven
from tests.distributed.inside import batches as batches_of
from tests.distributed.inside import trainer as trainer_inside
from tests.ops.test_sync import Collectives

F64, C, WORLD = torch.float64, 6, 2
SHARES = [(4, 3), (0, 7), (5, 2), (7, 0)]
"""Samples of the two ranks in each batch; two batches are a step."""


def built(key, **arguments):
    torch.manual_seed(0)
    cls = normalizers()[key]
    track = {"track_running_stats": True} if key in ("in", "dbn") else {}
    return cls(C, **{**cls.test_arguments, **track, **arguments}).double()


def batches(offset=0.0):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 7, C, 3, 2, generator=g, dtype=F64)
    return (
        x * torch.rand(4, 7, C, 1, 1, generator=g, dtype=F64)
        + 3 * torch.randn(4, 7, C, 1, 1, generator=g).double()
        + offset
    )


KEYS = [
    key
    for key in normalizers()
    if getattr(built(key), "track_running_stats", False) and not built(key).unsupported.window
]
CASES = [(key, {}) for key in KEYS] + [("bn", {"momentum": None}), ("dbn", {"average": "var"}), ("dbn", {"power": 2.0})]


def stored(layer):
    return {name: t.clone() for name, t in layer.state_dict().items() if not isinstance(t, nn.Parameter)}


def every_normalizer(rank):
    """Return, for each case, the statistics after two steps; and how many collectives a step of all layers makes."""
    layers = nn.ModuleList([built(key, **arguments) for key, arguments in CASES])
    alone = copy.deepcopy(layers)
    for layer in layers:
        layer.sync = "running"
    for layer in alone:
        layer.sync = False
        open_window(layer)
    counts = []
    for step in range(2):
        for number in (2 * step, 2 * step + 1):
            x = batches(1e4)[number].split(SHARES[number])[rank]
            for one, other in zip(layers, alone, strict=True):
                torch.manual_seed(number)
                with Collectives() as collectives:
                    y = one(x.requires_grad_())
                    if len(x):
                        y.square().sum().backward()
                assert collectives.count == 0
                torch.manual_seed(number)
                # the running ones, by which dbn normalizes, are those of all ranks
                for name in one.running_names:
                    other.get_buffer(name).copy_(one.get_buffer(name))
                for name in one.extra_buffers.counters:
                    other.get_buffer(name).copy_(one.get_buffer(name))
                torch.testing.assert_close(y, other(x), rtol=0, atol=0)
        with Collectives() as collectives:
            pool_statistics(layers)
        counts.append(collectives.count)
        for other in alone:
            close_window(other)
    return [stored(layer) for layer in layers], counts


def other_ways(rank):
    """Return what is not about one normalizer alone: how rank ``rank`` fares in networks, groups, graphs, mistakes."""
    return {**a_network(rank), **alone(rank), **as_one_graph(rank), **other_layers(rank)}


def images(seed, n=4, channels=3):
    return torch.randn(n, channels, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=F64)


def a_network(rank):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.ReLU(inplace=True), nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
    ).double()
    swap(net, "sn", sync="running")
    run, optimizer, evaluations = DistributedDataParallel(net), torch.optim.SGD(net.parameters(), 0.1), []
    for number in range(3):
        run(images(10 * number + rank)).square().sum().backward()
        if number:
            evaluations.append(net.eval()(images(99)).detach())
        net.train()
        optimizer.step()
        optimizer.zero_grad()
        pool_statistics(net)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    recalibrate(net, [images(rank)])
    return {"state": state, "evaluations": evaluations, "recalibrated": net[1].running_mean.clone()}


def alone(rank):
    forgotten, small = built("bn"), built("bn")
    forgotten.sync = small.sync = "running"
    forgotten(images(0, channels=C))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        forgotten.eval()(images(0, channels=C))
    small.sync_group = 1  # meets nobody, and moves with each batch
    small(images(0, channels=C))
    warned = [str(w.message) for w in told if w.category is SyncWarning]
    return {"warned": warned, "by itself": (small._accumulator is None, int(small.num_batches_tracked))}


def as_one_graph(rank):
    net = nn.Sequential(built("bn"))
    net[0].sync = "running"
    run, refused = torch.compile(net, backend="eager", fullgraph=True), ""
    try:
        run(images(rank, channels=C))
    except Exception as error:  # torch wraps what is raised while it traces
        refused = str(error)
    torch._dynamo.reset()
    pool_statistics(net)
    run(images(rank, channels=C))
    pool_statistics(net)
    return {"refused": refused, "compiled": stored(net[0])}


def other_layers(rank):
    layer = built("bn")
    layer.sync, layer._place = "running", f"layer{rank}"
    try:
        pool_statistics(layer)
    except SyncError as error:
        return {"different": str(error)}
    return {}


class First(Uneven):
    """A normalizer first of all, whose statistics depend on the images alone; the middle of a step is saved."""

    def __init__(self):
        super().__init__()
        self.first, self.inputs, self.values = nn.BatchNorm2d(3).double(), [], []

    def features(self, x):
        return super().features(self.first(x))

    def training_step(self, batch, batch_idx):
        self.inputs.append(batch[0])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.values.append(self(images(99)).detach())


class Save(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            trainer.save_checkpoint(self.path)


def in_trainers(rank, folder):
    got, path = {}, f"{folder}/middle.ckpt"
    options = {"max_epochs": 1, "accumulate_grad_batches": 2, "default_root_dir": folder}
    for name, resumed in (("whole", None), ("resumed", path)):
        model = First()
        model.train_dataloader = lambda: batches_of(rank, WORLD, (4, 2))
        model.val_dataloader = lambda: [0]
        # the steps end behind batches 1 and 3
        run = trainer_inside(
            rank,
            WORLD,
            callbacks=[NormSwap("bn", sync="running"), *([] if resumed else [Save(path)])],
            val_check_interval=3,
            **options,
        )
        run.fit(model, ckpt_path=resumed)
        state = {n: t.clone() for n, t in model.state_dict().items()}
        got[name] = {"state": state, "inputs": model.inputs, "values": model.values, "left": model.first._accumulator}
    return got


def everything(rank, folder):
    return every_normalizer(rank), other_ways(rank), in_trainers(rank, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the functions above returns, rank by rank, from one set of processes."""
    return [*zip(*run_ranks(everything, WORLD, str(tmp_path_factory.mktemp("ranks"))), strict=True)]


class TestAgainstOneProcess:
    def test_every_normalizer_uneven_and_empty_ranks_and_accumulation(self, ranks):
        (first, counts), (second, _) = ranks[0]
        # in the first step ranks compare their layers and find the shift
        assert counts == [3, 1]
        for (key, arguments), a, b in zip(CASES, first, second, strict=True):
            one = built(key, **arguments)
            open_window(one)
            for number, x in enumerate(batches(1e4)):
                torch.manual_seed(number)
                one(x)
                if number % 2:
                    close_window(one)
            for name, expected in stored(one).items():
                assert torch.allclose(a[name].double(), expected.double(), rtol=1e-10, atol=1e-10), (key, name)
                assert torch.equal(a[name], b[name]), (key, name)

    def test_everything_else(self, ranks):
        first, second = ranks[1]
        assert first["state"].keys() == second["state"].keys()
        for name, value in first["state"].items():
            assert torch.equal(value, second["state"][name]), name
        assert int(first["state"]["1.num_batches_tracked"]) == 3
        for a, b in zip(first["evaluations"], second["evaluations"], strict=True):
            assert torch.equal(a, b)
        assert torch.equal(first["recalibrated"], second["recalibrated"])
        assert "pool_statistics(model) on every rank after each optimizer step" in first["warned"][0]
        assert first["by itself"] == (True, 1)
        assert "pool_statistics(model) once before the first step" in first["refused"]
        assert (
            "different layers" in first["different"] == second["different"] or "different layers" in first["different"]
        )
        one = built("bn")
        one(torch.cat([images(rank, channels=C) for rank in range(WORLD)]))
        for name, value in stored(one).items():
            torch.testing.assert_close(first["compiled"][name], value, rtol=1e-10, atol=1e-10)


def test_trainers_of_two_ranks(ranks):
    """Gradient accumulation, validation in the middle of a step, and a run that is resumed there."""
    first, second = ranks[2]
    for name in ("whole", "resumed"):
        for key, value in first[name]["state"].items():
            assert torch.equal(value, second[name]["state"][key]), (name, key)
        assert all(torch.equal(a, b) for a, b in zip(first[name]["values"], second[name]["values"], strict=True))
        assert first[name]["left"] is None
    assert first["whole"]["values"]
    before = [torch.cat([a, b]) for a, b in zip(first["whole"]["inputs"], second["whole"]["inputs"], strict=True)]
    after = [torch.cat([a, b]) for a, b in zip(first["resumed"]["inputs"], second["resumed"]["inputs"], strict=True)]
    for name, seen in (("whole", before), ("resumed", [*before[:3], *after])):
        one = create("bn", 3, dtype=F64)
        for i in range(0, len(seen), 2):
            one(torch.cat(seen[i : i + 2]))
        assert int(first[name]["state"]["first.num_batches_tracked"]) == int(one.num_batches_tracked) == 2
        for key in one.running_names:
            torch.testing.assert_close(first[name]["state"][f"first.{key}"], getattr(one, key), rtol=1e-10, atol=1e-10)


class TestInOneProcess:
    def test_statistics_move_with_each_batch(self):
        layers = [built("dbn"), built("dbn")]
        layers[0].sync = "running"
        for x in batches():
            assert torch.equal(*(layer(x) for layer in layers))
        pool_statistics(layers[0])
        assert all(torch.equal(a, stored(layers[1])[name]) for name, a in stored(layers[0]).items())

    def test_report_manifest_and_plan_know_it(self, tmp_path):
        def net():
            return nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C))

        model, again = net(), net()
        report = swap(model, "sn", sync="running")
        assert report.layers[0].sync == "running"
        assert "sync: of the running statistics alone, once per optimizer step" in report.summary()
        assert str(report).splitlines()[1].endswith("running")
        rebuild(again, json.loads(json.dumps(manifest_of(model))))
        assert again[1].sync == "running"
        (tmp_path / "plan.yaml").write_text(report.to_yaml())
        assert NormSwap(plan=str(tmp_path / "plan.yaml"), sync="running").options.sync == "running"
        # statistics of each sample have nothing to pool
        assert swap(net(), "in", sync="running").layers[0].sync is False

    def test_what_cannot_be_is_refused(self):
        model = nn.Sequential(nn.BatchNorm2d(C))
        with pytest.raises(ValueError, match=r"sync must be True .* 'running' .* or False, got 'runing'"):
            swap(model, "sn", sync="runing")
        with pytest.raises(ValueError, match=r"0: sync='running': ContextNorm .*missing='posterior'.* Type sync=True"):
            swap(model, "cn", norm_args={"missing": "posterior"}, sync="running")
        assert type(model[0]) is nn.BatchNorm2d

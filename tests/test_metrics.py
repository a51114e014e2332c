"""FeatureCondensation against its definition, over batches, ranks and Lightning's logging."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_norm import FeatureCondensation
from lightning_norm.ops.condensation import condensation
from tests.callbacks.toy import Net, loader, trainer


def definition(x):
    unit = torch.nn.functional.normalize(x.double().flatten(1), dim=1)
    cosines = unit @ unit.T
    return cosines[~torch.eye(len(x), dtype=torch.bool)].mean()


def features(n=11, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(n, 3, 4, 5, generator=generator) + 0.3).to(dtype)


@pytest.mark.parametrize("sizes", [(11,), (4, 4, 3), (1,) * 11])
def test_streamed_equals_whole(sizes):
    x, metric = features(), FeatureCondensation()
    for part in x.split(sizes):
        metric.update(part)
    expected = definition(x)
    assert expected > 0.05
    torch.testing.assert_close(metric.compute().double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(condensation(x).double(), expected, rtol=1e-6, atol=1e-7)
    metric.reset()
    metric.update(x[:2, :1])
    torch.testing.assert_close(metric.compute().double(), definition(x[:2, :1]), rtol=1e-6, atol=1e-7)


def test_forward_is_of_the_batch_and_compute_of_all():
    x, metric = features(), FeatureCondensation()
    for part in x.split(4):
        torch.testing.assert_close(metric(part).double(), definition(part), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(metric.compute().double(), definition(x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_is_summed_in_float32(dtype):
    x, metric = features(dtype=dtype), FeatureCondensation()
    for part in x.split(4):
        metric.update(part.to(memory_format=torch.channels_last))
    tolerance = 1e-12 if dtype is torch.float64 else 1e-6
    torch.testing.assert_close(metric.compute().double(), definition(x), rtol=tolerance, atol=tolerance)


def test_samples_that_are_zero_do_not_count():
    metric = FeatureCondensation()
    metric.update(torch.cat([features(), torch.zeros(5, 3, 4, 5)]))
    assert metric.count == 11
    torch.testing.assert_close(metric.compute().double(), definition(features()), rtol=1e-6, atol=1e-7)
    metric.reset()
    metric.update(features()[:1])
    assert metric.compute().isnan()


def test_it_keeps_no_graph_and_copies():
    metric = FeatureCondensation()
    metric.update(features().requires_grad_())
    assert not metric.total.requires_grad
    assert copy.deepcopy(metric).compute() == metric.compute()


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ([1.0], TypeError, "floating point numbers, got list"),
        (torch.ones(3, 2, dtype=torch.long), TypeError, "got torch.int64"),
        (torch.ones(3), ValueError, r"takes \(N, \*\), one vector per sample, got \(3,\)"),
        (torch.ones(2, 4), ValueError, r"samples of shape \(4,\) after some of \(3, 4, 5\).*reset"),
    ],
)
def test_what_it_does_not_take(x, error, words):
    metric = FeatureCondensation()
    metric.update(features())
    with pytest.raises(error, match=words):
        metric.update(x)


class Measured(Net):
    def __init__(self):
        super().__init__()
        self.condensation, self.seen = FeatureCondensation(), []

    def training_step(self, batch, batch_idx):
        self.seen.append(self.net[0](batch[0]).detach())
        self.condensation(self.seen[-1])
        self.log("condensation", self.condensation, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_lightning_logs_it_by_step_and_epoch(tmp_path):
    model = Measured()
    logger = CSVLogger(tmp_path)
    run = trainer(logger=logger)
    run.fit(model, loader())
    first, second = model.seen
    got = run.callback_metrics
    torch.testing.assert_close(got["condensation_step"].double(), definition(second), rtol=1e-5, atol=1e-6)
    whole = definition(torch.cat([first, second]))
    torch.testing.assert_close(got["condensation_epoch"].double(), whole, rtol=1e-5, atol=1e-6)


RANK = """
import sys, torch, torch.distributed as dist
from lightning_norm import FeatureCondensation
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
x = torch.load(file + ".pt")
metric = FeatureCondensation()
for part in (x[:7] if rank == 0 else x[7:]).split(3):
    metric.update(part)
print(metric.compute().item())
dist.destroy_process_group()
"""


def test_two_uneven_ranks_equal_one(tmp_path):
    file = tmp_path / "meeting"
    torch.save(features(), f"{file}.pt")
    command = [sys.executable, "-W", "ignore", "-c", RANK]
    root = Path(__file__).parents[1]
    ranks = [
        subprocess.Popen([*command, str(r), str(file)], cwd=root, stdout=subprocess.PIPE, text=True) for r in (0, 1)
    ]
    got = [float(rank.communicate()[0]) for rank in ranks]
    assert got[0] == got[1] == pytest.approx(definition(features()).item(), rel=1e-6)

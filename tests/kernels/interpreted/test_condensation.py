"""ubn with a threshold on the kernels: the measure, the decision, and the gradient of a condensed batch."""

import copy

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

import lightning_norm
from lightning_norm.ops import condensation
from lightning_norm.testing.kit import features, noise
from tests.kernels.interpreted.test_layers import compare, count_launches
from tests.kernels.interpreted.test_per_channel import pair, same_buffers

SLOW = pytest.mark.slow


def test_condensation_reads_x_once_more(monkeypatch):
    ours, _ = pair("ubn", {"threshold": 0.5, "condensed_grad": "renorm"})
    launched = count_launches(monkeypatch)
    x = features(4, 6, 5, 3).requires_grad_()
    y = ours(x)
    assert launched == ["moments_rows", "survey", "directions", "channels_of", "apply_flat"]
    launched.clear()
    torch.autograd.grad(y, [x, *ours.parameters()], noise(4, 6, 5, 3, seed=7))
    assert launched == ["sums_rows", "channels_vjp", "combine_flat"]


@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels last"])
def test_condensation(last):
    """Samples of zeros do not count, and a sample longer than one program's block is summed over programs."""
    x = features(5, 8, 12, 9) * torch.tensor([1, 2, 0, -1, 3.0]).view(5, 1, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    layer = lightning_norm.create("ubn", 8, threshold=1.0, min_updates=0)
    layer.backend = "triton"
    layer(x)
    torch.testing.assert_close(layer.condensation.double(), condensation.condensation(x.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0, pytest.param(30.0, marks=SLOW)], ids=["near", "off", "beyond the limits"])
@pytest.mark.parametrize("shape", [(4, 6, 5, 3), pytest.param((3, 6, 96, 4), marks=SLOW)], ids=["rows", "parts, last"])
def test_renorm(offset, shape):
    """Statistics of the batch for the gradient, running ones within limits for the value."""
    arguments = {"threshold": -0.9, "min_updates": 0, "condensed_grad": "renorm"}
    ours, exact = pair("ubn", arguments, offset=offset)
    layout = torch.contiguous_format if len(set(shape)) == 4 and shape[2] == 5 else torch.channels_last
    for i in range(2):
        x = (features(*shape) * (1 + 20 * i)).contiguous(memory_format=layout)
        compare(ours, exact, x, noise(*shape, seed=7 + i).contiguous(memory_format=layout), 4e-6)
        same_buffers(ours, exact)
    assert exact.skipped == 2


def test_a_run_of_condensed_batches():
    """Warm-up, condensed, and one in three used: counters and statistics follow, though many programs read them."""
    arguments = {"threshold": -0.9, "min_updates": 2, "max_skip": 2, "momentum": None}
    ours, exact = pair("ubn", arguments, channels=20)
    counts = []
    for i in range(6):
        x = (features(4, 20, 2, 2) + 0.1 * i).contiguous(memory_format=torch.channels_last)
        compare(ours, exact, x, noise(4, 20, 2, 2, seed=7), 4e-6)
        same_buffers(ours, exact)
        counts.append(int(ours.num_batches_tracked))
    assert counts == [1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("how", ["detach", "renorm"])
def test_nan(how):
    """A similarity of NaN is undefined: the batch is normalized by itself, and moves nothing but what counts it."""
    ours, exact = pair("ubn", {"threshold": -0.9, "min_updates": 0, "condensed_grad": how})
    x = features(4, 6, 5, 3)
    for layer, batch in ((ours, x), (exact, x.double())):
        layer(batch)
    before = copy.deepcopy(ours)
    x[1, 2, 3, 1] = float("nan")
    got, want = ours(x), exact(x.double())
    assert torch.equal(got.isnan(), want.isnan())
    assert got.isnan().any()
    assert not got.isnan().all()
    same_buffers(ours, exact)
    assert ours.skipped_updates == before.skipped_updates + 1
    assert torch.equal(ours.running_mean, before.running_mean)


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("ubn", {"threshold": -0.9, "min_updates": 1}),
        ("cn", {"context": "gate", "prior_scale": True, "momentum": None}),
    ],
)
def test_programs_may_run_in_any_order(key, arguments, monkeypatch):
    """No program reads what another one of its launch writes: the last first, every number is the same."""
    layers = [pair(key, arguments, channels=20)[0] for _ in range(2)]
    real, runs = InterpreterBuilder.set_grid_idx, []
    for layer in layers:
        for i in range(2):
            x = (features(4, 20, 2, 2) + 0.1 * i).contiguous(memory_format=torch.channels_last).requires_grad_()
            runs.append(torch.autograd.grad(layer(x), [x, *layer.parameters()], noise(4, 20, 2, 2, seed=7)))
        runs.append(tuple(layer.buffers()))
        monkeypatch.setattr(
            InterpreterBuilder, "set_grid_idx", lambda self, x, y, z: real(self, self.grid_dim[0] - 1 - x, y, z)
        )
    for a, b in zip(runs[:3], runs[3:], strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))

"""What is off until a GPU has shown it: one launch per direction. Values against those of what is on, over and over."""

import copy

import pytest

from lightning_norm.kernels import grid, launcher
from tests.gpu import test_runtime
from tests.gpu.layers import close, equal, inputs, layer_of, results

SWITCHES = {"OWNER": ("bn", "in", "rbn", "dbn"), "COOPERATIVE": ("sn", "bcn", "gn", "ln", "bn")}
CASES = [(switch, key) for switch, keys in SWITCHES.items() for key in keys]


@pytest.fixture
def switch_on(monkeypatch):
    """Turns a switch on; it is read where launches are recorded."""

    def turn_on(switch):
        monkeypatch.setattr(grid, switch, True)
        monkeypatch.setattr(launcher, "_plans", {})

    return turn_on


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("switch", "key"), CASES)
def test_the_same_in_every_run(switch, key, form, device, switch_on):
    """A program that does not wait, or waits for too few, would show in one run or another."""
    layer = layer_of(key, {"num_groups": 3} if key == "gn" else {}, device, form)
    shape = (32, 24, 28, 28) if device == "cuda" else (2, 24, 7, 7)
    x, dy, residual = inputs(device, form, shape=shape)
    want = results(copy.deepcopy(layer), x, dy, activation="relu", residual=residual)
    switch_on(switch)
    first = results(copy.deepcopy(layer), x, dy, activation="relu", residual=residual)
    close(first, want, 1e-5)
    for _ in range(200 if device == "cuda" else 1):
        equal(results(copy.deepcopy(layer), x, dy, activation="relu", residual=residual), first)


@pytest.mark.parametrize(("switch", "key"), CASES)
def test_graphs_and_streams(switch, key, cuda, switch_on):
    """A graph's counters are its own, and each stream's."""
    switch_on(switch)
    arguments = {"num_groups": 3} if key == "gn" else {}
    test_runtime.test_a_training_step_in_a_cuda_graph(key, arguments, "contiguous", cuda, None)
    test_runtime.test_side_stream(key, arguments, cuda, None)
